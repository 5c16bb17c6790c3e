//! A drawing of a few sorts of shapes, and the same as SVG by hand: no libraries, and colours that follow the reader's
//! light or dark theme.

use std::fmt::Write;

/// Width of all drawings.
pub const WIDTH: f64 = 760.0;

/// Width of a letter of the drawings' font, if it is a wide one.
pub const LETTER: f64 = 7.2;

/// Colours of things that are told apart by them.
const COLOURS: usize = 8;

/// Colours as 0xRRGGBB: background, text, dim text, grid, and those of things.
pub type Palette = [u32; 4 + COLOURS];

const NAMES: [&str; 4 + COLOURS] = [
    "bg", "fg", "dim", "grid", "c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7",
];

/// The light theme.
pub const LIGHT: Palette = [
    0xffffff, 0x1c1c1e, 0x5c5f66, 0xd9dbe0, 0x0068a8, 0xd1510a, 0x00805c, 0xa84a86, 0x96700a, 0x4a8fd0,
    0x7a4fc0, 0x70757d,
];

/// The dark theme.
pub const DARK: Palette = [
    0x16181c, 0xeceef2, 0xa6acb8, 0x363b44, 0x5cb3f0, 0xff9a55, 0x3ecfa4, 0xee9ccb, 0xe5c04d, 0x9cc9f8,
    0xbda0fa, 0xa0a6b0,
];

/// What text and lines are drawn with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Ink {
    /// Text.
    Plain,
    /// Text of less weight.
    Dim,
    /// Text on a bar.
    OnBar,
    /// Lines of a grid.
    Grid,
    /// Lines of an interval.
    Whisker,
}

impl Ink {
    fn class(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Dim => "dim",
            Self::OnBar => "on",
            Self::Grid => "grid",
            Self::Whisker => "whisker",
        }
    }

    /// Its place in a [`Palette`].
    pub fn colour(self) -> usize {
        match self {
            Self::OnBar => 0,
            Self::Plain | Self::Whisker => 1,
            Self::Dim => 2,
            Self::Grid => 3,
        }
    }

    /// How wide its lines are.
    pub fn width(self) -> f64 {
        match self {
            Self::Whisker => 1.5,
            _ => 1.0,
        }
    }
}

/// How wide curves are.
pub const CURVE_WIDTH: f64 = 2.0;

/// The colour of the thing of this number: its place in a [`Palette`], and how much it covers. When all are used up they
/// come once more, paler.
pub fn colour(thing: usize) -> (usize, f64) {
    let paler = thing / COLOURS % 2 == 1;
    (4 + thing % COLOURS, if paler { 0.5 } else { 1.0 })
}

/// Has the thing of this number a colour that [`Ink::OnBar`] can be read on?
pub fn is_full(thing: usize) -> bool {
    colour(thing).1 == 1.0
}

/// What stands at its place: its left end, its middle, its right end.
#[derive(Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Anchor {
    Start,
    Middle,
    End,
}

/// A place, from the upper left corner: right, down.
pub type Place = (f64, f64);

/// Something drawn.
pub enum Shape {
    /// Text on a base line.
    Text {
        /// Where.
        at: Place,
        /// Which of its ends is there.
        anchor: Anchor,
        /// With what.
        ink: Ink,
        /// Itself.
        text: String,
    },
    /// A rectangle.
    Bar {
        /// Its upper left corner.
        at: Place,
        /// Width and height.
        size: (f64, f64),
        /// The number of the thing that it is of.
        thing: usize,
    },
    /// A disk.
    Dot {
        /// Its middle.
        at: Place,
        /// Its radius.
        radius: f64,
        /// The number of the thing that it is of.
        thing: usize,
    },
    /// A straight line.
    Line {
        /// One end.
        from: Place,
        /// The other.
        to: Place,
        /// With what.
        ink: Ink,
    },
    /// A line through points.
    Curve {
        /// These.
        points: Vec<Place>,
        /// The number of the thing that it is of.
        thing: usize,
    },
}

/// Style of all drawings, with both themes; it stands in every SVG file, and once in the page.
pub fn style() -> String {
    let colours = |palette: &Palette| {
        let all = NAMES.iter().zip(palette);
        all.map(|(name, rgb)| format!("--{name}:#{rgb:06x}"))
            .collect::<Vec<_>>()
            .join(";")
    };
    format!(
        ":root,svg{{{}}}\n@media(prefers-color-scheme:dark){{:root,svg{{{}}}}}\n\
        svg{{background:var(--bg);font:13px system-ui,sans-serif}}\n\
        svg text{{fill:var(--fg)}}\n\
        svg .dim{{fill:var(--dim)}}\n\
        svg .on{{fill:var(--bg);font-weight:600}}\n\
        svg .grid{{stroke:var(--grid);stroke-width:{}}}\n\
        svg .line{{fill:none;stroke-width:{CURVE_WIDTH}}}\n\
        svg .whisker{{stroke:var(--fg);stroke-width:{}}}\n",
        colours(&LIGHT),
        colours(&DARK),
        Ink::Grid.width(),
        Ink::Whisker.width()
    )
}

/// Text made safe for XML and HTML.
pub fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c if c.is_control() && c != '\n' => safe.push('\u{fffd}'),
            c => safe.push(c),
        }
    }
    safe
}

fn fill(thing: usize) -> String {
    let (place, share) = colour(thing);
    match share < 1.0 {
        true => format!("fill:var(--{});fill-opacity:{share}", NAMES[place]),
        false => format!("fill:var(--{})", NAMES[place]),
    }
}

impl Shape {
    fn svg(&self) -> String {
        match self {
            Self::Text {
                at: (x, y),
                anchor,
                ink,
                text,
            } => {
                let anchor = match anchor {
                    Anchor::Start => "start",
                    Anchor::Middle => "middle",
                    Anchor::End => "end",
                };
                let (class, text) = (ink.class(), escape(text));
                format!(
                    "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" class=\"{class}\">{text}</text>\n"
                )
            }
            Self::Bar {
                at: (x, y),
                size: (width, height),
                thing,
            } => format!(
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" style=\"{}\"/>\n",
                fill(*thing)
            ),
            Self::Dot {
                at: (x, y),
                radius,
                thing,
            } => format!(
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\" style=\"{}\"/>\n",
                fill(*thing)
            ),
            Self::Line {
                from: (x1, y1),
                to: (x2, y2),
                ink,
            } => format!(
                "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" class=\"{}\"/>\n",
                ink.class()
            ),
            Self::Curve { points, thing } => {
                let mut path = String::new();
                for (i, (x, y)) in points.iter().enumerate() {
                    let command = if i == 0 { 'M' } else { 'L' };
                    write!(path, "{command}{x:.1} {y:.1}").expect("a String takes all text");
                }
                let name = NAMES[colour(*thing).0];
                format!("<path d=\"{path}\" class=\"line\" style=\"stroke:var(--{name})\"/>\n")
            }
        }
    }
}

/// A drawing with a title for those who cannot see it.
pub struct Plot {
    title: String,
    /// How high it is.
    pub height: f64,
    shapes: Vec<Shape>,
}

impl Plot {
    /// An empty one.
    pub fn new(title: &str, height: f64) -> Self {
        Self {
            title: title.into(),
            height,
            shapes: Vec::new(),
        }
    }

    /// What is drawn, in order.
    pub fn shapes(&self) -> &[Shape] {
        &self.shapes
    }

    /// Adds text.
    pub fn text(&mut self, at: Place, anchor: Anchor, ink: Ink, text: &str) {
        self.shapes.push(Shape::Text {
            at,
            anchor,
            ink,
            text: text.into(),
        });
    }

    /// Adds a rectangle.
    pub fn bar(&mut self, at: Place, size: (f64, f64), thing: usize) {
        self.shapes.push(Shape::Bar { at, size, thing });
    }

    /// Adds a disk.
    pub fn dot(&mut self, at: Place, radius: f64, thing: usize) {
        self.shapes.push(Shape::Dot { at, radius, thing });
    }

    /// Adds a straight line.
    pub fn line(&mut self, from: Place, to: Place, ink: Ink) {
        self.shapes.push(Shape::Line { from, to, ink });
    }

    /// Adds a line through points.
    pub fn curve(&mut self, points: Vec<Place>, thing: usize) {
        self.shapes.push(Shape::Curve { points, thing });
    }

    fn svg(&self, inside: &str) -> String {
        let (title, height) = (escape(&self.title), self.height);
        let body: String = self.shapes.iter().map(Shape::svg).collect();
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" width=\"{WIDTH}\" \
             height=\"{height:.0}\" role=\"img\">\n<title>{title}</title>\n{inside}{body}</svg>\n"
        )
    }

    /// The same with its title above.
    pub fn figure(&self) -> String {
        format!(
            "<figure><figcaption>{}</figcaption>\n{}</figure>\n",
            escape(&self.title),
            self.inline()
        )
    }

    /// For a page that holds [`style`].
    pub fn inline(&self) -> String {
        self.svg("")
    }

    /// For a file of its own.
    pub fn file(&self) -> String {
        self.svg(&format!(
            "<style>{}</style>\n<rect width=\"100%\" height=\"100%\" style=\"fill:var(--bg)\"/>\n",
            style()
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_leave_its_element() {
        assert_eq!(
            escape("<a b=\"c\">&'\u{1}"),
            "&lt;a b=&quot;c&quot;&gt;&amp;&#39;\u{fffd}"
        );
        let mut plot = Plot::new("<script>", 10.0);
        plot.text((0.0, 0.0), Anchor::Start, Ink::Plain, "</svg>");
        let file = plot.file();
        assert!(!file.contains("<script>") && file.matches("</svg>").count() == 1);
    }

    #[test]
    fn every_colour_that_is_used_has_a_name_in_the_style() {
        let style = style();
        for thing in 0..2 * COLOURS {
            let used = fill(thing);
            let name = used.split(['(', ')']).nth(1).unwrap();
            assert_eq!(style.matches(&format!("{name}:#")).count(), 2, "{used}");
        }
        assert!(fill(0) != fill(COLOURS) && fill(0) == fill(2 * COLOURS));
    }
}
