//! Watches one run of the probe guest from its console: when it counts, what it prints, what its VMM uses meanwhile.

use std::io::{BufRead, BufReader, Read};

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;

use super::lines::{Line, MAX_LINE, parse};
use super::usage::{CpuMoment, CpuTime};
use crate::counter::Counter;
use crate::hdr;

/// Operations in a run whose latencies are told, at most; --turns of them have room in a histogram.
const MAX_OPS: u64 = 1 << 40;
/// Different latencies in a run, at most: more than the guest's histogram has buckets.
const MAX_LATENCIES: usize = 4096;

/// A VMM with the probe guest in it, which ends when it is dropped.
pub trait Vmm {
    /// Its process.
    fn pid(&self) -> u32;
    /// The guest's console. Taken once.
    fn console(&mut self) -> Result<Box<dyn Read + Send>>;
    /// What the VMM said of its own when its console ended early.
    fn last_words(&mut self) -> String;
}

/// What came of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Run {
    /// Operations.
    pub ops: u64,
    /// Time that they took by the guest's TSC.
    pub seconds: f64,
    /// Processor time of the VMM meanwhile.
    pub cpu: CpuTime,
    /// Notifications that the guest wrote. None: the guest does not count them.
    pub kicks: Option<u64>,
    /// Operations that were lost on their way (frames).
    pub lost: u64,
    /// Of single operations (ns). None: the guest did not measure them.
    pub latencies: Option<Histogram<u64>>,
    /// Present when they were counted in this run.
    pub counts: Counts,
}

/// What the kernel counted during a run. None: this machine does not let us.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    /// System calls of the VMM's threads.
    pub system_calls: Option<u64>,
    /// Exits of the vCPU out of the guest, to the kernel or further.
    pub exits: Option<u64>,
}

impl Run {
    /// Operations in one second.
    pub fn rate(&self) -> f64 {
        self.ops as f64 / self.seconds
    }
}

/// How a run is watched.
pub struct Watch<'a> {
    /// The word whose operations are measured: `block`, `net`, `vsock`.
    pub what: &'a str,
    /// Cycles of the TSC in one second.
    pub tsc_per_second: f64,
    /// Count system calls and exits, which makes each a little slower.
    pub count: bool,
}

/// What the kernel counts of a process.
#[derive(Default)]
pub struct Counters {
    system_calls: Option<Counter>,
    exits: Option<Counter>,
}

impl Counters {
    /// Up to now.
    pub fn read(&self) -> Result<Counts> {
        let read = |c: &Option<Counter>| c.as_ref().map(Counter::read).transpose();
        Ok(Counts {
            system_calls: read(&self.system_calls)?,
            exits: read(&self.exits)?,
        })
    }
}

impl Watch<'_> {
    /// Watches `vmm` until the guest is done. `listens` is called when the guest says that the host may begin its part.
    ///
    /// # Errors
    /// When the guest or its VMM fails; with what they said.
    pub fn run(&self, vmm: &mut dyn Vmm, mut listens: impl FnMut() -> Result<()>) -> Result<Run> {
        let pid = vmm.pid();
        let mut console = BufReader::with_capacity(64, vmm.console()?);
        let mut run = Run::default();
        let mut counters = Counters::default();
        let mut before: Option<(CpuMoment, Counts)> = None;
        let mut counted = None;
        let mut latencies = Vec::new();
        let mut said = String::new();
        loop {
            let line = read_line(&mut console)?;
            let Some(line) = line else {
                bail!(
                    "the guest ended early; its console: {said:?}; the VMM: {:?}",
                    vmm.last_words()
                );
            };
            match parse(&line) {
                Some(Line::Ready) if self.count => counters = counters_of(pid)?,
                Some(Line::Listens) => listens()?,
                Some(Line::Begins) => before = Some((CpuMoment::of(pid)?, counters.read()?)),
                Some(Line::Ends) => {
                    let (cpu, counts) = before.take().context("the guest ended what it had not begun")?;
                    run.cpu = cpu.until(&CpuMoment::of(pid)?);
                    run.counts = difference(counts, counters.read()?);
                }
                Some(Line::Count { name, count, cycles }) if name == self.what => {
                    (run.ops, run.seconds) = (count, cycles as f64 / self.tsc_per_second);
                    counted = Some(cycles);
                }
                Some(Line::Count { name, count, .. }) if name == "kicks" => run.kicks = Some(count),
                Some(Line::Count { name, count, .. }) if name == "lost" => run.lost = count,
                Some(Line::Latencies(more)) => {
                    latencies.extend(more);
                    ensure!(
                        latencies.len() <= MAX_LATENCIES,
                        "the guest tells more than {MAX_LATENCIES} different latencies"
                    );
                }
                Some(Line::Failed(why)) => bail!("the guest says: {why}; the VMM: {:?}", vmm.last_words()),
                Some(Line::Done) => {
                    let Some(cycles) = counted else {
                        bail!("the guest measured nothing; its console: {said:?}")
                    };
                    run.latencies = self.histogram(&latencies, run.ops, cycles)?;
                    return Ok(run);
                }
                _ => {}
            }
            if said.len() < 2000 {
                said.push_str(&line);
                said.push('\n');
            }
        }
    }
}

impl Watch<'_> {
    /// The guest's latencies (cycles, and how many took them), which have to be those of `ops` operations in a run of
    /// `cycles`.
    fn histogram(&self, all: &[(u64, u64)], ops: u64, cycles: u64) -> Result<Option<Histogram<u64>>> {
        if all.is_empty() {
            return Ok(None);
        }
        ensure!(
            ops <= MAX_OPS,
            "the guest says that it did {ops} operations in {cycles} cycles"
        );
        let sum = all
            .iter()
            .try_fold(0_u64, |sum, &(_, count)| sum.checked_add(count));
        ensure!(
            sum == Some(ops),
            "the guest tells the latencies of {} operations and did {ops}",
            sum.map_or_else(|| "countless".to_owned(), |n| n.to_string())
        );
        if let Some((longest, _)) = all.iter().find(|(latency, _)| *latency > cycles) {
            bail!("the guest tells a latency of {longest} cycles in a run of {cycles}");
        }
        let ns = |cycles: u64| (cycles as f64 / self.tsc_per_second * 1e9) as u64;
        Ok(Some(hdr::of(
            all.iter().map(|&(latency, count)| (ns(latency), count)),
        )))
    }
}

/// Begins to count, where this machine lets us.
pub fn counters_of(pid: u32) -> Result<Counters> {
    let threads = CpuMoment::of(pid)?;
    Ok(Counters {
        system_calls: Counter::system_calls_of(threads.threads()).ok(),
        exits: Counter::of_threads("kvm/kvm_exit", threads.vcpus()).ok(),
    })
}

/// What was counted between two readings.
pub fn difference(before: Counts, after: Counts) -> Counts {
    // Not every KVM passes its tracepoint: a guest that has printed has made exits.
    let less = |a: Option<u64>, b: Option<u64>| Some(b.filter(|&b| b > 0)?.saturating_sub(a?));
    Counts {
        system_calls: less(before.system_calls, after.system_calls),
        exits: less(before.exits, after.exits),
    }
}

/// A line without its end; none at the end of the console. A line that is too long comes in pieces.
pub fn read_line(console: &mut impl BufRead) -> Result<Option<String>> {
    let mut line = Vec::new();
    let n = console
        .by_ref()
        .take(MAX_LINE as u64)
        .read_until(b'\n', &mut line)
        .context("reading the guest's console")?;
    if n == 0 {
        return Ok(None);
    }
    if line.last() == Some(&b'\n') {
        line.pop();
    }
    Ok(Some(String::from_utf8_lossy(&line).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Script(Option<&'static str>);

    impl Vmm for Script {
        fn pid(&self) -> u32 {
            std::process::id()
        }

        fn console(&mut self) -> Result<Box<dyn Read + Send>> {
            Ok(Box::new(self.0.take().context("taken")?.as_bytes()))
        }

        fn last_words(&mut self) -> String {
            "bye".into()
        }
    }

    fn watch(text: &'static str) -> (Result<Run>, u32) {
        let mut listened = 0;
        let watch = Watch {
            what: "block",
            tsc_per_second: 1e6,
            count: false,
        };
        let run = watch.run(&mut Script(Some(text)), || {
            listened += 1;
            Ok(())
        });
        (run, listened)
    }

    const GOOD: &str = "firmware\nprobe: ready\nprobe: listens\nprobe: begins\nprobe: ends\nprobe: block 10 in 2000000 cycles\n\
        probe: latencies 100:2 200:5\nprobe: latencies 300:2 2000:1\nprobe: lost 1 in 2000000 cycles\n\
        probe: kicks 3 in 2000000 cycles\nprobe: done\n";

    #[test]
    fn a_run_is_read() {
        let (run, listened) = watch(GOOD);
        let run = run.unwrap();
        assert_eq!((run.ops, run.seconds, run.kicks, run.lost), (10, 2.0, Some(3), 1));
        assert_eq!((run.rate(), listened), (5.0, 1));
        let latencies = run.latencies.unwrap();
        assert_eq!(latencies.len(), 10);
        assert!(latencies.equivalent(latencies.value_at_quantile(0.5), 200_000));
        assert!(latencies.equivalent(latencies.max(), 2_000_000));
        assert_eq!(run.counts, Counts::default());
    }

    #[test]
    fn what_goes_wrong_is_told() {
        for (text, why) in [
            ("probe: ready\n", "ended early"),
            ("", "bye"),
            (
                "probe: block error: the request failed at 0\n",
                "the request failed",
            ),
            ("probe: ends\n", "not begun"),
            ("probe: ready\nprobe: done\n", "measured nothing"),
        ] {
            let error = format!("{:#}", watch(text).0.unwrap_err());
            assert!(error.contains(why), "{text:?}: {error}");
        }
        let many = "probe: latencies 1:0\n".repeat(MAX_LATENCIES + 1);
        for (latencies, why) in [
            (
                "probe: latencies 100:9",
                "the latencies of 9 operations and did 10",
            ),
            ("probe: latencies 100:11", "the latencies of 11 operations"),
            (
                "probe: latencies 100:18446744073709551615 1:11",
                "the latencies of countless operations",
            ),
            // One line of them was rubbish.
            ("probe: latencies 100:9\nprobe: latencies x:1", "of 9 operations"),
            (
                "probe: latencies 100:9 2000001:1",
                "2000001 cycles in a run of 2000000",
            ),
            (many.as_str(), "more than 4096 different latencies"),
        ] {
            let text = format!("probe: block 10 in 2000000 cycles\n{latencies}\nprobe: done\n");
            let error = format!("{:#}", watch(Box::leak(text.into_boxed_str())).0.unwrap_err());
            assert!(error.contains(why), "{latencies:?}: {error}");
        }
        let many = format!(
            "probe: block {0} in 9 cycles\nprobe: latencies 9:{0}\nprobe: done\n",
            u64::MAX
        );
        let error = watch(Box::leak(many.into_boxed_str())).0.unwrap_err().to_string();
        assert!(error.contains("operations in 9 cycles"), "{error}");
        let long = Box::leak(format!("{}\n{GOOD}", "x".repeat(100_000)).into_boxed_str());
        assert_eq!(watch(long).0.unwrap().ops, 10);
    }
}
