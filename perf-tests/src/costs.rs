//! What Shoal's own programs cost the host: instructions (time in the lab) and system calls of a VMM's start, of each call
//! of the API and of the devices' operations.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::api::{CALLS, call};
use crate::boot::{bar, ms, probe_guest};
use crate::counter::Counter;
use crate::daemon::Daemon;
use crate::driver::{Way, launch, sibling};
use crate::io;
use crate::results::{MAX_SUBJECTS, Measured, count, figure, text};
use crate::signal::interrupted;
use crate::stats::median;

/// What [`here`] measures.
pub const HERE: &str = "the host's side of a start, of API calls and of devices, on this machine";
/// What [`lab`] measures.
pub const LAB: &str =
    "the host's side of a start, of API calls and of devices in the lab, time counted in instructions";

/// What is measured of each, after one that is not.
const ROUNDS: u32 = 7;

/// What the host pays for.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Costs {
    /// Each cost.
    pub costs: Vec<Cost>,
}

/// A cost (medians).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Of what.
    pub name: String,
    /// How long it takes (µs; in the lab 1,000 instructions each).
    pub us: f64,
    /// System calls of the program and of what it starts; none where they cannot be counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_calls: Option<u64>,
    /// Exits of the vCPU, of a device's operations; none where this machine's KVM does not count them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exits: Option<u64>,
}

impl Costs {
    /// Refuses what cannot be.
    pub fn check(&self) -> Result<(), String> {
        count("costs", self.costs.len(), MAX_SUBJECTS)?;
        self.costs.iter().try_for_each(|c| {
            text("a cost", &c.name)?;
            figure("a cost", c.us)?;
            figure("system calls", c.system_calls.unwrap_or(0) as f64)?;
            figure("exits", c.exits.unwrap_or(0) as f64)
        })
    }
}

/// Measures all on this machine. Where system calls cannot be counted that is told.
pub fn here() -> Result<Costs> {
    if let Err(e) = Counter::of_next_program() {
        eprintln!("shoal-perf: left out: the numbers of system calls: {e:#}");
    }
    let mut costs = vec![start()?];
    costs.extend(calls()?);
    costs.extend(io::costs::devices()?);
    Ok(Costs { costs })
}

/// A VMM's start, by nobody's help: from before its process is made to the guest's first output.
fn start() -> Result<Cost> {
    let vmm = sibling("shoal-vmm")?;
    let guest = probe_guest()?;
    let (mut us, mut calls) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let counter = Counter::of_next_program().ok();
        let running = launch(&Way::Plain(&vmm), &guest, b"R")?;
        if round > 0 {
            us.push(ms(running.elapsed) * 1e3);
            calls.extend(counter.map(|c| c.read()).transpose()?.map(|n| n as f64));
        }
    }
    Ok(cost("start of a VMM", &us, &calls))
}

fn cost(name: &str, us: &[f64], calls: &[f64]) -> Cost {
    Cost {
        name: name.into(),
        us: median(us),
        system_calls: (!calls.is_empty()).then(|| median(calls) as u64),
        exits: None,
    }
}

/// Each call of the API, with ten other guests.
fn calls() -> Result<Vec<Cost>> {
    let daemon = Daemon::start(true)?;
    let mut client = daemon.connect()?;
    for _ in 0..10 {
        client.call("POST", "/v1/guests", Some(&daemon.guest(true)), 201)?;
    }
    let counter = Counter::of_process(daemon.pid()).ok();
    let read = || counter.as_ref().map(Counter::read).transpose();
    let mut us: [Vec<f64>; CALLS.len()] = Default::default();
    let mut system_calls: [Vec<f64>; CALLS.len()] = Default::default();
    let progress = bar(ROUNDS, "rounds");
    for round in 0..=ROUNDS {
        let mut guest = String::new();
        for (i, name) in CALLS.iter().enumerate() {
            let before = read()?;
            let took;
            (took, guest) = call(name, &daemon, &mut client, guest)?;
            if round > 0 {
                us[i].push(took * 1e3);
                let counted = before.zip(read()?).map(|(before, after)| (after - before) as f64);
                system_calls[i].extend(counted);
            }
        }
        progress.inc(1);
        if interrupted() {
            bail!("interrupted: a cost that was half measured is none");
        }
    }
    progress.finish_and_clear();
    let all = CALLS.iter().zip(us.iter().zip(&system_calls));
    Ok(all
        .map(|(name, (us, calls))| cost(&format!("API: {name}"), us, calls))
        .collect())
}

/// The same in the lab.
pub fn lab() -> Result<Costs> {
    let arguments = ["costs", "--here", "--json"].map(Into::into);
    match crate::lab::run(&arguments, &[&sibling("shoald")?])?.measured {
        Measured::Costs(costs) => Ok(costs),
        _ => bail!("the lab printed another kind of result than costs"),
    }
}

/// Prints the result as a table.
pub fn print(costs: &Costs) {
    println!(
        "{:<72} {:>12} {:>13} {:>7}",
        "what the host pays (medians; of devices their threads' processor time):",
        "µs",
        "system calls",
        "exits"
    );
    for c in &costs.costs {
        let counted = |n: Option<u64>| n.map_or("-".into(), |n| n.to_string());
        println!(
            "  {:<70} {:12.1} {:>13} {:>7}",
            c.name,
            c.us,
            counted(c.system_calls),
            counted(c.exits)
        );
    }
}

/// What grew by more than `tolerance_percent`, in words. A cost that is gone cannot be compared and is an error.
pub fn grown(before: &[Cost], now: &[Cost], tolerance_percent: f64) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for b in before {
        let n = now.iter().find(|n| n.name == b.name);
        let n = n.with_context(|| {
            format!(
                "{:?} is measured no more: write the baseline anew with --update",
                b.name
            )
        })?;
        let too_much = |before: f64, now: f64| now > before * (1.0 + tolerance_percent / 100.0);
        if too_much(b.us, n.us) {
            all.push(format!("{}: {:.1} µs, was {:.1}", b.name, n.us, b.us));
        }
        for (what, before, now) in [
            ("system calls", b.system_calls, n.system_calls),
            ("exits", b.exits, n.exits),
        ] {
            match (before, now) {
                (Some(before), Some(now)) if too_much(before as f64, now as f64) => {
                    all.push(format!("{}: {now} {what}, was {before}", b.name));
                }
                (Some(_), None) => bail!("{}: {what} could not be counted", b.name),
                _ => {}
            }
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str, us: f64, system_calls: Option<u64>) -> Cost {
        Cost {
            name: name.into(),
            us,
            system_calls,
            exits: system_calls.map(|n| n / 10),
        }
    }

    #[test]
    fn what_grew_is_named() {
        let before = [of("a", 100.0, Some(50)), of("b", 10.0, None)];
        let same = [
            of("b", 10.1, Some(7)),
            of("a", 101.0, Some(50)),
            of("new", 1.0, None),
        ];
        assert!(grown(&before, &same, 2.0).unwrap().is_empty());
        let worse = [of("a", 110.0, Some(53)), of("b", 9.0, None)];
        assert_eq!(
            grown(&before, &worse, 2.0).unwrap(),
            ["a: 110.0 µs, was 100.0", "a: 53 system calls, was 50"]
        );
        let gone = grown(&before, &worse[..1], 2.0).unwrap_err().to_string();
        assert!(gone.contains("\"b\""), "{gone}");
        assert!(grown(&before, &[of("a", 1.0, None), of("b", 1.0, None)], 2.0).is_err());
    }

    #[test]
    fn costs_are_checked() {
        let all = |us| Costs {
            costs: vec![of("a", us, Some(1))],
        };
        assert!(all(1.0).check().is_ok());
        assert!(all(-1.0).check().is_err());
    }
}
