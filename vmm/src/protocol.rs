//! The messages between the host and one VMM, and what describes a machine.
//!
//! The two talk over a Unix seqpacket socket: one message per packet, a two-byte version before each body (postcard),
//! at most [`MAX_MESSAGE`] bytes, descriptors beside it (SCM_RIGHTS). The host asks, the VMM answers every
//! [`Request`] with one [`Message::Reply`] in order; between replies it sends [`Message::Event`]s.
//!
//! The VMM trusts its host for what the descriptors are, and nobody for numbers: every field is checked in
//! [`crate::config`].

use serde::{Deserialize, Serialize};
use shoal_devices::limit::DeviceLimits;
use shoal_devices::spec::{AnyDeviceSpec, FdSlot};

/// Version of this protocol. A peer with another version is refused before its body is read.
pub const VERSION: u16 = 2;
/// The largest message (bytes), version included.
pub const MAX_MESSAGE: usize = 128 << 10;
/// The most descriptors that one message carries.
pub const MAX_FDS: usize = 64;

/// What the host asks of a VMM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// Build the machine from this and from the descriptors sent along, and run it. Once per VMM.
    Start(Box<VmConfig>),
    /// Say how the guest is.
    Status,
    /// Press the guest's power button (ACPI). The guest decides what it does.
    PowerButton,
    /// Type into the serial console (at most [`MAX_CONSOLE_INPUT`] bytes).
    ConsoleInput(Vec<u8>),
    /// End the guest and the VMM now.
    Kill,
    /// Limit a device of a running guest otherwise than before. What waits for the old limits looks at the new ones.
    SetLimits {
        /// Its position in [`VmConfig::devices`].
        device: u8,
        /// What is not limited any more is missing.
        limits: DeviceLimits,
    },
}

/// The most bytes that one [`Request::ConsoleInput`] carries.
pub const MAX_CONSOLE_INPUT: usize = 4096;

/// What a VMM sends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Message {
    /// The answer to the oldest unanswered request.
    Reply(Result<Reply, Failure>),
    /// Something happened.
    Event(Event),
}

/// A request was done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// The guest runs ([`Request::Start`]).
    Started {
        /// When each step of the start was done.
        timeline: Timeline,
    },
    /// The guest's state ([`Request::Status`]).
    Status {
        /// Whether the machine has been started.
        running: bool,
        /// What was stamped so far.
        timeline: Timeline,
    },
    /// Done, nothing to tell.
    Done,
}

/// A request was refused or failed. The text says what was tried, on what, and why it failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Which part of the configuration is to blame (`memory.bytes`, `devices[2]`, …), if one is.
    pub field: Option<String>,
    /// The whole chain of causes, for a person.
    pub message: String,
}

/// What a VMM tells unasked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// A new stamp stands in the timeline (a device came up, the guest wrote a mark).
    Stamped(Stamp),
    /// The guest has ended; the VMM ends after this message.
    Exited {
        /// Why.
        reason: ExitReason,
    },
}

/// Why a guest ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitReason {
    /// The guest powered off (ACPI sleep state S5).
    PowerOff,
    /// The guest asked for a reset (i8042 or the ACPI reset register).
    Reset,
    /// A vCPU met a triple fault: the guest's kernel crashed beyond repair.
    TripleFault,
    /// KVM could not go on (KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_FAIL_ENTRY, or an error of KVM_RUN itself).
    KvmError {
        /// What KVM said.
        detail: String,
    },
    /// The host asked for it ([`Request::Kill`]), or its control connection ended and none can follow.
    Killed,
    /// The VMM met a bug of its own (a panic). Only ever in the exit record: nobody is left to send it.
    Bug {
        /// Where in its source.
        place: String,
    },
}

impl ExitReason {
    /// The VMM's exit code for this reason, for those who run it by hand.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::PowerOff => 0,
            Self::Reset => 64,
            Self::TripleFault => 65,
            Self::KvmError { .. } => 66,
            Self::Killed => 67,
            Self::Bug { .. } => 72,
        }
    }

    /// Reads an exit record written by a VMM (see [`VmConfig::exit_record`]).
    pub fn from_record(bytes: &[u8]) -> Option<Self> {
        let (version, body) = bytes.split_first_chunk::<2>()?;
        (u16::from_le_bytes(*version) == VERSION).then(|| postcard::from_bytes(body).ok())?
    }

    /// The bytes of an exit record.
    pub fn to_record(&self) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        bytes.extend(postcard::to_stdvec(self).unwrap_or_default());
        bytes
    }
}

/// A step of a start. In the order in which they come to pass on a cold boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Step {
    /// The VMM's `main` was entered.
    ProcessStarted,
    /// The start request was received and checked.
    ConfigReceived,
    /// The VM, its memory slots and its interrupt controllers exist.
    VmCreated,
    /// The vCPUs exist and are set up.
    VcpusCreated,
    /// The guest's memory is mapped, with kernel and initrd in it: they are placed while the VM is created.
    MemoryMapped,
    /// All devices exist and are wired.
    DevicesCreated,
    /// Boot parameters and tables are written.
    BootConfigured,
    /// The boot vCPU is about to execute its first instruction.
    FirstInstruction,
    /// The guest wrote its first byte to the console.
    FirstOutput,
    /// The guest first touched the serial port.
    ConsoleProbed,
    /// The guest first read a register of the virtio device with this index.
    DeviceProbed(u8),
    /// A driver set DRIVER_OK on the virtio device with this index.
    DriverOk(u8),
    /// The guest wrote this number to the mark port ([`crate::layout::MARK_PORT`]).
    Mark(u8),
}

/// The names that people see in timelines.
impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match self {
            Self::ProcessStarted => "vmm-main",
            Self::ConfigReceived => "config-received",
            Self::VmCreated => "vm-created",
            Self::VcpusCreated => "vcpus-created",
            Self::MemoryMapped => "memory-mapped",
            Self::DevicesCreated => "devices-created",
            Self::BootConfigured => "boot-configured",
            Self::FirstInstruction => "first-instruction",
            Self::FirstOutput => "first-output",
            Self::ConsoleProbed => "console-probed",
            Self::DeviceProbed(device) => return write!(f, "device-probed-{device}"),
            Self::DriverOk(device) => return write!(f, "driver-ok-{device}"),
            Self::Mark(mark::INIT) => "init",
            Self::Mark(mark::WORKLOAD) => "workload",
            Self::Mark(mark::WORKLOAD_ENDED) => "workload-ended",
            Self::Mark(mark::KERNEL_BEGUN) => "kernel-begun",
            Self::Mark(mark::CONSOLE_READY) => "console-ready",
            Self::Mark(mark::DEVICES_PROBED) => "devices-probed",
            Self::Mark(mark::ROOT_MOUNTED) => "root-mounted",
            Self::Mark(n) => return write!(f, "mark-{n}"),
        };
        f.write_str(name)
    }
}

/// Marks that Shoal's own guests write to the mark port.
pub mod mark {
    /// PID 1 has begun.
    pub const INIT: u8 = 1;
    /// The workload is about to be started.
    pub const WORKLOAD: u8 = 2;
    /// The workload has ended.
    pub const WORKLOAD_ENDED: u8 = 3;
    /// The kernel's C code has begun. This mark and the next three come from Shoal's own kernel.
    pub const KERNEL_BEGUN: u8 = 16;
    /// The kernel has set its console up.
    pub const CONSOLE_READY: u8 = 17;
    /// The kernel's drivers have looked for their devices.
    pub const DEVICES_PROBED: u8 = 18;
    /// The root file system is mounted.
    pub const ROOT_MOUNTED: u8 = 19;
}

/// A step and its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// What was reached.
    pub step: Step,
    /// CLOCK_MONOTONIC of the host (ns).
    pub at_ns: u64,
}

/// The stamps of one start, in the order of their time. The guest can add at most [`Timeline::MAX`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// The stamps.
    pub stamps: Vec<Stamp>,
}

impl Timeline {
    /// More stamps than these are dropped: the guest can write marks without end.
    pub const MAX: usize = 64;

    /// When `step` was first reached (ns of CLOCK_MONOTONIC).
    pub fn at(&self, step: Step) -> Option<u64> {
        self.stamps.iter().find(|s| s.step == step).map(|s| s.at_ns)
    }

    /// Adds a stamp; false when the timeline is full.
    pub fn push(&mut self, stamp: Stamp) -> bool {
        let room = self.stamps.len() < Self::MAX;
        if room {
            self.stamps.push(stamp);
        }
        room
    }
}

/// A machine. All descriptors are named by their position among those sent with the message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmConfig {
    /// The guest's id, for log lines (1 to 64 of `[A-Za-z0-9-]`).
    pub guest_id: String,
    /// `/dev/kvm`, opened for reading and writing by the host.
    pub kvm: FdSlot,
    /// Number of vCPUs, 1 to 32.
    pub vcpus: u8,
    /// The guest's memory.
    pub memory: MemoryConfig,
    /// The kernel, as [`crate::kernel::load`] prepared it.
    pub kernel: KernelConfig,
    /// An initial RAM disk.
    pub initrd: Option<InitrdConfig>,
    /// The kernel's command line. What announces the virtio-mmio devices is added to it by the VMM.
    pub cmdline: String,
    /// Where the serial console's output goes.
    pub console: ConsoleConfig,
    /// The virtio devices, in the order of their bus addresses.
    pub devices: Vec<AnyDeviceSpec>,
    /// A file that gets the [`ExitReason`] when the guest ends, so that a host that was away still learns it.
    pub exit_record: Option<FdSlot>,
}

/// The guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryConfig {
    /// Size in bytes, a multiple of 1 MiB from 16 MiB on.
    pub bytes: u64,
    /// Page size behind it.
    pub pages: Pages,
}

/// Which pages lie behind the guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pages {
    /// As the host's administrator has set it for programs that say nothing
    /// (`/sys/kernel/mm/transparent_hugepage/enabled`).
    #[default]
    Host,
    /// 4 KiB pages whatever the host's setting. Densest.
    Small,
    /// Transparent huge pages where the host allows them. Fastest to boot: a fault brings 2 MiB.
    Transparent,
}

/// A kernel in a sealed memfd whose offsets are guest-physical addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelConfig {
    /// The memfd.
    pub fd: FdSlot,
    /// What lies in it.
    pub layout: KernelLayout,
}

/// What a loaded kernel occupies, and how it is entered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelLayout {
    /// Page-aligned ranges of the memfd that come into the guest at the same guest-physical address, sorted.
    pub ranges: Vec<KernelRange>,
    /// End of all that the kernel needs at its place (its bss, its decompression area), guest-physical.
    pub end: u64,
    /// How it is entered.
    pub entry: KernelEntry,
    /// A bzImage's setup header, which goes into the boot parameters (from offset 0x1f1 of the file).
    pub setup_header: Option<Vec<u8>>,
}

/// A part of a kernel, in the memfd and in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelRange {
    /// Where it lies.
    pub range: PhysRange,
    /// Whether the guest gets a copy of its own, or a private mapping whose untouched pages all guests share.
    pub copied: bool,
}

/// A range of guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhysRange {
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// A kernel's entry point, by the protocol that it is entered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KernelEntry {
    /// x86/HVM direct boot (PVH): 32-bit protected mode, paging off, ebx = start info.
    Pvh {
        /// Guest-physical address.
        entry: u32,
    },
    /// The 64-bit entry of the Linux boot protocol: long mode, identity-mapped, rsi = boot parameters.
    Linux64 {
        /// Guest-physical address.
        entry: u64,
    },
}

/// An initial RAM disk in a sealed memfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitrdConfig {
    /// The memfd; the data begins at offset 0 and is padded with zeros to whole pages.
    pub fd: FdSlot,
    /// Length of the data in bytes.
    pub len: u64,
}

/// Where the serial console's output goes. The guest is never made to wait for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConsoleConfig {
    /// There is a serial port; what is written to it is dropped.
    Null,
    /// Written to a pipe, socket or file as it comes; dropped while that is full.
    Stream(FdSlot),
    /// Kept in a ring file (see `shoal_devices::legacy::console_ring`).
    Ring {
        /// The file.
        fd: FdSlot,
        /// Bytes of output that it holds.
        capacity: u64,
    },
}
