//! How exactly the rate limiters keep what they were asked for.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use shoal_devices::limit::{Limits, Rate};
use shoal_devices::virtio::block::EngineKind;

use super::watch::Watch;
use super::{Contender, Pattern, block, net, shoal, sys, vsock};
use crate::boot::bar;
use crate::results::{MAX_SUBJECTS, count, figure, samples, text};
use crate::signal::interrupted;
use crate::stats::median;

/// How it is measured.
pub const METHOD: &str =
    "/dev/kvm with the probe guest, which does as much as a limit lets it; by the guest's clock";

/// What `limits` measures.
#[derive(clap::Args)]
pub struct LimitsArgs {
    /// Measured runs of each limit
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// How long each run is, if the limit is kept (seconds)
    #[arg(long, default_value_t = 1.0, value_parser = seconds)]
    seconds: f64,
}

impl LimitsArgs {
    /// What `all` runs.
    pub fn short() -> Self {
        Self {
            runs: 3,
            seconds: 0.5,
        }
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(s) if (0.05..=60.0).contains(&s) => Ok(s),
        _ => Err("not from 0.05 to 60".into()),
    }
}

/// All limits that were measured.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct LimitResult {
    /// One after the other.
    pub cases: Vec<LimitCase>,
}

/// One limit.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct LimitCase {
    /// What was limited, and how.
    pub name: String,
    /// Operations or bytes.
    pub unit: String,
    /// The limit (per second).
    pub asked: f64,
    /// What was done (per second): the median of the runs.
    pub measured: f64,
    /// How far it is off (percent of what was asked; negative: less than that).
    pub error_percent: f64,
    /// Each run (per second).
    pub samples: Vec<f64>,
}

impl LimitResult {
    /// What a file must hold to be believed.
    pub fn check(&self) -> Result<(), String> {
        count("limits", self.cases.len(), MAX_SUBJECTS)?;
        self.cases.iter().try_for_each(|c| {
            text("a name", &c.name)?;
            text("a unit", &c.unit)?;
            figure("asked", c.asked)?;
            figure("measured", c.measured)?;
            figure("error_percent", c.error_percent.abs())?;
            samples("samples", &c.samples)
        })
    }

    /// The largest error.
    pub fn headlines(&self) -> Vec<(String, &'static str, f64)> {
        let worst = self.cases.iter().map(|c| c.error_percent.abs()).reduce(f64::max);
        worst
            .map(|w| ("Rate limiters, largest error".to_owned(), "%", w))
            .into_iter()
            .collect()
    }

    /// On the report's page: the title and the figures.
    pub fn section(&self) -> (String, String) {
        let mut html = String::from(
            "<table><tr><th>limit<th class=n>asked, per second<th class=n>done<th class=n>error, %</tr>\n",
        );
        for c in &self.cases {
            html.push_str(&format!(
                "<tr><td>{} ({})<td class=n>{:.0}<td class=n>{:.0}<td class=n>{:+.2}</tr>\n",
                crate::plot::escape(&c.name),
                crate::plot::escape(&c.unit),
                c.asked,
                c.measured,
                c.error_percent
            ));
        }
        ("Rate limiters: asked and done".into(), html + "</table>\n")
    }
}

/// Prints them as a table.
pub fn print(result: &LimitResult) {
    println!(
        "{:<44} {:>14} {:>14} {:>9}",
        "limit", "asked/s", "done/s", "error"
    );
    for c in &result.cases {
        println!(
            "  {:<42} {:>14.0} {:>14.0} {:>7.2} %  ({})",
            c.name, c.asked, c.measured, c.error_percent, c.unit
        );
    }
}

/// The part of a second that a burst lasts: less than what is done before it counts, so that none of it counts.
const BURST: u64 = 50;

#[derive(Clone, Copy)]
enum What {
    Operations,
    Bytes,
}

/// One thing to measure.
struct Case<'a> {
    name: String,
    what: What,
    per_second: u64,
    pattern: Pattern,
    contender: Contender<'a>,
}

fn limits(what: What, per_second: u64) -> Limits {
    let rate = Some(Rate {
        per_second,
        burst: (per_second / BURST).max(1),
    });
    match what {
        What::Operations => Limits {
            operations: rate,
            ..Limits::default()
        },
        What::Bytes => Limits {
            bandwidth: rate,
            ..Limits::default()
        },
    }
}

/// Measures disks and sockets, and a network where one can be made.
pub fn measure(args: &LimitsArgs) -> Result<LimitResult> {
    let (starter, disk) = (shoal::Starter::new()?, block::disk(64 << 20)?);
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("vsock");
    let mut cases = Vec::new();
    for (what, per_second) in [
        (What::Operations, 1_000),
        (What::Operations, 10_000),
        (What::Operations, 100_000),
        (What::Bytes, 10_000_000),
        (What::Bytes, 100_000_000),
    ] {
        cases.push(Case {
            name: "disk, 4 KiB random reads".into(),
            what,
            per_second,
            pattern: block::random_reads(),
            contender: block::ours(&starter, EngineKind::default(), limits(what, per_second), &disk),
        });
    }
    for (what, per_second) in [(What::Bytes, 10_000_000), (What::Bytes, 100_000_000)] {
        cases.push(Case {
            name: "stream to the host".into(),
            what,
            per_second,
            pattern: vsock::to_host(),
            contender: vsock::limited(&starter, &path, limits(what, per_second)),
        });
    }
    let mut result = run(args, cases)?;
    match net::missing() {
        Some(why) => eprintln!("SKIP: limits of a network: {why}"),
        None => result
            .cases
            .extend(net::in_namespace(|| network(args, &starter))?.cases),
    }
    match result.cases.is_empty() {
        true => bail!("interrupted before the first limit was measured"),
        false => Ok(result),
    }
}

fn network(args: &LimitsArgs, starter: &shoal::Starter) -> Result<LimitResult> {
    let mut cases = Vec::new();
    for to_guest in [false, true] {
        for (what, per_second) in [(What::Operations, 10_000), (What::Bytes, 100_000_000)] {
            cases.push(Case {
                name: format!(
                    "frames of 1514 bytes to the {}",
                    if to_guest { "guest" } else { "host" }
                ),
                what,
                per_second,
                pattern: net::frames(to_guest),
                contender: net::limited(starter, to_guest, limits(what, per_second)),
            });
        }
    }
    run(args, cases)
}

fn run(args: &LimitsArgs, cases: Vec<Case<'_>>) -> Result<LimitResult> {
    let progress = bar(cases.len() as u32 * args.runs, "runs");
    let tsc_per_second = sys::tsc_per_second();
    let mut done = Vec::new();
    for case in cases {
        let watch = Watch {
            what: case.pattern.what,
            tsc_per_second,
            count: false,
        };
        let per_op = match case.what {
            What::Operations => 1,
            What::Bytes => case.pattern.bytes_per_op,
        };
        let ops = (case.per_second as f64 * args.seconds / per_op as f64).max(1.0) as u64;
        let mut all = Vec::new();
        for _ in 0..args.runs {
            if interrupted() {
                break;
            }
            let run = case.contender.once(&watch, &case.pattern, ops, false)?;
            all.push(run.rate() * per_op as f64);
            progress.inc(1);
        }
        if all.is_empty() {
            break;
        }
        let asked = case.per_second as f64;
        done.push(LimitCase {
            name: case.name,
            unit: match case.what {
                What::Operations => "operations".into(),
                What::Bytes => "bytes".into(),
            },
            asked,
            measured: median(&all),
            error_percent: (median(&all) / asked - 1.0) * 100.0,
            samples: all,
        });
    }
    progress.finish_and_clear();
    Ok(LimitResult { cases: done })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_checked_and_shown() {
        let case = |error_percent| LimitCase {
            name: "<disk>".into(),
            unit: "operations".into(),
            asked: 1000.0,
            measured: 990.0,
            error_percent,
            samples: vec![990.0],
        };
        let result = LimitResult {
            cases: vec![case(-1.0), case(0.5)],
        };
        result.check().unwrap();
        assert_eq!(result.headlines()[0].2, 1.0);
        let (_, html) = result.section();
        assert!(html.contains("&lt;disk&gt;") && html.contains("-1.00"), "{html}");
        let bad = LimitResult {
            cases: vec![case(f64::NAN)],
        };
        assert!(bad.check().is_err());
    }

    #[test]
    fn seconds_are_checked() {
        assert_eq!(seconds("0.5"), Ok(0.5));
        for bad in ["0", "61", "NaN", "", "-1", "inf"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
