//! Density: what one more idle guest costs its host in memory, and what it does to the next start.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::accounts::{Account, Moment};
use crate::boot::{PROBE_MEMORY_MIB, bar, ms, probe_guest};
use crate::driver::{Guest, Running, Way, launch, sibling};
use crate::machine::{mem_available, meminfo};
use crate::results::{Density, DensityPoint, Leaks, Measured};
use crate::signal::interrupted;
use crate::stats::{median, quantile, slope};

/// What [`probe`] measures.
pub const PROBE: &str = "/dev/kvm with idle probe guests, host memory by MemAvailable";

/// What [`lab`] measures.
pub const LAB: &str = "the lab (emulated hardware KVM) with idle probe guests, host memory by MemAvailable";

/// Moments at which memory is read, spread over the run.
const POINTS: u32 = 20;
/// Guests are added no longer when the host has less than this left (bytes).
const RESERVE: u64 = 512 << 20;
/// No guest costs less (bytes): asked for more than fit even so, nothing is started.
const LEAST_PER_GUEST: u64 = 600_000;
/// How long the guests are watched at rest.
const REST: Duration = Duration::from_secs(2);
/// Of shoal-perf's own descriptors, those that one guest takes, and those of a start that end with it.
const FDS_PER_GUEST: u64 = 2;
const FDS_OTHER: u64 = 64;

/// Adds idle guests up to `guests`, watches them, and ends them all.
pub fn probe(guests: u32) -> Result<Density> {
    let vmm = sibling("shoal-vmm")?;
    let guest = probe_guest()?;
    check_memory(guests, mem_available()?)?;
    allow_descriptors(u64::from(guests) * FDS_PER_GUEST + FDS_OTHER)?;
    let way = Way::Plain(&vmm);
    // The first start reads the VMM's own file, and makes what the kernel keeps for the next.
    drop(launch(&way, &guest, b"R")?);

    let account = Account::enter();
    let before = own_descriptors()?;
    let untouched = Moment::now(account.as_ref());
    let mut fleet = Vec::new();
    let mut density = Density {
        guests_asked: guests,
        guests: 0,
        guest_memory_mib: PROBE_MEMORY_MIB,
        stopped_because: None,
        host_mb_per_guest: 0.0,
        host_mb_per_guest_end_to_end: 0.0,
        pss_mb_per_guest: 0.0,
        shares: Vec::new(),
        accounts: if account.is_some() { "cgroup" } else { "machine" }.into(),
        rest_cpu_percent: 0.0,
        start_ms: 0.0,
        starts_ms: Vec::new(),
        points: vec![point(&[])?],
        leaks: Leaks::default(),
    };
    fill(&mut density, &mut fleet, &way, &guest)?;
    if !fleet.is_empty() {
        density.shares = Moment::now(account.as_ref()).shares(&untouched, density.guests);
        density.rest_cpu_percent = rest(&fleet)?;
    }
    let pids: Vec<u32> = fleet.iter().map(Running::pid).collect();
    drop(fleet);
    density.leaks = Leaks {
        processes: pids
            .iter()
            .filter(|pid| fs::exists(format!("/proc/{pid}")).unwrap_or(false))
            .count() as u32,
        descriptors: own_descriptors()?.saturating_sub(before),
    };
    summarize(&mut density);
    Ok(density)
}

/// The same on the lab's machine, where no other work changes the memory.
pub fn lab(guests: u32) -> Result<Density> {
    let arguments = ["density", "--probe", "--json", "--guests", &guests.to_string()].map(Into::into);
    match crate::lab::run(&arguments, &[])?.measured {
        Measured::Density(density) => Ok(density),
        _ => bail!("the lab printed another kind of result than a density"),
    }
}

/// Adds the guests, and reads memory from time to time.
fn fill(density: &mut Density, fleet: &mut Vec<Running>, way: &Way<'_>, guest: &Guest) -> Result<()> {
    let guests = density.guests_asked;
    let every = guests.div_ceil(POINTS).max(1);
    let progress = bar(guests, "guests");
    for n in 1..=guests {
        density.stopped_because = too_little(mem_available()?);
        if density.stopped_because.is_some() || interrupted() {
            break;
        }
        match launch(way, guest, b"R") {
            Ok(running) => {
                density.starts_ms.push(ms(running.elapsed));
                fleet.push(running);
            }
            Err(e) => {
                density.stopped_because = Some(format!("guest {n} could not be started: {e:#}"));
                break;
            }
        }
        if n % every == 0 || n == guests {
            density.points.push(point(fleet)?);
        }
        progress.inc(1);
    }
    progress.finish_and_clear();
    let running = fleet.len() as u32;
    if density.points.last().is_some_and(|p| p.guests != running) {
        density.points.push(point(fleet)?);
    }
    density.guests = running;
    Ok(())
}

/// The figures that follow from the points and samples.
fn summarize(density: &mut Density) {
    density.start_ms = median(&density.starts_ms);
    let line: Vec<(f64, f64)> = density
        .points
        .iter()
        .map(|p| (f64::from(p.guests), p.mem_available as f64 / 1e6))
        .collect();
    density.host_mb_per_guest = -slope(&line).unwrap_or(0.0);
    if let ([first, ..], Some(last)) = (line.as_slice(), density.points.last()) {
        let guests = f64::from(last.guests.max(1));
        density.host_mb_per_guest_end_to_end = (first.1 - last.mem_available as f64 / 1e6) / guests;
        density.pss_mb_per_guest = last.pss as f64 / 1e6 / guests;
    }
}

/// Refuses what cannot fit.
fn check_memory(guests: u32, available: u64) -> Result<()> {
    let room = available.saturating_sub(RESERVE) / LEAST_PER_GUEST;
    if u64::from(guests) > room {
        bail!(
            "{guests} guests need at least {} MB of host memory, and {} MB are available, of which {} MB are left \
             alone: ask for at most {room} with --guests",
            u64::from(guests) * LEAST_PER_GUEST / 1_000_000,
            available / 1_000_000,
            RESERVE / 1_000_000
        );
    }
    Ok(())
}

fn too_little(available: u64) -> Option<String> {
    (available < RESERVE).then(|| {
        format!(
            "too little memory for one more guest: {} MB are available, and {} MB are left alone",
            available / 1_000_000,
            RESERVE / 1_000_000
        )
    })
}

fn point(fleet: &[Running]) -> Result<DensityPoint> {
    let mut sum = 0;
    for running in fleet {
        let path = format!("/proc/{}/smaps_rollup", running.pid());
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {path}: did this guest end?"))?;
        sum += meminfo(&text, "Pss").with_context(|| format!("{path} has no line Pss"))?;
    }
    Ok(DensityPoint {
        guests: fleet.len() as u32,
        mem_available: mem_available()?,
        pss: sum,
    })
}

/// Processor time that all VMMs take together while nothing happens (percent of one processor).
fn rest(fleet: &[Running]) -> Result<f64> {
    let (begin, before) = (Instant::now(), cpu_time(fleet)?);
    while begin.elapsed() < REST && !interrupted() {
        std::thread::sleep(REST / 20);
    }
    let used = cpu_time(fleet)?.saturating_sub(before);
    Ok(used as f64 / begin.elapsed().as_nanos() as f64 * 100.0)
}

/// Processor time of all VMMs' threads so far (ns).
fn cpu_time(fleet: &[Running]) -> Result<u64> {
    let mut sum = 0;
    for running in fleet {
        let folder = format!("/proc/{}/task", running.pid());
        for task in fs::read_dir(&folder).with_context(|| format!("reading {folder}: did this guest end?"))? {
            let path = task?.path().join("schedstat");
            let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            let first = text.split(' ').next().and_then(|n| n.parse::<u64>().ok());
            sum += first.with_context(|| format!("{} does not begin with a number", path.display()))?;
        }
    }
    Ok(sum)
}

fn own_descriptors() -> Result<u32> {
    let folder = fs::read_dir("/proc/self/fd").context("reading /proc/self/fd")?;
    Ok(folder.count() as u32)
}

/// Raises this process's limit of descriptors to `needed`.
#[allow(unsafe_code)]
pub fn allow_descriptors(needed: u64) -> Result<()> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a valid rlimit to write to and to read from.
    let done = unsafe {
        let read = libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        if limit.rlim_max < needed {
            bail!(
                "this density needs {needed} descriptors, and the hard limit is {}: raise it (ulimit -Hn), or ask for \
                 fewer guests",
                limit.rlim_max
            );
        }
        limit.rlim_cur = limit.rlim_cur.max(needed);
        read == 0 && libc::setrlimit(libc::RLIMIT_NOFILE, &limit) == 0
    };
    match done {
        true => Ok(()),
        false => Err(std::io::Error::last_os_error()).context("raising the limit of descriptors"),
    }
}

/// Prints the result as a table.
pub fn print(d: &Density) {
    println!("{} idle probe guests of {} MiB:", d.guests, d.guest_memory_mib);
    if let Some(why) = &d.stopped_because {
        println!("  fewer than the {} asked for: {why}", d.guests_asked);
    }
    let (mb, how) = d.host_mb();
    println!("  host memory per guest  {mb:8.3} MB ({how})");
    println!(
        "           MemAvailable  {:8.3} MB (slope), {:.3} MB (first and last point)",
        d.host_mb_per_guest, d.host_mb_per_guest_end_to_end
    );
    println!("  PSS per guest          {:8.3} MB", d.pss_mb_per_guest);
    for share in &d.shares {
        println!(
            "    {:<20} {:8.3} MB (by the {}'s account)",
            share.kind, share.mb, d.accounts
        );
    }
    println!(
        "  processor time at rest {:8.3} % of one, all guests together",
        d.rest_cpu_percent
    );
    println!("  start, median          {:8.3} ms", d.start_ms);
    let half = d.starts_ms.len() / 2;
    let (early, late) = d.starts_ms.split_at(half);
    println!(
        "    first half           {:8.3} ms, p90 {:.3}",
        median(early),
        quantile(early, 0.9)
    );
    println!(
        "    second half          {:8.3} ms, p90 {:.3}",
        median(late),
        quantile(late, 0.9)
    );
    println!(
        "  left behind            {} processes, {} descriptors",
        d.leaks.processes, d.leaks.descriptors
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_fit_is_refused_with_what_can() {
        let available = RESERVE + 100 * LEAST_PER_GUEST;
        assert!(check_memory(100, available).is_ok());
        let refused = check_memory(101, available).unwrap_err().to_string();
        assert!(refused.contains("at most 100"), "{refused}");
        assert!(check_memory(1, 0).is_err());
        assert!(too_little(RESERVE).is_none());
        assert!(too_little(RESERVE - 1).is_some());
    }
}
