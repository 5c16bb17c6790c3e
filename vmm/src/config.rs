//! Checks a [`VmConfig`] once. What comes out can be built without any further question about its numbers.

use shoal_devices::legacy::console_ring::CAPACITY;
use shoal_devices::spec::AnyDeviceSpec;
use shoal_devices::virtio::DeviceKind;
use shoal_devices::virtio::block::EngineKind;
use shoal_seccomp::ThreadKind;

use crate::arch::x86_64::layout::{
    CMDLINE_MAX, GAP_START, HIGH_MEMORY, PAGE, VIRTIO_GSIS, VIRTIO_MMIO, VIRTIO_MMIO_STRIDE,
};
use crate::kernel::{MAX_INITRD, MAX_RANGES};
use crate::protocol::{ConsoleConfig, Failure, KernelEntry, KernelLayout, KernelRange, VmConfig};

/// Most vCPUs of one guest.
pub const MAX_VCPUS: u8 = 32;
/// Least memory of a guest (bytes).
pub const MIN_MEMORY: u64 = 16 << 20;
/// Most memory of a guest (bytes).
pub const MAX_MEMORY: u64 = 1 << 40;
/// A guest's memory is a multiple of this (bytes).
pub const MEMORY_STEP: u64 = 1 << 20;
/// Most virtio devices of one guest: each has an interrupt of its own.
pub const MAX_DEVICES: usize = VIRTIO_GSIS.len();
/// Longest guest id.
pub const MAX_GUEST_ID: usize = 64;
/// Largest setup header of a bzImage that boot parameters have room for (bytes).
const MAX_SETUP_HEADER: usize = 0x290 - 0x1f1;

/// A configuration is wrong.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{field}: {why}")]
pub struct ConfigError {
    /// Which part of the configuration.
    pub field: String,
    /// What is wrong, and what would be right.
    pub why: String,
}

impl From<ConfigError> for Failure {
    fn from(e: ConfigError) -> Self {
        Self {
            message: e.to_string(),
            field: Some(e.field),
        }
    }
}

fn refuse<T>(field: impl Into<String>, why: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError {
        field: field.into(),
        why: why.into(),
    })
}

/// A configuration that was checked, with what follows from it.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidConfig {
    /// The checked configuration.
    pub config: VmConfig,
    /// The command line with what announces the devices, without terminator.
    pub cmdline: String,
    /// Where the initial RAM disk lies (guest-physical), when there is one.
    pub initrd_at: Option<u64>,
}

impl VmConfig {
    /// Which filter the event loop's thread needs.
    pub fn event_loop_kind(&self) -> ThreadKind {
        let rings =
            |d: &AnyDeviceSpec| matches!(d, AnyDeviceSpec::Block(b) if b.engine == EngineKind::IoUring);
        if self.devices.iter().any(rings) {
            ThreadKind::EventLoopUring
        } else {
            ThreadKind::EventLoop
        }
    }

    /// Checks everything that numbers can tell.
    ///
    /// # Errors
    /// The first field that is wrong, and why.
    pub fn validate(self) -> Result<ValidConfig, ConfigError> {
        check_guest_id(&self.guest_id)?;
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return refuse(
                "vcpus",
                format!("{} is not between 1 and {MAX_VCPUS}", self.vcpus),
            );
        }
        let bytes = self.memory.bytes;
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&bytes) || !bytes.is_multiple_of(MEMORY_STEP) {
            let why = format!("{bytes} bytes is not a whole number of MiB between 16 MiB and 1 TiB");
            return refuse("memory.bytes", why);
        }
        let low_end = bytes.min(GAP_START);
        check_kernel(&self.kernel.layout, low_end)?;
        let initrd_at = match &self.initrd {
            None => None,
            Some(initrd) => Some(place_initrd(initrd.len, self.kernel.layout.end, low_end)?),
        };
        if let ConsoleConfig::Ring { capacity, .. } = self.console
            && !CAPACITY.contains(&capacity)
        {
            let (least, most) = (CAPACITY.start() >> 10, CAPACITY.end() >> 10);
            let why = format!("{capacity} bytes is not between {least} KiB and {most} KiB");
            return refuse("console.capacity", why);
        }
        check_devices(&self)?;
        let cmdline = full_cmdline(&self.cmdline, self.devices.len())?;
        Ok(ValidConfig {
            config: self,
            cmdline,
            initrd_at,
        })
    }
}

/// Checks an id: 1 to 64 letters, digits or dashes.
///
/// # Errors
/// Says what is wrong with it.
pub fn check_guest_id(id: &str) -> Result<(), ConfigError> {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if id.is_empty() || id.len() > MAX_GUEST_ID || !id.chars().all(good) {
        return refuse("guest_id", "an id has 1 to 64 letters, digits or dashes");
    }
    Ok(())
}

fn check_kernel(layout: &KernelLayout, low_end: u64) -> Result<(), ConfigError> {
    if layout.ranges.is_empty() || layout.ranges.len() > MAX_RANGES {
        return refuse(
            "kernel.layout.ranges",
            format!("{} ranges, not 1 to {MAX_RANGES}", layout.ranges.len()),
        );
    }
    let mut at = HIGH_MEMORY;
    for KernelRange { range: r, .. } in &layout.ranges {
        let aligned = r.start.is_multiple_of(PAGE) && r.len.is_multiple_of(PAGE) && r.len > 0;
        if !aligned || r.start < at || r.start.checked_add(r.len).is_none_or(|end| end > GAP_START) {
            return refuse(
                "kernel.layout.ranges",
                "not page-aligned, sorted and between 1 MiB and 3 GiB",
            );
        }
        at = r.start + r.len;
    }
    let end = at.max(layout.end);
    if end > low_end {
        return refuse(
            "kernel",
            format!(
                "the kernel needs guest memory up to {} MiB, the guest has {} MiB below 3 GiB: give it more memory",
                end.div_ceil(1 << 20),
                low_end >> 20
            ),
        );
    }
    let entry = match layout.entry {
        KernelEntry::Pvh { entry } => u64::from(entry),
        KernelEntry::Linux64 { entry } => entry,
    };
    if !layout
        .ranges
        .iter()
        .any(|r| entry >= r.range.start && entry - r.range.start < r.range.len)
    {
        return refuse(
            "kernel.layout.entry",
            format!("{entry:#x} lies in no range of the kernel"),
        );
    }
    if layout
        .setup_header
        .as_ref()
        .is_some_and(|h| h.len() > MAX_SETUP_HEADER)
    {
        return refuse(
            "kernel.layout.setup_header",
            "longer than boot parameters have room for",
        );
    }
    Ok(())
}

/// The initial RAM disk lies as high as it can, below 3 GiB and below 2 GiB as old kernels want it.
fn place_initrd(len: u64, kernel_end: u64, low_end: u64) -> Result<u64, ConfigError> {
    if len == 0 || len > MAX_INITRD {
        return refuse("initrd", format!("{len} bytes is not between 1 byte and 2 GiB"));
    }
    let top = low_end.min(1 << 31);
    let at = top
        .checked_sub(len.next_multiple_of(PAGE))
        .filter(|at| *at >= kernel_end);
    at.map_or_else(
        || {
            refuse(
                "initrd",
                format!(
                    "{} KiB do not fit between the kernel's end at {} KiB and the end of memory at {} KiB: \
                     give the guest more memory",
                    len.div_ceil(1024),
                    kernel_end.div_ceil(1024),
                    top >> 10
                ),
            )
        },
        Ok,
    )
}

fn check_devices(config: &VmConfig) -> Result<(), ConfigError> {
    if config.devices.len() > MAX_DEVICES {
        return refuse(
            "devices",
            format!("{} devices, at most {MAX_DEVICES} fit", config.devices.len()),
        );
    }
    for (i, device) in config.devices.iter().enumerate() {
        let queues = match device {
            AnyDeviceSpec::Block(disk) => usize::from(disk.queues),
            AnyDeviceSpec::Net(net) => net.fds.len(),
            _ => continue,
        };
        let vcpus = config.vcpus;
        if !(1..=usize::from(vcpus)).contains(&queues) {
            let why = format!("{queues} queues, not 1 to {vcpus}: one for each vCPU at most");
            return refuse(format!("devices[{i}].queues"), why);
        }
    }
    if config
        .devices
        .iter()
        .filter(|d| d.kind() == DeviceKind::Vsock)
        .count()
        > 1
    {
        return refuse("devices", "a guest has one vsock device at most");
    }
    Ok(())
}

/// What announces device `index` to a kernel without ACPI (Linux's `virtio_mmio.device` parameter).
fn announcement(index: usize) -> String {
    let base = VIRTIO_MMIO + index as u64 * VIRTIO_MMIO_STRIDE;
    format!("virtio_mmio.device=4K@{base:#x}:{}", VIRTIO_GSIS[index])
}

/// Most bytes of a command line with `devices` devices.
pub fn cmdline_room(devices: usize) -> usize {
    let announced: usize = (0..devices.min(MAX_DEVICES))
        .map(|i| announcement(i).len() + 1)
        .sum();
    (CMDLINE_MAX - 1).saturating_sub(announced)
}

/// Puts the devices' announcements before a ` -- `, behind which everything belongs to PID 1.
fn full_cmdline(given: &str, devices: usize) -> Result<String, ConfigError> {
    if let Some(c) = given.chars().find(|c| !(' '..='~').contains(c)) {
        return refuse(
            "cmdline",
            format!("holds {c:?}; only printable ASCII characters can be handed over"),
        );
    }
    let room = cmdline_room(devices);
    if given.len() > room {
        return refuse(
            "cmdline",
            format!(
                "{} bytes, at most {room} fit beside {devices} devices",
                given.len()
            ),
        );
    }
    let (kernel, init) = match given.find(" -- ") {
        Some(at) => given.split_at(at),
        None => (given, ""),
    };
    let mut line = kernel.to_owned();
    for i in 0..devices {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(&announcement(i));
    }
    line.push_str(init);
    Ok(line)
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
