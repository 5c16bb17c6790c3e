//! The gate: deterministic figures against baselines that are kept with the sources.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::costs::{self, Cost};
use crate::linux::{self, Ours};
use crate::results::{LinuxBoot, Stage};
use crate::served;

/// The form of a baseline file.
const SCHEMA: u32 = 1;
const MAX_BYTES: u64 = 1 << 20;
/// Boots behind a figure.
const RUNS: u32 = 3;

/// A figure that is held, and how it came about.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Baseline {
    schema: u32,
    figure: Figure,
    /// Growth that is let pass (percent): another build of the guest's kernel is not the same to the instruction.
    tolerance_percent: f64,
    /// Of a boot: process start to the first line of init (ms).
    #[serde(default, skip_serializing_if = "is_zero")]
    init_ms: f64,
    /// Of a boot: when each stage was reached (ms).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    stages: Vec<Stage>,
    /// What the host pays.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    costs: Vec<Cost>,
}

fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

/// What can be held.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Figure {
    /// The result of `shoal-perf boot --lab`.
    #[serde(rename = "boot --lab")]
    BootLab,
    /// The result of `shoal-perf boot --lab --image`.
    #[serde(rename = "boot --lab --image")]
    BootLabImage,
    /// The result of `shoal-perf boot --lab --daemon`.
    #[serde(rename = "boot --lab --daemon")]
    BootLabDaemon,
    /// The result of `shoal-perf costs --lab`.
    #[serde(rename = "costs --lab")]
    CostsLab,
}

/// Why a baseline is refused.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error("{0} is no baseline: {1}")]
    Malformed(PathBuf, serde_json::Error),
    #[error(
        "{0} is a baseline of form {1}, this shoal-perf reads form {SCHEMA}: write it anew with --update"
    )]
    Schema(PathBuf, u32),
    #[error("{0}: {1} is no sensible figure")]
    Absurd(PathBuf, f64),
}

/// What a comparison says.
#[derive(Debug, PartialEq)]
enum Verdict {
    /// Within the tolerance; the change in percent.
    Same(f64),
    /// Better by more than the tolerance.
    Better(f64),
    /// Worse by more than the tolerance, and the stage that grew most.
    Worse(f64, Option<Grown>),
}

/// A stage that takes longer.
#[derive(Debug, PartialEq)]
struct Grown {
    stage: String,
    before_ms: f64,
    now_ms: f64,
}

impl Baseline {
    fn load(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("opening the baseline {}", path.display()))?;
        let mut bytes = Vec::new();
        file.take(MAX_BYTES)
            .read_to_end(&mut bytes)
            .with_context(|| format!("reading the baseline {}", path.display()))?;
        Ok(Self::parse(path, &bytes)?)
    }

    /// Reads a file's content.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, Refused> {
        #[derive(Deserialize)]
        struct Head {
            schema: u32,
        }
        let malformed = |e| Refused::Malformed(path.into(), e);
        let head: Head = serde_json::from_slice(bytes).map_err(malformed)?;
        if head.schema != SCHEMA {
            return Err(Refused::Schema(path.into(), head.schema));
        }
        let baseline: Self = serde_json::from_slice(bytes).map_err(malformed)?;
        let figures = baseline.stages.iter().map(|s| s.at_ms);
        for figure in figures.chain([baseline.tolerance_percent]) {
            if !(0.0..1e9).contains(&figure) {
                return Err(Refused::Absurd(path.into(), figure));
            }
        }
        if let Some(bad) = baseline.costs.iter().find(|c| !(0.0..1e9).contains(&c.us)) {
            return Err(Refused::Absurd(path.into(), bad.us));
        }
        let boots = baseline.figure != Figure::CostsLab;
        match !boots || (baseline.init_ms > 0.0 && baseline.init_ms < 1e9) {
            true => Ok(baseline),
            false => Err(Refused::Absurd(path.into(), baseline.init_ms)),
        }
    }

    fn save(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        std::fs::write(path, text).with_context(|| format!("writing the baseline {}", path.display()))
    }

    fn compare(&self, now: &LinuxBoot) -> Verdict {
        let change = (now.init_ms / self.init_ms - 1.0) * 100.0;
        if change > self.tolerance_percent {
            Verdict::Worse(change, most_grown(&self.stages, &now.stages))
        } else if change < -self.tolerance_percent {
            Verdict::Better(change)
        } else {
            Verdict::Same(change)
        }
    }
}

/// How long each stage took: from the one before it.
pub fn durations(stages: &[Stage]) -> Vec<(&str, f64)> {
    let mut before = 0.0;
    let each = stages.iter().map(|s| {
        let took = s.at_ms - before;
        before = s.at_ms;
        (s.step.as_str(), took)
    });
    each.collect()
}

/// The stage whose duration grew most. One that is new counts in full.
fn most_grown(before: &[Stage], now: &[Stage]) -> Option<Grown> {
    let before = durations(before);
    let took = |name| before.iter().find(|b| b.0 == name).map_or(0.0, |b| b.1);
    let grown = durations(now).into_iter().map(|(stage, now_ms)| Grown {
        stage: stage.into(),
        before_ms: took(stage),
        now_ms,
    });
    grown
        .filter(|g| g.now_ms > g.before_ms)
        .max_by(|a, b| (a.now_ms - a.before_ms).total_cmp(&(b.now_ms - b.before_ms)))
}

/// Measures each baseline's figure again. An error tells the regressions.
pub fn check(paths: &[PathBuf], update: bool) -> Result<()> {
    let mut regressions = Vec::new();
    for path in paths {
        let mut baseline = Baseline::load(path)?;
        let now = match baseline.figure {
            Figure::BootLab => linux::lab(&Ours::Reference.resolve()?, RUNS, &[])?,
            Figure::BootLabImage => linux::lab(&Ours::Image.resolve()?, RUNS, &[])?,
            Figure::BootLabDaemon => served::lab(RUNS)?,
            Figure::CostsLab => {
                regressions.extend(check_costs(path, baseline, update)?);
                continue;
            }
        };
        if update {
            (baseline.init_ms, baseline.stages) = (now.init_ms, now.stages);
            baseline.save(path)?;
            println!("{}: now {:.3} ms", path.display(), baseline.init_ms);
            continue;
        }
        let verdict = baseline.compare(&now);
        println!(
            "{}: {:.3} ms, was {:.3} ms (tolerance {} %): {}",
            path.display(),
            now.init_ms,
            baseline.init_ms,
            baseline.tolerance_percent,
            tell(&verdict)
        );
        if let Verdict::Worse(..) = verdict {
            regressions.push(path.display().to_string());
        }
    }
    if !regressions.is_empty() {
        bail!(
            "slower than the baseline allows: {}; make it fast again, or justify the growth in the commit and run \
             `shoal-perf check --update`",
            regressions.join(", ")
        );
    }
    Ok(())
}

/// Measures the host's costs again; the file's name if one grew.
fn check_costs(path: &Path, mut baseline: Baseline, update: bool) -> Result<Option<String>> {
    let now = costs::lab()?;
    if update {
        baseline.costs = now.costs;
        baseline.save(path)?;
        println!("{}: now {} costs", path.display(), baseline.costs.len());
        return Ok(None);
    }
    let grown = costs::grown(&baseline.costs, &now.costs, baseline.tolerance_percent)?;
    let (file, tolerance) = (path.display(), baseline.tolerance_percent);
    println!(
        "{file}: {} costs, {} grown (tolerance {tolerance} %)",
        baseline.costs.len(),
        grown.len()
    );
    for what in &grown {
        println!("  WORSE: {what}");
    }
    Ok((!grown.is_empty()).then(|| file.to_string()))
}

fn tell(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Same(change) => format!("same ({change:+.2} %)"),
        Verdict::Better(change) => format!("better ({change:+.2} %); keep it with --update"),
        Verdict::Worse(change, None) => format!("WORSE ({change:+.2} %), no single stage grew"),
        Verdict::Worse(change, Some(g)) => format!(
            "WORSE ({change:+.2} %); the stage that grew most: {}, {:.3} ms, was {:.3} ms",
            g.stage, g.now_ms, g.before_ms
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stages(at: &[(&str, f64)]) -> Vec<Stage> {
        let each = at.iter().map(|&(step, at_ms)| Stage {
            step: step.into(),
            at_ms,
        });
        each.collect()
    }

    fn baseline() -> Baseline {
        Baseline {
            schema: SCHEMA,
            figure: Figure::BootLab,
            tolerance_percent: 2.0,
            init_ms: 100.0,
            stages: stages(&[("A", 10.0), ("B", 30.0), ("C", 100.0)]),
            costs: vec![],
        }
    }

    fn boot(at: &[(&str, f64)]) -> LinuxBoot {
        LinuxBoot {
            guest: String::new(),
            runs: 1,
            init_ms: at.last().unwrap().1,
            spread_percent: 0.0,
            subjects: vec![],
            samples_ms: vec![],
            stages: stages(at),
        }
    }

    #[test]
    fn a_regression_names_the_stage_that_grew() {
        let now = boot(&[("A", 11.0), ("B", 36.0), ("C", 105.0)]);
        let Verdict::Worse(_, Some(grown)) = baseline().compare(&now) else {
            panic!("5 % is more than 2 %")
        };
        assert_eq!(
            (grown.stage.as_str(), grown.before_ms, grown.now_ms),
            ("B", 20.0, 25.0)
        );
        let new = boot(&[("A", 10.0), ("New", 40.0), ("B", 60.0), ("C", 130.0)]);
        let Verdict::Worse(_, Some(grown)) = baseline().compare(&new) else {
            panic!("30 % is more than 2 %")
        };
        assert_eq!((grown.stage.as_str(), grown.before_ms), ("New", 0.0));
    }

    #[test]
    fn the_tolerance_is_the_files() {
        let at = |ms| boot(&[("C", ms)]);
        assert!(matches!(baseline().compare(&at(101.9)), Verdict::Same(_)));
        assert!(matches!(baseline().compare(&at(98.1)), Verdict::Same(_)));
        assert!(matches!(baseline().compare(&at(102.1)), Verdict::Worse(..)));
        assert!(matches!(baseline().compare(&at(97.9)), Verdict::Better(_)));
    }

    #[test]
    fn damaged_baselines_are_refused() {
        let path = Path::new("b.json");
        let text = serde_json::to_string(&baseline()).unwrap();
        assert_eq!(Baseline::parse(path, text.as_bytes()).unwrap(), baseline());
        for end in 0..text.len() {
            assert!(Baseline::parse(path, &text.as_bytes()[..end]).is_err(), "{end}");
        }
        for (from, to) in [
            ("\"schema\":1", "\"schema\":0"),
            ("\"init_ms\":100.0", "\"init_ms\":0.0"),
            ("\"tolerance_percent\":2.0", "\"tolerance_percent\":-1.0"),
            ("boot --lab", "boot --moon"),
            ("\"at_ms\":30.0", "\"at_ms\":-30.0"),
            ("\"schema\":1", "\"schema\":1,\"more\":1"),
        ] {
            let bad = text.replacen(from, to, 1);
            assert_ne!(bad, text);
            assert!(Baseline::parse(path, bad.as_bytes()).is_err(), "{to}");
        }
    }
}
