//! A network interface over a TAP in a network namespace of this benchmark's own.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use shoal_devices::spec::AnyDeviceSpec;
use shoal_devices::virtio::net::NetSpec;
use shoal_devices::virtio::net::open::open_tap;

use super::results::IoResult;
use super::watch::{Run, Vmm};
use super::{Contender, HostPart, IoArgs, Pattern, When, qemu, qemus, result, shoal, sys, take_turns};
use crate::peers::PeerArg;

/// What `net` measures.
#[derive(clap::Args)]
pub struct NetArgs {
    #[command(flatten)]
    io: IoArgs,
    /// What is done (repeatable) [default: all]
    #[arg(long = "pattern", value_enum)]
    patterns: Vec<Traffic>,
    /// Bytes of each frame (repeatable) [default: 60 and 1514; 60 with ping]
    #[arg(long = "size", value_parser = clap::value_parser!(u64).range(60..=1514))]
    sizes: Vec<u64>,
    /// Frames in flight from the guest to the host
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u64).range(1..=256))]
    depth: u64,
}

impl NetArgs {
    /// What `all` runs.
    pub fn all(peers: &[PeerArg]) -> Self {
        Self {
            io: IoArgs::all(peers),
            patterns: vec![],
            sizes: vec![],
            depth: 128,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Traffic {
    /// The guest sends; the host counts what comes
    ToHost,
    /// The host sends as fast as the interface takes it
    ToGuest,
    /// The guest sends one frame and waits until the host has sent it back
    Ping,
}

impl Traffic {
    fn pattern(self, size: u64, depth: u64) -> Pattern {
        let (word, name, ops) = match self {
            Self::ToHost => (
                "send",
                format!("frames of {size} bytes to the host, {depth} in flight"),
                200_000,
            ),
            Self::ToGuest => ("receive", format!("frames of {size} bytes to the guest"), 200_000),
            Self::Ping => ("ping", format!("frames of {size} bytes there and back"), 10_000),
        };
        Pattern {
            name,
            what: "net",
            words: format!("depth={depth} size={size} net={word}"),
            bytes_per_op: size,
            ops,
        }
    }
}

const TAP: &str = "perf0";
/// For local experiments (IEEE 802).
const FRAME_TYPE: u16 = 0x88b5;
const PATTERN: u64 = 0x9e37_79b9_7f4a_7c15;
const VHOST: &str = "/dev/vhost-net";

/// Runs the patterns one after the other, in a thread that leaves this process's network.
pub fn measure(args: &NetArgs) -> Result<IoResult> {
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| inside(args));
        inside
            .join()
            .map_err(|_| anyhow::anyhow!("the benchmark's thread panicked"))?
    })
}

/// Why it cannot be measured here, if so.
pub fn missing() -> Option<String> {
    let tried = std::thread::spawn(enter).join();
    match tried {
        Ok(Ok(())) => None,
        Ok(Err(e)) => Some(format!("{e:#}")),
        Err(_) => Some("making a network namespace panicked".into()),
    }
}

/// Takes this thread into a namespace with a TAP, which go with the thread and what it has started.
fn enter() -> Result<()> {
    sys::leave_network().context("making a network namespace, for which one has to be root")?;
    sys::make_tap(TAP).context("making a TAP, for which one needs CAP_NET_ADMIN and /dev/net/tun")
}

fn inside(args: &NetArgs) -> Result<IoResult> {
    enter()?;
    let (starter, qemus) = (shoal::Starter::new()?, qemus(&args.io));
    let all_patterns = [Traffic::ToHost, Traffic::ToGuest, Traffic::Ping];
    let patterns = match args.patterns[..] {
        [] => &all_patterns,
        _ => &args.patterns[..],
    };
    let parts = patterns.iter().flat_map(|&traffic| {
        let sizes: &[u64] = match (&args.sizes[..], traffic) {
            ([], Traffic::Ping) => &[60],
            ([], _) => &[60, 1514],
            (sizes, _) => sizes,
        };
        sizes.iter().map(move |&size| (traffic, size))
    });
    let parts = parts.map(|(traffic, size)| {
        let part = move || begin(traffic, size);
        let mut all = vec![ours(&starter).with_host(When::BeforeStart, part)];
        all.extend(
            qemus
                .iter()
                .map(|q| theirs(q, false).with_host(When::BeforeStart, part)),
        );
        if Path::new(VHOST).exists() {
            all.extend(
                qemus
                    .iter()
                    .map(|q| theirs(q, true).with_host(When::BeforeStart, part)),
            );
        }
        take_turns(&traffic.pattern(size, args.depth), &args.io, all)
    });
    result("net", parts)
}

fn ours(starter: &shoal::Starter) -> Contender<'_> {
    Contender::new("shoal", "", |words| {
        let spec = AnyDeviceSpec::Net(NetSpec {
            fds: vec![shoal::slot(0)],
            mac: [2, 0, 0, 0, 0, 1],
            mtu: None,
            ..NetSpec::default()
        });
        let vmm = starter.start(words, vec![spec], &open_tap(TAP, 1)?)?;
        Ok(Box::new(vmm) as Box<dyn Vmm>)
    })
}

/// docs/system/devices/net.rst: a TAP that exists, without scripts; the kernel's back end where there is one.
fn theirs(qemu: &qemu::Starter, vhost: bool) -> Contender<'_> {
    let name = if vhost {
        "qemu microvm, vhost"
    } else {
        "qemu microvm"
    };
    Contender::new(name, qemu.version(), move |words| {
        let vhost = if vhost { "on" } else { "off" };
        let arguments = [
            "-netdev".into(),
            format!("tap,id=net0,ifname={TAP},script=no,downscript=no,vhost={vhost}").into(),
            "-device".into(),
            "virtio-net-device,netdev=net0".into(),
        ];
        Ok(Box::new(qemu.start(words, &arguments)?) as Box<dyn Vmm>)
    })
}

fn begin(traffic: Traffic, size: u64) -> Result<Box<dyn HostPart>> {
    Ok(match traffic {
        Traffic::ToHost => Box::new(Sink {
            before: frames_from_guest()?,
        }),
        Traffic::ToGuest => Worker::start(move |socket, stop| flood(socket, stop, size as usize))?,
        Traffic::Ping => Worker::start(send_back)?,
    })
}

/// Frames that came out of the TAP since it was made: the kernel counts what the guest sent.
fn frames_from_guest() -> Result<u64> {
    let table =
        fs::read_to_string("/proc/thread-self/net/dev").context("reading /proc/thread-self/net/dev")?;
    received(&table, TAP).with_context(|| format!("the interface {TAP} is gone"))
}

/// The packets received by `interface` in the text of /proc/net/dev.
fn received(table: &str, interface: &str) -> Option<u64> {
    let line = table
        .lines()
        .find_map(|l| l.trim_start().strip_prefix(interface)?.strip_prefix(':'))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Counts what the guest sends; the kernel drops it, since nobody takes frames of that type.
struct Sink {
    before: u64,
}

impl HostPart for Sink {
    fn finish(self: Box<Self>, run: &mut Run, warm: u64) -> Result<()> {
        let came = frames_from_guest()?.saturating_sub(self.before);
        let sent = run.ops + warm;
        // Frames of other types, as the kernel's own neighbours discovery, do not come from this guest.
        run.lost = sent.saturating_sub(came);
        if came == 0 {
            bail!("the guest's {sent} frames did not reach the host");
        }
        Ok(())
    }
}

/// A thread that does the host's part until the run is over.
struct Worker {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Worker {
    fn start(
        work: impl FnOnce(&OwnedFd, &AtomicBool) -> Result<()> + Send + 'static,
    ) -> Result<Box<dyn HostPart>> {
        let socket = sys::packet_socket(TAP, FRAME_TYPE).context("opening a packet socket")?;
        let stop = Arc::new(AtomicBool::new(false));
        let asked = stop.clone();
        // In this thread's network, as all that it starts.
        let thread = std::thread::Builder::new().spawn(move || work(&socket, &asked))?;
        Ok(Box::new(Self {
            stop,
            thread: Some(thread),
        }))
    }

    fn end(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => bail!("the host's thread panicked"),
            None => Ok(()),
        }
    }
}

impl HostPart for Worker {
    fn finish(mut self: Box<Self>, _run: &mut Run, _warm: u64) -> Result<()> {
        self.end()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // The run has failed otherwise, and that is what is told.
        let _ = self.end();
    }
}

/// Frames that are sent with one system call.
const BATCH: usize = 64;
/// How long the sender leaves a full interface alone: it holds 1,000 frames, more than any VMM takes meanwhile.
const FULL: Duration = Duration::from_micros(100);

/// Sends numbered frames as fast as the interface takes them.
fn flood(socket: &OwnedFd, stop: &AtomicBool, size: usize) -> Result<()> {
    let mut number = 0;
    let mut frames = vec![frame(size); BATCH];
    while !stop.load(Ordering::Relaxed) {
        for (n, frame) in frames.iter_mut().enumerate() {
            put_number(frame, number + n as u64);
        }
        match sys::send_all(socket, &frames) {
            Ok(sent) => number += sent as u64,
            Err(e) if is_full(&e) => std::thread::sleep(FULL),
            // No VMM has the interface open yet, or no more.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EIO | libc::ENETDOWN)) => {
                std::thread::sleep(FULL)
            }
            Err(e) => return Err(e).context("sending to the guest"),
        }
    }
    Ok(())
}

fn is_full(e: &std::io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOBUFS | libc::EAGAIN | libc::EINTR))
}

/// Sends every frame back.
fn send_back(socket: &OwnedFd, stop: &AtomicBool) -> Result<()> {
    let mut frame = [0; 2048];
    while !stop.load(Ordering::Relaxed) {
        match sys::receive(socket, &mut frame) {
            Ok(n) => match sys::send(socket, &frame[..n]) {
                Ok(_) => {}
                Err(e) if is_full(&e) => bail!("the interface was full, with one frame on its way"),
                Err(e) => return Err(e).context("sending a frame back"),
            },
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(e) => return Err(e).context("receiving from the guest"),
        }
    }
    Ok(())
}

/// A frame as the guest expects it (guest-images/probe/guest/net.c), without its number.
fn frame(size: usize) -> Vec<u8> {
    let mut frame = vec![0; size];
    frame[..6].fill(0xff);
    frame[6] = 2;
    frame[12..14].copy_from_slice(&FRAME_TYPE.to_be_bytes());
    frame
}

fn put_number(frame: &mut [u8], number: u64) {
    frame[14..22].copy_from_slice(&number.to_le_bytes());
    frame[22..30].copy_from_slice(&number.wrapping_mul(PATTERN).to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_table_is_read() {
        let table = "Inter-|   Receive |\n face |bytes packets\n    lo: 1 2 3\n perf0: 600 10 0 0 0 0 0 0 7 8 0\nperf01: 1 99\n";
        assert_eq!(received(table, "perf0"), Some(10));
        assert_eq!(received(table, "lo"), Some(2));
        assert_eq!(received(table, "eth0"), None);
        assert_eq!(received("perf0: x y\n", "perf0"), None);
    }

    #[test]
    fn frames_are_numbered() {
        let mut f = frame(60);
        put_number(&mut f, 3);
        assert_eq!((f.len(), &f[12..15]), (60, &[0x88, 0xb5, 3][..]));
        assert_eq!(f[22..30], 3_u64.wrapping_mul(PATTERN).to_le_bytes());
    }
}
