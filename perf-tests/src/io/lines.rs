//! What the probe guest prints while it measures a device (guest-images/README.md).

use serde::{Deserialize, Serialize};

/// A longer line is none of the probe's (bytes).
pub const MAX_LINE: usize = 512;

/// One line.
#[derive(Debug, PartialEq)]
pub enum Line {
    /// `probe: ready`: the guest runs.
    Ready,
    /// `probe: listens`: the host may connect, or begin to send.
    Listens,
    /// `probe: begins`: from here on it counts.
    Begins,
    /// `probe: ends`: up to here.
    Ends,
    /// `probe: NAME N in C cycles`.
    Count {
        /// What was counted.
        name: String,
        /// How many.
        count: u64,
        /// TSC cycles.
        cycles: u64,
    },
    /// `probe: latency p50 C … cycles`, in TSC cycles.
    Latency(Latency),
    /// `probe: WHAT error: WHY`.
    Failed(String),
    /// `probe: done`: the last word of the command line was obeyed.
    Done,
}

/// Latencies of single operations. In cycles from the guest; in results in µs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Median.
    pub p50: f64,
    /// 90 % are below.
    pub p90: f64,
    /// 99 % are below.
    pub p99: f64,
    /// 99.9 % are below.
    pub p999: f64,
    /// The longest.
    pub max: f64,
}

impl Latency {
    /// All of them by `f`.
    pub fn map(self, f: impl Fn(f64) -> f64) -> Self {
        Self {
            p50: f(self.p50),
            p90: f(self.p90),
            p99: f(self.p99),
            p999: f(self.p999),
            max: f(self.max),
        }
    }
}

/// Reads one line without its end; nothing when it is not of the probe, as what a firmware prints.
pub fn parse(line: &str) -> Option<Line> {
    let rest = line.trim_end_matches('\r').strip_prefix("probe: ")?;
    let words: Vec<&str> = rest.split(' ').collect();
    match words[..] {
        ["ready"] => Some(Line::Ready),
        ["listens"] => Some(Line::Listens),
        ["begins"] => Some(Line::Begins),
        ["ends"] => Some(Line::Ends),
        ["done"] => Some(Line::Done),
        ["exception", ..] => Some(Line::Failed(rest.into())),
        [_, "error:", ..] => Some(Line::Failed(rest.into())),
        [name, count, "in", cycles, "cycles"] => Some(Line::Count {
            name: name.into(),
            count: count.parse().ok()?,
            cycles: cycles.parse().ok()?,
        }),
        [
            "latency",
            "p50",
            a,
            "p90",
            b,
            "p99",
            c,
            "p999",
            d,
            "max",
            e,
            "cycles",
        ] => {
            let cycles = |text: &str| text.parse::<u64>().ok().map(|n| n as f64);
            Some(Line::Latency(Latency {
                p50: cycles(a)?,
                p90: cycles(b)?,
                p99: cycles(c)?,
                p999: cycles(d)?,
                max: cycles(e)?,
            }))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_is_known() {
        for (text, line) in [
            ("probe: ready\r", Line::Ready),
            ("probe: listens", Line::Listens),
            ("probe: begins", Line::Begins),
            ("probe: ends", Line::Ends),
            ("probe: done", Line::Done),
            (
                "probe: block error: the request failed at 4096",
                Line::Failed("block error: the request failed at 4096".into()),
            ),
            (
                "probe: exception 14 error 0x4 at 0x1 address 0x2",
                Line::Failed("exception 14 error 0x4 at 0x1 address 0x2".into()),
            ),
            (
                "probe: block 7 in 21 cycles",
                Line::Count {
                    name: "block".into(),
                    count: 7,
                    cycles: 21,
                },
            ),
        ] {
            assert_eq!(parse(text), Some(line), "{text}");
        }
        let latency = "probe: latency p50 1 p90 2 p99 3 p999 4 max 5 cycles";
        let Some(Line::Latency(l)) = parse(latency) else {
            panic!("{latency}")
        };
        assert_eq!([l.p50, l.p90, l.p99, l.p999, l.max], [1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(l.map(|c| c * 2.0).max, 10.0);
    }

    #[test]
    fn anything_else_is_passed_over() {
        for text in [
            "",
            "probe:",
            "probe: ",
            "ready",
            "probe: ready now",
            "probe: block x in 1 cycles",
            "probe: block 99999999999999999999999 in 1 cycles",
            "probe: latency p50 1 p90 2 p99 3 p999 4 max x cycles",
            "\u{1b}[2J",
        ] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }
}
