//! Boot latency of the probe guest: the VMM's own cost, in turns with the floor and with other VMMs.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use shoal_vmm::protocol::{Pages, Step};

use crate::driver::{Guest, Jails, Started, Way, sibling, start_floor, start_vmm};
use crate::peers::{Peer, PeerArg, PeerGuest, usable};
use crate::results::{ProbeBoot, Stage, Subject};
use crate::signal::interrupted;
use crate::stats::median;

/// What [`probe`] measures.
pub const PROBE: &str = "/dev/kvm with the probe guest, in turns with the raw-ioctl floor";

const WARM_UP: u32 = 3;
/// The probe guest's first output.
const MARKER: &[u8] = b"R";
/// Memory of the probe guest (MiB), with every program that is compared.
pub const PROBE_MEMORY_MIB: u64 = 128;
pub const SHOAL: &str = "shoal-vmm";
const UNJAILED: &str = "shoal-vmm, by the jailer without a jail";
const JAILED: &str = "shoal-vmm, jailed";

pub fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

/// A progress bar, drawn only where somebody looks.
pub fn bar(length: u32, what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {bar:30} {pos}/{len}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(length.into())
        .with_style(style)
        .with_message(what)
}

/// What `boot --probe` measures beside the VMM.
#[derive(clap::Args)]
pub struct BesideArgs {
    /// With --probe: also in turns with starts by the jailer, without and with jail and filters
    #[arg(long, requires = "probe")]
    jail: bool,
    /// With --jail: the cgroup (version 2, an absolute path) that the jails lie in
    #[arg(long, value_name = "PATH", requires = "jail")]
    cgroup: Option<PathBuf>,
    /// Also in turns with another VMM: qemu=PATH, firecracker=PATH or cloud-hypervisor=PATH (repeatable)
    #[arg(long = "peer", value_name = "NAME=PATH", conflicts_with = "daemon")]
    pub peers: Vec<PeerArg>,
}

impl BesideArgs {
    /// All that can be had without asking anybody for a cgroup.
    pub fn all(peers: &[PeerArg]) -> Self {
        Self {
            jail: true,
            cgroup: None,
            peers: peers.to_vec(),
        }
    }
}

/// The halting probe guest, ready to be mapped.
pub fn probe_guest() -> Result<Guest> {
    Guest::bare_metal(shoal_probe::HALT_PVH, Pages::Small)
}

/// Something that is started once a turn.
pub struct Contender<'a> {
    name: String,
    version: String,
    start: Start<'a>,
    samples_ms: Vec<f64>,
    /// Why it is started no more.
    failed: Option<String>,
}

/// How it is started.
pub enum Start<'a> {
    /// The floor program.
    Floor(&'a Path),
    /// Shoal's VMM.
    Shoal(Way<'a>),
    /// Another one.
    Peer(&'a Peer<'a>),
}

impl<'a> Contender<'a> {
    /// Nothing is measured of it yet.
    pub fn new(name: &str, version: &str, start: Start<'a>) -> Self {
        Self {
            name: name.into(),
            version: version.into(),
            start,
            samples_ms: Vec::new(),
            failed: None,
        }
    }

    /// A peer.
    pub fn peer(peer: &'a Peer<'a>) -> Self {
        Self::new(peer.name(), peer.version(), Start::Peer(peer))
    }

    /// Starts it once; the second value is there for Shoal's.
    fn once(&self, guest: &Guest, marker: &[u8]) -> Result<(f64, Option<Started>)> {
        Ok(match &self.start {
            Start::Floor(path) => (ms(start_floor(path)?), None),
            Start::Peer(peer) => (ms(peer.start()?), None),
            Start::Shoal(way) => {
                let started = start_vmm(way, guest, marker)?;
                (ms(started.elapsed), Some(started))
            }
        })
    }
}

/// Starts all in turns, every second turn in the opposite order.
pub fn probe(runs: u32, beside: &BesideArgs) -> Result<ProbeBoot> {
    let (vmm, floor) = (sibling("shoal-vmm")?, sibling("shoal-floor")?);
    let guest = probe_guest()?;
    let jails = match beside.jail {
        true => Some((Jails::off(&vmm)?, Jails::full(&vmm, beside.cgroup.as_deref())?)),
        false => None,
    };
    let mut kernel = tempfile::NamedTempFile::new().context("making a temporary file")?;
    kernel.write_all(shoal_probe::HALT_PVH)?;
    let theirs = PeerGuest {
        kernel: kernel.path().into(),
        initrd: None,
        cmdline: String::new(),
        memory_mib: PROBE_MEMORY_MIB,
        marker: MARKER.into(),
        at_once: true,
    };
    let peers = usable(&beside.peers, |arg| Peer::new(arg, &theirs));
    let mut all = vec![
        Contender::new("floor", "", Start::Floor(&floor)),
        Contender::new(SHOAL, "", Start::Shoal(Way::Plain(&vmm))),
    ];
    if let Some((off, full)) = &jails {
        all.push(Contender::new(UNJAILED, "", Start::Shoal(Way::Jailer(off))));
        all.push(Contender::new(JAILED, "", Start::Shoal(Way::Jailer(full))));
    }
    all.extend(peers.iter().map(Contender::peer));
    let timelines = take_turns(&mut all, &guest, MARKER, WARM_UP, runs)?;
    let lacks = jails
        .as_ref()
        .map(|(_, full)| full.lacks().map(str::to_owned).collect());
    Ok(result(&all, &timelines, lacks.unwrap_or_default()))
}

/// Starts all `warm_up` times and `runs` times more, which count, until the guest writes `marker`; the timelines of the
/// plain shoal-vmm. A turn that was interrupted does not count.
pub fn take_turns(
    all: &mut [Contender<'_>],
    guest: &Guest,
    marker: &[u8],
    warm_up: u32,
    runs: u32,
) -> Result<Vec<Started>> {
    let mut timelines = Vec::new();
    let progress = bar(runs, "turns");
    for run in 0..warm_up + runs {
        let mut order: Vec<usize> = (0..all.len()).filter(|&i| all[i].failed.is_none()).collect();
        if run % 2 == 1 {
            order.reverse();
        }
        let mut turn = Vec::new();
        for i in order {
            if interrupted() {
                break;
            }
            match all[i].once(guest, marker) {
                Ok(once) => turn.push((i, once)),
                // Ctrl-C reaches the floor and the peers too.
                Err(_) if interrupted() => {}
                Err(e) if matches!(all[i].start, Start::Peer(_)) => {
                    progress
                        .suspend(|| eprintln!("shoal-perf: {} is left out from here on: {e:#}", all[i].name));
                    all[i].failed = Some(format!("{e:#}"));
                }
                Err(e) => return Err(e),
            }
        }
        if interrupted() {
            break;
        }
        if run < warm_up {
            continue;
        }
        for (i, (sample, started)) in turn {
            all[i].samples_ms.push(sample);
            timelines.extend(started.filter(|_| all[i].name == SHOAL));
        }
        progress.inc(1);
    }
    progress.finish_and_clear();
    if timelines.is_empty() {
        bail!("interrupted before the first turn was done");
    }
    Ok(timelines)
}

fn result(all: &[Contender<'_>], timelines: &[Started], jail_lacks: Vec<String>) -> ProbeBoot {
    let of = |name: &str| {
        all.iter()
            .find(|c| c.name == name)
            .map(|c| c.samples_ms.as_slice())
    };
    let median_of = |name| of(name).map(median);
    let shoal = of(SHOAL).unwrap_or_default();
    let (floor_ms, vmm_ms) = (median_of("floor").unwrap_or_default(), median(shoal));
    ProbeBoot {
        runs: timelines.len() as u32,
        floor_ms,
        vmm_ms,
        ratio: vmm_ms / floor_ms,
        jail_adds_ms: median_of(JAILED)
            .zip(median_of(UNJAILED))
            .map(|(with, without)| with - without),
        jail_lacks,
        subjects: subjects(all),
        stages: stages(timelines),
    }
}

/// What was measured of each.
pub fn subjects(all: &[Contender<'_>]) -> Vec<Subject> {
    let shoal = all.iter().find(|c| c.name == SHOAL);
    let shoal = shoal.map_or(&[][..], |c| &c.samples_ms);
    let measured = all.iter().filter(|c| !c.samples_ms.is_empty());
    measured
        .map(|c| Subject::new(&c.name, &c.version, c.samples_ms.clone(), shoal))
        .collect()
}

/// Prints the comparison as a table.
pub fn print(boot: &ProbeBoot) {
    println!(
        "process start to first guest output, medians of {} starts in turns:",
        boot.runs
    );
    print_subjects(&boot.subjects);
    println!("  shoal-vmm ÷ floor {:32.2}", boot.ratio);
    if let Some(adds) = boot.jail_adds_ms {
        println!("  the jail adds {adds:37.3} ms (jailed less unjailed, both by the jailer)");
    }
    if !boot.jail_lacks.is_empty() {
        println!("  the jail lacks: {}", boot.jail_lacks.join(", "));
    }
    print_stages(&boot.stages);
}

/// Prints how fast each was.
pub fn print_subjects(subjects: &[Subject]) {
    println!(
        "{:<42} {:>9} {:>9} {:>9}  95 % interval",
        "", "ms", "p90", "÷ shoal"
    );
    for s in subjects {
        let (low, high) = s.ratio_interval;
        println!(
            "  {:<40} {:9.3} {:9.3} {:9.2}  {low:.2} to {high:.2}",
            s.name, s.median_ms, s.p90_ms, s.ratio_to_shoal
        );
    }
}

/// Medians of when each step was reached, from process start on, in their order.
pub fn stages(started: &[Started]) -> Vec<Stage> {
    let Some(first) = started.first() else {
        return Vec::new();
    };
    let since_start =
        |s: &Started, step: Step| Some(s.timeline.at(step)?.saturating_sub(s.begin_ns) as f64 / 1e6);
    let steps = first.timeline.stamps.iter().map(|s| s.step);
    let mut stages: Vec<Stage> = steps
        .map(|step| {
            let samples: Vec<f64> = started.iter().filter_map(|s| since_start(s, step)).collect();
            Stage {
                step: step.to_string(),
                at_ms: median(&samples),
            }
        })
        .collect();
    let ends: Vec<f64> = started.iter().map(|s| ms(s.elapsed)).collect();
    stages.push(Stage {
        step: "output-read".into(),
        at_ms: median(&ends),
    });
    stages.sort_by(|a, b| a.at_ms.total_cmp(&b.at_ms));
    stages
}

/// Prints stages as a table.
pub fn print_stages(stages: &[Stage]) {
    println!("when each step was reached (medians):");
    let mut before = 0.0;
    for s in stages {
        println!("  {:<22} {:8.3} ms  +{:.3}", s.step, s.at_ms, s.at_ms - before);
        before = s.at_ms;
    }
}
