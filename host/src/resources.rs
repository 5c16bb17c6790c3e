//! Opens all that a guest needs, so that its VMM opens nothing.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use shoal_devices::spec::{AnyDeviceSpec, FdSlot};
use shoal_devices::virtio::block::BlockSpec;
use shoal_devices::virtio::net::NetSpec;
use shoal_devices::virtio::net::open::{OpenTapError, interface_index, open_tap};
use shoal_devices::virtio::rng::RngSpec;
use shoal_devices::virtio::vsock::VsockSpec;
use shoal_vmm::kernel::{LoadedInitrd, LoadedKernel};
use shoal_vmm::protocol::{
    ConsoleConfig, Failure, InitrdConfig, KernelConfig, MemoryConfig, Pages, VmConfig,
};
use tokio::sync::mpsc;

use crate::actor::Shared;
use crate::disk::{self, DiskUse};
use crate::error::{HostError, chain};
use crate::link::listen_at;
use crate::log;
use crate::paths::{self, GuestDir};
use crate::spec::{FIRST_CID, GuestSpec};
use crate::vsock::{self, VsockService, Word};

/// The service behind a guest's socket device, and what the guest says.
pub(crate) type VsockParts = Option<(VsockService, mpsc::Receiver<Word>)>;

/// A descriptor for the VMM. Images are shared with other guests.
pub(crate) enum Handed {
    Own(OwnedFd),
    Kernel(Arc<LoadedKernel>),
    Initrd(Arc<LoadedInitrd>),
}

impl AsFd for Handed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Own(fd) => fd.as_fd(),
            Self::Kernel(kernel) => kernel.memfd.as_fd(),
            Self::Initrd(initrd) => initrd.memfd.as_fd(),
        }
    }
}

/// All that a VMM is started with.
pub(crate) struct Prepared {
    pub config: VmConfig,
    pub handed: Vec<Handed>,
    pub control: OwnedFd,
    pub log: File,
    pub vsock: VsockParts,
    pub disks: Vec<DiskUse>,
}

/// Descriptors in the order in which they are handed over.
#[derive(Default)]
struct Hand(Vec<Handed>);

impl Hand {
    fn add(&mut self, handed: Handed) -> FdSlot {
        self.0.push(handed);
        // At most MAX_FDS: checked with the description.
        FdSlot((self.0.len() - 1) as u16)
    }

    fn own(&mut self, fd: impl Into<OwnedFd>) -> FdSlot {
        self.add(Handed::Own(fd.into()))
    }
}

/// Opens everything. What was opened is closed again when a later step fails; sockets are left to the caller to remove.
pub(crate) fn prepare(
    id: &str,
    spec: &GuestSpec,
    dir: &GuestDir,
    shared: &Shared,
) -> Result<Prepared, HostError> {
    let mut hand = Hand::default();
    let kvm = hand.own(open_kvm()?);
    let kernel = shared.images.kernel(&spec.kernel)?;
    let layout = kernel.layout.clone();
    let kernel = KernelConfig {
        fd: hand.add(Handed::Kernel(kernel)),
        layout,
    };
    let initrd = match &spec.initrd {
        Some(path) => {
            let initrd = shared.images.initrd(path)?;
            let len = initrd.len;
            Some(InitrdConfig {
                fd: hand.add(Handed::Initrd(initrd)),
                len,
            })
        }
        None => None,
    };
    let mut devices = Vec::new();
    let disks = open_disks(id, spec, shared, &mut hand, &mut devices)?;
    let mut disks = disks;
    disks.extend(open_networks(id, spec, shared, &mut hand, &mut devices)?);
    dir.remove_sockets();
    let vsock = open_vsock(spec, dir, &mut hand, &mut devices)?;
    devices.push(AnyDeviceSpec::Rng(RngSpec {
        limits: spec.rng_limits,
    }));

    let console = file(dir.console(), OpenOptions::new().read(true).write(true))?;
    let console = ConsoleConfig::Ring {
        fd: hand.own(console),
        capacity: u64::from(spec.console_kib) << 10,
    };
    paths::remove(&dir.exit_record());
    let exit_record = file(dir.exit_record(), OpenOptions::new().write(true))?;
    let log = log::open(&dir.log()).map_err(HostError::io("opening for a new VMM", &dir.log()))?;
    let config = VmConfig {
        guest_id: id.to_owned(),
        kvm,
        // Checked with the description: 1 to 32.
        vcpus: spec.vcpus as u8,
        memory: MemoryConfig {
            bytes: spec.memory_mib << 20,
            pages: Pages::Small,
        },
        kernel,
        initrd,
        cmdline: spec.cmdline.clone(),
        console,
        devices,
        exit_record: Some(hand.own(exit_record)),
    };
    // What the VMM would refuse is refused before there is one.
    config
        .clone()
        .validate()
        .map_err(|e| HostError::invalid(api_field(&e.field), e.why))?;
    let control = listen_at(&dir.control()).map_err(HostError::io("listening at", &dir.control()))?;
    Ok(Prepared {
        config,
        handed: hand.0,
        control,
        log,
        vsock,
        disks,
    })
}

/// Opens `/dev/kvm`.
pub(crate) fn open_kvm() -> Result<File, HostError> {
    let path = std::path::Path::new("/dev/kvm");
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|source| HostError::Kvm { source })
}

/// A field of the VMM's configuration by its name in a guest's description.
fn api_field(field: &str) -> &str {
    match field {
        "kernel" | "kernel.layout.ranges" | "kernel.layout.entry" => "kernel.path",
        "initrd" => "initrd.path",
        "cmdline" => "kernel.cmdline",
        "memory.bytes" => "memory_mib",
        "devices" => "disks",
        "console.capacity" => "console.keep_kib",
        other => other,
    }
}

/// What the VMM says of `devices[N]`, said of the guest's description.
pub(crate) fn of_the_guest(failure: Failure, spec: &GuestSpec) -> Failure {
    let index = failure.field.as_deref().and_then(|field| {
        let digits = field.strip_prefix("devices[")?.strip_suffix(']')?;
        digits.parse::<usize>().ok()
    });
    let Some(index) = index else { return failure };
    let (disks, networks) = (spec.disks.len(), spec.networks.len());
    let field = if index < disks {
        format!("disks[{index}]")
    } else if index < disks + networks {
        format!("networks[{}]", index - disks)
    } else if index == disks + networks && spec.vsock.is_some() {
        "vsock".into()
    } else {
        // The entropy device, which nobody describes.
        return Failure {
            field: None,
            ..failure
        };
    };
    Failure {
        field: Some(field),
        ..failure
    }
}

fn file(path: std::path::PathBuf, options: &mut OpenOptions) -> Result<File, HostError> {
    options
        .create(true)
        .mode(0o600)
        .open(&path)
        .map_err(HostError::io("opening", &path))
}

fn open_disks(
    id: &str,
    spec: &GuestSpec,
    shared: &Shared,
    hand: &mut Hand,
    devices: &mut Vec<AnyDeviceSpec>,
) -> Result<Vec<DiskUse>, HostError> {
    let mut uses = Vec::new();
    for (i, disk) in spec.disks.iter().enumerate() {
        let file = disk::open(disk, i, &shared.disks)?;
        uses.extend(file.metadata().map(|meta| shared.disks.note(&meta, id)));
        let fd = hand.own(file);
        devices.push(AnyDeviceSpec::Block(BlockSpec {
            id: disk.id.clone(),
            fd,
            read_only: disk.read_only,
            engine: disk.engine,
            limits: disk.limits,
            // Checked with the description: 1 to 32.
            queues: disk.queues as u8,
        }));
    }
    Ok(uses)
}

/// Notes which files and interfaces an adopted guest has open. Its VMM holds the locks of the files.
pub(crate) fn note_disks(id: &str, spec: &GuestSpec, shared: &Shared) -> Vec<DiskUse> {
    let metadata = spec.disks.iter().filter_map(|d| std::fs::metadata(&d.path).ok());
    let taps = spec.networks.iter().filter_map(|n| interface_index(&n.tap));
    metadata
        .map(|meta| shared.disks.note(&meta, id))
        .chain(taps.map(|index| shared.disks.note_tap(index, id)))
        .collect()
}

fn open_networks(
    id: &str,
    spec: &GuestSpec,
    shared: &Shared,
    hand: &mut Hand,
    devices: &mut Vec<AnyDeviceSpec>,
) -> Result<Vec<DiskUse>, HostError> {
    let mut uses = Vec::new();
    for (i, network) in spec.networks.iter().enumerate() {
        let field = format!("networks[{i}].tap");
        let in_use = |by: String| HostError::InUse {
            field: field.clone(),
            what: format!("the interface {:?}", network.tap),
            by,
        };
        // The kernel lets any number of processes have queues of one TAP.
        if let Some(index) = interface_index(&network.tap) {
            if let Some(by) = shared.disks.tap_user(index) {
                return Err(in_use(format!("guest {by}")));
            }
            uses.push(shared.disks.note_tap(index, id));
        }
        // Checked with the description: 1 to 32.
        let queues = open_tap(&network.tap, network.queues as u8).map_err(|error| match error {
            OpenTapError::Busy(_) => in_use("another process".into()),
            error => HostError::invalid(field.clone(), chain(&error)),
        })?;
        // Chosen when the guest was created.
        let mac = network
            .mac
            .ok_or_else(|| HostError::invalid(format!("networks[{i}].mac"), "is missing"))?;
        devices.push(AnyDeviceSpec::Net(NetSpec {
            fds: queues.into_iter().map(|queue| hand.own(queue)).collect(),
            mac: mac.0,
            mtu: None,
            rx_limits: network.rx_limits,
            tx_limits: network.tx_limits,
        }));
    }
    Ok(uses)
}

fn open_vsock(
    spec: &GuestSpec,
    dir: &GuestDir,
    hand: &mut Hand,
    devices: &mut Vec<AnyDeviceSpec>,
) -> Result<VsockParts, HostError> {
    let Some(vsock) = &spec.vsock else { return Ok(None) };
    let listeners = vsock::bind(dir).map_err(HostError::io("listening at", &dir.vsock()))?;
    devices.push(AnyDeviceSpec::Vsock(VsockSpec {
        cid: u64::from(vsock.cid.unwrap_or(FIRST_CID)),
        listener: hand.own(listeners.programs),
        broker: hand.own(listeners.broker),
        limits: vsock.limits,
    }));
    VsockService::connect(dir)
        .map(Some)
        .map_err(HostError::io("connecting to", &dir.broker()))
}

/// Serves an adopted guest's connections again.
pub(crate) fn reopen_vsock(spec: &GuestSpec, dir: &GuestDir) -> VsockParts {
    spec.vsock.as_ref()?;
    let service = VsockService::connect(dir);
    service
        .inspect_err(
            |error| tracing::error!(dir = ?dir.path(), %error, "a guest's socket device cannot be served"),
        )
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Disk, DiskEngine, Network, Vsock};

    #[test]
    fn a_device_is_named_as_its_owner_knows_it() {
        let mut spec = GuestSpec::new("/k", 1, 64);
        let disk = |id: &str| Disk {
            id: id.into(),
            path: "/d".into(),
            read_only: true,
            engine: DiskEngine::IoUring,
            ..Disk::default()
        };
        spec.disks = vec![disk("a"), disk("b")];
        spec.networks = vec![Network {
            tap: "t".into(),
            ..Network::default()
        }];
        spec.vsock = Some(Vsock::default());
        for (said, meant) in [
            ("devices[0]", Some("disks[0]")),
            ("devices[1]", Some("disks[1]")),
            ("devices[2]", Some("networks[0]")),
            ("devices[3]", Some("vsock")),
            ("devices[4]", None),
            ("devices[x]", Some("devices[x]")),
            ("memory.bytes", Some("memory.bytes")),
        ] {
            let failure = Failure {
                field: Some(said.into()),
                message: "m".into(),
            };
            let got = of_the_guest(failure, &spec);
            assert_eq!(
                (got.field.as_deref(), got.message.as_str()),
                (meant, "m"),
                "{said}"
            );
        }
    }
}
