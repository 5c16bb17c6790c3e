//! I/O of a guest: the probe guest drives a device as fast as it can, in Shoal and in what is compared with it, in turns.

pub mod block;
pub mod costs;
pub mod fuzzing;
pub mod limits;
mod lines;
pub mod linux;
pub mod net;
mod qemu;
pub mod report;
pub mod results;
mod shoal;
#[allow(unsafe_code)]
mod sys;
mod usage;
pub mod vsock;
mod watch;

use std::fs::File;
use std::io::{Read, Seek};

use anyhow::{Context, Result, bail};
use shoal_vmm::protocol::Pages;

use crate::boot::bar;
use crate::driver::Guest;
use crate::peers::PeerArg;
use crate::signal::interrupted;
use results::{IoPart, IoResult, IoSubject};
use watch::{Run, Vmm, Watch};

/// How all of it is measured.
pub const METHOD: &str = "/dev/kvm with the probe guest, which polls; in turns";

/// What the I/O benchmarks have in common.
#[derive(Default, clap::Args)]
pub struct IoArgs {
    /// Measured turns: each starts every program once [default: 10; of a Linux guest 5, in the lab 1]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    turns: Option<u32>,
    /// Operations in each run [default: enough for some tenths of a second]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    ops: Option<u64>,
    /// Also in turns with QEMU's microvm: qemu=PATH
    #[arg(long = "peer", value_name = "NAME=PATH")]
    peers: Vec<PeerArg>,
    /// The guest looks at every byte that it gets, not only at the first and the last ones of each operation
    #[arg(long)]
    check: bool,
}

impl IoArgs {
    /// What `all` runs: fewer turns, since there are many parts, and the peers that can be driven.
    fn all(peers: &[PeerArg]) -> Self {
        Self {
            turns: Some(4),
            peers: peers.iter().filter(|p| p.qemu().is_some()).cloned().collect(),
            ..Self::default()
        }
    }
}

/// The probe guest, ready to be mapped. Its pages are as a process gets them that says nothing, which is what the peers are.
fn probe_guest() -> Result<Guest> {
    Guest::bare_metal(shoal_probe::PROBE, Pages::Host)
}

/// The end of `text`, up to so many bytes of it.
fn tail_of(text: &str, bytes: usize) -> &str {
    &text[text.ceil_char_boundary(text.len().saturating_sub(bytes))..]
}

/// The end of what a program wrote to `file`.
fn tail(file: &mut File) -> String {
    let mut said = Vec::new();
    if file
        .rewind()
        .and_then(|()| file.take(2000).read_to_end(&mut said))
        .is_err()
    {
        return String::new();
    }
    String::from_utf8_lossy(&said).trim().to_owned()
}

/// What is done in a part.
struct Pattern {
    /// For people.
    name: String,
    /// The word of the guest that measures: `block`, `net`, `vsock`.
    what: &'static str,
    /// All words of the guest but the number of operations.
    words: String,
    bytes_per_op: u64,
    ops: u64,
}

impl Pattern {
    fn words(&self, ops: u64, check: bool) -> String {
        let warm = warm_up(ops);
        let check = if check { " check=1" } else { "" };
        format!("ops={ops} warm={warm}{check} {}", self.words)
    }
}

/// Operations before those that count.
fn warm_up(ops: u64) -> u64 {
    (ops / 10).clamp(1, 10_000)
}

/// What the host does at the other end of a device while the guest is measured.
trait HostPart {
    /// The run is over: ends the part, adds what it alone knows, and says what it has met.
    fn finish(self: Box<Self>, run: &mut Run, warm: u64) -> Result<()>;
}

/// When the host's part begins.
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    /// The guest does not wait for it.
    BeforeStart,
    /// The guest waits for it.
    GuestListens,
}

type Start<'a> = Box<dyn Fn(&str) -> Result<Box<dyn Vmm>> + 'a>;
type Begin<'a> = Box<dyn Fn() -> Result<Box<dyn HostPart>> + 'a>;

/// Something that runs the guest once a turn.
struct Contender<'a> {
    name: String,
    version: String,
    /// A peer may fail: it is left out then.
    is_peer: bool,
    /// Starts the guest with these words.
    start: Start<'a>,
    /// Begins the host's part.
    host: Option<(When, Begin<'a>)>,
    runs: Vec<Run>,
    counted: Option<Run>,
    failed: bool,
}

impl<'a> Contender<'a> {
    fn new(name: &str, version: &str, start: impl Fn(&str) -> Result<Box<dyn Vmm>> + 'a) -> Self {
        Self {
            name: name.into(),
            version: version.into(),
            is_peer: !version.is_empty(),
            start: Box::new(start),
            host: None,
            runs: Vec::new(),
            counted: None,
            failed: false,
        }
    }

    fn with_host(mut self, when: When, begin: impl Fn() -> Result<Box<dyn HostPart>> + 'a) -> Self {
        self.host = Some((when, Box::new(begin)));
        self
    }

    fn begin_host(&self, now: When) -> Result<Option<Box<dyn HostPart>>> {
        let due = self.host.as_ref().filter(|(when, _)| *when == now);
        due.map(|(_, begin)| begin()).transpose()
    }

    /// Keeps a run in which was counted, if it saw more than those before.
    fn count(&mut self, run: Run) {
        let seen = |r: &Run| r.counts.system_calls.unwrap_or(0);
        if self
            .counted
            .as_ref()
            .is_none_or(|before| seen(before) < seen(&run))
        {
            self.counted = Some(run);
        }
    }

    fn once(&self, watch: &Watch<'_>, pattern: &Pattern, ops: u64, check: bool) -> Result<Run> {
        let run = || -> Result<Run> {
            let mut part = self.begin_host(When::BeforeStart)?;
            let mut vmm = (self.start)(&pattern.words(ops, check))?;
            let run = watch.run(&mut *vmm, || {
                if let Some(begun) = self.begin_host(When::GuestListens)? {
                    part = Some(begun);
                }
                Ok(())
            });
            // The host's part can end with the VMM.
            drop(vmm);
            let (mut run, part) = match (run, part) {
                (run, None) => return run,
                (Ok(run), Some(part)) => (run, part),
                // It may know why.
                (Err(e), Some(part)) => {
                    return Err(match part.finish(&mut Run::default(), 0) {
                        Ok(()) => e,
                        Err(why) => why.context(e.to_string()),
                    });
                }
            };
            part.finish(&mut run, warm_up(ops))?;
            Ok(run)
        };
        run().with_context(|| format!("{}: {}", self.name, pattern.name))
    }
}

/// The share of the operations that the run has in which is counted.
const COUNTED_SHARE: u64 = 4;

/// Turns in which is counted. A counter of the kernel can miss something (when another process begins or ends to count the
/// same), and never counts too much: the turn that saw most is right.
const COUNTED_TURNS: u32 = 3;

/// Turns of the probe guest.
const TURNS: u32 = 10;

/// Runs all with the probe guest in turns.
fn take_turns(pattern: &Pattern, args: &IoArgs, all: Vec<Contender<'_>>) -> Result<Option<IoPart>> {
    let tsc_per_second = sys::tsc_per_second();
    let ops = args.ops.unwrap_or(pattern.ops);
    let plan = Plan {
        name: pattern.name.clone(),
        bytes_per_op: pattern.bytes_per_op,
        ops,
        few: (ops / COUNTED_SHARE).max(1),
        warm_up: 1,
        turns: args.turns.unwrap_or(TURNS),
        counted: COUNTED_TURNS,
    };
    in_turns(&plan, all, |contender, ops, count| {
        let watch = Watch {
            what: pattern.what,
            tsc_per_second,
            count,
        };
        contender.once(&watch, pattern, ops, args.check)
    })
}

/// How often all are run.
struct Plan {
    /// What is done, for people.
    name: String,
    bytes_per_op: u64,
    /// Operations in each run that is measured.
    ops: u64,
    /// Turns before those that are measured.
    warm_up: u32,
    turns: u32,
    /// Turns after them, in which is counted.
    counted: u32,
    /// Operations in each run of the other turns.
    few: u64,
}

/// Runs all by `once` (operations, whether to count) in turns, every second turn in the opposite order.
fn in_turns(
    plan: &Plan,
    mut all: Vec<Contender<'_>>,
    once: impl Fn(&Contender<'_>, u64, bool) -> Result<Run>,
) -> Result<Option<IoPart>> {
    let turns = plan.warm_up + plan.turns + plan.counted;
    let progress = bar(turns, "turns").with_prefix(plan.name.clone());
    for turn in 0..turns {
        let (first, last) = (turn < plan.warm_up, turn >= plan.warm_up + plan.turns);
        let ops = if first || last { plan.few } else { plan.ops };
        let mut order: Vec<usize> = (0..all.len()).filter(|&i| !all[i].failed).collect();
        if turn % 2 == 1 {
            order.reverse();
        }
        let mut runs = Vec::new();
        for i in order {
            if interrupted() {
                break;
            }
            match once(&all[i], ops, last) {
                Ok(run) => runs.push((i, run)),
                Err(e) if all[i].is_peer => {
                    progress.suspend(|| eprintln!("shoal-perf: left out from here on: {e:#}"));
                    all[i].failed = true;
                }
                Err(e) => return Err(e),
            }
        }
        if interrupted() {
            break;
        }
        for (i, run) in runs {
            match () {
                () if first => {}
                () if last => all[i].count(run),
                () => all[i].runs.push(run),
            }
        }
        progress.inc(1);
    }
    progress.finish_and_clear();
    let first = all.first().map(|c| c.runs.clone()).unwrap_or_default();
    if first.is_empty() {
        return Ok(None);
    }
    let measured = all.iter().filter(|c| !c.runs.is_empty());
    Ok(Some(IoPart {
        name: plan.name.clone(),
        bytes_per_op: plan.bytes_per_op,
        ops: plan.ops,
        turns: first.len() as u32,
        subjects: measured
            .map(|c| IoSubject::new(&c.name, &c.version, &c.runs, &first, c.counted.as_ref()))
            .collect(),
    }))
}

/// Puts the parts together; those that an interruption left without a turn are not there.
fn result(device: &str, parts: impl Iterator<Item = Result<Option<IoPart>>>) -> Result<IoResult> {
    let parts: Vec<IoPart> = parts.filter_map(Result::transpose).collect::<Result<_>>()?;
    if parts.is_empty() {
        bail!("interrupted before the first turn was done");
    }
    Ok(IoResult {
        device: device.into(),
        parts,
    })
}

/// Prints a result as a table for each part.
pub fn print(io: &IoResult) {
    for part in &io.parts {
        println!(
            "{}: medians of {} runs of {} operations in turns",
            part.name, part.turns, part.ops
        );
        println!(
            "  {:<28} {:>10} {:>8} {:>7} {:>15} {:>10} {:>8} {:>8} {:>8}",
            "", "ops/s", "MB/s", "×", "95 % interval", "CPU µs/op", "calls/op", "exits/op", "kicks/op"
        );
        for s in &part.subjects {
            let (low, high) = s.interval;
            let optional = |n: Option<f64>| n.map_or_else(|| "-".to_owned(), |n| format!("{n:.3}"));
            println!(
                "  {:<28} {:>10.0} {:>8.1} {:>7.2} {:>15} {:>10.3} {:>8} {:>8} {:>8}",
                s.name,
                s.ops_per_s,
                s.ops_per_s * part.bytes_per_op as f64 / 1e6,
                s.first_is_faster_by,
                format!("{low:.2} to {high:.2}"),
                s.device_cpu_us_per_op,
                optional(s.system_calls_per_op),
                optional(s.exits_per_op),
                optional(s.kicks_per_op)
            );
        }
        for s in part.subjects.iter().filter(|s| s.latency_us.is_some()) {
            let l = s.latency_us.unwrap_or_default();
            println!(
                "  {:<28} latency µs: median {:.1}, 90 % {:.1}, 99 % {:.1}, 99.9 % {:.1}, longest {:.0}{}",
                s.name,
                l.p50,
                l.p90,
                l.p99,
                l.p999,
                l.max,
                if s.lost_percent > 0.0 {
                    format!("; lost {:.1} %", s.lost_percent)
                } else {
                    String::new()
                }
            );
        }
    }
    println!(
        "  ×: operations per second of the first ÷ those of this one. CPU: the VMM's threads but the vCPU's."
    );
}
