//! What every virtio transport needs (virtio 1.2 §2.1, §2.2, §3.1): device status, feature negotiation, queue set-up.
//!
//! The core knows neither registers nor threads. It is told what the driver wrote and says what follows from it.
//!
//! ```text
//!         ACKNOWLEDGE          DRIVER         FEATURES_OK           DRIVER_OK
//!  Reset ───────────▶ Found ─────────▶ Driver ───────────▶ Negotiated ─────────▶ Running
//!    ▲                                  │ refused: the bit stays clear               │
//!    └───────────────── 0 is written, in every phase ───────────────────────────────┘
//! ```
//!
//! FAILED may be set in every phase and stays until the reset; a failed device is not started. DEVICE_NEEDS_RESET is
//! not kept here, since the event loop sets it: see the transport.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::GuestMemoryMmap;

/// VIRTIO_F_RING_INDIRECT_DESC (virtio 1.2 §6).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_RING_EVENT_IDX.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1.
pub const F_VERSION_1: u64 = 1 << 32;
/// The features that every device here has for its rings.
pub const RING_FEATURES: u64 = F_INDIRECT_DESC | F_EVENT_IDX;

/// Bits of the device status (virtio 1.2 §2.1).
pub mod status {
    /// The guest has found the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed upon.
    pub const FEATURES_OK: u8 = 8;
    /// The device cannot go on without a reset.
    pub const NEEDS_RESET: u8 = 0x40;
    /// The guest has given up on the device.
    pub const FAILED: u8 = 0x80;
}

/// How far the driver has come. See the diagram at the top of this file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Phase {
    /// After start-up or a reset.
    Reset,
    /// ACKNOWLEDGE.
    Found,
    /// DRIVER: features are being negotiated.
    Driver,
    /// FEATURES_OK: queues are being set up.
    Negotiated,
    /// DRIVER_OK.
    Running,
}

impl Phase {
    fn bits(self) -> u8 {
        use status::*;
        match self {
            Phase::Reset => 0,
            Phase::Found => ACKNOWLEDGE,
            Phase::Driver => ACKNOWLEDGE | DRIVER,
            Phase::Negotiated => ACKNOWLEDGE | DRIVER | FEATURES_OK,
            Phase::Running => ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
        }
    }
}

/// What a write to the status asks the transport to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusChange {
    /// Nothing.
    None,
    /// Stop the device; the core is reset already.
    Reset,
    /// Start the device.
    Start,
}

/// One queue as the driver sets it up. Plain data, untrusted until [`VirtioCore::build_queue`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueSetup {
    /// Size that the driver chose (entries).
    pub size: u32,
    /// The driver has finished setting the queue up.
    pub ready: bool,
    /// Address of the descriptor table.
    pub desc: u64,
    /// Address of the driver area (available ring).
    pub driver: u64,
    /// Address of the device area (used ring).
    pub device: u64,
    /// Position in the available ring.
    pub next_avail: u16,
    /// Position in the used ring.
    pub next_used: u16,
}

/// Which address of a queue is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueArea {
    /// Descriptor table.
    Desc,
    /// Driver area (available ring).
    Driver,
    /// Device area (used ring).
    Device,
}

/// A queue that the driver declared ready cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BadQueue {
    /// Zero, larger than the device's limit, or not a power of two.
    #[error("queue {index}: size {size} is not a power of two up to {max}")]
    Size {
        /// Which queue.
        index: u16,
        /// The size that the driver chose.
        size: u32,
        /// The largest one allowed.
        max: u16,
    },
    /// A ring is misaligned.
    #[error("queue {index}: {source}")]
    Alignment {
        /// Which queue.
        index: u16,
        /// Which ring.
        source: virtio_queue::Error,
    },
    /// A ring does not lie in guest memory.
    #[error("queue {index}: its rings do not lie in guest memory")]
    Memory {
        /// Which queue.
        index: u16,
    },
}

/// A saved core was refused.
#[derive(Debug, thiserror::Error)]
pub enum BadCoreState {
    /// The device has another number of queues.
    #[error("the saved device has {found} queues, this one has {expected}")]
    QueueCount {
        /// In the state.
        found: usize,
        /// Of the device.
        expected: usize,
    },
    /// The driver uses features that the device no longer has.
    #[error("the saved driver uses features {0:#x} that this device does not offer")]
    Features(u64),
}

/// The core's saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoreState {
    phase: Phase,
    failed: bool,
    driver_features: u64,
    device_features_page: u32,
    driver_features_page: u32,
    queue_sel: u32,
    queues: Vec<QueueSetup>,
}

/// The common part of a virtio device.
pub struct VirtioCore {
    offered: u64,
    max_sizes: Vec<u16>,
    s: CoreState,
}

impl VirtioCore {
    /// A core for a device that offers `features` and has queues of at most `max_sizes` entries.
    pub fn new(features: u64, max_sizes: &[u16]) -> Self {
        let s = CoreState {
            phase: Phase::Reset,
            failed: false,
            driver_features: 0,
            device_features_page: 0,
            driver_features_page: 0,
            queue_sel: 0,
            queues: initial_queues(max_sizes),
        };
        Self {
            offered: features | F_VERSION_1,
            max_sizes: max_sizes.to_vec(),
            s,
        }
    }

    /// A core as it was saved, for a device like the one that was saved.
    pub fn restore(features: u64, max_sizes: &[u16], state: &CoreState) -> Result<Self, BadCoreState> {
        let mut core = Self::new(features, max_sizes);
        if state.queues.len() != max_sizes.len() {
            return Err(BadCoreState::QueueCount {
                found: state.queues.len(),
                expected: max_sizes.len(),
            });
        }
        let unknown = state.driver_features & !core.offered;
        if state.phase >= Phase::Negotiated && unknown != 0 {
            return Err(BadCoreState::Features(unknown));
        }
        core.s = state.clone();
        Ok(core)
    }

    /// The state to save.
    pub fn state(&self) -> CoreState {
        self.s.clone()
    }

    /// How far the driver has come.
    pub fn phase(&self) -> Phase {
        self.s.phase
    }

    /// The device should be served: the driver is ready and has not given up.
    pub fn is_running(&self) -> bool {
        self.s.phase == Phase::Running && !self.s.failed
    }

    /// The device status, without DEVICE_NEEDS_RESET.
    pub fn status(&self) -> u8 {
        self.s.phase.bits() | if self.s.failed { status::FAILED } else { 0 }
    }

    /// The driver writes the device status. Steps may be taken several at once, but none may be left out or taken
    /// back; what breaks that rule is ignored.
    pub fn write_status(&mut self, value: u8) -> StatusChange {
        if value == 0 {
            self.reset();
            return StatusChange::Reset;
        }
        if value & status::FAILED != 0 {
            self.s.failed = true;
        }
        if self.s.failed || value & self.s.phase.bits() != self.s.phase.bits() {
            return StatusChange::None;
        }
        let before = self.s.phase;
        while let Some(next) = self.next_phase(value) {
            self.s.phase = next;
        }
        if self.s.phase == Phase::Running && before != Phase::Running {
            StatusChange::Start
        } else {
            StatusChange::None
        }
    }

    fn next_phase(&self, value: u8) -> Option<Phase> {
        let (bit, next) = match self.s.phase {
            Phase::Reset => (status::ACKNOWLEDGE, Phase::Found),
            Phase::Found => (status::DRIVER, Phase::Driver),
            Phase::Driver => (status::FEATURES_OK, Phase::Negotiated),
            Phase::Negotiated => (status::DRIVER_OK, Phase::Running),
            Phase::Running => return None,
        };
        let allowed = next != Phase::Negotiated || self.features_acceptable();
        (value & bit != 0 && allowed).then_some(next)
    }

    fn features_acceptable(&self) -> bool {
        let f = self.s.driver_features;
        f & !self.offered == 0 && f & F_VERSION_1 != 0
    }

    fn reset(&mut self) {
        let max_sizes = std::mem::take(&mut self.max_sizes);
        *self = Self::new(self.offered, &max_sizes);
    }

    /// The features that were negotiated; meaningful from FEATURES_OK on.
    pub fn features(&self) -> u64 {
        self.s.driver_features
    }

    /// Selects which 32 bits of the offered features are read.
    pub fn select_device_features(&mut self, page: u32) {
        self.s.device_features_page = page;
    }

    /// The selected 32 bits of the offered features.
    pub fn device_features(&self) -> u32 {
        match self.s.device_features_page {
            0 => self.offered as u32,
            1 => (self.offered >> 32) as u32,
            _ => 0,
        }
    }

    /// Selects which 32 bits of the driver's features are written.
    pub fn select_driver_features(&mut self, page: u32) {
        self.s.driver_features_page = page;
    }

    /// The driver writes the selected 32 bits of its features. False when this is not the time for it.
    pub fn write_driver_features(&mut self, value: u32) -> bool {
        if self.s.phase != Phase::Driver {
            return false;
        }
        let (shift, v) = match self.s.driver_features_page {
            0 => (0, u64::from(value)),
            1 => (32, u64::from(value)),
            // Nothing is offered there, so that a driver can only accept nothing.
            _ => return value == 0,
        };
        self.s.driver_features = self.s.driver_features & !(0xffff_ffff << shift) | v << shift;
        true
    }

    /// Selects the queue that the queue registers stand for.
    pub fn select_queue(&mut self, index: u32) {
        self.s.queue_sel = index;
    }

    /// The largest size of the selected queue; zero when there is no such queue.
    pub fn queue_max(&self) -> u16 {
        usize::try_from(self.s.queue_sel)
            .ok()
            .and_then(|i| self.max_sizes.get(i))
            .copied()
            .unwrap_or(0)
    }

    /// The selected queue, if it exists.
    pub fn queue(&self) -> Option<&QueueSetup> {
        self.s.queues.get(self.s.queue_sel as usize)
    }

    /// Number of queues.
    pub fn queue_count(&self) -> usize {
        self.s.queues.len()
    }

    /// Changes the selected queue. False when there is none, or this is not the time for it: queues are set up
    /// between FEATURES_OK and DRIVER_OK.
    pub fn set_queue(&mut self, change: impl FnOnce(&mut QueueSetup)) -> bool {
        let settable = self.s.phase == Phase::Negotiated && !self.s.failed;
        match self.s.queues.get_mut(self.s.queue_sel as usize) {
            Some(q) if settable => {
                change(q);
                true
            }
            _ => false,
        }
    }

    /// Sets one half of an address of the selected queue. A queue that is ready is left as it is.
    pub fn set_queue_address(&mut self, area: QueueArea, high: bool, value: u32) -> bool {
        self.set_queue(|q| {
            if q.ready {
                return;
            }
            let address = match area {
                QueueArea::Desc => &mut q.desc,
                QueueArea::Driver => &mut q.driver,
                QueueArea::Device => &mut q.device,
            };
            let shift = if high { 32 } else { 0 };
            *address = *address & !(0xffff_ffff << shift) | u64::from(value) << shift;
        })
    }

    /// Makes the ring of queue `index` from what the driver set up; `None` when it left the queue out.
    pub fn build_queue(&self, index: u16, memory: &GuestMemoryMmap) -> Result<Option<Queue>, BadQueue> {
        let at = usize::from(index);
        let (Some(q), Some(&max)) = (self.s.queues.get(at), self.max_sizes.get(at)) else {
            return Ok(None);
        };
        if !q.ready {
            return Ok(None);
        }
        let size = u16::try_from(q.size)
            .ok()
            .filter(|s| s.is_power_of_two() && *s <= max)
            .ok_or(BadQueue::Size {
                index,
                size: q.size,
                max,
            })?;
        let queue = Queue::try_from(QueueState {
            max_size: max,
            next_avail: q.next_avail,
            next_used: q.next_used,
            event_idx_enabled: self.s.driver_features & F_EVENT_IDX != 0,
            size,
            ready: true,
            desc_table: q.desc,
            avail_ring: q.driver,
            used_ring: q.device,
        })
        .map_err(|source| BadQueue::Alignment { index, source })?;
        // virtio-queue takes an available ring at address zero for one that was not set.
        if q.driver == 0 || !queue.is_valid(memory) {
            return Err(BadQueue::Memory { index });
        }
        Ok(Some(queue))
    }

    /// Takes over the positions of a queue that has stopped, so that it can go on from there.
    pub fn keep_position(&mut self, index: u16, next_avail: u16, next_used: u16) {
        if let Some(q) = self.s.queues.get_mut(usize::from(index)) {
            (q.next_avail, q.next_used) = (next_avail, next_used);
        }
    }
}

fn initial_queues(max_sizes: &[u16]) -> Vec<QueueSetup> {
    max_sizes
        .iter()
        .map(|&max| QueueSetup {
            size: u32::from(max),
            ..QueueSetup::default()
        })
        .collect()
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
