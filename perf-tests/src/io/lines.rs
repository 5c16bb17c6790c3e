//! What the probe guest prints while it measures a device (guest-images/README.md).

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
    /// `probe: latencies C:N C:N …`: latencies of single operations in TSC cycles, and how many took each.
    Latencies(Vec<(u64, u64)>),
    /// `probe: WHAT error: WHY`.
    Failed(String),
    /// `probe: done`: the last word of the command line was obeyed.
    Done,
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
        ["latencies", ref all @ ..] => {
            let pair = |word: &&str| {
                let (cycles, count) = word.split_once(':')?;
                Some((cycles.parse().ok()?, count.parse().ok()?))
            };
            let all: Option<Vec<_>> = all.iter().map(pair).collect();
            all.map(Line::Latencies)
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
            (
                "probe: latencies 7:3 90000:1\r",
                Line::Latencies(vec![(7, 3), (90_000, 1)]),
            ),
        ] {
            assert_eq!(parse(text), Some(line), "{text}");
        }
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
            "probe: latencies 1:2 x:3",
            "probe: latencies 1:2 3",
            "probe: latencies 1:-2",
            "probe: latencies 1:99999999999999999999999",
            "probe: latencies 1:2:3",
            "\u{1b}[2J",
        ] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }
}
