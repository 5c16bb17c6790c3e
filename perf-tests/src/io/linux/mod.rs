//! I/O of a Linux guest: fio, iperf3 and ping as people run them, in Shoal and in QEMU, in turns. The lab runs the same.

pub mod disk;
pub(super) mod fio;
pub(super) mod guest;
mod image;
pub(super) mod iperf3;
pub mod net;
pub(super) mod ping;
mod server;

use std::cell::RefCell;
use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use shoal_devices::spec::AnyDeviceSpec;
use shoal_devices::virtio::block::BlockSpec;
use shoal_vmm::protocol::Pages;

use super::results::{IoPart, IoResult};
use super::{Contender, IoArgs, Plan, in_turns, shoal};
use crate::driver::{Guest, images};
use crate::machine::Machine;
use crate::results::Measured;
use guest::{Tool, once};
pub use image::missing;

/// Memory of the guest (MiB).
const MEMORY_MIB: u64 = 256;

/// Where a Linux guest runs, and what it is made of.
#[derive(clap::Args)]
pub struct GuestArgs {
    /// The Linux guest runs in the lab, where time is counted in instructions: the same on every machine
    #[arg(long, group = "linux_place", requires = "tool")]
    lab: bool,
    /// The Linux guest runs on this machine's /dev/kvm, which has to be hardware's
    #[arg(long, group = "linux_place", requires = "tool")]
    here: bool,
    /// The Linux guest's kernel [default: Shoal's own, as `make images` leaves it]
    #[arg(long, value_name = "FILE", requires = "tool")]
    kernel: Option<PathBuf>,
    /// The Linux guest's root disk (EROFS) [default: one made of this machine's program and its libraries]
    #[arg(long, value_name = "FILE", requires = "tool")]
    root: Option<PathBuf>,
}

impl GuestArgs {
    /// What `all` runs.
    pub fn lab() -> Self {
        Self {
            lab: true,
            ..Self::none()
        }
    }

    /// No Linux guest.
    pub fn none() -> Self {
        Self {
            lab: false,
            here: false,
            kernel: None,
            root: None,
        }
    }

    /// In the lab, not here.
    pub fn in_lab(&self) -> bool {
        self.lab
    }
}

/// The files that a Linux guest boots from.
struct Files {
    kernel: PathBuf,
    root: PathBuf,
    /// The root disk, where it was made for this run.
    _made: Option<image::Image>,
}

impl Files {
    fn find(args: &GuestArgs, program: &str, destination: &str) -> Result<Self> {
        let kernel = match &args.kernel {
            Some(kernel) => kernel.clone(),
            None => images()?.join("vmlinux"),
        };
        let found = |path: &Path, what| {
            path.canonicalize().with_context(|| {
                format!(
                    "{}: run `make images`, or name the guest's {what}",
                    path.display()
                )
            })
        };
        let kernel = found(&kernel, "kernel (--kernel)")?;
        let made = match &args.root {
            Some(_) => None,
            None => Some(image::Image::with(program, destination)?),
        };
        let root = args.root.as_deref().or(made.as_ref().map(|i| i.path.as_path()));
        let root = found(root.context("there is no root disk")?, "root disk (--root)")?;
        Ok(Self {
            kernel,
            root,
            _made: made,
        })
    }

    fn open_root(&self) -> Result<File> {
        File::open(&self.root).with_context(|| format!("opening the root disk {}", self.root.display()))
    }

    /// The root disk for QEMU. Its tables list the buses from the last to the first, so that this disk is /dev/vda; what is
    /// measured is on bus 1. (A device on bus 0 is found by Linux, but QEMU 7.2's interrupts of it do not arrive.)
    fn qemu_root(&self) -> Vec<OsString> {
        let mut drive = OsString::from("if=none,id=root,format=raw,read-only=on,file=");
        drive.push(&self.root);
        let device = "virtio-blk-device,drive=root,bus=virtio-mmio-bus.2";
        vec!["-drive".into(), drive, "-device".into(), device.into()]
    }

    fn guest(&self) -> Result<Guest> {
        let what = || format!("loading the kernel {}", self.kernel.display());
        let file = File::open(&self.kernel).with_context(what)?;
        Ok(Guest {
            kernel: shoal_vmm::kernel::load(&file).with_context(what)?,
            initrd: None,
            cmdline: String::new(),
            memory_mib: MEMORY_MIB,
            pages: Pages::Host,
        })
    }
}

/// Refuses what cannot be measured: Linux on a machine on which it does not boot, peers in the lab.
fn check(io: &IoArgs, in_lab: bool) -> Result<()> {
    if in_lab {
        ensure!(
            io.peers.is_empty(),
            "--peer goes with --here: the lab has no other VMM"
        );
        return Ok(());
    }
    let kvm = Machine::here().kvm;
    ensure!(
        kvm.starts_with("hardware"),
        "Linux guests do not boot on this machine's KVM, which is: {kvm}; --lab runs them anywhere"
    );
    Ok(())
}

/// This is the lab, in which time is counted in instructions.
fn in_lab() -> bool {
    std::env::var_os("SHOAL_LAB").is_some_and(|how| how == "icount")
}

/// Runs `tool` in all contenders' guests in turns.
fn part(
    io: &IoArgs,
    name: &str,
    bytes_per_op: u64,
    ops: u64,
    tool: &dyn Tool,
    all: Vec<Contender<'_>>,
) -> Result<Option<IoPart>> {
    let version = RefCell::new(String::new());
    let plan = Plan {
        name: format!("{}, {name}", tool.name()),
        bytes_per_op,
        ops,
        // What a program does before it begins and after its end would tell the more, the fewer they are.
        few: ops,
        // In the lab nothing gets warm, and no counter is disturbed.
        warm_up: u32::from(!in_lab()),
        turns: io.turns.unwrap_or(if in_lab() { 1 } else { 5 }),
        counted: if in_lab() { 1 } else { super::COUNTED_TURNS },
    };
    let part = in_turns(&plan, all, |contender, ops, count| {
        let outcome = once(contender, tool, ops, count)?;
        version.replace(outcome.version);
        Ok(outcome.run)
    })?;
    Ok(part.map(|part| IoPart {
        name: format!("Linux guest, {}: {name}", version.borrow()),
        ..part
    }))
}

/// Runs this program with `words` in the lab, for a Linux guest on the lab's /dev/kvm; `more` files go with it.
fn lab(words: Vec<OsString>, io: &IoArgs, files: &Files, more: &[PathBuf]) -> Result<IoResult> {
    let mut inside = words;
    inside.extend(["--here".into(), "--json".into()]);
    inside.extend(["--kernel".into(), files.kernel.clone().into()]);
    inside.extend(["--root".into(), files.root.clone().into()]);
    for (name, n) in [("--ops", io.ops), ("--turns", io.turns.map(u64::from))] {
        inside.extend(n.into_iter().flat_map(|n| [name.into(), n.to_string().into()]));
    }
    let copies: Vec<&PathBuf> = [&files.kernel, &files.root].into_iter().chain(more).collect();
    match crate::lab::run(&inside, &copies)?.measured {
        Measured::Io(io) => Ok(io),
        _ => bail!("the lab printed another kind of result"),
    }
}

/// The root disk, whose descriptor is the first.
fn root() -> AnyDeviceSpec {
    AnyDeviceSpec::Block(BlockSpec {
        id: "root".into(),
        fd: shoal::slot(0),
        read_only: true,
        ..BlockSpec::default()
    })
}

/// What a value is called on the command line.
fn value_name(value: &impl clap::ValueEnum) -> OsString {
    let name = value.to_possible_value();
    name.map_or_else(OsString::new, |n| n.get_name().into())
}
