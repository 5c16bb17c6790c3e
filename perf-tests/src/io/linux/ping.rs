//! The guest's ping: how long a packet takes to the host and back.

use anyhow::{Context, Result, ensure};

use super::guest::{BEGINS, ENDS, Outcome, Tool};
use super::net::{ADDRESSES, HOST};
use crate::hdr;
use crate::io::watch::Run;

/// Bytes in each packet, with the header of ICMP.
pub const PACKET: u64 = 64;

/// Busybox's, with one packet under way at a time.
pub struct Ping;

impl Tool for Ping {
    fn name(&self) -> &'static str {
        "ping"
    }

    fn path(&self) -> &'static str {
        "/bin/sh"
    }

    fn kernel_words(&self) -> &'static str {
        ADDRESSES
    }

    /// What it prints is shown when it is over: each byte on the console is an exit, which would be counted.
    fn arguments(&self, ops: u64) -> Vec<String> {
        let script = format!(
            "echo {BEGINS}; ping -A -W 5 -c {ops} {HOST} >/tmp/ping; code=$?; echo {ENDS}; cat /tmp/ping; exit $code"
        );
        vec!["-c".into(), script]
    }

    /// Operations per second are those of packets that go one after the other without a pause.
    fn read(&self, printed: &str, ops: u64) -> Result<Outcome> {
        let mut all = Vec::new();
        for line in printed.lines().filter(|l| l.contains(" bytes from ")) {
            let ns = round_trip(line).with_context(|| format!("ping's line {line:?} cannot be"))?;
            all.push(ns);
        }
        ensure!(
            all.len() as u64 == ops,
            "{} packets of {ops} came back",
            all.len()
        );
        let ns: u64 = all.iter().sum();
        ensure!(ns > 0, "no packet took any time");
        Ok(Outcome {
            run: Run {
                ops,
                seconds: ns as f64 / 1e9,
                latencies: Some(hdr::of(all.iter().map(|&ns| (ns, 1)))),
                ..Run::default()
            },
            version: "busybox ping".into(),
        })
    }
}

/// Of `64 bytes from 192.0.2.1: seq=0 ttl=64 time=0.123 ms` the time (ns).
fn round_trip(line: &str) -> Option<u64> {
    let ms: f64 = line.rsplit_once(" time=")?.1.strip_suffix(" ms")?.parse().ok()?;
    // As long as it waits.
    (0.0..=60_000.0).contains(&ms).then(|| (ms * 1e6).round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_are_read() {
        let printed = "PING 192.0.2.1 (192.0.2.1): 56 data bytes\n64 bytes from 192.0.2.1: seq=0 ttl=64 time=0.300 ms\n\
            64 bytes from 192.0.2.1: seq=1 ttl=64 time=0.100 ms\n\n--- 192.0.2.1 ping statistics ---\n";
        let run = Ping.read(printed, 2).unwrap().run;
        assert_eq!((run.ops, run.seconds), (2, 0.0004));
        let latencies = run.latencies.unwrap();
        assert_eq!(latencies.len(), 2);
        assert!(
            latencies.equivalent(latencies.min(), 100_000) && latencies.equivalent(latencies.max(), 300_000)
        );
        let lost = Ping.read(printed, 3).unwrap_err().to_string();
        assert!(lost.contains("2 packets of 3"), "{lost}");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for time in ["x", "-1", "NaN", "inf", "1e99", "60001", ""] {
            let line = format!("64 bytes from 192.0.2.1: seq=0 ttl=64 time={time} ms");
            assert!(Ping.read(&line, 1).is_err(), "{time}");
        }
        let zero = "64 bytes from 192.0.2.1: seq=0 ttl=64 time=0.000 ms";
        assert!(Ping.read(zero, 1).is_err());
        assert!(Ping.read("", 0).is_err());
    }
}
