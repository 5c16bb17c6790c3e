//! fio on a disk over a file in the page cache.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result, ensure};
use shoal_devices::spec::AnyDeviceSpec;
use shoal_devices::virtio::block::{BlockSpec, EngineKind};
use tempfile::NamedTempFile;

use super::super::block::{Access, BlockArgs, DISK_MIB};
use super::super::results::IoResult;
use super::super::watch::Vmm;
use super::super::{Contender, qemu, result, shoal};
use super::fio::{self, Fio};
use super::{Files, MEMORY_MIB, check, in_lab, lab, part, value_name};
use crate::peers::usable;

/// How it is measured with --here, and with --lab.
pub const HERE: &str = "Linux guest with fio (libaio, direct) on /dev/kvm; in turns";
pub const LAB: &str = "Linux guest with fio (libaio, direct) in the lab, time counted in instructions";

/// What the lab does in some seconds.
const LAB_OPS: u64 = 2000;
const LAB_DISK_MIB: u64 = 64;

/// Runs the patterns one after the other.
pub fn measure(args: &BlockArgs) -> Result<IoResult> {
    let in_lab = args.guest.in_lab();
    check(&args.io, in_lab)?;
    args.patterns()
        .iter()
        .try_for_each(|&access| check_access(access))?;
    let files = Files::find(&args.guest, fio::PROGRAM, fio::PATH)?;
    match in_lab {
        true => lab(lab_words(args), &args.io, &files, &[]),
        false => here(args, &files),
    }
}

/// What the program in the lab is asked for.
fn lab_words(args: &BlockArgs) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec!["block".into(), "--fio".into()];
    for access in args.patterns() {
        words.extend(["--pattern".into(), value_name(access)]);
    }
    for (name, value) in [
        ("--size", args.size),
        ("--depth", args.depth),
        ("--disk-mib", args.disk_mib.unwrap_or(LAB_DISK_MIB)),
    ] {
        words.extend([name.into(), value.to_string().into()]);
    }
    words
}

fn check_access(access: Access) -> Result<()> {
    ensure!(
        access != Access::Flush,
        "fio does no flushes alone: take another --pattern"
    );
    Ok(())
}

fn here(args: &BlockArgs, files: &Files) -> Result<IoResult> {
    let disk = disk(args.disk_mib.unwrap_or(DISK_MIB))?;
    let starter = shoal::Starter::with(files.guest()?)?;
    let qemus = usable(&args.io.peers, |arg| {
        qemu::Starter::linux(arg, &files.kernel, MEMORY_MIB)
    });
    let parts = args.patterns().iter().map(|&access| {
        // fio's words are the probe guest's.
        let (word, _, ops) = access.describe();
        let tool = Fio {
            access: word,
            size: args.size,
            depth: args.depth,
        };
        let mut all: Vec<_> = [EngineKind::Sync, EngineKind::IoUring]
            .map(|engine| ours(&starter, engine, files, &disk))
            .into();
        all.extend(
            qemus
                .iter()
                .flat_map(|q| ["threads", "io_uring"].map(|aio| theirs(q, aio, files, &disk))),
        );
        let ops = args.io.ops.unwrap_or(if in_lab() { LAB_OPS } else { ops });
        part(&args.io, &args.name(access), args.size, ops, &tool, all)
    });
    result("block", parts)
}

/// A file of so many MiB in the page cache, without holes.
fn disk(mib: u64) -> Result<NamedTempFile> {
    let making = || format!("writing a disk of {mib} MiB to the folder for temporary files");
    let mut file = NamedTempFile::new().with_context(making)?;
    let piece = vec![0x5a; 1 << 20];
    for _ in 0..mib {
        file.write_all(&piece).with_context(making)?;
    }
    // Nothing is written back while it is measured.
    file.as_file().sync_all().with_context(making)?;
    Ok(file)
}

fn ours<'a>(
    starter: &'a shoal::Starter,
    engine: EngineKind,
    files: &'a Files,
    disk: &'a NamedTempFile,
) -> Contender<'a> {
    let name = match engine {
        EngineKind::Sync => "shoal, sync",
        EngineKind::IoUring => "shoal, io_uring",
    };
    Contender::new(name, "", move |words| {
        let file = File::options().read(true).write(true).open(disk.path())?;
        let disk = BlockSpec {
            id: "perf".into(),
            fd: shoal::slot(1),
            engine,
            ..BlockSpec::default()
        };
        let devices = vec![super::root(), AnyDeviceSpec::Block(disk)];
        let vmm = starter.start(words, devices, &[files.open_root()?.into(), OwnedFd::from(file)])?;
        Ok(Box::new(vmm) as Box<dyn Vmm>)
    })
}

/// As in `block`: a thread of its own for the disk, and the page cache.
fn theirs<'a>(
    qemu: &'a qemu::Starter,
    aio: &'static str,
    files: &'a Files,
    disk: &'a NamedTempFile,
) -> Contender<'a> {
    let name = format!("qemu microvm, aio={aio}");
    Contender::new(&name, qemu.version(), move |words| {
        let mut drive = OsString::from("if=none,id=disk,format=raw,cache=writeback,aio=");
        drive.push(aio);
        drive.push(",file=");
        drive.push(disk.path());
        let mut arguments = files.qemu_root();
        arguments.extend([
            "-object".into(),
            "iothread,id=io0".into(),
            "-drive".into(),
            drive,
            "-device".into(),
            "virtio-blk-device,drive=disk,iothread=io0,bus=virtio-mmio-bus.1".into(),
        ]);
        Ok(Box::new(qemu.start(words, &arguments)?) as Box<dyn Vmm>)
    })
}
