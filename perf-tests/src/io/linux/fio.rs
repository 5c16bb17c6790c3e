//! fio in a Linux guest: how it is called, and what it prints.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use serde::Deserialize;

use super::guest::{BEGINS, ENDS, Outcome, Tool, json, version};
use crate::hdr;
use crate::io::watch::Run;

/// The program on this machine.
pub const PROGRAM: &str = "fio";
/// Where it lies in the guest.
pub const PATH: &str = "/usr/bin/fio";
/// No operation takes longer than a guest may run.
const LONGEST_NS: u64 = 1_000_000_000_000;

/// A pattern of fio's: `rw=`, `bs=`, `iodepth=`.
pub struct Fio {
    /// fio's word for what is done.
    pub access: &'static str,
    /// Bytes of each request.
    pub size: u64,
    /// Requests in flight.
    pub depth: u64,
}

impl Tool for Fio {
    fn name(&self) -> &'static str {
        PROGRAM
    }

    fn path(&self) -> &'static str {
        PATH
    }

    /// `direct` takes each request to the device, past the guest's page cache. The random numbers begin the same each time.
    fn arguments(&self, ops: u64) -> Vec<String> {
        let says = |what: &str, text| format!("--exec_{what}=echo {text} >/dev/console #");
        vec![
            "--name=perf".into(),
            "--filename=/dev/vdb".into(),
            "--ioengine=libaio".into(),
            "--direct=1".into(),
            format!("--rw={}", self.access),
            format!("--bs={}", self.size),
            format!("--iodepth={}", self.depth),
            format!("--io_size={}", self.size * ops),
            "--norandommap=1".into(),
            "--randrepeat=1".into(),
            "--clat_percentiles=0".into(),
            "--lat_percentiles=1".into(),
            // One is enough: all of them are in the histogram.
            "--percentile_list=50".into(),
            "--eta=never".into(),
            "--output-format=json+".into(),
            says("prerun", BEGINS),
            says("postrun", ENDS),
        ]
    }

    fn read(&self, printed: &str, ops: u64) -> Result<Outcome> {
        read(printed, ops)
    }
}

/// As much of fio's JSON as is wanted.
#[derive(Deserialize)]
struct Report {
    #[serde(rename = "fio version")]
    version: String,
    jobs: Vec<Job>,
}

#[derive(Deserialize)]
struct Job {
    error: i64,
    read: Direction,
    write: Direction,
}

/// What was read, or written.
#[derive(Deserialize)]
struct Direction {
    total_ios: u64,
    /// Milliseconds.
    runtime: u64,
    lat_ns: Latencies,
}

/// From the moment that fio makes a request to that when it sees it done.
#[derive(Deserialize)]
struct Latencies {
    /// How many took so many ns.
    #[serde(default)]
    bins: BTreeMap<String, u64>,
}

impl Latencies {
    /// They have to be those of `ops` operations.
    fn histogram(&self, ops: u64) -> Result<Histogram<u64>> {
        let bin = |(ns, &count): (&String, &u64)| {
            let ns: u64 = ns.parse().ok().filter(|&ns| ns <= LONGEST_NS)?;
            Some((ns, count))
        };
        let all: Option<Vec<_>> = self.bins.iter().map(bin).collect();
        let all = all.context("fio tells of latencies that cannot be")?;
        let sum = all
            .iter()
            .try_fold(0_u64, |sum, &(_, count)| sum.checked_add(count));
        ensure!(
            sum == Some(ops),
            "fio tells the latencies of {} operations and did {ops}",
            sum.map_or_else(|| "countless".to_owned(), |n| n.to_string())
        );
        Ok(hdr::of(all))
    }
}

/// What it has measured.
pub fn read(printed: &str, ops: u64) -> Result<Outcome> {
    let report: Report =
        serde_json::from_str(json(printed)?).context("what fio printed is not what fio prints")?;
    let [job] = &report.jobs[..] else {
        bail!("fio tells of {} jobs, and was given one", report.jobs.len())
    };
    ensure!(job.error == 0, "fio met the error {}", job.error);
    let done = match (&job.read, &job.write) {
        (done, Direction { total_ios: 0, .. }) | (Direction { total_ios: 0, .. }, done) => done,
        _ => bail!("fio has read and written, and was asked for one of them"),
    };
    ensure!(
        done.total_ios == ops,
        "fio did {} operations of {ops}",
        done.total_ios
    );
    ensure!(
        done.runtime > 0,
        "{ops} operations took fio less than a millisecond: ask for more (--ops)"
    );
    let run = Run {
        ops,
        seconds: done.runtime as f64 / 1e3,
        latencies: Some(done.lat_ns.histogram(ops)?),
        ..Run::default()
    };
    Ok(Outcome {
        run,
        version: version(&report.version.replacen("fio-", "fio ", 1))?,
    })
}

#[cfg(test)]
#[path = "fio_tests.rs"]
mod tests;
