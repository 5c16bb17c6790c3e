//! Shoal's VMM with a guest and devices.

use std::fs::File;
use std::io::{PipeReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context, Result};
use shoal_devices::spec::{AnyDeviceSpec, FdSlot};
use shoal_vmm::channel::HostChannel;
use shoal_vmm::protocol::{Request, VmConfig};

use super::watch::Vmm;
use crate::driver::{self, Guest, Reaped, sibling};

/// The first slot of a device's descriptors; those before are the machine's own (see `driver::config`).
pub const FIRST_SLOT: u16 = 3;

/// What starts it.
pub struct Starter {
    program: PathBuf,
    guest: Guest,
}

/// One that runs.
pub struct Running {
    /// The connection that it lives by.
    _host: HostChannel,
    child: Reaped,
    console: Option<PipeReader>,
}

impl Starter {
    /// With the probe guest's image loaded.
    pub fn new() -> Result<Self> {
        Self::with(super::probe_guest()?)
    }

    /// With a guest that has no initial RAM disk.
    pub fn with(guest: Guest) -> Result<Self> {
        Ok(Self {
            program: sibling("shoal-vmm")?,
            guest,
        })
    }

    /// Starts the guest with `words` to obey and `devices`, whose descriptors are `fds`, in slots from [`FIRST_SLOT`] on.
    pub fn start(&self, words: &str, devices: Vec<AnyDeviceSpec>, fds: &[OwnedFd]) -> Result<Running> {
        let (host, control) = driver::control_pair()?;
        let (console, console_end) = std::io::pipe()?;
        let kvm = File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .context("opening /dev/kvm")?;
        let config = VmConfig {
            cmdline: words.into(),
            devices,
            ..driver::config(&self.guest)
        };
        let mut all = vec![kvm.as_fd(), self.guest.kernel.memfd.as_fd(), console_end.as_fd()];
        all.extend(fds.iter().map(AsFd::as_fd));
        let child = driver::spawn_plain(&self.program, &control)?;
        drop(control);
        host.send(&Request::Start(Box::new(config)), &all)?;
        driver::answer(&host)?;
        Ok(Running {
            _host: host,
            child,
            console: Some(console),
        })
    }
}

/// A slot of a device's descriptors, by its place among them.
pub fn slot(place: u16) -> FdSlot {
    FdSlot(FIRST_SLOT + place)
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
        // Its log goes to standard error as it comes.
        String::new()
    }
}
