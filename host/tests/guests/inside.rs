//! What the tests' guests run: the guest's ends of what the tests do, for which busybox has no tool.
//!
//! ```text
//! guest-work vsock-listen PORT BYTES      takes one connection, reads to its end, answers, hangs up
//! guest-work vsock-connect PORT BYTES     connects to the host, sends, hangs up one way, reads the answer
//! guest-work tcp-listen ADDRESS BYTES     the same over TCP
//! guest-work tcp-connect ADDRESS BYTES
//! guest-work disk-write DEVICE BYTES      writes and flushes
//! guest-work disk-verify DEVICE BYTES
//! guest-work disk-zero DEVICE OFFSET BYTES   has a range zeroed (it stays allocated)
//! guest-work disk-punch DEVICE OFFSET BYTES  the same, and it may be unmapped
//! ```
//!
//! It says what it did in one line, and exits with 1 when that failed.

#![forbid(unsafe_code)]

#[path = "pattern.rs"]
mod pattern;

use std::fs::File;
use std::io::{self, Read};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::ExitCode;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, bind, connect, socket};
use pattern::{ANSWER, DISK, OFFER};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::net::{Shutdown, accept, listen, shutdown};

const CID_ANY: u32 = u32::MAX;
const CID_HOST: u32 = 2;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match work(&words) {
        Ok(()) => {
            println!("guest-work: {} good", words.join(" "));
            ExitCode::SUCCESS
        }
        Err(e) => {
            println!("guest-work: {} failed: {e}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn number<T: std::str::FromStr>(word: &str) -> io::Result<T> {
    word.parse()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("'{word}' is no number")))
}

fn work(words: &[&str]) -> io::Result<()> {
    match words {
        ["vsock-listen", port, bytes] => answer(vsock_accept(number(port)?)?, number(bytes)?),
        ["vsock-connect", port, bytes] => offer(vsock_connect(number(port)?)?, number(bytes)?),
        ["tcp-listen", address, bytes] => {
            let listener = TcpListener::bind(address)?;
            println!("guest-work: listening at {address}");
            answer(OwnedFd::from(listener.accept()?.0), number(bytes)?)
        }
        ["tcp-connect", address, bytes] => offer(OwnedFd::from(TcpStream::connect(address)?), number(bytes)?),
        ["disk-write", device, bytes] => {
            let mut disk = File::options().write(true).open(device)?;
            pattern::send(&mut disk, DISK, number(bytes)?)?;
            disk.sync_all()
        }
        ["disk-verify", device, bytes] => {
            let bytes = number(bytes)?;
            pattern::expect(&mut File::open(device)?.take(bytes), DISK, bytes)
        }
        ["disk-zero", device, offset, bytes] => zero(device, offset, bytes, FallocateFlags::ZERO_RANGE),
        ["disk-punch", device, offset, bytes] => zero(device, offset, bytes, FallocateFlags::PUNCH_HOLE),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "no such work")),
    }
}

/// On a block device this makes a request to write zeroes, not one to write.
fn zero(device: &str, offset: &str, bytes: &str, how: FallocateFlags) -> io::Result<()> {
    let disk = File::options().read(true).write(true).open(device)?;
    fallocate(
        &disk,
        how | FallocateFlags::KEEP_SIZE,
        number(offset)?,
        number(bytes)?,
    )?;
    disk.sync_all()
}

fn vsock() -> io::Result<OwnedFd> {
    Ok(socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?)
}

fn vsock_accept(port: u32) -> io::Result<OwnedFd> {
    let listener = vsock()?;
    bind(listener.as_raw_fd(), &VsockAddr::new(CID_ANY, port))?;
    listen(&listener, 1)?;
    println!("guest-work: listening at {port}");
    Ok(accept(&listener)?)
}

fn vsock_connect(port: u32) -> io::Result<OwnedFd> {
    let stream = vsock()?;
    connect(stream.as_raw_fd(), &VsockAddr::new(CID_HOST, port))?;
    Ok(stream)
}

/// Sends, says that this was all, and reads the answer to its end.
fn offer(stream: OwnedFd, bytes: u64) -> io::Result<()> {
    let mut stream = File::from(stream);
    pattern::send(&mut stream, OFFER, bytes)?;
    shutdown(&stream, Shutdown::Write)?;
    pattern::expect(&mut stream, ANSWER, bytes)
}

/// Reads to the end, and only then sends the answer.
fn answer(stream: OwnedFd, bytes: u64) -> io::Result<()> {
    let mut stream = File::from(stream);
    pattern::expect(&mut stream, OFFER, bytes)?;
    pattern::send(&mut stream, ANSWER, bytes)
}
