//! iperf3 in a Linux guest and on the host: how both are called, and what the guest's prints.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::guest::{BEGINS, ENDS, Outcome, Tool, json, version};
use super::net::{ADDRESSES, HOST};
use super::server::Server;
use crate::io::watch::Run;

/// The program on this machine.
pub const PROGRAM: &str = "iperf3";
/// Where it lies in the guest.
pub const PATH: &str = "/usr/bin/iperf3";
/// Bytes that TCP is given at a time, and that are called an operation: what iperf3 does of itself.
pub const BLOCK: u64 = 128 << 10;
/// Bytes in each packet by UDP. Smaller ones have no room for what iperf3 writes into them.
pub const PACKET: u64 = 64;

/// What is sent, and by whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    TcpToHost,
    TcpToGuest,
    UdpToHost,
}

/// A stream, with the host's program.
pub struct Iperf3 {
    pub stream: Stream,
    pub server: PathBuf,
}

impl Tool for Iperf3 {
    fn name(&self) -> &'static str {
        PROGRAM
    }

    fn path(&self) -> &'static str {
        "/bin/sh"
    }

    fn kernel_words(&self) -> &'static str {
        ADDRESSES
    }

    /// So many blocks or packets, as fast as they go. The program and its libraries are read from the root disk before it
    /// counts, and what it prints is shown when it is over: each byte on the console is an exit.
    fn arguments(&self, ops: u64) -> Vec<String> {
        let more = match self.stream {
            Stream::TcpToHost => "-l 128K",
            Stream::TcpToGuest => "-l 128K -R",
            Stream::UdpToHost => "-l 64 -u -b 0",
        };
        let script = format!(
            "{PATH} -v >/dev/null || exit; cat {PATH} /lib/*-linux-gnu/* >/dev/null; echo {BEGINS}; \
             {PATH} -c {HOST} -J -i 0 --connect-timeout 5000 -k {ops} {more} >/tmp/said; \
             code=$?; echo {ENDS}; cat /tmp/said; exit $code"
        );
        vec!["-c".into(), script]
    }

    /// One client.
    fn serve(&self) -> Result<Option<Server>> {
        let mut command = Command::new(&self.server);
        command.args(["-s", "-1", "--forceflush", "-B", HOST]);
        Server::start(&mut command, "Server listening").map(Some)
    }

    fn read(&self, printed: &str, ops: u64) -> Result<Outcome> {
        read(self.stream, printed, ops)
    }
}

/// As much of iperf3's JSON as is wanted.
#[derive(Deserialize)]
struct Report {
    error: Option<String>,
    start: Start,
    #[serde(default)]
    end: End,
}

#[derive(Deserialize)]
struct Start {
    version: String,
}

/// Each is there or not, by what was sent.
#[derive(Default, Deserialize)]
struct End {
    /// By TCP.
    sum_received: Option<Received>,
    /// By UDP.
    sum: Option<Packets>,
}

#[derive(Deserialize)]
struct Received {
    seconds: f64,
    bytes: u64,
}

#[derive(Deserialize)]
struct Packets {
    seconds: f64,
    packets: u64,
    lost_packets: i64,
}

/// What it has measured.
pub fn read(stream: Stream, printed: &str, ops: u64) -> Result<Outcome> {
    let report: Report =
        serde_json::from_str(json(printed)?).context("what iperf3 printed is not what iperf3 prints")?;
    if let Some(error) = report.error {
        bail!("iperf3 says: {error:?}");
    }
    let (done, lost, seconds) = match (stream, report.end) {
        (
            Stream::UdpToHost,
            End {
                sum: Some(packets), ..
            },
        ) => {
            let lost = u64::try_from(packets.lost_packets).unwrap_or(u64::MAX);
            let came = packets.packets.checked_sub(lost);
            (
                came.context("iperf3 lost more than it sent")?,
                lost,
                packets.seconds,
            )
        }
        (
            Stream::TcpToHost | Stream::TcpToGuest,
            End {
                sum_received: Some(received),
                ..
            },
        ) => (received.bytes / BLOCK, 0, received.seconds),
        _ => bail!("iperf3 does not tell what was received"),
    };
    // A block that was begun is sent to its end.
    ensure!(
        done > 0 && done + lost <= ops + ops / 2 + 64,
        "iperf3 tells of {done} operations received, and was asked for {ops}"
    );
    ensure!(
        seconds > 0.0 && seconds < 1e6,
        "iperf3 measured for {seconds} seconds"
    );
    let run = Run {
        ops: done,
        seconds,
        lost,
        ..Run::default()
    };
    Ok(Outcome {
        run,
        version: version(&report.start.version)?,
    })
}

#[cfg(test)]
#[path = "iperf3_tests.rs"]
mod tests;
