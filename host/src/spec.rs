//! What a guest is made of, as its owner describes it.

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
pub use shoal_devices::limit::{Limits as RateLimits, Rate};
pub use shoal_devices::virtio::block::EngineKind as DiskEngine;
use shoal_vmm::config::{MAX_DEVICES, MAX_VCPUS, cmdline_room};
use shoal_vmm::protocol::MAX_FDS;

use crate::error::HostError;

/// Bounds of what a guest may have.
pub struct Limits;

impl Limits {
    /// Most vCPUs.
    pub const VCPUS: u32 = MAX_VCPUS as u32;
    /// Least memory (MiB).
    pub const MIN_MEMORY_MIB: u64 = 16;
    /// Most memory (MiB): 1 TiB.
    pub const MAX_MEMORY_MIB: u64 = 1 << 20;
    /// Most virtio devices: disks, networks, vsock, and the entropy device that every guest has.
    pub const DEVICES: usize = MAX_DEVICES;
    /// Longest name (bytes).
    pub const NAME: usize = 63;
    /// Longest disk id (bytes; virtio 1.2 §5.2.6.1).
    pub const DISK_ID: usize = 20;
    /// Longest path (bytes).
    pub const PATH: usize = 4095;
    /// Least and most output that the console keeps (KiB).
    pub const CONSOLE_KIB: std::ops::RangeInclusive<u32> = 16..=64 << 10;
}

/// What is handed to a VMM beside disks and queues of networks: /dev/kvm, kernel, initial RAM disk, console, exit record,
/// and the two sockets of a socket device.
const OTHER_DESCRIPTORS: usize = 7;

/// The lowest context id of a guest (virtio 1.2 §5.10.4); a guest gets it unless its owner chooses another.
pub(crate) const FIRST_CID: u32 = 3;

/// What a guest is made of. Paths are absolute, on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestSpec {
    /// A name of the owner's choice, unique on the host.
    pub name: Option<String>,
    /// The kernel: an ELF vmlinux or a bzImage.
    pub kernel: PathBuf,
    /// The kernel's command line.
    pub cmdline: String,
    /// An initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Memory (MiB).
    pub memory_mib: u64,
    /// Disks, in the order in which the guest sees them.
    pub disks: Vec<Disk>,
    /// Network interfaces.
    pub networks: Vec<Network>,
    /// A socket device between host and guest.
    pub vsock: Option<Vsock>,
    /// How much of the serial console's output is kept (KiB).
    pub console_kib: u32,
    /// How much the entropy device gives, which every guest has.
    #[serde(default)]
    pub rng_limits: RateLimits,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// What the guest reads as the disk's serial number.
    pub id: String,
    /// A regular file or a block device.
    pub path: PathBuf,
    /// Whether the guest can only read it. Such a disk may be used by many guests at once.
    pub read_only: bool,
    /// How the guest's requests are done.
    #[serde(default)]
    pub engine: DiskEngine,
    /// How many requests are done, and how much data they move.
    #[serde(default)]
    pub limits: RateLimits,
    /// Number of request queues, at most one for each vCPU.
    #[serde(default = "one")]
    pub queues: u32,
}

impl Default for Disk {
    fn default() -> Self {
        Self {
            id: String::new(),
            path: PathBuf::new(),
            read_only: false,
            engine: DiskEngine::default(),
            limits: RateLimits::default(),
            queues: one(),
        }
    }
}

fn one() -> u32 {
    1
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// The TAP interface; it must exist.
    pub tap: String,
    /// The guest's address; one is chosen when it is missing.
    pub mac: Option<Mac>,
    /// Packets to the guest.
    #[serde(default)]
    pub rx_limits: RateLimits,
    /// Packets from the guest.
    #[serde(default)]
    pub tx_limits: RateLimits,
    /// Number of pairs of queues, at most one for each vCPU. More than one needs a TAP made with `multi_queue`.
    #[serde(default = "one")]
    pub queues: u32,
}

impl Default for Network {
    fn default() -> Self {
        Self {
            tap: String::new(),
            mac: None,
            rx_limits: RateLimits::default(),
            tx_limits: RateLimits::default(),
            queues: one(),
        }
    }
}

/// A socket device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vsock {
    /// The guest's context id; 3 when missing. Guests on one host may have the same.
    pub cid: Option<u32>,
    /// Packets both ways together.
    #[serde(default)]
    pub limits: RateLimits,
}

/// A MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let error = || format!("{text:?} is no MAC address; one looks like 02:00:00:00:00:01");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = u8::from_str_radix(part.ok_or_else(error)?, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() {
            Err(error())
        } else {
            Ok(Self(bytes))
        }
    }
}

impl GuestSpec {
    /// A guest with a kernel and nothing else.
    pub fn new(kernel: impl Into<PathBuf>, vcpus: u32, memory_mib: u64) -> Self {
        Self {
            name: None,
            kernel: kernel.into(),
            cmdline: String::new(),
            initrd: None,
            vcpus,
            memory_mib,
            disks: Vec::new(),
            networks: Vec::new(),
            vsock: None,
            console_kib: 256,
            rng_limits: RateLimits::default(),
        }
    }

    /// All numbers of queues, each with its field.
    fn queues(&self) -> Vec<(String, u32)> {
        let disks = self.disks.iter().enumerate();
        let networks = self.networks.iter().enumerate();
        disks
            .map(|(i, d)| (format!("disks[{i}].queues"), d.queues))
            .chain(networks.map(|(i, n)| (format!("networks[{i}].queues"), n.queues)))
            .collect()
    }

    /// All limits, each with its field.
    fn limits(&self) -> Vec<(String, RateLimits)> {
        let disks = self.disks.iter().enumerate();
        let networks = self.networks.iter().enumerate();
        let mut all: Vec<_> = disks
            .map(|(i, d)| (format!("disks[{i}].limits"), d.limits))
            .collect();
        for (i, network) in networks {
            all.push((format!("networks[{i}].rx_limits"), network.rx_limits));
            all.push((format!("networks[{i}].tx_limits"), network.tx_limits));
        }
        all.extend(self.vsock.as_ref().map(|v| ("vsock.limits".into(), v.limits)));
        all.push(("rng.limits".into(), self.rng_limits));
        all
    }

    /// Number of virtio devices that the guest gets.
    pub(crate) fn devices(&self) -> usize {
        self.disks.len() + self.networks.len() + usize::from(self.vsock.is_some()) + 1
    }

    /// Checks all that can be told without looking at the host. What it names (files, interfaces) is looked at when
    /// the guest starts.
    ///
    /// # Errors
    /// [`HostError::Invalid`] with the first field that is wrong.
    pub fn validate(&self) -> Result<(), HostError> {
        if let Some(name) = &self.name {
            check_name(name)?;
        }
        check_path("kernel.path", &self.kernel)?;
        if let Some(path) = &self.initrd {
            check_path("initrd.path", path)?;
        }
        if !(1..=Limits::VCPUS).contains(&self.vcpus) {
            let why = format!("a guest has 1 to {} vCPUs, not {}", Limits::VCPUS, self.vcpus);
            return Err(HostError::invalid("vcpus", why));
        }
        if !(Limits::MIN_MEMORY_MIB..=Limits::MAX_MEMORY_MIB).contains(&self.memory_mib) {
            let (min, max) = (Limits::MIN_MEMORY_MIB, Limits::MAX_MEMORY_MIB);
            let why = format!(
                "a guest has {min} to {max} MiB of memory, not {}",
                self.memory_mib
            );
            return Err(HostError::invalid("memory_mib", why));
        }
        if !Limits::CONSOLE_KIB.contains(&self.console_kib) {
            let (min, max) = (Limits::CONSOLE_KIB.start(), Limits::CONSOLE_KIB.end());
            let why = format!("the console keeps {min} to {max} KiB, not {}", self.console_kib);
            return Err(HostError::invalid("console.keep_kib", why));
        }
        self.check_devices()?;
        self.check_cmdline()
    }

    fn check_cmdline(&self) -> Result<(), HostError> {
        let room = cmdline_room(self.devices());
        if self.cmdline.len() > room {
            let why = format!(
                "the command line has {} bytes, at most {room} fit beside {} devices",
                self.cmdline.len(),
                self.devices()
            );
            return Err(HostError::invalid("kernel.cmdline", why));
        }
        match self.cmdline.chars().find(|c| !(' '..='~').contains(c)) {
            Some(c) => {
                let why = format!("the command line holds {c:?}; only printable ASCII can be handed over");
                Err(HostError::invalid("kernel.cmdline", why))
            }
            None => Ok(()),
        }
    }

    fn check_devices(&self) -> Result<(), HostError> {
        if self.devices() > Limits::DEVICES {
            let why = format!(
                "a guest has at most {} devices (disks, networks, vsock and one for entropy), not {}",
                Limits::DEVICES,
                self.devices()
            );
            return Err(HostError::invalid("disks", why));
        }
        let mut seen = HashSet::new();
        for (i, disk) in self.disks.iter().enumerate() {
            check_path(&format!("disks[{i}].path"), &disk.path)?;
            let field = format!("disks[{i}].id");
            if disk.id.is_empty() || disk.id.len() > Limits::DISK_ID || !disk.id.bytes().all(is_word) {
                let why = format!(
                    "an id has 1 to {} letters, digits, '-', '_' or '.'",
                    Limits::DISK_ID
                );
                return Err(HostError::invalid(field, why));
            }
            if !seen.insert(&disk.id) {
                return Err(HostError::invalid(
                    field,
                    format!("the id {:?} is used twice", disk.id),
                ));
            }
        }
        let mut seen = HashSet::new();
        for (i, network) in self.networks.iter().enumerate() {
            check_interface(&format!("networks[{i}].tap"), &network.tap)?;
            if !seen.insert(&network.tap) {
                let why = format!("the interface {:?} is used twice", network.tap);
                return Err(HostError::invalid(format!("networks[{i}].tap"), why));
            }
            if network
                .mac
                .is_some_and(|mac| mac.0[0] & 1 != 0 || mac.0 == [0; 6])
            {
                let why =
                    "a guest's address is a unicast one: its first byte is even, and it is not all zeros";
                return Err(HostError::invalid(format!("networks[{i}].mac"), why));
            }
        }
        for (field, queues) in self.queues() {
            if !(1..=self.vcpus).contains(&queues) {
                let why = format!(
                    "{queues} queues, not 1 to {}: one for each vCPU at most",
                    self.vcpus
                );
                return Err(HostError::invalid(field, why));
            }
        }
        let descriptors = self.disks.len()
            + self.networks.iter().map(|n| n.queues as usize).sum::<usize>()
            + OTHER_DESCRIPTORS;
        if descriptors > MAX_FDS {
            let why = format!(
                "disks and queues of networks need {descriptors} descriptors, at most {MAX_FDS} can be handed over: \
                 give the networks fewer queues"
            );
            return Err(HostError::invalid("networks", why));
        }
        for (field, limits) in self.limits() {
            limits.check().map_err(|(rate, bad)| {
                HostError::invalid(format!("{field}.{rate}.{}", bad.field), bad.to_string())
            })?;
        }
        match self.vsock.as_ref().and_then(|v| v.cid) {
            Some(cid) if cid < FIRST_CID || cid == u32::MAX => Err(HostError::invalid(
                "vsock.cid",
                format!("{cid} is reserved; use 3 to 4294967294"),
            )),
            _ => Ok(()),
        }
    }
}

fn is_word(b: u8) -> bool {
    b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.')
}

/// Whether a text has the form of an id that the host gives out: 12 hexadecimal digits.
pub(crate) fn is_id(text: &str) -> bool {
    text.len() == 12 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn check_name(name: &str) -> Result<(), HostError> {
    let starts_well = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if !starts_well || name.len() > Limits::NAME || !name.bytes().all(is_word) {
        let why = format!(
            "a name has 1 to {} letters, digits, '-', '_' or '.', and begins with a letter or digit",
            Limits::NAME
        );
        return Err(HostError::invalid("name", why));
    }
    if is_id(name) {
        return Err(HostError::invalid(
            "name",
            "12 hexadecimal digits look like an id; choose another name",
        ));
    }
    Ok(())
}

fn check_path(field: &str, path: &Path) -> Result<(), HostError> {
    let bytes = path.as_os_str().len();
    if !path.is_absolute() {
        return Err(HostError::invalid(
            field,
            format!("{path:?} is not an absolute path"),
        ));
    }
    if bytes > Limits::PATH || path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(HostError::invalid(
            field,
            format!("a path has at most {} bytes, none zero", Limits::PATH),
        ));
    }
    Ok(())
}

fn check_interface(field: &str, name: &str) -> Result<(), HostError> {
    let good = !name.is_empty() && name.len() <= 15 && name != "." && name != "..";
    if !good
        || !name
            .bytes()
            .all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%'))
    {
        let why =
            format!("{name:?} is no interface name: 1 to 15 printable characters without '/', ':', '%'");
        return Err(HostError::invalid(field, why));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> GuestSpec {
        GuestSpec::new("/k", 1, 64)
    }

    fn field(spec: GuestSpec) -> String {
        match spec.validate() {
            Err(HostError::Invalid { field, .. }) => field,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn names_the_field_that_is_wrong() {
        good().validate().unwrap();
        let disk = |id: &str, path: &str| Disk {
            id: id.into(),
            path: path.into(),
            read_only: true,
            ..Disk::default()
        };
        let net = |tap: &str, mac| Network {
            tap: tap.into(),
            mac,
            ..Network::default()
        };
        let cases: Vec<(GuestSpec, &str)> = vec![
            (
                GuestSpec {
                    name: Some("a b".into()),
                    ..good()
                },
                "name",
            ),
            (
                GuestSpec {
                    name: Some("0123456789ab".into()),
                    ..good()
                },
                "name",
            ),
            (
                GuestSpec {
                    name: Some(String::new()),
                    ..good()
                },
                "name",
            ),
            (
                GuestSpec {
                    name: Some("x".repeat(64)),
                    ..good()
                },
                "name",
            ),
            (
                GuestSpec {
                    kernel: "k".into(),
                    ..good()
                },
                "kernel.path",
            ),
            (
                GuestSpec {
                    initrd: Some("".into()),
                    ..good()
                },
                "initrd.path",
            ),
            (GuestSpec { vcpus: 0, ..good() }, "vcpus"),
            (GuestSpec { vcpus: 33, ..good() }, "vcpus"),
            (
                GuestSpec {
                    memory_mib: 0,
                    ..good()
                },
                "memory_mib",
            ),
            (
                GuestSpec {
                    memory_mib: 15,
                    ..good()
                },
                "memory_mib",
            ),
            (
                GuestSpec {
                    memory_mib: u64::MAX,
                    ..good()
                },
                "memory_mib",
            ),
            (
                GuestSpec {
                    cmdline: "x".repeat(2048),
                    ..good()
                },
                "kernel.cmdline",
            ),
            (
                GuestSpec {
                    cmdline: "a\nb".into(),
                    ..good()
                },
                "kernel.cmdline",
            ),
            (
                GuestSpec {
                    console_kib: 1,
                    ..good()
                },
                "console.keep_kib",
            ),
            (
                GuestSpec {
                    disks: vec![disk("a", "d")],
                    ..good()
                },
                "disks[0].path",
            ),
            (
                GuestSpec {
                    disks: vec![disk("a", "/d"), disk("a", "/e")],
                    ..good()
                },
                "disks[1].id",
            ),
            (
                GuestSpec {
                    disks: vec![disk("", "/d")],
                    ..good()
                },
                "disks[0].id",
            ),
            (
                GuestSpec {
                    networks: vec![net("a/b", None)],
                    ..good()
                },
                "networks[0].tap",
            ),
            (
                GuestSpec {
                    networks: vec![net("t", None), net("t", None)],
                    ..good()
                },
                "networks[1].tap",
            ),
            (
                GuestSpec {
                    networks: vec![net("t", Some(Mac([1; 6])))],
                    ..good()
                },
                "networks[0].mac",
            ),
            (
                GuestSpec {
                    vsock: Some(Vsock {
                        cid: Some(2),
                        ..Vsock::default()
                    }),
                    ..good()
                },
                "vsock.cid",
            ),
        ];
        for (spec, want) in cases {
            assert_eq!(field(spec.clone()), want, "{spec:?}");
        }
        let disks = (0..15).map(|i| disk(&format!("d{i}"), "/d")).collect();
        assert_eq!(field(GuestSpec { disks, ..good() }), "disks");
    }

    #[test]
    fn reads_mac_addresses() {
        assert_eq!("02:00:00:aB:00:01".parse(), Ok(Mac([2, 0, 0, 0xab, 0, 1])));
        assert_eq!(Mac([2, 0, 0, 0xab, 0, 1]).to_string(), "02:00:00:ab:00:01");
        for bad in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "2:0:0:0:0:1",
            "02-00-00-00-00-01",
            "+2:00:00:00:00:01",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }
}
