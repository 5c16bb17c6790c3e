//! What operations of each device cost the host: processor time of the device's threads, system calls, exits.

use anyhow::Result;
use shoal_devices::limit::Limits;
use shoal_devices::virtio::block::EngineKind;

use super::watch::Watch;
use super::{Contender, Pattern, block, net, shoal, sys, vsock};
use crate::boot::bar;
use crate::costs::Cost;
use crate::signal::interrupted;
use crate::stats::median;

/// Operations of each run. Few, since the lab takes long for each; enough for the moments when it is begun and ended not to matter.
const OPS: u64 = 4000;
/// Runs without counters behind a figure; one more counts.
const RUNS: u32 = 3;
/// Costs are of so many operations, so that their system calls are whole numbers.
const UNIT: f64 = 1000.0;

/// Measures disks and sockets, and a network where one can be made.
pub fn devices() -> Result<Vec<Cost>> {
    let (starter, disk) = (shoal::Starter::new()?, block::disk(64 << 20)?);
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("vsock");
    let none = Limits::default();
    let mut costs = Vec::new();
    for engine in [EngineKind::Sync, EngineKind::IoUring] {
        costs.extend(one(
            &block::random_reads(),
            &block::ours(&starter, engine, none, &disk),
        )?);
    }
    costs.extend(one(&vsock::to_host(), &vsock::limited(&starter, &path, none))?);
    match net::missing() {
        Some(why) => eprintln!("shoal-perf: left out: what a network costs: {why}"),
        None => costs.extend(net::in_namespace(|| {
            let each = [false, true]
                .map(|to_guest| one(&net::frames(to_guest), &net::limited(&starter, to_guest, none)));
            each.into_iter()
                .filter_map(Result::transpose)
                .collect::<Result<Vec<_>>>()
        })?),
    }
    Ok(costs)
}

/// None when it was interrupted.
fn one(pattern: &Pattern, contender: &Contender<'_>) -> Result<Option<Cost>> {
    let mut watch = Watch {
        what: pattern.what,
        tsc_per_second: sys::tsc_per_second(),
        count: true,
    };
    let progress = bar(RUNS + 1, "runs").with_prefix(pattern.name.clone());
    let counted = contender.once(&watch, pattern, OPS, false)?;
    watch.count = false;
    let mut us = Vec::new();
    for _ in 0..RUNS {
        progress.inc(1);
        if interrupted() {
            return Ok(None);
        }
        let run = contender.once(&watch, pattern, OPS, false)?;
        us.push(run.cpu.devices_ns as f64 / 1e3 / run.ops as f64 * UNIT);
    }
    progress.finish_and_clear();
    let of_unit = |n: u64| (n as f64 / counted.ops as f64 * UNIT).round() as u64;
    Ok(Some(Cost {
        name: format!("{UNIT} × {} ({})", pattern.name, contender.name),
        us: median(&us),
        system_calls: counted.counts.system_calls.map(of_unit),
        exits: counted.counts.exits.map(of_unit),
    }))
}
