//! Types of Shoal's HTTP API: JSON over HTTP/1.1 on a Unix socket. The daemon and its clients share them; the OpenAPI
//! document is made from them.
//!
//! Requests refuse fields that they do not know. All paths are absolute and on the daemon's machine.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Body of `POST /v1/guests`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateGuest {
    /// A name, unique on the host: 1 to 63 letters, digits, `-`, `_` or `.`, beginning with a letter or digit, and not
    /// of the form of an id (12 hexadecimal digits).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "web-1", max_length = 63)]
    pub name: Option<String>,
    /// The kernel.
    pub kernel: Kernel,
    /// An initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub initrd: Option<Initrd>,
    /// Number of vCPUs.
    #[serde(default = "default_vcpus")]
    #[schema(minimum = 1, maximum = 32, default = 1)]
    pub vcpus: u32,
    /// Memory (MiB).
    #[serde(default = "default_memory_mib")]
    #[schema(minimum = 16, maximum = 1_048_576, default = 128)]
    pub memory_mib: u64,
    /// Disks, in the order in which the guest sees them (`/dev/vda`, …).
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// Network interfaces.
    #[serde(default)]
    pub networks: Vec<Network>,
    /// A socket device between host and guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub vsock: Option<Vsock>,
    /// The serial console.
    #[serde(default)]
    pub console: Console,
    /// The entropy device.
    #[serde(default)]
    pub rng: Rng,
    /// Start the guest at once. When that fails, the guest is not created.
    #[serde(default)]
    pub start: bool,
}

/// A kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// An ELF vmlinux or a bzImage.
    #[schema(example = "/var/lib/images/vmlinux")]
    pub path: String,
    /// The kernel's command line: printable ASCII, at most 2047 bytes less what announces the devices (about 40 bytes
    /// each).
    #[serde(default)]
    #[schema(example = "console=ttyS0 root=/dev/vda ro")]
    pub cmdline: String,
}

/// An initial RAM disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Initrd {
    /// A cpio archive, compressed as the kernel can read it.
    pub path: String,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// What the guest reads as the disk's serial number: 1 to 20 letters, digits, `-`, `_` or `.`; `disk0`, `disk1`, …
    /// when it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, max_length = 20)]
    pub id: Option<String>,
    /// A regular file or a block device; a multiple of 512 bytes. One guest at a time may write to it, or many may read
    /// it.
    pub path: String,
    /// Whether the guest can only read it.
    #[serde(default)]
    pub read_only: bool,
    /// How the guest's requests are done.
    #[serde(default)]
    pub engine: DiskEngine,
    /// How many requests are done, and how much data they move.
    #[serde(default, skip_serializing_if = "Limits::are_none")]
    pub limits: Limits,
    /// Number of request queues, at most one for each vCPU.
    #[serde(default = "one_queue")]
    #[schema(minimum = 1, maximum = 32, default = 1)]
    pub queues: u32,
}

impl Default for Disk {
    fn default() -> Self {
        Self {
            id: None,
            path: String::new(),
            read_only: false,
            engine: DiskEngine::default(),
            limits: Limits::default(),
            queues: one_queue(),
        }
    }
}

fn one_queue() -> u32 {
    1
}

/// Limits of a device. What is missing is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Bytes of data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub bandwidth: Option<Rate>,
    /// Requests or packets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub operations: Option<Rate>,
}

impl Limits {
    /// Nothing is limited.
    pub fn are_none(&self) -> bool {
        *self == Self::default()
    }
}

/// A rate, and how far it may be exceeded after a time of rest. A request that is larger than a burst passes, and is
/// paid for by those after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// How many per second.
    #[schema(minimum = 1, maximum = 1_099_511_627_776_u64, example = 10_000_000)]
    pub per_second: u64,
    /// How many gather while nothing is done; what comes in a tenth of a second when it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, minimum = 1, maximum = 1_099_511_627_776_u64)]
    pub burst: Option<u64>,
}

/// Body of `PATCH /v1/guests/{guest}/limits`. Each limit that is named takes the place of the one before as a whole: `{}`
/// lifts it. What is not named stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetLimits {
    /// Of disks, by their ids.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub disks: BTreeMap<String, Limits>,
    /// Of network interfaces, by their TAPs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub networks: BTreeMap<String, SetNetworkLimits>,
    /// Of the socket device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub vsock: Option<Limits>,
    /// Of the entropy device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub rng: Option<Limits>,
}

/// Limits of a network interface, each direction for itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetNetworkLimits {
    /// Packets to the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub rx: Option<Limits>,
    /// Packets from the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub tx: Option<Limits>,
}

/// The entropy device, which every guest has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rng {
    /// How much it gives.
    #[serde(default, skip_serializing_if = "Limits::are_none")]
    pub limits: Limits,
}

/// How a disk's requests are done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskEngine {
    /// One after the other, with blocking system calls.
    #[default]
    Sync,
    /// As many at once as the guest asks for, through io_uring. The host needs Linux 5.15 with io_uring allowed to the
    /// VMM (`sysctl kernel.io_uring_disabled`).
    IoUring,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// A TAP interface of the host. It must exist and be used by nobody else.
    #[schema(example = "tap0", max_length = 15)]
    pub tap: String,
    /// The guest's address (unicast); one is chosen when it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "02:00:00:00:00:01")]
    pub mac: Option<String>,
    /// Packets to the guest. What is held back waits in the interface's queue, which drops when it is full.
    #[serde(default, skip_serializing_if = "Limits::are_none")]
    pub rx_limits: Limits,
    /// Packets from the guest.
    #[serde(default, skip_serializing_if = "Limits::are_none")]
    pub tx_limits: Limits,
    /// Number of pairs of queues, at most one for each vCPU. More than one needs an interface that was made with
    /// `ip tuntap add NAME mode tap multi_queue`, one needs an interface made without.
    #[serde(default = "one_queue")]
    #[schema(minimum = 1, maximum = 32, default = 1)]
    pub queues: u32,
}

impl Default for Network {
    fn default() -> Self {
        Self {
            tap: String::new(),
            mac: None,
            rx_limits: Limits::default(),
            tx_limits: Limits::default(),
            queues: one_queue(),
        }
    }
}

/// A socket device (virtio-vsock).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's context id; guests on one host may have the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, minimum = 3, maximum = 4_294_967_294_u32, default = 3)]
    pub cid: Option<u32>,
    /// Packets both ways together.
    #[serde(default, skip_serializing_if = "Limits::are_none")]
    pub limits: Limits,
}

/// The serial console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// How much of the output is kept (KiB).
    #[serde(default = "default_keep_kib")]
    #[schema(minimum = 16, maximum = 65_536, default = 256)]
    pub keep_kib: u32,
}

impl Default for Console {
    fn default() -> Self {
        Self {
            keep_kib: default_keep_kib(),
        }
    }
}

fn default_vcpus() -> u32 {
    1
}

fn default_memory_mib() -> u64 {
    128
}

fn default_keep_kib() -> u32 {
    256
}

/// Body of `POST /v1/guests/{id}/stop`; an empty body means the defaults.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StopGuest {
    /// How long the guest may take before it is ended by force (ms); 0 ends it at once.
    #[serde(default = "default_deadline_ms")]
    #[schema(maximum = 3_600_000, default = 10_000)]
    pub deadline_ms: u64,
}

impl StopGuest {
    /// Longest deadline (ms).
    pub const MAX_DEADLINE_MS: u64 = 3_600_000;
}

impl Default for StopGuest {
    fn default() -> Self {
        Self {
            deadline_ms: default_deadline_ms(),
        }
    }
}

fn default_deadline_ms() -> u64 {
    10_000
}

/// A guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Guest {
    /// Its id: 12 hexadecimal digits. Every call takes the id or the name.
    #[schema(example = "5f3a09c1d2e4")]
    pub id: String,
    /// Its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub name: Option<String>,
    /// How it is.
    pub state: GuestState,
    /// Why it ended, in state `stopped`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub stopped: Option<Stopped>,
    /// Why it could not be started, in state `failed`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub error: Option<String>,
    /// The exit code of its workload, when the guest has told it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub exit_code: Option<i32>,
    /// The process of its VMM, while there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub pid: Option<u32>,
    /// When it was created (ms since 1970-01-01 UTC).
    pub created_unix_ms: u64,
    /// The kernel.
    pub kernel: Kernel,
    /// The initial RAM disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub initrd: Option<Initrd>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Memory.
    pub memory: Memory,
    /// Disks.
    pub disks: Vec<Disk>,
    /// Network interfaces.
    pub networks: Vec<Network>,
    /// The socket device.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub vsock: Option<GuestVsock>,
    /// The serial console.
    pub console: Console,
    /// The entropy device.
    #[serde(default)]
    pub rng: Rng,
    /// The steps of its last start, in the order of their time.
    pub timeline: Vec<TimelineStep>,
}

/// How a guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum GuestState {
    /// Described, never started.
    Created,
    /// Being started.
    Starting,
    /// It runs.
    Running,
    /// It runs and was asked to stop.
    Stopping,
    /// It ran and has ended.
    Stopped,
    /// It could not be started.
    Failed,
}

/// Why a guest ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Stopped {
    /// The reason.
    pub reason: StopReason,
    /// More about it, for a person.
    pub detail: String,
    /// The signal that ended the VMM, with `vmm-signal`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub signal: Option<i32>,
    /// The name of the forbidden system call, with `seccomp-kill`, where the host's kernel tells it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub syscall: Option<String>,
}

/// Why a guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum StopReason {
    /// It powered off.
    PowerOff,
    /// It asked for a reset.
    Reset,
    /// A vCPU met a triple fault.
    TripleFault,
    /// KVM could not go on.
    KvmError,
    /// It was ended by force.
    Killed,
    /// Its VMM was ended for a system call that its seccomp filter forbids.
    SeccompKill,
    /// Its VMM met a bug of its own.
    VmmBug,
    /// A signal ended its VMM.
    VmmSignal,
    /// Its VMM ended without saying why.
    VmmExit,
    /// It ended while no daemon watched, and left no record.
    Lost,
}

/// A guest's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Memory {
    /// What the guest was given (MiB).
    pub configured_mib: u64,
    /// What it costs now. Only when one guest that runs is shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub used: Option<MemoryUsed>,
}

/// What a guest's process costs in memory, from /proc/PID/smaps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemoryUsed {
    /// All resident pages of the VMM (KiB), those shared with others in full.
    pub resident_kib: u64,
    /// All of the VMM's memory (KiB), pages shared with others by their share (PSS).
    pub proportional_kib: u64,
    /// The guest's memory that is resident (KiB).
    pub guest_kib: u64,
    /// What the VMM needs beside the guest's memory (KiB, by share).
    pub overhead_kib: u64,
}

/// A guest's socket device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestVsock {
    /// The guest's context id.
    pub cid: u32,
    /// A Unix socket: say `CONNECT PORT\n` to it to reach the guest, and read `OK …\n`. What listens at this path with
    /// `_PORT` at its end gets the guest's connections to PORT.
    pub socket: String,
    /// Limits of packets both ways together.
    #[serde(default, skip_serializing_if = "Limits::are_none")]
    pub limits: Limits,
}

/// A step of a start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TimelineStep {
    /// Which step; api-server/README.md lists them.
    #[schema(example = "first-instruction")]
    pub step: String,
    /// When it was done (ms since the daemon got the request).
    pub ms: f64,
}

/// Body of `GET /v1/guests`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Guests {
    /// All guests, the oldest first.
    pub guests: Vec<Guest>,
}

/// Body of `GET /v1/version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// The daemon's version.
    pub version: String,
    /// Version of the protocol between the daemon and its VMMs.
    pub vmm_protocol: u16,
}

/// Body of `GET /v1/health`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// `ok`: the daemon answers.
    #[schema(example = "ok")]
    pub status: String,
    /// Number of guests, in whatever state.
    pub guests: usize,
    /// Number of guests that run.
    pub running: usize,
}

/// What went wrong (RFC 9457, `application/problem+json`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// The kind of problem, for programs.
    #[serde(rename = "type")]
    #[schema(example = "urn:shoal:problem:invalid-field")]
    pub kind: String,
    /// The kind of problem, for people.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened: what was tried, on what, and why it failed.
    pub detail: String,
    /// The field that is to blame (`disks[0].path`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub field: Option<String>,
    /// What can be done about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub hint: Option<String>,
    /// The path that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub instance: Option<String>,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.title, self.detail)
    }
}

impl std::error::Error for Problem {}

/// The media type of [`Problem`].
pub const PROBLEM_TYPE: &str = "application/problem+json";
/// Header of a console answer: offset of the first byte that follows.
pub const CONSOLE_NEXT: &str = "shoal-console-next";
/// Header of a console answer: bytes that were asked for but are not kept any more.
pub const CONSOLE_LOST: &str = "shoal-console-lost";
