//! fio on a disk over a file in the page cache.

use std::ffi::OsString;

use anyhow::{Result, ensure};
use shoal_devices::limit::Limits;
use shoal_devices::virtio::block::EngineKind;
use tempfile::NamedTempFile;

use super::super::block::{self, Access, BlockArgs, DISK_MIB};
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
    let disk = block::disk(args.disk_mib.unwrap_or(DISK_MIB) << 20)?;
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
                .flat_map(|q| args.qemu_aio.iter().map(|aio| theirs(q, aio, files, &disk))),
        );
        let ops = args.io.ops.unwrap_or(if in_lab() { LAB_OPS } else { ops });
        part(&args.io, &args.name(access), args.size, ops, &tool, all)
    });
    result("block", parts)
}

fn ours<'a>(
    starter: &'a shoal::Starter,
    engine: EngineKind,
    files: &'a Files,
    disk: &'a NamedTempFile,
) -> Contender<'a> {
    Contender::new(block::name_of(engine), "", move |words| {
        let devices = vec![super::root(), block::device(1, engine, Limits::default())];
        let vmm = starter.start(words, devices, &[files.open_root()?.into(), block::open(disk)?])?;
        Ok(Box::new(vmm) as Box<dyn Vmm>)
    })
}

fn theirs<'a>(
    qemu: &'a qemu::Starter,
    aio: &'a str,
    files: &'a Files,
    disk: &'a NamedTempFile,
) -> Contender<'a> {
    Contender::new(&block::qemu_s_name(aio), qemu.version(), move |words| {
        let mut arguments = files.qemu_root();
        arguments.extend(block::qemu_s_disk(aio, disk));
        let device = "virtio-blk-device,drive=disk,iothread=io0,bus=virtio-mmio-bus.1";
        arguments.extend(["-device", device].map(Into::into));
        Ok(Box::new(qemu.start(words, &arguments)?) as Box<dyn Vmm>)
    })
}
