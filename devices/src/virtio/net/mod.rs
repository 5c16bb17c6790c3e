//! Network device (virtio 1.2 §5.1) over a TAP that the host opened.
//!
//! Packets go between the TAP and guest memory without a copy: a packet to the guest is read straight into as many of
//! its buffers as it takes, a packet from the guest is written from where it lies. Only its header is copied, checked
//! and replaced.

mod handler;
mod header;
pub mod open;
mod receive;
mod tap;
mod transmit;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use super::core::RING_FEATURES;
use super::{ActivateError, Activation, DeviceKind, QueueHandler, Stopped, VirtioDevice, config_bytes};
use crate::limit::{DeviceLimits, Limiter, Limits, Path};
use crate::spec::{BuildEnv, BuildError, DeviceSpec, FdSlot, SaveError, Section, Versioned};
use handler::NetHandler;
use tap::{Tap, TapError};

/// Length of `struct virtio_net_hdr_v1` (bytes, §5.1.6.1).
const HEADER: usize = 12;
const QUEUE_SIZES: [u16; 2] = [256, 256];
const NAME: &str = "network device";
/// What an MTU may be (bytes): the least of IPv4, the most of a TAP.
const MTUS: std::ops::RangeInclusive<u16> = 68..=65_521;

/// Feature bits (§5.1.3).
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_ECN: u64 = 1 << 9;
    pub const GUEST_UFO: u64 = 1 << 10;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const HOST_UFO: u64 = 1 << 14;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    /// Packets to the guest may be as large as IP allows.
    pub const GUEST_LARGE: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_UFO;
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetSpec {
    /// A TAP, opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR.
    pub fd: FdSlot,
    /// The guest's address: unicast and not zero.
    pub mac: [u8; 6],
    /// The largest packet (bytes, without the Ethernet header) that the guest is told of.
    pub mtu: Option<u16>,
    /// Packets to the guest.
    pub rx_limits: Limits,
    /// Packets from the guest.
    pub tx_limits: Limits,
}

/// The device's saved state: all of it is in the spec and in the TAP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {}

impl Versioned for NetState {
    const NAME: &'static str = "virtio-net";
    const VERSION: u32 = 1;
}

impl DeviceSpec for NetSpec {
    type State = NetState;

    fn build(
        &self,
        env: &mut BuildEnv,
        _saved: Option<NetState>,
    ) -> Result<Box<dyn VirtioDevice>, BuildError> {
        self.check()?;
        let tap = Tap::new(env.take(self.fd)?).map_err(|e| match e {
            TapError::Io(what, source) => BuildError::Backend {
                device: NAME,
                what,
                source,
            },
            TapError::Kind(what) => BuildError::Invalid { device: NAME, what },
        })?;
        let limiters = self.limiters(env)?;
        Ok(Box::new(self.device(tap, limiters)))
    }
}

impl NetSpec {
    fn check(&self) -> Result<(), BuildError> {
        let invalid = |what| Err(BuildError::Invalid { device: NAME, what });
        let [a, b, c, d, e, f] = self.mac;
        if self.mac == [0; 6] || a & 1 != 0 {
            return invalid(format!(
                "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x} is no unicast MAC address"
            ));
        }
        match self.mtu {
            Some(mtu) if !MTUS.contains(&mtu) => invalid(format!(
                "an MTU of {mtu} is not from {} to {}",
                MTUS.start(),
                MTUS.end()
            )),
            _ => Ok(()),
        }
    }

    fn limiters(&self, env: &mut BuildEnv) -> Result<[Limiter; 2], BuildError> {
        let (rx, tx) = (self.rx_limits, self.tx_limits);
        let cell = env.limit(NAME, DeviceLimits::Net { rx, tx })?;
        Ok([Path::First, Path::Second].map(|path| Limiter::new(cell.clone(), path)))
    }

    fn device(&self, tap: Tap, limiters: [Limiter; 2]) -> Net {
        let ufo = if tap.has_ufo() {
            feature::GUEST_UFO | feature::HOST_UFO
        } else {
            0
        };
        Net {
            mac: self.mac,
            mtu: self.mtu,
            ufo,
            backend: Some(Backend { tap, limiters }),
            link: Arc::default(),
        }
    }

    /// The device over a packet socket in the place of a TAP.
    #[cfg(any(test, fuzzing))]
    pub fn over_socket(&self, socket: std::os::fd::OwnedFd) -> std::io::Result<Box<dyn VirtioDevice>> {
        self.over_socket_in(socket, &mut BuildEnv::new(Vec::new()))
    }

    /// The same, with limits that can be changed through `env`.
    #[cfg(any(test, fuzzing))]
    pub fn over_socket_in(
        &self,
        socket: std::os::fd::OwnedFd,
        env: &mut BuildEnv,
    ) -> std::io::Result<Box<dyn VirtioDevice>> {
        let limiters = self.limiters(env).map_err(std::io::Error::other)?;
        Ok(Box::new(self.device(Tap::stand_in(socket)?, limiters)))
    }
}

/// Whether the TAP is still there; shared between the two halves of the device.
#[derive(Default)]
struct Link {
    lost: AtomicBool,
}

/// What the handler works with, and gives back.
struct Backend {
    tap: Tap,
    /// To the guest, from the guest.
    limiters: [Limiter; 2],
}

struct Net {
    mac: [u8; 6],
    mtu: Option<u16>,
    /// The features for whole UDP packets, if the kernel has them.
    ufo: u64,
    /// With the handler while the device is active.
    backend: Option<Backend>,
    link: Arc<Link>,
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        use feature::*;
        let mtu = if self.mtu.is_some() { MTU } else { 0 };
        let segmentation = HOST_TSO4 | HOST_TSO6 | HOST_ECN | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | self.ufo;
        RING_FEATURES | MAC | CSUM | GUEST_CSUM | MRG_RXBUF | STATUS | segmentation | mtu
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut c = [0; 12];
        c[..6].copy_from_slice(&self.mac);
        // VIRTIO_NET_S_LINK_UP
        c[6] = u8::from(!self.link.lost.load(Ordering::SeqCst));
        c[8] = 1;
        c[10..].copy_from_slice(&self.mtu.unwrap_or_default().to_le_bytes());
        config_bytes(&c, offset, data);
    }

    fn activate(&mut self, a: Activation) -> Result<Box<dyn QueueHandler>, ActivateError> {
        let got = a.queues.len();
        let (memory, interrupt, features) = (a.memory, a.interrupt, a.features);
        let Ok([rx, tx]) = <[_; 2]>::try_from(a.queues) else {
            return Err(ActivateError::MissingQueue { needed: 2, got });
        };
        let backend = self.backend.take().ok_or(ActivateError::BackendGone)?;
        if let Err(source) = backend.tap.set_up(offloads(features)) {
            self.backend = Some(backend);
            return Err(ActivateError::Backend {
                what: "setting the TAP's offloads",
                source,
            });
        }
        let mtu = self.mtu.unwrap_or(0);
        Ok(Box::new(NetHandler::new(
            memory,
            interrupt,
            (rx, tx),
            backend,
            features,
            mtu,
            self.link.clone(),
        )))
    }

    fn deactivate(&mut self, stopped: Stopped) {
        if let Ok(backend) = stopped.backend.downcast::<Backend>() {
            self.backend = Some(*backend);
        }
    }

    fn save(&self) -> Result<Section, SaveError> {
        Section::encode(&NetState {})
    }
}

/// What the TAP may leave to a guest with `features`.
fn offloads(features: u64) -> u32 {
    let has = |f: u64, o: u32| if features & f == f { o } else { 0 };
    if features & feature::GUEST_CSUM == 0 {
        return 0;
    }
    let ecn = if features & (feature::GUEST_TSO4 | feature::GUEST_TSO6) != 0 {
        has(feature::GUEST_ECN, libc::TUN_F_TSO_ECN)
    } else {
        0
    };
    libc::TUN_F_CSUM
        | has(feature::GUEST_TSO4, libc::TUN_F_TSO4)
        | has(feature::GUEST_TSO6, libc::TUN_F_TSO6)
        | has(feature::GUEST_UFO, libc::TUN_F_UFO)
        | ecn
}

#[cfg(test)]
mod tap_tests;
#[cfg(test)]
mod tests;
