//! A drawing as PNG, twice as large in both directions, in the colours of one theme. Letters come from a bitmap font that
//! is part of the program, so that the picture is the same on every machine, and one without fonts makes it, too.

use noto_sans_mono_bitmap::{FontWeight, RasterHeight, RasterizedChar, get_raster, get_raster_width};
use tiny_skia::{Color, FillRule, Paint, Path, PathBuilder, Pixmap, Rect, Stroke, Transform};

use crate::canvas::{Anchor, CURVE_WIDTH, Palette, Place, Plot, Shape, WIDTH, colour};

/// Pixels for each unit of a drawing.
const SCALE: f64 = 2.0;
/// No drawing of ours is higher, in its own units.
const MAX_HEIGHT: f64 = 10_000.0;
const FONT: (FontWeight, RasterHeight) = (FontWeight::Regular, RasterHeight::Size32);

/// Why there is no PNG.
#[derive(Debug, thiserror::Error)]
pub enum PngError {
    /// It would take too much memory.
    #[error(
        "a plot of {WIDTH} × {0} is not drawn as PNG: it would be higher than {MAX_HEIGHT}; its SVG is complete"
    )]
    Height(f64),
    /// The encoder refuses.
    #[error("cannot encode a plot as PNG: {0}")]
    Encode(String),
}

/// The drawing in these colours, as the bytes of a file.
///
/// # Errors
/// When it is higher than any drawing of ours.
pub fn png(plot: &Plot, palette: &Palette) -> Result<Vec<u8>, PngError> {
    let too_high = PngError::Height(plot.height);
    if !(1.0..=MAX_HEIGHT).contains(&plot.height) {
        return Err(too_high);
    }
    let size = |units: f64| (units * SCALE).round() as u32;
    let pixmap = Pixmap::new(size(WIDTH), size(plot.height)).ok_or(too_high)?;
    let mut canvas = Canvas { pixmap, palette };
    canvas.pixmap.fill(canvas.ink(0, 1.0));
    for shape in plot.shapes() {
        canvas.draw(shape);
    }
    canvas
        .pixmap
        .encode_png()
        .map_err(|e| PngError::Encode(e.to_string()))
}

struct Canvas<'a> {
    pixmap: Pixmap,
    palette: &'a Palette,
}

impl Canvas<'_> {
    fn rgb(&self, place: usize) -> [u8; 3] {
        let [_, r, g, b] = self.palette[place].to_be_bytes();
        [r, g, b]
    }

    fn ink(&self, place: usize, share: f64) -> Color {
        let [r, g, b] = self.rgb(place);
        Color::from_rgba8(r, g, b, (share * 255.0).round() as u8)
    }

    fn paint(&self, (place, share): (usize, f64)) -> Paint<'static> {
        let mut paint = Paint::default();
        paint.set_color(self.ink(place, share));
        paint
    }

    /// What has no extent, or one that is no number, is not drawn: the SVG shows nothing then either.
    fn draw(&mut self, shape: &Shape) {
        match shape {
            Shape::Text {
                at,
                anchor,
                ink,
                text,
            } => self.text(*at, *anchor, ink.colour(), text),
            Shape::Bar {
                at: (x, y),
                size: (width, height),
                thing,
            } => {
                let rect = Rect::from_xywh(*x as f32, *y as f32, *width as f32, *height as f32);
                self.fill(rect.map(PathBuilder::from_rect), colour(*thing));
            }
            Shape::Dot {
                at: (x, y),
                radius,
                thing,
            } => self.fill(
                PathBuilder::from_circle(*x as f32, *y as f32, *radius as f32),
                colour(*thing),
            ),
            Shape::Line { from, to, ink } => self.stroke(&[*from, *to], ink.width(), ink.colour()),
            Shape::Curve { points, thing } => self.stroke(points, CURVE_WIDTH, colour(*thing).0),
        }
    }

    fn fill(&mut self, path: Option<Path>, colour: (usize, f64)) {
        if let Some(path) = path {
            let paint = self.paint(colour);
            let scale = Transform::from_scale(SCALE as f32, SCALE as f32);
            self.pixmap
                .fill_path(&path, &paint, FillRule::Winding, scale, None);
        }
    }

    fn stroke(&mut self, points: &[Place], width: f64, place: usize) {
        let mut path = PathBuilder::new();
        for (i, &(x, y)) in points.iter().enumerate() {
            match i {
                0 => path.move_to(x as f32, y as f32),
                _ => path.line_to(x as f32, y as f32),
            }
        }
        if let Some(path) = path.finish() {
            let stroke = Stroke {
                width: width as f32,
                ..Stroke::default()
            };
            let scale = Transform::from_scale(SCALE as f32, SCALE as f32);
            let paint = self.paint((place, 1.0));
            self.pixmap.stroke_path(&path, &paint, &stroke, scale, None);
        }
    }

    fn text(&mut self, (x, y): Place, anchor: Anchor, place: usize, text: &str) {
        let letter = get_raster_width(FONT.0, FONT.1) as i64;
        let width = letter * text.chars().count() as i64;
        // Far out of the drawing is out of it.
        let pixel = |units: f64| (units * SCALE).round().clamp(-1e6, 1e6) as i64;
        let left = pixel(x)
            - match anchor {
                Anchor::Start => 0,
                Anchor::Middle => width / 2,
                Anchor::End => width,
            };
        let top = pixel(y) - base_line();
        for (i, c) in text.chars().enumerate() {
            self.letter((left + i as i64 * letter, top), place, &raster(c));
        }
    }

    /// A letter, as far as it is inside of the drawing.
    fn letter(&mut self, (left, top): (i64, i64), place: usize, letter: &RasterizedChar) {
        let ink = self.rgb(place);
        let (width, height) = (i64::from(self.pixmap.width()), i64::from(self.pixmap.height()));
        let data = self.pixmap.data_mut();
        for (y, row) in (top..).zip(letter.rows()) {
            for (x, &share) in (left..).zip(row) {
                if share == 0 || !(0..width).contains(&x) || !(0..height).contains(&y) {
                    continue;
                }
                let at = ((y * width + x) * 4) as usize;
                // The background covers all: there is nothing to see through.
                for (old, new) in data[at..at + 3].iter_mut().zip(ink) {
                    let (old_part, new_part) = (255 - u32::from(share), u32::from(share));
                    *old = ((u32::from(*old) * old_part + u32::from(new) * new_part + 127) / 255) as u8;
                }
            }
        }
    }
}

/// A letter of the font, or the sign for one that it lacks.
fn raster(c: char) -> RasterizedChar {
    let c = match c {
        '\u{2010}'..='\u{2015}' | '\u{2212}' => '-',
        '\u{2018}' | '\u{2019}' => '\'',
        '\u{3bc}' => 'µ',
        c => c,
    };
    let raster = |c| get_raster(c, FONT.0, FONT.1);
    raster(c)
        .or_else(|| raster('\u{fffd}'))
        .expect("the sign for a letter that is lacking is part of the font")
}

/// Rows above the base line, on which capital letters stand.
fn base_line() -> i64 {
    let stands = raster('H').rows().rposition(|row| row.iter().any(|&p| p > 127));
    stands.map_or(0, |row| row as i64 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::canvas::{DARK, Ink, LETTER, LIGHT};

    fn painted(plot: &Plot, palette: &Palette) -> Pixmap {
        Pixmap::decode_png(&png(plot, palette).unwrap()).unwrap()
    }

    /// The colour at a place of the drawing.
    fn at(pixmap: &Pixmap, (x, y): Place) -> u32 {
        let p = pixmap
            .pixel((x * SCALE) as u32, (y * SCALE) as u32)
            .unwrap()
            .demultiply();
        u32::from_be_bytes([0, p.red(), p.green(), p.blue()])
    }

    fn inked(pixmap: &Pixmap, background: u32, from: Place, to: Place) -> usize {
        let (mut n, mut y) = (0, from.1);
        while y < to.1 {
            let mut x = from.0;
            while x < to.0 {
                n += usize::from(at(pixmap, (x, y)) != background);
                x += 1.0 / SCALE;
            }
            y += 1.0 / SCALE;
        }
        n
    }

    #[test]
    fn shapes_are_where_they_belong_in_the_colours_of_the_theme() {
        let mut plot = Plot::new("t", 100.0);
        plot.bar((10.0, 10.0), (50.0, 20.0), 1);
        plot.bar((10.0, 40.0), (50.0, 20.0), 9);
        plot.dot((100.0, 20.0), 5.0, 2);
        plot.line((150.0, 10.0), (150.0, 30.0), Ink::Whisker);
        plot.curve(vec![(200.0, 20.0), (250.0, 20.0), (250.0, 80.0)], 3);
        for palette in [&LIGHT, &DARK] {
            let pixmap = painted(&plot, palette);
            assert_eq!((pixmap.width(), pixmap.height()), (1520, 200));
            for (place, colour) in [
                ((0.0, 0.0), 0),
                ((759.0, 99.0), 0),
                ((30.0, 20.0), 5),
                ((100.0, 20.0), 6),
                ((150.0, 20.0), 1),
                ((225.0, 20.0), 7),
                ((250.0, 50.0), 7),
            ] {
                assert_eq!(at(&pixmap, place), palette[colour], "{place:?}");
            }
            // Half of the colour, half of the background.
            let pale = at(&pixmap, (30.0, 50.0));
            assert!(pale != palette[0] && pale != palette[5], "{pale:x}");
        }
    }

    #[test]
    fn text_stands_on_its_line_at_its_anchor() {
        let width = 5.0 * get_raster_width(FONT.0, FONT.1) as f64 / SCALE;
        assert!(width <= 5.0 * LETTER, "plots leave that much room");
        for (anchor, left) in [
            (Anchor::Start, 300.0),
            (Anchor::Middle, 300.0 - width / 2.0),
            (Anchor::End, 300.0 - width),
        ] {
            let mut plot = Plot::new("t", 60.0);
            plot.text((300.0, 40.0), anchor, Ink::Plain, "HHHHH");
            let pixmap = painted(&plot, &LIGHT);
            let inside = inked(&pixmap, LIGHT[0], (left - 0.5, 28.0), (left + width + 0.5, 40.5));
            let all = inked(&pixmap, LIGHT[0], (0.0, 0.0), (WIDTH, 60.0));
            assert!(inside > 100 && inside == all, "{left}: {inside} of {all}");
        }
    }

    #[test]
    fn letters_of_all_sorts_and_places_are_drawn_as_far_as_they_can_be() {
        for c in "AÄµ×÷–−’%(…漢\u{0}".chars() {
            assert!(raster(c).pixels().iter().any(|&p| p > 127), "{c:?}");
        }
        for odd in [f64::NAN, f64::INFINITY, -1e300, 1e300, -3.0, 759.0] {
            let mut plot = Plot::new("t", 20.0);
            plot.text((odd, odd), Anchor::End, Ink::Plain, "text");
            plot.bar((odd, odd), (odd, odd), 0);
            plot.dot((odd, odd), odd, 0);
            plot.line((odd, odd), (1.0, 1.0), Ink::Grid);
            plot.curve(vec![(odd, odd)], 0);
            plot.curve(vec![], 0);
            painted(&plot, &LIGHT);
        }
        for height in [0.0, -1.0, f64::NAN, 1e9] {
            let told = png(&Plot::new("t", height), &LIGHT).unwrap_err().to_string();
            assert!(told.contains("higher than"), "{told}");
        }
    }
}
