//! A disk over a file in the page cache.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use clap::ValueEnum;
use shoal_devices::limit::Limits;
use shoal_devices::spec::AnyDeviceSpec;
use shoal_devices::virtio::block::{BlockSpec, EngineKind};
use tempfile::NamedTempFile;

use super::linux::{self, GuestArgs};
use super::results::IoResult;
use super::watch::Vmm;
use super::{Contender, IoArgs, Pattern, qemu, result, shoal, take_turns};
use crate::peers::{PeerArg, usable};

/// What `block` measures.
#[derive(clap::Args)]
pub struct BlockArgs {
    #[command(flatten)]
    pub(super) io: IoArgs,
    /// What the guest does (repeatable) [default: rand-read, rand-write, read; of --fio the first two]
    #[arg(long = "pattern", value_enum)]
    patterns: Vec<Access>,
    /// Bytes of each request
    #[arg(long, default_value_t = 4096, value_parser = size)]
    pub(super) size: u64,
    /// Requests in flight
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u64).range(1..=64))]
    pub(super) depth: u64,
    /// Size of the disk (MiB): its file is written anew, and stays in the page cache [default: 256; in the lab 64]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    pub(super) disk_mib: Option<u64>,
    /// With --peer: how QEMU does its requests
    #[arg(long, value_delimiter = ',', default_values = QEMU_AIO, value_parser = QEMU_AIO, value_name = "SORT,…")]
    pub(super) qemu_aio: Vec<String>,
    /// By fio in a Linux guest, instead of the probe guest
    #[arg(long, group = "tool", requires = "linux_place", conflicts_with = "check")]
    fio: bool,
    #[command(flatten)]
    pub(super) guest: GuestArgs,
}

impl BlockArgs {
    /// What `all` runs.
    pub fn all(peers: &[PeerArg]) -> Self {
        Self {
            io: IoArgs::all(peers),
            patterns: vec![],
            size: 4096,
            depth: 32,
            disk_mib: None,
            // The faster one.
            qemu_aio: vec!["io_uring".into()],
            fio: false,
            guest: GuestArgs::none(),
        }
    }

    /// What `all` runs of a Linux guest.
    pub fn all_fio() -> Self {
        Self {
            io: IoArgs::default(),
            fio: true,
            guest: GuestArgs::lab(),
            patterns: vec![Access::RandRead],
            ..Self::all(&[])
        }
    }

    /// How it is measured.
    pub fn method(&self) -> &'static str {
        match (self.fio, self.guest.in_lab()) {
            (false, _) => super::METHOD,
            (true, false) => linux::disk::HERE,
            (true, true) => linux::disk::LAB,
        }
    }

    pub(super) fn patterns(&self) -> &[Access] {
        match (&self.patterns[..], self.fio) {
            ([], false) => &[Access::RandRead, Access::RandWrite, Access::Read],
            ([], true) => &[Access::RandRead, Access::RandWrite],
            (patterns, _) => patterns,
        }
    }

    /// What a pattern is called.
    pub(super) fn name(&self, access: Access) -> String {
        let (_, name, _) = access.describe();
        match access {
            Access::Flush => format!("{name}, {} in flight", self.depth),
            _ => format!("{} {name}, {} in flight", bytes(self.size), self.depth),
        }
    }
}

/// How QEMU can do requests of a page-cached file.
const QEMU_AIO: [&str; 2] = ["threads", "io_uring"];
/// Size of the disk, if nobody says another (MiB).
pub(super) const DISK_MIB: u64 = 256;
/// The guest has 6 MiB of buffers.
const BUFFERS: u64 = 6 << 20;
const SECTOR: u64 = 512;

fn size(text: &str) -> Result<u64, String> {
    let n: u64 = text.parse().map_err(|_| "not a number".to_owned())?;
    match n > 0 && n.is_multiple_of(SECTOR) && n <= 1 << 20 {
        true => Ok(n),
        false => Err(format!("{n} is no multiple of {SECTOR} up to 1 MiB")),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Access {
    RandRead,
    RandWrite,
    Read,
    Write,
    Flush,
}

impl Access {
    /// The guest's word, what people call it, and operations for some tenths of a second.
    pub(super) fn describe(self) -> (&'static str, &'static str, u64) {
        match self {
            Self::RandRead => ("randread", "random reads", 150_000),
            Self::RandWrite => ("randwrite", "random writes", 100_000),
            Self::Read => ("read", "reads in order", 150_000),
            Self::Write => ("write", "writes in order", 100_000),
            Self::Flush => ("flush", "flushes", 20_000),
        }
    }

    fn pattern(self, args: &BlockArgs) -> Pattern {
        let (word, _, ops) = self.describe();
        let (size, depth) = (args.size, args.depth);
        Pattern {
            name: args.name(self),
            what: "block",
            words: format!("depth={depth} size={size} block={word}"),
            bytes_per_op: if self == Self::Flush { 0 } else { size },
            ops: (ops * 4096 / size.max(4096)).max(1000),
        }
    }
}

/// As people write it.
fn bytes(n: u64) -> String {
    match n {
        _ if n.is_multiple_of(1 << 20) => format!("{} MiB", n >> 20),
        _ if n.is_multiple_of(1 << 10) => format!("{} KiB", n >> 10),
        _ => format!("{n} B"),
    }
}

/// Runs the patterns one after the other.
pub fn measure(args: &BlockArgs) -> Result<IoResult> {
    if args.fio {
        return linux::disk::measure(args);
    }
    anyhow::ensure!(
        args.size * args.depth <= BUFFERS,
        "{} requests of {} bytes are more than the guest's {} MiB of buffers: take a smaller --depth or --size",
        args.depth,
        args.size,
        BUFFERS >> 20
    );
    let disk = disk(args.disk_mib.unwrap_or(DISK_MIB) << 20)?;
    let (starter, qemus) = (shoal::Starter::new()?, usable(&args.io.peers, qemu::Starter::new));
    let parts = args.patterns().iter().map(|access| {
        let mut all: Vec<_> = [EngineKind::Sync, EngineKind::IoUring]
            .map(|engine| ours(&starter, engine, Limits::default(), &disk))
            .into();
        all.extend(
            qemus
                .iter()
                .flat_map(|q| args.qemu_aio.iter().map(|aio| theirs(q, aio, &disk))),
        );
        take_turns(&access.pattern(args), &args.io, all)
    });
    result("block", parts)
}

/// A file in the page cache that holds the guest's pattern (guest-images/probe/guest/block.c).
pub(super) fn disk(size: u64) -> Result<NamedTempFile> {
    let making = || {
        format!(
            "writing a disk of {} MiB to the folder for temporary files",
            size >> 20
        )
    };
    let file = NamedTempFile::new().with_context(making)?;
    let mut out = BufWriter::with_capacity(1 << 20, file.as_file());
    for n in 1..=size / 8 {
        out.write_all(&n.wrapping_mul(PATTERN).to_le_bytes())
            .with_context(making)?;
    }
    out.flush().with_context(making)?;
    drop(out);
    // Nothing is written back while it is measured.
    file.as_file().sync_all().with_context(making)?;
    Ok(file)
}

const PATTERN: u64 = 0x9e37_79b9_7f4a_7c15;

/// What the limits of a disk are measured with.
pub(super) fn random_reads() -> Pattern {
    Access::RandRead.pattern(&BlockArgs::all(&[]))
}

/// Shoal's, with one of its engines.
pub(super) fn ours<'a>(
    starter: &'a shoal::Starter,
    engine: EngineKind,
    limits: Limits,
    disk: &'a NamedTempFile,
) -> Contender<'a> {
    Contender::new(name_of(engine), "", move |words| {
        let devices = vec![device(0, engine, limits)];
        let vmm = starter.start(words, devices, &[open(disk)?])?;
        Ok(Box::new(vmm) as Box<dyn Vmm>)
    })
}

/// What Shoal with an engine is called.
pub(super) fn name_of(engine: EngineKind) -> &'static str {
    match engine {
        EngineKind::Sync => "shoal, sync",
        EngineKind::IoUring => "shoal, io_uring",
    }
}

/// The disk, whose descriptor is at `place` among those of devices.
pub(super) fn device(place: u16, engine: EngineKind, limits: Limits) -> AnyDeviceSpec {
    AnyDeviceSpec::Block(BlockSpec {
        id: "perf".into(),
        fd: shoal::slot(place),
        engine,
        limits,
        ..BlockSpec::default()
    })
}

/// The disk's file, to read and write.
pub(super) fn open(disk: &NamedTempFile) -> Result<OwnedFd> {
    Ok(File::options().read(true).write(true).open(disk.path())?.into())
}

fn theirs<'a>(qemu: &'a qemu::Starter, aio: &'a str, disk: &'a NamedTempFile) -> Contender<'a> {
    Contender::new(&qemu_s_name(aio), qemu.version(), move |words| {
        let mut arguments = qemu_s_disk(aio, disk);
        arguments.extend(["-device", "virtio-blk-device,drive=disk,iothread=io0"].map(Into::into));
        Ok(Box::new(qemu.start(words, &arguments)?) as Box<dyn Vmm>)
    })
}

/// What QEMU with a sort of I/O is called.
pub(super) fn qemu_s_name(aio: &str) -> String {
    format!("qemu microvm, aio={aio}")
}

/// docs/devel/multiple-iothreads.txt, docs/system/qemu-block-drivers: a thread of its own (`io0`) for the disk (`disk`); the
/// page cache used as it is here (`cache=writeback`), for which `aio` is `threads` or `io_uring`: `native` needs O_DIRECT.
pub(super) fn qemu_s_disk(aio: &str, disk: &NamedTempFile) -> Vec<OsString> {
    let mut drive = OsString::from("if=none,id=disk,format=raw,cache=writeback,aio=");
    drive.push(aio);
    drive.push(",file=");
    drive.push(disk.path());
    vec!["-object".into(), "iothread,id=io0".into(), "-drive".into(), drive]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_checked() {
        assert_eq!(size("4096"), Ok(4096));
        for bad in ["0", "100", "1049088", "", "-1", "4k"] {
            assert!(size(bad).is_err(), "{bad}");
        }
        assert_eq!([512, 4096, 3 << 20].map(bytes), ["512 B", "4 KiB", "3 MiB"]);
    }

    #[test]
    fn the_disk_holds_the_pattern() {
        let disk = disk(1 << 20).unwrap();
        let content = std::fs::read(disk.path()).unwrap();
        assert_eq!(content.len(), 1 << 20);
        assert_eq!(content[..8], PATTERN.to_le_bytes());
        assert_eq!(content[4096..4104], 513_u64.wrapping_mul(PATTERN).to_le_bytes());
    }
}
