//! What the jail adds to a start, with few and with many other jails and mounts on the host.

use std::path::PathBuf;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::boot::{bar, ms, probe_guest};
use crate::density::allow_descriptors;
use crate::driver::{Guest, Jails, Running, Way, launch, sibling, start_vmm};
use crate::hdr::Latencies;
use crate::mounts;
use crate::results::{MAX_SUBJECTS, count, figure, text};
use crate::signal::interrupted;
use crate::stats::difference_interval;

/// What [`measure`] measures.
pub const METHOD: &str =
    "/dev/kvm with the probe guest, started by the jailer with and without a jail, in turns";

const WARM_UP: u32 = 3;

/// What `jail` is asked for.
#[derive(clap::Args)]
pub struct JailArgs {
    /// Starts of each kind under each condition
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,
    /// Other guests in jails, for the second condition
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(0..=3_000))]
    jails: u32,
    /// Mounts, for the third condition (as root)
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(0..=50_000))]
    mounts: u32,
    /// The cgroup (version 2, an absolute path) that the jails lie in
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,
}

impl Default for JailArgs {
    fn default() -> Self {
        Self {
            runs: 40,
            jails: 500,
            mounts: 2_000,
            cgroup: None,
        }
    }
}

/// The cost of the jail under each condition.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct JailCost {
    /// Layers that this machine and user do not have.
    pub lacks: Vec<String>,
    /// Conditions that were left out, and why.
    pub left_out: Vec<String>,
    /// Each condition.
    pub conditions: Vec<Condition>,
}

/// A condition, and starts under it. Times in ms.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Condition {
    /// Jailed guests that run meanwhile.
    pub jails: u32,
    /// Mounts that the host has beside its own.
    pub mounts: u32,
    /// Started by the jailer, with neither jail nor filters.
    pub without: Latencies,
    /// In a jail, with filters.
    pub with: Latencies,
    /// Median with less median without.
    pub adds_ms: f64,
    /// Its 95 % confidence interval.
    pub interval_ms: (f64, f64),
}

impl JailCost {
    /// Refuses what cannot be.
    pub fn check(&self) -> Result<(), String> {
        for all in [&self.lacks, &self.left_out] {
            count("layers or conditions", all.len(), MAX_SUBJECTS)?;
            all.iter().try_for_each(|t| text("a layer or condition", t))?;
        }
        count("conditions", self.conditions.len(), MAX_SUBJECTS)?;
        for c in &self.conditions {
            for value in [c.adds_ms, c.interval_ms.0, c.interval_ms.1] {
                figure("what the jail adds", value.abs())?;
            }
            c.without.check()?;
            c.with.check()?;
        }
        Ok(())
    }
}

/// Measures alone, beside other jails, and with many mounts. What cannot be had is told and left out.
pub fn measure(args: &JailArgs) -> Result<JailCost> {
    let vmm = sibling("shoal-vmm")?;
    let guest = probe_guest()?;
    let make =
        || -> Result<(Jails, Jails)> { Ok((Jails::off(&vmm)?, Jails::full(&vmm, args.cgroup.as_deref())?)) };
    let jailers = make()?;
    let mut cost = JailCost {
        lacks: jailers.1.lacks().map(str::to_owned).collect(),
        left_out: Vec::new(),
        conditions: Vec::new(),
    };
    cost.conditions
        .extend(condition(args.runs, (0, 0), &jailers, &guest)?);
    if args.jails > 0 && !interrupted() {
        match hold(args.jails, &jailers.1, &guest) {
            Ok(held) => {
                let there = held.len() as u32;
                cost.conditions
                    .extend(condition(args.runs, (there, 0), &jailers, &guest)?);
            }
            Err(e) => cost.leave_out(format!("{} other jails: {e:#}", args.jails)),
        }
    }
    if args.mounts > 0 && !interrupted() {
        let folder = tempfile::tempdir()?;
        match mounts::make(folder.path(), args.mounts) {
            // A jailer made before knows nothing of them.
            Ok(()) => cost
                .conditions
                .extend(condition(args.runs, (0, args.mounts), &make()?, &guest)?),
            Err(e) => cost.leave_out(format!("{} mounts: {e:#}", args.mounts)),
        }
        mounts::take_away(folder.path()).ok();
    }
    if cost.conditions.is_empty() {
        bail!("interrupted before the first turn was done");
    }
    Ok(cost)
}

impl JailCost {
    fn leave_out(&mut self, what: String) {
        eprintln!("shoal-perf: left out: {what}");
        self.left_out.push(what);
    }
}

/// Starts guests that stay, in jails.
fn hold(guests: u32, jails: &Jails, guest: &Guest) -> Result<Vec<Running>> {
    allow_descriptors(u64::from(guests) * 8 + 64)?;
    let progress = bar(guests, "other jails");
    let mut held = Vec::new();
    for _ in 0..guests {
        if interrupted() {
            break;
        }
        held.push(launch(&Way::Jailer(jails), guest, b"R")?);
        progress.inc(1);
    }
    progress.finish_and_clear();
    Ok(held)
}

/// Starts in turns, every second turn in the opposite order. None if the first was interrupted.
fn condition(
    runs: u32,
    (jails, mounts): (u32, u32),
    (off, full): &(Jails, Jails),
    guest: &Guest,
) -> Result<Option<Condition>> {
    let (mut without, mut with) = (Vec::new(), Vec::new());
    let progress = bar(runs, "turns");
    for run in 0..WARM_UP + runs {
        let once = |jails| -> Result<f64> { Ok(ms(start_vmm(&Way::Jailer(jails), guest, b"R")?.elapsed)) };
        let (a, b) = match run % 2 {
            0 => {
                let a = once(off)?;
                (a, once(full)?)
            }
            _ => {
                let b = once(full)?;
                (once(off)?, b)
            }
        };
        if interrupted() {
            break;
        }
        if run >= WARM_UP {
            without.push(a);
            with.push(b);
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    if with.is_empty() {
        return Ok(None);
    }
    let interval_ms = difference_interval(&with, &without);
    let (without, with) = (Latencies::new("without", without), Latencies::new("with", with));
    Ok(Some(Condition {
        jails,
        mounts,
        adds_ms: with.median_ms - without.median_ms,
        interval_ms,
        without,
        with,
    }))
}

/// What a condition is called.
pub fn name(c: &Condition) -> String {
    match (c.jails, c.mounts) {
        (0, 0) => "alone".into(),
        (jails, 0) => format!("{jails} other jails"),
        (0, mounts) => format!("{mounts} mounts"),
        (jails, mounts) => format!("{jails} other jails, {mounts} mounts"),
    }
}

/// Prints the result as a table.
pub fn print(cost: &JailCost) {
    println!("process start to first guest output, by the jailer (medians, ms):");
    println!(
        "  {:<20} {:>9} {:>9} {:>9}  95 % interval",
        "", "without", "with", "adds"
    );
    for c in &cost.conditions {
        println!(
            "  {:<20} {:9.3} {:9.3} {:9.3}  {:.3} to {:.3}",
            name(c),
            c.without.median_ms,
            c.with.median_ms,
            c.adds_ms,
            c.interval_ms.0,
            c.interval_ms.1
        );
    }
    if !cost.lacks.is_empty() {
        println!("  the jail lacks: {}", cost.lacks.join(", "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_are_named_and_checked() {
        let condition = |jails, mounts| Condition {
            jails,
            mounts,
            without: Latencies::new("without", vec![1.0]),
            with: Latencies::new("with", vec![1.2]),
            adds_ms: 0.2,
            interval_ms: (-0.1, 0.3),
        };
        assert_eq!(name(&condition(0, 0)), "alone");
        assert_eq!(name(&condition(500, 0)), "500 other jails");
        assert_eq!(name(&condition(0, 2000)), "2000 mounts");
        let mut cost = JailCost {
            lacks: vec![],
            left_out: vec![],
            conditions: vec![condition(0, 0)],
        };
        assert!(cost.check().is_ok());
        cost.conditions[0].adds_ms = f64::NAN;
        assert!(cost.check().is_err());
    }
}
