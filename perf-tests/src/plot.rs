//! The report's plots.

pub use crate::canvas::{Plot, escape};

use crate::canvas::{Anchor, Ink, LETTER, WIDTH, is_full};

/// At most `most` letters.
fn shortened(text: &str, most: usize) -> String {
    match text.chars().count() <= most {
        true => text.to_owned(),
        false => text
            .chars()
            .take(most.saturating_sub(2))
            .chain("..".chars())
            .collect(),
    }
}

/// A figure with three digits that matter.
pub fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// Names with their colours, in rows below `top`, in as many columns as the longest leaves room for; the plot ends below
/// them.
fn legend(plot: &mut Plot, names: &[String], top: f64) {
    let longest = names.iter().map(|n| n.chars().count()).max().unwrap_or(0);
    let columns = ((WIDTH / (longest as f64 * LETTER + 34.0)) as usize).clamp(1, 3);
    let column = WIDTH / columns as f64;
    let most = ((column - 34.0) / LETTER) as usize;
    for (i, name) in names.iter().enumerate() {
        let (x, y) = (
            8.0 + column * (i % columns) as f64,
            top + 20.0 * (i / columns) as f64,
        );
        plot.bar((x, y), (12.0, 12.0), i);
        plot.text(
            (x + 18.0, y + 11.0),
            Anchor::Start,
            Ink::Plain,
            &shortened(name, most),
        );
    }
    plot.height = top + 20.0 * names.len().div_ceil(columns) as f64 + 8.0;
}

/// From a figure to a place.
struct Axis {
    from: f64,
    to: f64,
    log: bool,
    /// Places of the two ends.
    ends: (f64, f64),
}

impl Axis {
    fn linear(to: f64, ends: (f64, f64)) -> Self {
        Self {
            from: 0.0,
            to: if to > 0.0 { to } else { 1.0 },
            log: false,
            ends,
        }
    }

    /// Both ends are widened a little; what is below a microsecond (in ms) is drawn there. Of no
    /// samples `from` is infinite.
    fn log(from: f64, to: f64, ends: (f64, f64)) -> Self {
        let from = if from.is_finite() {
            (from * 0.9).max(1e-3)
        } else {
            1.0
        };
        Self {
            from,
            to: (to * 1.1).max(from * 2.0),
            log: true,
            ends,
        }
    }

    fn place(&self, value: f64) -> f64 {
        let share = match self.log {
            true => (value.max(self.from) / self.from).ln() / (self.to / self.from).ln(),
            false => (value - self.from) / (self.to - self.from),
        };
        self.ends.0 + share * (self.ends.1 - self.ends.0)
    }

    /// Round figures between the ends, at most a dozen.
    fn ticks(&self) -> Vec<f64> {
        let decade = |value: f64| 10_f64.powf(value.log10().floor());
        if !self.log {
            let rough = self.to / 6.0;
            let unit = decade(rough);
            let step = [1.0, 2.0, 5.0, 10.0]
                .into_iter()
                .find(|s| s * unit >= rough)
                .unwrap_or(10.0)
                * unit;
            let count = (self.to / step + 1e-9) as u32;
            return (0..=count).map(|i| f64::from(i) * step).collect();
        }
        let (first, last) = (self.from.log10().floor() as i32, self.to.log10().ceil() as i32);
        let of = |marks: &[f64]| -> Vec<f64> {
            let all = (first..=last).flat_map(|e| marks.iter().map(move |m| m * 10_f64.powi(e)));
            all.filter(|t| (self.from..=self.to).contains(t)).collect()
        };
        // The coarsest of which there are enough to see that the axis is logarithmic.
        let coarse: [&[f64]; 2] = [&[1.0], &[1.0, 2.0, 5.0]];
        let enough = coarse.into_iter().map(of).find(|ticks| ticks.len() > 3);
        enough.unwrap_or_else(|| of(&[1.0, 1.5, 2.0, 3.0, 5.0, 7.0]))
    }
}

/// A tick's figure, without zeros that say nothing.
fn tick(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn draw_x(plot: &mut Plot, axis: &Axis, (top, bottom): (f64, f64), unit: &str) {
    for t in axis.ticks() {
        let x = axis.place(t);
        plot.line((x, top), (x, bottom), Ink::Grid);
        plot.text((x, bottom + 16.0), Anchor::Middle, Ink::Dim, &tick(t));
    }
    plot.text((axis.ends.1, bottom + 34.0), Anchor::End, Ink::Dim, unit);
}

fn draw_y(plot: &mut Plot, axis: &Axis, (left, right): (f64, f64), unit: &str) {
    for t in axis.ticks() {
        let y = axis.place(t);
        plot.line((left, y), (right, y), Ink::Grid);
        plot.text((left - 6.0, y + 4.0), Anchor::End, Ink::Dim, &tick(t));
    }
    plot.text((left, axis.ends.1 - 10.0), Anchor::Start, Ink::Dim, unit);
}

/// A distribution: each latency that was met, and the share of all (0 to 1) that took at most this long; in order.
pub type Shares = Vec<(f64, f64)>;

/// The distribution of samples.
pub fn of_samples(samples: &[f64]) -> Shares {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let all = sorted.len() as f64;
    let share = |(n, sample)| (sample, (n + 1) as f64 / all);
    sorted.into_iter().enumerate().map(share).collect()
}

/// The share of samples (ms) below each latency, for each name.
pub fn cdf(title: &str, series: &[(&str, &[f64])]) -> Plot {
    let series: Vec<(&str, Shares)> = series.iter().map(|s| (s.0, of_samples(s.1))).collect();
    distributions(title, "ms", &series)
}

/// Distributions of latencies in `unit`, for each name.
pub fn distributions(title: &str, unit: &str, series: &[(&str, Shares)]) -> Plot {
    let (left, right, top, bottom) = (50.0, WIDTH - 20.0, 30.0, 270.0);
    let mut plot = Plot::new(title, 0.0);
    let all = || series.iter().flat_map(|s| s.1.iter().map(|p| p.0));
    let x = Axis::log(
        all().fold(f64::INFINITY, f64::min),
        all().fold(0.0, f64::max),
        (left, right),
    );
    let y = Axis::linear(100.0, (bottom, top));
    draw_x(&mut plot, &x, (top, bottom), &format!("{unit} (logarithmic)"));
    draw_y(&mut plot, &y, (left, right), "% that took at most this long");
    for (i, (_, shares)) in series.iter().enumerate() {
        let mut points = Vec::new();
        let mut below = 0.0;
        for &(latency, share) in shares {
            points.push((x.place(latency), y.place(below * 100.0)));
            points.push((x.place(latency), y.place(share * 100.0)));
            below = share;
        }
        plot.curve(points, i);
    }
    let names: Vec<String> = series.iter().map(|s| s.0.to_owned()).collect();
    legend(&mut plot, &names, bottom + 48.0);
    plot
}

/// One bar of what a boot spends its time on: each piece has the name of the step that ends it, and how long it takes
/// (ms). Pieces with room for it bear their name.
pub fn timeline(title: &str, pieces: &[(&str, f64)]) -> Plot {
    let mut plot = Plot::new(title, 0.0);
    let total = pieces.iter().map(|p| p.1.max(0.0)).sum();
    let axis = Axis::linear(total, (12.0, WIDTH - 20.0));
    draw_x(&mut plot, &axis, (8.0, 62.0), "ms from the beginning");
    let mut at = 0.0;
    let mut names = Vec::new();
    for (i, &(name, took)) in pieces.iter().enumerate() {
        let (from, to) = (axis.place(at), axis.place(at + took.max(0.0)));
        plot.bar((from, 14.0), (to - from, 42.0), i);
        let label = format!("{name} {}", short(took));
        if label.chars().count() as f64 * LETTER < to - from {
            plot.text(
                ((from + to) / 2.0, 40.0),
                Anchor::Middle,
                if is_full(i) { Ink::OnBar } else { Ink::Plain },
                &label,
            );
        }
        at += took.max(0.0);
        names.push(format!("{name}: +{} ms", short(took)));
    }
    legend(&mut plot, &names, 110.0);
    plot
}

/// A ratio with its confidence interval.
pub struct Ratio<'a> {
    /// Of what.
    pub name: &'a str,
    /// Itself.
    pub ratio: f64,
    /// Its interval.
    pub interval: (f64, f64),
}

/// Ratios as bars from zero, with whiskers for their intervals.
pub fn ratios(title: &str, unit: &str, all: &[Ratio<'_>]) -> Plot {
    let (left, right, row) = (270.0, WIDTH - 165.0, 30.0);
    let bottom = 10.0 + row * all.len() as f64;
    let mut plot = Plot::new(title, bottom + 46.0);
    let most = all.iter().map(|r| r.ratio.max(r.interval.1)).fold(0.0, f64::max);
    let axis = Axis::linear(most, (left, right));
    draw_x(&mut plot, &axis, (6.0, bottom), unit);
    for (i, r) in all.iter().enumerate() {
        let y = 10.0 + row * i as f64;
        plot.text(
            (left - 8.0, y + 16.0),
            Anchor::End,
            Ink::Plain,
            &shortened(r.name, 36),
        );
        plot.bar((left, y + 2.0), (axis.place(r.ratio) - left, row - 10.0), i);
        let (low, high) = (axis.place(r.interval.0), axis.place(r.interval.1));
        plot.line((low, y + 12.0), (high, y + 12.0), Ink::Whisker);
        for end in [low, high] {
            plot.line((end, y + 7.0), (end, y + 17.0), Ink::Whisker);
        }
        let figures = [r.ratio, r.interval.0, r.interval.1].map(short);
        let label = format!("{} ({} to {})", figures[0], figures[1], figures[2]);
        plot.text(
            (axis.place(r.ratio).max(high) + 8.0, y + 16.0),
            Anchor::Start,
            Ink::Plain,
            &label,
        );
    }
    plot
}

/// How figures over the number of guests are drawn.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Lines from zero.
    Lines,
    /// Lines, logarithmic.
    LogLines,
    /// Dots.
    Dots,
}

/// Figures over the number of guests.
pub fn over_guests(title: &str, unit: &str, series: &[(&str, Vec<(f64, f64)>)], look: Look) -> Plot {
    let (left, right, top, bottom) = (60.0, WIDTH - 20.0, 30.0, 270.0);
    let mut plot = Plot::new(title, 0.0);
    let all = || series.iter().flat_map(|s| s.1.iter());
    let x = Axis::linear(all().map(|p| p.0).fold(0.0, f64::max), (left, right));
    let most = all().map(|p| p.1).fold(0.0, f64::max);
    let y = match look {
        Look::LogLines => Axis::log(
            all().map(|p| p.1).fold(f64::INFINITY, f64::min),
            most,
            (bottom, top),
        ),
        _ => Axis::linear(most * 1.05, (bottom, top)),
    };
    draw_x(&mut plot, &x, (top, bottom), "guests running");
    draw_y(&mut plot, &y, (left, right), unit);
    for (i, (_, points)) in series.iter().enumerate() {
        let placed: Vec<(f64, f64)> = points
            .iter()
            .map(|p| (x.place(p.0), y.place(p.1.max(0.0))))
            .collect();
        if look == Look::Dots {
            for place in placed {
                plot.dot(place, 2.5, i);
            }
        } else {
            plot.curve(placed, i);
        }
    }
    let names: Vec<String> = series.iter().map(|s| s.0.to_owned()).collect();
    legend(&mut plot, &names, bottom + 48.0);
    plot
}

/// One figure from commit to commit, with the name of each and its figure.
pub fn history(title: &str, unit: &str, points: &[(&str, f64)]) -> Plot {
    let (left, right, top, bottom) = (60.0, WIDTH - 40.0, 34.0, 200.0);
    let mut plot = Plot::new(title, bottom + 44.0);
    let last = points.len().saturating_sub(1).max(1) as f64;
    let x = Axis::linear(last, (left + 30.0, right));
    let y = Axis::linear(
        points.iter().map(|p| p.1).fold(0.0, f64::max) * 1.15,
        (bottom, top),
    );
    draw_y(&mut plot, &y, (left, right), unit);
    let placed: Vec<(f64, f64)> = points
        .iter()
        .enumerate()
        .map(|(i, p)| (x.place(i as f64), y.place(p.1.max(0.0))))
        .collect();
    plot.curve(placed.clone(), 0);
    // As many names as have room beside each other.
    let every = points.len().div_ceil(9).max(1);
    for (i, (&(cx, cy), &(label, figure))) in placed.iter().zip(points).enumerate() {
        plot.dot((cx, cy), 3.5, 0);
        if i % every == 0 || i + 1 == points.len() {
            plot.text(
                (cx, bottom + 18.0),
                Anchor::Middle,
                Ink::Dim,
                &shortened(label, 10),
            );
            plot.text((cx, cy - 9.0), Anchor::Middle, Ink::Plain, &short(figure));
        }
    }
    plot
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_few_and_inside() {
        for to in [1e-6, 0.3, 1.0, 7.7, 108.0, 1e9] {
            let axis = Axis::linear(to, (0.0, 1.0));
            let ticks = axis.ticks();
            assert!((2..=12).contains(&ticks.len()), "{to}: {ticks:?}");
            assert!(ticks.iter().all(|t| (0.0..=to * 1.001).contains(t)));
        }
        for (from, to) in [(0.0, 0.0), (1.2, 1.3), (1.2, 42.0), (0.001, 1e9)] {
            let ticks = Axis::log(from, to, (0.0, 1.0)).ticks();
            assert!((1..=15).contains(&ticks.len()), "{from} {to}: {ticks:?}");
        }
    }

    #[test]
    fn nothing_to_draw_and_extremes_make_no_bad_figures() {
        for plot in [
            cdf("t", &[]),
            cdf("t", &[("a", &[]), ("b", &[0.0, 1e9])]),
            timeline("t", &[]),
            timeline("t", &[("a", 0.0), ("b", -1.0)]),
            ratios("t", "u", &[]),
            over_guests("t", "u", &[("a", vec![])], Look::Lines),
            over_guests(
                "t",
                "u",
                &[("a", vec![]), ("b", vec![(0.0, 0.0), (1.0, 1e9)])],
                Look::LogLines,
            ),
            history("t", "u", &[]),
            history("t", "u", &[("a", -1.0), ("b", 0.0)]),
            over_guests("t", "u", &[("a", vec![(0.0, -5.0), (1e9, 1e9)])], Look::Dots),
        ] {
            let svg = plot.inline();
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    #[test]
    fn distributions_are_of_their_samples() {
        assert_eq!(of_samples(&[3.0, 1.0]), [(1.0, 0.5), (3.0, 1.0)]);
        assert_eq!(of_samples(&[]), []);
    }

    #[test]
    fn places_follow_the_figures() {
        let axis = Axis::linear(10.0, (100.0, 200.0));
        assert_eq!(
            (axis.place(0.0), axis.place(5.0), axis.place(10.0)),
            (100.0, 150.0, 200.0)
        );
        let axis = Axis::log(1.0 / 0.9, 100.0 / 1.1, (0.0, 1.0));
        assert!((axis.place(10.0) - 0.5).abs() < 1e-9);
    }
}
