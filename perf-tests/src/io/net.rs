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
use shoal_devices::limit::Limits;
use shoal_devices::spec::AnyDeviceSpec;
use shoal_devices::virtio::net::NetSpec;
use shoal_devices::virtio::net::open::open_tap;

use super::linux::{self, GuestArgs};
use super::results::IoResult;
use super::watch::{Run, Vmm};
use super::{Contender, HostPart, IoArgs, Pattern, When, qemu, result, shoal, sys, take_turns};
use crate::peers::{PeerArg, usable};

/// What `net` measures.
#[derive(clap::Args)]
pub struct NetArgs {
    #[command(flatten)]
    pub(super) io: IoArgs,
    /// What is done (repeatable) [default: all]
    #[arg(long = "pattern", value_enum)]
    pub(super) patterns: Vec<Traffic>,
    /// Bytes of each frame (repeatable) [default: 60 and 1514; 60 with ping]
    #[arg(long = "size", value_parser = clap::value_parser!(u64).range(60..=1514))]
    sizes: Vec<u64>,
    /// Frames in flight from the guest to the host
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u64).range(1..=256))]
    depth: u64,
    /// By iperf3 in a Linux guest (TCP each way, small UDP packets to the host) and its ping, instead of the probe guest
    #[arg(long, group = "tool", requires = "linux_place", conflicts_with_all = ["check", "sizes", "depth"])]
    iperf3: bool,
    #[command(flatten)]
    pub(super) guest: GuestArgs,
}

impl NetArgs {
    /// What `all` runs.
    pub fn all(peers: &[PeerArg]) -> Self {
        Self {
            io: IoArgs::all(peers),
            patterns: vec![],
            sizes: vec![],
            depth: 128,
            iperf3: false,
            guest: GuestArgs::none(),
        }
    }

    /// What `all` runs of a Linux guest.
    pub fn all_iperf3() -> Self {
        Self {
            io: IoArgs::default(),
            iperf3: true,
            guest: GuestArgs::lab(),
            ..Self::all(&[])
        }
    }

    /// How it is measured.
    pub fn method(&self) -> &'static str {
        match (self.iperf3, self.guest.in_lab()) {
            (false, _) => super::METHOD,
            (true, false) => linux::net::HERE,
            (true, true) => linux::net::LAB,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Traffic {
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

pub(super) const TAP: &str = "perf0";
/// For local experiments (IEEE 802).
const FRAME_TYPE: u16 = 0x88b5;
const PATTERN: u64 = 0x9e37_79b9_7f4a_7c15;
const VHOST: &str = "/dev/vhost-net";

/// Runs the patterns one after the other, in a thread that leaves this process's network.
pub fn measure(args: &NetArgs) -> Result<IoResult> {
    if args.iperf3 {
        return linux::net::measure(args);
    }
    in_namespace(|| inside(args))
}

/// Runs `work` in a thread with a network, and a TAP in it, of its own.
pub(super) fn in_namespace<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| enter().and_then(|()| work()));
        inside
            .join()
            .map_err(|_| anyhow::anyhow!("the benchmark's thread panicked"))?
    })
}

/// What the limits of a network are measured with.
pub(super) fn frames(to_guest: bool) -> Pattern {
    direction(to_guest).pattern(1514, 128)
}

fn direction(to_guest: bool) -> Traffic {
    if to_guest {
        Traffic::ToGuest
    } else {
        Traffic::ToHost
    }
}

/// Limited in one direction, with the host's part.
pub(super) fn limited(starter: &shoal::Starter, to_guest: bool, limits: Limits) -> Contender<'_> {
    let (rx, tx) = match to_guest {
        true => (limits, Limits::default()),
        false => (Limits::default(), limits),
    };
    ours(starter, rx, tx).with_host(When::BeforeStart, move || begin(direction(to_guest), 1514))
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
    let (starter, qemus) = (shoal::Starter::new()?, usable(&args.io.peers, qemu::Starter::new));
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
        let mut all =
            vec![ours(&starter, Limits::default(), Limits::default()).with_host(When::BeforeStart, part)];
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

fn ours(starter: &shoal::Starter, rx_limits: Limits, tx_limits: Limits) -> Contender<'_> {
    Contender::new("shoal", "", move |words| {
        let spec = AnyDeviceSpec::Net(NetSpec {
            fds: vec![shoal::slot(0)],
            mac: [2, 0, 0, 0, 0, 1],
            mtu: None,
            rx_limits,
            tx_limits,
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
    Ok(counters()?.from_guest)
}

/// Frames that the VMM took out of the TAP, or the kernel dropped, since it was made.
fn frames_to_guest() -> Result<u64> {
    Ok(counters()?.to_guest)
}

fn counters() -> Result<Counters> {
    let table =
        fs::read_to_string("/proc/thread-self/net/dev").context("reading /proc/thread-self/net/dev")?;
    Counters::parse(&table, TAP).with_context(|| format!("the interface {TAP} is gone"))
}

/// Frames that went through an interface.
#[derive(Debug, PartialEq)]
struct Counters {
    from_guest: u64,
    to_guest: u64,
}

impl Counters {
    /// Those of `interface` in the text of /proc/net/dev, whose columns are: received bytes, packets, six more, then sent
    /// bytes, packets, errors, dropped.
    fn parse(table: &str, interface: &str) -> Option<Self> {
        let line = table
            .lines()
            .find_map(|l| l.trim_start().strip_prefix(interface)?.strip_prefix(':'))?;
        let columns: Vec<u64> = line.split_whitespace().map_while(|c| c.parse().ok()).collect();
        Some(Self {
            from_guest: *columns.get(1)?,
            to_guest: columns.get(9)?.checked_add(*columns.get(11)?)?,
        })
    }
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
/// Frames that wait in the interface at most. It holds 1,000; what comes on top is dropped and nobody is told, so that a
/// sender which does not look would keep a processor busy for nothing.
const WAITING: u64 = 512;
/// How long the sender leaves an interface with that many alone: shorter than any VMM takes for them.
const FULL: Duration = Duration::from_micros(50);
/// After so many of them without progress (10 ms) the frames are lost: no VMM had the interface open.
const LOST: u32 = 200;

/// Sends numbered frames as fast as the VMM takes them.
fn flood(socket: &OwnedFd, stop: &AtomicBool, size: usize) -> Result<()> {
    let (mut number, mut idle) = (0, 0);
    let mut taken = frames_to_guest()?;
    let mut sent = taken;
    let mut frames = vec![frame(size); BATCH];
    while !stop.load(Ordering::Relaxed) {
        if sent + BATCH as u64 > taken + WAITING {
            let before = std::mem::replace(&mut taken, frames_to_guest()?);
            idle = if taken == before { idle + 1 } else { 0 };
            if idle == LOST {
                (sent, idle) = (taken, 0);
            } else if sent + BATCH as u64 > taken + WAITING {
                std::thread::sleep(FULL);
            }
            continue;
        }
        for (n, frame) in frames.iter_mut().enumerate() {
            put_number(frame, number + n as u64);
        }
        match sys::send_all(socket, &frames) {
            Ok(n) => (number, sent) = (number + n as u64, sent + n as u64),
            // Full, or no VMM has the interface open.
            Err(e) if is_full(&e) || matches!(e.raw_os_error(), Some(libc::EIO | libc::ENETDOWN)) => {
                std::thread::sleep(FULL);
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
        let table = "Inter-|   Receive |  Transmit\n face |bytes packets\n    lo: 1 2 0 0 0 0 0 0 1 2 0 0 0 0 0 0\n \
            perf0: 600 10 0 0 0 0 0 0 700 8 0 3 0 0 0 0\nperf01: 1 99 0 0 0 0 0 0 0 0 0 0\n";
        let counters = |from_guest, to_guest| Some(Counters { from_guest, to_guest });
        assert_eq!(Counters::parse(table, "perf0"), counters(10, 11));
        assert_eq!(Counters::parse(table, "lo"), counters(2, 2));
        for (table, name) in [
            (table, "eth0"),
            ("perf0: x y\n", "perf0"),
            ("perf0: 1 2 3\n", "perf0"),
            ("", "lo"),
        ] {
            assert_eq!(Counters::parse(table, name), None, "{table}");
        }
    }

    #[test]
    fn frames_are_numbered() {
        let mut f = frame(60);
        put_number(&mut f, 3);
        assert_eq!((f.len(), &f[12..15]), (60, &[0x88, 0xb5, 3][..]));
        assert_eq!(f[22..30], 3_u64.wrapping_mul(PATTERN).to_le_bytes());
    }
}
