//! Streams between the guest and a Unix socket of the host.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use shoal_devices::limit::Limits;
use shoal_devices::spec::AnyDeviceSpec;
use shoal_devices::virtio::vsock::VsockSpec;

use super::results::IoResult;
use super::watch::{Run, Vmm};
use super::{Contender, HostPart, IoArgs, Pattern, When, result, shoal, sys, take_turns};

/// What `vsock` measures. There is no peer: QEMU's sockets are vhost's and have no Unix socket.
#[derive(clap::Args)]
pub struct VsockArgs {
    #[command(flatten)]
    io: IoArgs,
    /// What is done (repeatable) [default: all]
    #[arg(long = "pattern", value_enum)]
    patterns: Vec<Stream>,
    /// Bytes of each packet [default: 32768; 64 with ping]
    #[arg(long, value_parser = size)]
    size: Option<u64>,
    /// Packets in flight from the guest to the host
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..=64))]
    depth: u64,
}

impl VsockArgs {
    /// What `all` runs.
    pub fn all() -> Self {
        Self {
            io: IoArgs::all(&[]),
            patterns: vec![],
            size: None,
            depth: 16,
        }
    }
}

fn size(text: &str) -> Result<u64, String> {
    let n: u64 = text.parse().map_err(|_| "not a number".to_owned())?;
    match n > 0 && n.is_multiple_of(8) && n <= 61_440 {
        true => Ok(n),
        false => Err(format!("{n} is no multiple of 8 up to 61440")),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Stream {
    /// The guest sends
    ToHost,
    /// The host sends
    ToGuest,
    /// The guest sends and waits until as much has come back
    Ping,
}

impl Stream {
    fn pattern(self, args: &VsockArgs) -> Pattern {
        let depth = args.depth;
        let size = args.size.unwrap_or(if self == Self::Ping { 64 } else { 32_768 });
        let (word, name, ops) = match self {
            Self::ToHost => (
                "send",
                format!("packets of {size} bytes to the host, {depth} in flight"),
                20_000,
            ),
            Self::ToGuest => (
                "receive",
                format!("a stream to the guest, by {size} bytes"),
                20_000,
            ),
            Self::Ping => ("ping", format!("{size} bytes there and back"), 10_000),
        };
        Pattern {
            name,
            what: "vsock",
            words: format!("depth={depth} size={size} vsock={word}"),
            bytes_per_op: size,
            ops,
        }
    }
}

const PORT: u32 = 5000;
const PATTERN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Runs the patterns one after the other.
pub fn measure(args: &VsockArgs) -> Result<IoResult> {
    let starter = shoal::Starter::new()?;
    let folder = tempfile::tempdir().context("making a temporary folder")?;
    let path = folder.path().join("vsock");
    let all_patterns = [Stream::ToHost, Stream::ToGuest, Stream::Ping];
    let patterns = match args.patterns[..] {
        [] => &all_patterns,
        _ => &args.patterns[..],
    };
    for peer in &args.io.peers {
        eprintln!("shoal-perf: the peer {peer} is left out: it has no sockets of this kind");
    }
    let parts = patterns.iter().map(|&stream| {
        let all = vec![
            ours(&starter, &path, Limits::default())
                .with_host(When::GuestListens, || Worker::start(&path, stream)),
        ];
        take_turns(&stream.pattern(args), &args.io, all)
    });
    result("vsock", parts)
}

/// What the limits of sockets are measured with.
pub(super) fn to_host() -> Pattern {
    Stream::ToHost.pattern(&VsockArgs {
        size: Some(4096),
        ..VsockArgs::all()
    })
}

/// Limited, with the host's part.
pub(super) fn limited<'a>(starter: &'a shoal::Starter, path: &'a Path, limits: Limits) -> Contender<'a> {
    ours(starter, path, limits).with_host(When::GuestListens, || Worker::start(path, Stream::ToHost))
}

fn ours<'a>(starter: &'a shoal::Starter, path: &'a Path, limits: Limits) -> Contender<'a> {
    Contender::new("shoal", "", move |words| {
        if path.exists() {
            std::fs::remove_file(path)?;
        }
        let listener =
            UnixListener::bind(path).with_context(|| format!("listening on {}", path.display()))?;
        let broker = sys::seqpacket_listener().context("making the broker's socket")?;
        let spec = AnyDeviceSpec::Vsock(VsockSpec {
            cid: 3,
            listener: shoal::slot(0),
            broker: shoal::slot(1),
            limits,
        });
        let vmm = starter.start(words, vec![spec], &[OwnedFd::from(listener), broker])?;
        Ok(Box::new(vmm) as Box<dyn Vmm>)
    })
}

/// A thread at the host's end of the stream. It ends with the stream, which ends with the VMM.
struct Worker(JoinHandle<Result<()>>);

impl Worker {
    fn start(path: &Path, stream: Stream) -> Result<Box<dyn HostPart>> {
        let mut socket = UnixStream::connect(path).context("connecting to the guest's socket")?;
        writeln!(socket, "CONNECT {PORT}").context("asking for a connection to the guest")?;
        let work = move || {
            let mut from = BufReader::with_capacity(64 << 10, socket.try_clone()?);
            let mut answer = String::new();
            from.read_line(&mut answer)?;
            ensure!(answer.starts_with("OK "), "the guest's answer was {answer:?}");
            match stream {
                Stream::ToHost => take(&mut from),
                Stream::ToGuest => give(&mut socket),
                Stream::Ping => echo(&mut from, &mut socket),
            }
        };
        let thread = std::thread::Builder::new().spawn(work)?;
        Ok(Box::new(Self(thread)))
    }
}

impl HostPart for Worker {
    fn finish(self: Box<Self>, _run: &mut Run, _warm: u64) -> Result<()> {
        match self.0.join() {
            Ok(result) => result,
            Err(_) => bail!("the host's thread panicked"),
        }
    }
}

/// The byte at `at` of a stream (guest-images/probe/guest/vsock.c).
fn byte(at: u64) -> u8 {
    ((at / 8 + 1).wrapping_mul(PATTERN) >> (at % 8 * 8)) as u8
}

/// Takes all that comes, and looks at the first and the last byte of each piece.
fn take(from: &mut impl BufRead) -> Result<()> {
    let mut at = 0_u64;
    loop {
        let piece = match from.fill_buf() {
            Ok([]) => return Ok(()),
            Ok(piece) => piece,
            Err(e) if is_end(&e) => return Ok(()),
            Err(e) => return Err(e).context("reading what the guest sends"),
        };
        let (n, last) = (piece.len(), at + piece.len() as u64 - 1);
        let ends = (piece.first().copied(), piece.last().copied());
        ensure!(
            ends == (Some(byte(at)), Some(byte(last))),
            "what came from the guest between its bytes {at} and {last} is not what it sent"
        );
        at += n as u64;
        from.consume(n);
    }
}

/// Gives without end.
fn give(to: &mut impl Write) -> Result<()> {
    let mut piece = vec![0; 64 << 10];
    let mut word = 1_u64;
    loop {
        for bytes in piece.chunks_exact_mut(8) {
            bytes.copy_from_slice(&word.wrapping_mul(PATTERN).to_le_bytes());
            word += 1;
        }
        match to.write_all(&piece) {
            Err(e) if is_end(&e) => return Ok(()),
            r => r.context("writing to the guest")?,
        }
    }
}

/// Gives back all that comes.
fn echo(from: &mut impl Read, to: &mut impl Write) -> Result<()> {
    let mut piece = vec![0; 64 << 10];
    loop {
        let n = match from.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(e) if is_end(&e) => return Ok(()),
            Err(e) => return Err(e).context("reading what the guest sends"),
        };
        match to.write_all(&piece[..n]) {
            Err(e) if is_end(&e) => return Ok(()),
            r => r.context("writing to the guest")?,
        }
    }
}

/// The VMM has ended.
fn is_end(e: &std::io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ECONNRESET | libc::EPIPE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_looked_at() {
        let words = (1..=100_u64).flat_map(|n| n.wrapping_mul(PATTERN).to_le_bytes());
        let mut good: Vec<u8> = words.collect();
        assert!(good.iter().enumerate().all(|(at, &b)| byte(at as u64) == b));
        take(&mut &good[..]).unwrap();
        good.pop();
        take(&mut &good[..]).unwrap();
        if let Some(last) = good.last_mut() {
            *last ^= 1;
        }
        let error = take(&mut &good[..]).unwrap_err().to_string();
        assert!(error.contains("is not what it sent"), "{error}");
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(size("61440"), Ok(61_440));
        for bad in ["0", "12", "61448", "x", ""] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
