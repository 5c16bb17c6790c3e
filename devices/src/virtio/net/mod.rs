//! Network device (virtio 1.2 §5.1) over a TAP that the host opened.
//!
//! Packets go between the TAP and guest memory without a copy: a packet to the guest is read straight into as many of
//! its buffers as it takes, a packet from the guest is written from where it lies. Only its header is copied, checked
//! and replaced.

mod control;
mod handler;
mod header;
pub mod open;
mod pair;
mod receive;
mod tap;
mod transmit;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use super::core::RING_FEATURES;
use super::{
    ActivateError, Activation, ActiveQueue, DeviceKind, MAX_QUEUES, QueueHandler, Stopped, VirtioDevice,
    config_bytes,
};
use crate::limit::{DeviceLimits, Limiter, Limits, Path};
use crate::spec::{BuildEnv, BuildError, DeviceSpec, FdSlot, SaveError, Section, Versioned};
use handler::{NetHandler, Queues};
use tap::{Tap, TapError};

/// Length of `struct virtio_net_hdr_v1` (bytes, §5.1.6.1).
const HEADER: usize = 12;
const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
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
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const MQ: u64 = 1 << 22;
    /// Packets to the guest may be as large as IP allows.
    pub const GUEST_LARGE: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_UFO;
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetSpec {
    /// A TAP, opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR; or one that was made for several queues, opened with
    /// IFF_MULTI_QUEUE as well, once for each pair of queues that the guest shall have (at most [`MAX_QUEUES`]).
    pub fds: Vec<FdSlot>,
    /// The guest's address: unicast and not zero.
    pub mac: [u8; 6],
    /// The largest packet (bytes, without the Ethernet header) that the guest is told of.
    pub mtu: Option<u16>,
    /// Packets to the guest.
    pub rx_limits: Limits,
    /// Packets from the guest.
    pub tx_limits: Limits,
}

/// The device's saved state: the rest is in the spec and in the TAP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// Number of pairs of queues that the driver uses.
    pub pairs: u16,
}

impl Versioned for NetState {
    const NAME: &'static str = "virtio-net";
    const VERSION: u32 = 2;
}

impl DeviceSpec for NetSpec {
    type State = NetState;

    fn build(
        &self,
        env: &mut BuildEnv,
        saved: Option<NetState>,
    ) -> Result<Box<dyn VirtioDevice>, BuildError> {
        self.check()?;
        let mut taps = Vec::new();
        for fd in &self.fds {
            let tap = Tap::new(env.take(*fd)?, self.fds.len() > 1).map_err(|e| match e {
                TapError::Io(what, source) => BuildError::Backend {
                    device: NAME,
                    what,
                    source,
                },
                TapError::Kind(what) => BuildError::Invalid { device: NAME, what },
            })?;
            taps.push(tap);
        }
        let limiters = self.limiters(env)?;
        Ok(Box::new(self.device(taps, limiters, saved)?))
    }
}

impl NetSpec {
    fn check(&self) -> Result<(), BuildError> {
        if !(1..=usize::from(MAX_QUEUES)).contains(&self.fds.len()) {
            return invalid(format!(
                "{} pairs of queues, not 1 to {MAX_QUEUES}",
                self.fds.len()
            ));
        }
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

    /// The device over the queues of a TAP, of which there is at least one.
    fn device(
        &self,
        taps: Vec<Tap>,
        limiters: [Limiter; 2],
        saved: Option<NetState>,
    ) -> Result<Net, BuildError> {
        // What is asked of one queue holds for the whole interface.
        let ufo = if taps.first().is_some_and(Tap::has_ufo) {
            feature::GUEST_UFO | feature::HOST_UFO
        } else {
            0
        };
        let active = saved.map_or(1, |s| usize::from(s.pairs));
        if !(1..=taps.len()).contains(&active) {
            return invalid(format!(
                "the saved driver uses {active} pairs of queues, this device has {}",
                taps.len()
            ));
        }
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * taps.len()];
        if taps.len() > 1 {
            queue_sizes.push(CONTROL_QUEUE_SIZE);
        }
        Ok(Net {
            mac: self.mac,
            mtu: self.mtu,
            ufo,
            // At most MAX_QUEUES.
            pairs: taps.len() as u16,
            queue_sizes,
            backend: Some(Backend {
                taps,
                active,
                limiters,
            }),
            link: Arc::default(),
        })
    }

    /// The device over a packet socket in the place of a TAP.
    #[cfg(any(test, fuzzing))]
    pub fn over_socket(&self, socket: std::os::fd::OwnedFd) -> std::io::Result<Box<dyn VirtioDevice>> {
        self.over_sockets(vec![socket], &mut BuildEnv::new(Vec::new()), None)
    }

    /// The same, with a pair of queues for each of several sockets, and limits that can be changed through `env`.
    #[cfg(any(test, fuzzing))]
    pub fn over_sockets(
        &self,
        sockets: Vec<std::os::fd::OwnedFd>,
        env: &mut BuildEnv,
        saved: Option<NetState>,
    ) -> std::io::Result<Box<dyn VirtioDevice>> {
        let limiters = self.limiters(env).map_err(std::io::Error::other)?;
        let taps = sockets
            .into_iter()
            .map(Tap::stand_in)
            .collect::<std::io::Result<_>>()?;
        let device = self
            .device(taps, limiters, saved)
            .map_err(std::io::Error::other)?;
        Ok(Box::new(device))
    }
}

/// Whether the TAP is still there; shared between the two halves of the device.
#[derive(Default)]
struct Link {
    lost: AtomicBool,
}

/// What the handler works with, and gives back.
struct Backend {
    /// The queues of the TAP, one for each pair.
    taps: Vec<Tap>,
    /// How many of them the driver uses.
    active: usize,
    /// To the guest, from the guest.
    limiters: [Limiter; 2],
}

struct Net {
    mac: [u8; 6],
    mtu: Option<u16>,
    /// The features for whole UDP packets, if the kernel has them.
    ufo: u64,
    pairs: u16,
    queue_sizes: Vec<u16>,
    /// With the handler while the device is active.
    backend: Option<Backend>,
    link: Arc<Link>,
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        use feature::*;
        let mtu = if self.mtu.is_some() { MTU } else { 0 };
        let segmentation = HOST_TSO4 | HOST_TSO6 | HOST_ECN | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | self.ufo;
        let queues = if self.pairs > 1 { CTRL_VQ | MQ } else { 0 };
        RING_FEATURES | MAC | CSUM | GUEST_CSUM | MRG_RXBUF | STATUS | segmentation | mtu | queues
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut c = [0; 12];
        c[..6].copy_from_slice(&self.mac);
        // VIRTIO_NET_S_LINK_UP
        c[6] = u8::from(!self.link.lost.load(Ordering::SeqCst));
        c[8..10].copy_from_slice(&self.pairs.to_le_bytes());
        c[10..].copy_from_slice(&self.mtu.unwrap_or_default().to_le_bytes());
        config_bytes(&c, offset, data);
    }

    fn activate(&mut self, a: Activation) -> Result<Box<dyn QueueHandler>, ActivateError> {
        let got = a.queues.len();
        let (memory, interrupt, features) = (a.memory, a.interrupt, a.features);
        let queues = self.sort(a.queues, features);
        if queues.pairs.is_empty() {
            return Err(ActivateError::MissingQueue { needed: 2, got });
        }
        let backend = self.backend.take().ok_or(ActivateError::BackendGone)?;
        if let Err(source) = backend.taps[0].set_up(offloads(features)) {
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
            queues,
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

    /// The driver begins anew with one pair (§5.1.6.5.5).
    fn reset(&mut self) {
        if let Some(backend) = &mut self.backend {
            backend.active = 1;
        }
    }

    fn save(&self) -> Result<Section, SaveError> {
        let active = self.backend.as_ref().map_or(1, |b| b.active);
        Section::encode(&NetState {
            // At most MAX_QUEUES.
            pairs: active as u16,
        })
    }
}

impl Net {
    /// Which queue is which (§5.1.2): pairs of receive and transmit queues, and behind them the control queue. A driver
    /// without MQ knows of one pair, so that its control queue comes next.
    fn sort(&self, queues: Vec<ActiveQueue>, features: u64) -> Queues {
        let has = |f| features & f != 0;
        let known = if has(feature::MQ) { self.pairs } else { 1 };
        let mut all: Vec<Option<ActiveQueue>> = Vec::new();
        all.resize_with(self.queue_sizes.len(), || None);
        for queue in queues {
            let at = usize::from(queue.index);
            all[at] = Some(queue);
        }
        let mut pairs = Vec::new();
        for at in 0..usize::from(known) {
            match (all[2 * at].take(), all[2 * at + 1].take()) {
                (Some(rx), Some(tx)) => pairs.push((rx, tx)),
                // Pairs behind one that was left out are of no use.
                (rx, tx) => {
                    (all[2 * at], all[2 * at + 1]) = (rx, tx);
                    break;
                }
            }
        }
        let control = all.get_mut(2 * usize::from(known)).and_then(Option::take);
        let (control, unasked) = if has(feature::CTRL_VQ) {
            (control, None)
        } else {
            (None, control)
        };
        Queues {
            pairs,
            control,
            others: all.into_iter().flatten().chain(unasked).collect(),
        }
    }
}

fn invalid<T>(what: String) -> Result<T, BuildError> {
    Err(BuildError::Invalid { device: NAME, what })
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
