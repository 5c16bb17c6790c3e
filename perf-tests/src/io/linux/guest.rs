//! One run of a program in a Linux guest, watched from outside: its console, what its VMM uses meanwhile, and the end.

use std::io::{BufReader, Read};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::super::usage::CpuMoment;
use super::super::watch::{Counters, Counts, Run, Vmm, counters_of, difference, read_line};
use super::super::{Contender, tail_of};
use super::in_lab;
use super::server::Server;

/// What all guests get before the words of the program: the root disk, the console, a panic that ends the guest at once.
const CMDLINE: &str = "console=ttyS0 root=/dev/vda rootfstype=erofs ro panic=-1 quiet";
/// A program that has printed more has lost its mind (bytes).
const MAX_OUTPUT: usize = 1 << 20;
/// How long a guest may take for everything, by this machine's clock, which the lab counts in instructions.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a guest may say nothing in the lab before it is started once more: in a run it says something every half second
/// of the lab's time at least; half a minute of ours goes by meanwhile.
///
/// QEMU (7.2, and later) emulates VMRUN so that an interrupt which KVM injects stays noted as an exception. If QEMU leaves its
/// loop before the guest's next exit, for a timer of the lab's own machine, the guest gets the interrupt twice, in the middle
/// of handling it, and waits for a lock of its own. Where time is counted in instructions that comes to pass at the same
/// moment each time, and the next start is another moment.
const SILENCE: Duration = Duration::from_millis(600);
/// Starts of one guest in the lab.
const STARTS: u32 = 4;
/// How much of the console an error shows (bytes).
const SHOWN: usize = 2000;
/// What init says when it has started the program, and when that has ended.
const READY: &str = "shoal-init: ready";
const EXITED: &str = "shoal-init: workload exited with code ";
/// What a shell in the guest says before the first operation and after the last.
pub const BEGINS: &str = "shoal-perf: begins";
pub const ENDS: &str = "shoal-perf: ends";
/// The exit code of a program that could not be run.
const NOT_RUN: u32 = 127;

/// A program in the guest that measures a device.
pub trait Tool {
    /// Its name.
    fn name(&self) -> &'static str;
    /// Where it lies in the guest.
    fn path(&self) -> &'static str;
    /// Words for the kernel and init, none by default.
    fn kernel_words(&self) -> &'static str {
        ""
    }
    /// Its arguments for so many operations.
    fn arguments(&self, ops: u64) -> Vec<String>;
    /// Its other end on the host; none by default.
    fn serve(&self) -> Result<Option<Server>> {
        Ok(None)
    }
    /// What it has measured, out of all that it printed, which may be anything.
    fn read(&self, printed: &str, ops: u64) -> Result<Outcome>;
}

/// What a program says that it has measured.
#[derive(Debug)]
pub struct Outcome {
    /// Without the host's part of it.
    pub run: Run,
    /// Program and version.
    pub version: String,
}

/// Starts the contender's guest with the program in it, and watches it to its end.
pub fn once(contender: &Contender<'_>, tool: &dyn Tool, ops: u64, count: bool) -> Result<Outcome> {
    let run = || -> Result<Option<Outcome>> {
        // Few: whoever prints faster than it is read has to wait.
        let (said, lines) = sync_channel(64);
        let server = tool.serve()?;
        let mut vmm = (contender.start)(&cmdline(tool, ops)?)?;
        read_console(vmm.console()?, said)?;
        let outcome = watch(&mut *vmm, &lines, tool, ops, count, in_lab().then_some(SILENCE));
        // The reading threads end with what they read.
        drop((vmm, server));
        outcome
    };
    let tried = || -> Result<Outcome> {
        for start in 1..=STARTS {
            match run()? {
                Some(outcome) => return Ok(outcome),
                None => {
                    eprintln!("shoal-perf: the guest stands still in the lab (start {start} of {STARTS})")
                }
            }
        }
        bail!("the guest stood still each time that it was started")
    };
    tried().with_context(|| format!("{}, a Linux guest with {}", contender.name, tool.name()))
}

/// The kernel's command line: the program and its arguments behind two dashes, as init takes them.
fn cmdline(tool: &dyn Tool, ops: u64) -> Result<String> {
    let mut line = format!("{CMDLINE} {} shoal.exec={} --", tool.kernel_words(), tool.path());
    for word in tool.arguments(ops) {
        if word.contains(['"', '\n']) {
            bail!("{word:?} cannot stand on a kernel's command line");
        }
        match word.contains(' ') {
            true => line.push_str(&format!(" \"{word}\"")),
            false => line.push_str(&format!(" {word}")),
        }
    }
    Ok(line)
}

/// Sends the console's lines to whoever watches, in a thread that ends with the console or with the watching.
fn read_console(console: Box<dyn Read + Send>, said: SyncSender<String>) -> Result<()> {
    let mut console = BufReader::with_capacity(64, console);
    thread::Builder::new()
        .spawn(move || {
            while let Ok(Some(line)) = read_line(&mut console) {
                let line = line.trim_end_matches('\r').to_owned();
                if said.send(line).is_err() {
                    return;
                }
            }
        })
        .context("starting a thread that reads the guest's console")?;
    Ok(())
}

/// What has been seen of a run so far.
#[derive(Default)]
struct Seen {
    printed: String,
    counters: Counters,
    before: Option<(CpuMoment, Counts)>,
    measured: Option<Run>,
}

/// None: the guest said nothing for `silence`.
fn watch(
    vmm: &mut dyn Vmm,
    lines: &Receiver<String>,
    tool: &dyn Tool,
    ops: u64,
    count: bool,
    silence: Option<Duration>,
) -> Result<Option<Outcome>> {
    let (begin, pid, name) = (Instant::now(), vmm.pid(), tool.name());
    let mut seen = Seen::default();
    let code = loop {
        let left = PATIENCE.saturating_sub(begin.elapsed());
        let line = match lines.recv_timeout(silence.unwrap_or(left).min(left)) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => bail!(
                "the guest ended before {name} was done; its console: {:?}; the VMM: {:?}",
                tail_of(&seen.printed, SHOWN),
                vmm.last_words()
            ),
            Err(RecvTimeoutError::Timeout) if silence.is_some() => return Ok(None),
            Err(RecvTimeoutError::Timeout) => bail!(
                "{name} was not done after {} s, and the guest was ended; its console: {:?}",
                PATIENCE.as_secs(),
                tail_of(&seen.printed, SHOWN)
            ),
        };
        match line.as_str() {
            BEGINS => seen.before = Some((CpuMoment::of(pid)?, seen.counters.read()?)),
            ENDS => seen.end(pid)?,
            _ => {}
        }
        if count && line == READY {
            seen.counters = counters_of(pid)?;
        }
        if let Some(code) = line.strip_prefix(EXITED).and_then(|n| n.parse::<u32>().ok()) {
            break code;
        }
        seen.printed.push_str(&line);
        seen.printed.push('\n');
        if seen.printed.len() > MAX_OUTPUT {
            bail!(
                "the guest wrote more than {} KiB to its console",
                MAX_OUTPUT >> 10
            );
        }
    };
    seen.outcome(code, tool, ops).map(Some)
}

impl Seen {
    fn end(&mut self, pid: u32) -> Result<()> {
        // What was begun twice or never is told when all is over.
        let Some((cpu, counts)) = self.before.take() else {
            return Ok(());
        };
        self.measured = Some(Run {
            cpu: cpu.until(&CpuMoment::of(pid)?),
            counts: difference(counts, self.counters.read()?),
            ..Run::default()
        });
        Ok(())
    }

    fn outcome(self, code: u32, tool: &dyn Tool, ops: u64) -> Result<Outcome> {
        let (name, said) = (tool.name(), tail_of(&self.printed, SHOWN));
        match code {
            0 => {}
            NOT_RUN => bail!(
                "the guest could not run {name}: is it in the image, with its libraries? Its console: {said:?}"
            ),
            _ => bail!("{name} failed in the guest (exit code {code}); its console: {said:?}"),
        }
        let outcome = tool.read(&self.printed, ops);
        let outcome = outcome.with_context(|| format!("the guest's console ends with {said:?}"))?;
        let Some(measured) = self.measured else {
            bail!("{name} did not say when it began and ended to measure; its console: {said:?}")
        };
        Ok(Outcome {
            run: Run {
                cpu: measured.cpu,
                counts: measured.counts,
                ..outcome.run
            },
            ..outcome
        })
    }
}

/// The JSON object in what a program printed, from a line `{` to a line `}`.
pub fn json(printed: &str) -> Result<&str> {
    let begin = match printed.starts_with("{\n") {
        true => 0,
        false => printed.find("\n{\n").context("no JSON in what it printed")? + 1,
    };
    let end = printed[begin..].find("\n}\n").map(|n| begin + n + 2);
    Ok(&printed[begin..end.context("the JSON that it printed ends early")?])
}

/// A version that can be shown: what it says of itself may be anything.
pub fn version(said: &str) -> Result<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || " .-".contains(c);
    if said.is_empty() || said.len() > 32 || !said.chars().all(plain) {
        bail!("its version cannot be {said:?}");
    }
    Ok(said.to_owned())
}

#[cfg(test)]
#[path = "guest_tests.rs"]
mod tests;
