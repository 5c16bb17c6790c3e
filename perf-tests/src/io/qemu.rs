//! QEMU's microvm with a guest and devices, as its documentation recommends (docs/performance.md, I/O).

use std::ffi::OsString;
use std::fs::File;
use std::io::{PipeReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use tempfile::NamedTempFile;

use super::watch::Vmm;
use crate::boot::PROBE_MEMORY_MIB;
use crate::driver::Reaped;
use crate::peers::{PeerArg, version_of};

/// What starts it.
pub struct Starter {
    program: PathBuf,
    version: String,
    kernel: PathBuf,
    /// The kernel, where it is the probe guest.
    _image: Option<NamedTempFile>,
    machine: &'static str,
    memory_mib: u64,
}

/// docs/system/i386/microvm.rst: the smallest machine. The probe guest takes its devices from the command line, Linux from
/// ACPI's tables.
const PROBE: &str = "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=on,acpi=off";
const LINUX: &str = "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=on,acpi=on";

/// One that runs.
pub struct Running {
    child: Reaped,
    console: Option<PipeReader>,
    errors: File,
}

impl Starter {
    /// Asks the program for its version and writes the probe guest's image to a file.
    pub fn new(arg: &PeerArg) -> Result<Self> {
        let mut image = NamedTempFile::new().context("making a temporary file")?;
        image.write_all(shoal_probe::PROBE)?;
        let path = image.path().to_owned();
        Ok(Self {
            machine: PROBE,
            _image: Some(image),
            ..Self::linux(arg, &path, PROBE_MEMORY_MIB)?
        })
    }

    /// Asks the program for its version. The guest is a Linux kernel with so much memory.
    pub fn linux(arg: &PeerArg, kernel: &Path, memory_mib: u64) -> Result<Self> {
        let program = arg
            .qemu()
            .with_context(|| format!("{arg}: I/O is compared with qemu=PATH only"))?;
        Ok(Self {
            program: program.into(),
            version: version_of(arg)?,
            kernel: kernel.into(),
            _image: None,
            machine: LINUX,
            memory_mib,
        })
    }

    /// What it says of its version.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Starts the guest with `words` to obey and the devices of `arguments`.
    pub fn start(&self, words: &str, arguments: &[OsString]) -> Result<Running> {
        let (console, console_end) = std::io::pipe()?;
        let errors = tempfile::tempfile().context("making a temporary file")?;
        let mut command = Command::new(&self.program);
        command
            .args(["-M", self.machine])
            // QEMU 7.2 ends when KVM offers the register of these capabilities and then refuses its value (pagetable
            // KVM does), so the guest does without.
            .args(["-enable-kvm", "-cpu", "host,arch-capabilities=off", "-smp", "1"])
            .args(["-m", &format!("{}M", self.memory_mib)])
            // Devices of virtio 1, as everybody's drivers take them. Threads get names, so that the vCPU's is known.
            .args([
                "-global",
                "virtio-mmio.force-legacy=false",
                "-name",
                "probe,debug-threads=on",
            ])
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
                "-serial",
                "stdio",
            ])
            .args(arguments)
            .arg("-append")
            .arg(words)
            .arg("-kernel")
            .arg(&self.kernel)
            // A pipe that stays open: the end of standard input means "quit" to some.
            .stdin(Stdio::piped())
            .stdout(console_end)
            .stderr(errors.try_clone()?)
            // Ctrl-C in a terminal is for shoal-perf alone.
            .process_group(0);
        let child = command.spawn();
        let child = Reaped(child.with_context(|| format!("starting {}", self.program.display()))?);
        Ok(Running {
            child,
            console: Some(console),
            errors,
        })
    }
}

impl Vmm for Running {
    fn pid(&self) -> u32 {
        self.child.0.id()
    }

    fn console(&mut self) -> Result<Box<dyn Read + Send>> {
        Ok(Box::new(
            self.console.take().context("the console is read already")?,
        ))
    }

    fn last_words(&mut self) -> String {
        super::tail(&mut self.errors)
    }
}
