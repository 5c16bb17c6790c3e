//! What guests print, for the fuzz target.

use std::io::Read;

use anyhow::{Context, Result};

use super::linux::guest::Tool;
use super::linux::iperf3::Stream;
use super::linux::ping::Ping;
use super::linux::{fio, iperf3};
use super::watch::{Vmm, Watch};

struct Console(Option<Vec<u8>>);

impl Vmm for Console {
    fn pid(&self) -> u32 {
        std::process::id()
    }

    fn console(&mut self) -> Result<Box<dyn Read + Send>> {
        Ok(Box::new(std::io::Cursor::new(self.0.take().context("taken")?)))
    }

    fn last_words(&mut self) -> String {
        String::new()
    }
}

/// The console of a probe guest that measures a disk.
pub fn probe(console: &[u8]) {
    let watch = Watch {
        what: "block",
        tsc_per_second: 1e9,
        count: false,
    };
    let _ = watch.run(&mut Console(Some(console.into())), || Ok(()));
}

/// Consoles of Linux guests with programs that measure.
pub const TOOLS: [fn(&str); 5] = [
    |text| drop(fio::read(text, 3)),
    |text| drop(iperf3::read(Stream::TcpToHost, text, 3)),
    |text| drop(iperf3::read(Stream::TcpToGuest, text, 3)),
    |text| drop(iperf3::read(Stream::UdpToHost, text, 3)),
    |text| drop(Ping.read(text, 3)),
];
