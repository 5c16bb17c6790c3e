//! Guests started and ended at a rate for a time, and what is left of them.

use std::collections::VecDeque;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::api::{id, print_leaks};
use crate::boot::{bar, ms};
use crate::daemon::{Census, Client, Daemon};
use crate::hdr::Latencies;
use crate::machine::{mem_available, meminfo};
use crate::results::{Measured, figure};
use crate::signal::interrupted;

/// What [`probe`] measures.
pub const PROBE: &str = "shoald on this machine, jailed probe guests that come and go";
/// What [`lab`] measures.
pub const LAB: &str = "shoald in the lab, jailed probe guests that come and go";

/// Guests that run at any time.
const ALIVE: usize = 10;
/// Guests before those that count: they make what the daemon keeps.
const WARM_UP: usize = 20;
/// A daemon may grow by this much in the second half of a run (KiB): heaps are not returned to the last page.
const MOST_GROWTH_KIB: f64 = 1024.0;

/// What churn is asked for.
#[derive(Clone, Debug, clap::Args)]
pub struct ChurnArgs {
    /// Start and end guests through a daemon at this rate (guests in a second), instead of adding idle ones
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub churn: Option<f64>,
    /// For how long (s)
    #[arg(long = "for", default_value_t = 10, value_name = "SECONDS", requires = "churn",
        value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub seconds: u32,
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 && rate <= 1000.0 => Ok(rate),
        _ => Err("a rate lies above 0 and is at most 1000 guests in a second".into()),
    }
}

/// A run. Times in ms.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Churn {
    /// Guests in a second: asked for.
    pub rate_asked: f64,
    /// And reached.
    pub rate: f64,
    /// How long it took (s).
    pub seconds: f64,
    /// Guests that were started.
    pub guests: u32,
    /// Creating and starting one.
    pub start: Latencies,
    /// Ending and deleting one.
    pub end: Latencies,
    /// The daemon's resident memory: what it grew by in each half of the run (KiB; less than zero if it shrank).
    pub daemon_grew_kib: (f64, f64),
    /// What the host's MemAvailable lost over the run (MB; other programs change it, too).
    pub host_lost_mb: f64,
    /// What was left when all guests had been deleted.
    pub leaks: Census,
}

impl Churn {
    /// Refuses what cannot be.
    pub fn check(&self) -> Result<(), String> {
        for (what, value) in [
            ("rate_asked", self.rate_asked),
            ("rate", self.rate),
            ("seconds", self.seconds),
            ("daemon_grew_kib", self.daemon_grew_kib.0.abs()),
            ("daemon_grew_kib", self.daemon_grew_kib.1.abs()),
            ("host_lost_mb", self.host_lost_mb.abs()),
        ] {
            figure(what, value)?;
        }
        self.start.check()?;
        self.end.check()
    }

    /// What was left behind, in words; none if nothing was.
    pub fn verdict(&self) -> Option<String> {
        let left = self.leaks.rows().into_iter().filter(|r| r.1 > 0);
        let mut all: Vec<String> = left.map(|(name, n)| format!("{n} {name}")).collect();
        if self.daemon_grew_kib.1 > MOST_GROWTH_KIB {
            all.push(format!(
                "{:.0} KiB of the daemon's memory",
                self.daemon_grew_kib.1
            ));
        }
        (!all.is_empty()).then(|| all.join(", "))
    }
}

/// Guests that come and go.
struct Fleet<'a> {
    daemon: &'a Daemon,
    client: Client,
    alive: VecDeque<String>,
    starts: Vec<f64>,
    ends: Vec<f64>,
}

impl Fleet<'_> {
    fn add(&mut self) -> Result<()> {
        let (took, guest) = self
            .client
            .call("POST", "/v1/guests", Some(&self.daemon.guest(true)), 201)?;
        self.starts.push(ms(took));
        self.alive.push_back(id(&guest)?);
        Ok(())
    }

    /// Ends the oldest ones until `most` are left.
    fn shrink(&mut self, most: usize) -> Result<()> {
        while self.alive.len() > most
            && let Some(id) = self.alive.pop_front()
        {
            let path = format!("/v1/guests/{id}?force=true");
            self.ends
                .push(ms(self.client.call("DELETE", &path, None, 204)?.0));
        }
        Ok(())
    }
}

/// Starts guests at `rate` (in a second) for `seconds`, ends the oldest whenever there are more than ten, and counts what
/// is left at the end.
pub fn probe(rate: f64, seconds: u32) -> Result<Churn> {
    let daemon = Daemon::start(true)?;
    let mut fleet = Fleet {
        client: daemon.connect()?,
        daemon: &daemon,
        alive: VecDeque::new(),
        starts: Vec::new(),
        ends: Vec::new(),
    };
    for _ in 0..WARM_UP {
        fleet.add()?;
    }
    fleet.shrink(0)?;
    fleet.starts.clear();
    fleet.ends.clear();

    let (before, available) = (daemon.census()?, mem_available()?);
    let mut resident = vec![rss_kib(&daemon)?];
    let total = (rate * f64::from(seconds)).ceil().max(2.0) as u32;
    let progress = bar(total, "guests");
    let begin = Instant::now();
    for n in 0..total {
        if interrupted() {
            break;
        }
        let due = Duration::from_secs_f64(f64::from(n) / rate);
        std::thread::sleep(due.saturating_sub(begin.elapsed()));
        fleet.add()?;
        fleet.shrink(ALIVE)?;
        if n + 1 == total / 2 {
            resident.push(rss_kib(&daemon)?);
        }
        progress.inc(1);
    }
    let elapsed = begin.elapsed().as_secs_f64();
    progress.finish_and_clear();
    fleet.shrink(0)?;
    resident.push(rss_kib(&daemon)?);
    let leaks = daemon.census()?.beyond(&before);
    let guests = fleet.starts.len() as u32;
    if guests == 0 {
        bail!("interrupted before the first guest was started");
    }
    let grew = |i: usize| match resident.as_slice() {
        [a, b, c] => [b - a, c - b][i],
        [a, c] => [0.0, c - a][i],
        _ => 0.0,
    };
    Ok(Churn {
        rate_asked: rate,
        rate: f64::from(guests) / elapsed,
        seconds: elapsed,
        guests,
        start: Latencies::new("POST guests, start", fleet.starts),
        end: Latencies::new("DELETE guest, running", fleet.ends),
        daemon_grew_kib: (grew(0), grew(1)),
        host_lost_mb: (available as f64 - mem_available()? as f64) / 1e6,
        leaks,
    })
}

/// Resident memory of the daemon (KiB).
fn rss_kib(daemon: &Daemon) -> Result<f64> {
    let path = format!("/proc/{}/smaps_rollup", daemon.pid());
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let bytes = meminfo(&text, "Rss").with_context(|| format!("{path} has no line Rss"))?;
    Ok(bytes as f64 / 1024.0)
}

/// The same in the lab.
pub fn lab(rate: f64, seconds: u32) -> Result<Churn> {
    let arguments = ["density", "--probe", "--json", "--churn"].map(String::from);
    let arguments = arguments
        .into_iter()
        .chain([rate.to_string(), "--for".into(), seconds.to_string()]);
    let arguments: Vec<_> = arguments.map(Into::into).collect();
    match crate::lab::run(&arguments, &[&crate::driver::sibling("shoald")?])?.measured {
        Measured::Churn(churn) => Ok(churn),
        _ => bail!("the lab printed another kind of result than churn"),
    }
}

/// Prints the result as a table.
pub fn print(c: &Churn) {
    println!(
        "{} guests started and ended in {:.1} s: {:.1} in a second ({:.1} asked for)",
        c.guests, c.seconds, c.rate, c.rate_asked
    );
    for l in [&c.start, &c.end] {
        println!(
            "  {:<24} median {:8.3} ms, p90 {:.3}, p99 {:.3}, longest {:.3}",
            l.name, l.median_ms, l.p90_ms, l.p99_ms, l.max_ms
        );
    }
    println!(
        "  the daemon's memory grew by {:.0} KiB in the first half, {:.0} KiB in the second; the host lost {:.1} MB",
        c.daemon_grew_kib.0, c.daemon_grew_kib.1, c.host_lost_mb
    );
    print_leaks(&c.leaks);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn churn() -> Churn {
        Churn {
            rate_asked: 5.0,
            rate: 5.0,
            seconds: 1.0,
            guests: 5,
            start: Latencies::new("s", vec![1.0]),
            end: Latencies::new("e", vec![1.0]),
            daemon_grew_kib: (5000.0, 0.0),
            host_lost_mb: -3.0,
            leaks: Census::default(),
        }
    }

    #[test]
    fn rates_are_checked() {
        assert_eq!(rate("2.5"), Ok(2.5));
        for bad in ["0", "-1", "1001", "NaN", "inf", "x", ""] {
            assert!(rate(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_left_is_named() {
        assert_eq!(churn().verdict(), None);
        let mut leaky = churn();
        leaky.leaks.cgroups = 3;
        leaky.daemon_grew_kib.1 = 2048.0;
        assert_eq!(
            leaky.verdict().unwrap(),
            "3 cgroups, 2048 KiB of the daemon's memory"
        );
        assert!(churn().check().is_ok());
        leaky.rate = f64::NAN;
        assert!(leaky.check().is_err());
    }
}
