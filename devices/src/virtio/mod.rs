//! virtio 1.2: the device model that every transport and every device shares.
//!
//! A device has two halves. Its **control half** is a [`VirtioDevice`], owned by the transport and called under the
//! transport's lock from vCPU threads (configuration space, activation). Its **data half** is a [`QueueHandler`],
//! made by [`VirtioDevice::activate`], owned by the event loop and called from its thread only.
//!
//! ```text
//!              DRIVER_OK: activate(Activation)
//!   inactive ───────────────────────────────────▶ active (handler in the event loop)
//!      ▲                                             │
//!      └──── deactivate(Stopped) ◀── handler.stop() ─┘   device reset, pause, save
//!                                                    │
//!                    handle() fails: DEVICE_NEEDS_RESET, the handler is parked until the driver resets
//! ```

pub mod block;
pub mod core;
pub mod mmio;
pub mod net;
pub mod ring;
pub mod rng;
pub mod vsock;

use std::any::Any;
use std::io;
use std::sync::Arc;

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::GuestMemory;
use crate::event::{Readiness, Registrar, Token};
use crate::spec::{SaveError, Section};

/// Device types (virtio 1.2 §5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[repr(u32)]
#[non_exhaustive]
pub enum DeviceKind {
    /// Network device (§5.1).
    Net = 1,
    /// Block device (§5.2).
    Block = 2,
    /// Entropy device (§5.4).
    Rng = 4,
    /// Socket device (§5.10).
    Vsock = 19,
}

/// The most request queues of a disk, and the most pairs of queues of a network interface: as many as a guest has vCPUs
/// at most.
pub const MAX_QUEUES: u8 = 32;

/// The control half of a device.
pub trait VirtioDevice: Send {
    /// Which device this is.
    fn kind(&self) -> DeviceKind;
    /// The largest size of each queue, a power of two up to 32768; as many entries as there are queues.
    fn queue_max_sizes(&self) -> &[u16];
    /// The feature bits that the device offers. The core adds VIRTIO_F_VERSION_1.
    fn features(&self) -> u64;
    /// Reads configuration space at `offset` (bytes). What lies outside reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes configuration space at `offset`. Devices without writable fields ignore it.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }
    /// The driver has set DRIVER_OK: makes the data half.
    fn activate(&mut self, activation: Activation) -> Result<Box<dyn QueueHandler>, ActivateError>;
    /// The data half has stopped; takes back what it held, so that `activate` can be called again.
    fn deactivate(&mut self, stopped: Stopped);
    /// The driver has reset the device: what belonged to it (connections) is forgotten. Called after `deactivate`, which
    /// a pause calls as well.
    fn reset(&mut self) {}
    /// The device's state, as plain data. Called only while the device is inactive or its handler is stopped.
    fn save(&self) -> Result<Section, SaveError>;
}

/// A queue that the driver has set up and the core has checked.
pub struct ActiveQueue {
    /// Which queue of the device this is.
    pub index: u16,
    /// The ring, validated against guest memory.
    pub queue: Queue,
    /// Written by the guest's notification (an ioeventfd under KVM).
    pub notify: Arc<EventFd>,
}

/// All that a data half works with.
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The queues that the driver enabled, in order of their indices. Queues that it left out are missing.
    pub queues: Vec<ActiveQueue>,
    /// Signals the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// The feature bits that were negotiated.
    pub features: u64,
}

/// The data half of a device, called only from the event loop's thread.
pub trait QueueHandler: Send {
    /// Registers the handler's event sources (queue notifications, TAP, sockets, timers).
    fn register(&mut self, events: &mut Registrar<'_>) -> io::Result<()>;
    /// Removes all of them, as far as they are registered; called before `stop`, and when registration failed or the
    /// handler has, so that nothing of it stays ready.
    fn unregister(&mut self, events: &mut Registrar<'_>);
    /// Serves one ready source. A token that the handler does not know (any more) is ignored. An error means that the
    /// device cannot go on until the driver resets it; a bad request is no error, it gets an error status.
    fn handle(
        &mut self,
        token: Token,
        ready: Readiness,
        events: &mut Registrar<'_>,
    ) -> Result<(), HandlerError>;
    /// Drains what is in flight and gives queues and back end back.
    fn stop(self: Box<Self>) -> Stopped;
}

/// What a stopped data half gives back.
pub struct Stopped {
    /// The queues, with their positions.
    pub queues: Vec<ActiveQueue>,
    /// The back end (file, TAP, …), of a type that only the device knows.
    pub backend: Box<dyn Any + Send>,
}

/// How a device reaches its driver. Implemented by the transport.
pub trait Interrupt: Send + Sync {
    /// Queue `index` has new used buffers.
    fn signal_queue(&self, index: u16);
    /// The configuration space has changed.
    fn signal_config(&self);
    /// The device cannot go on: sets DEVICE_NEEDS_RESET and signals a configuration change. `why` is for the log.
    fn signal_needs_reset(&self, why: &str);
}

/// A device could not be activated. The core sets DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver enabled fewer queues than the device needs.
    #[error("the driver enabled {got} queues, the device needs {needed}")]
    MissingQueue {
        /// How many the device needs.
        needed: usize,
        /// How many it got.
        got: usize,
    },
    /// The back end refused.
    #[error("setting up the device's back end failed: {what}")]
    Backend {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The back end is gone: an earlier activation failed and took it along.
    #[error("the device's back end is gone after an earlier failure")]
    BackendGone,
    /// The event loop is gone or refused.
    #[error(transparent)]
    Loop(#[from] crate::event::LoopError),
}

/// The data half met something from which only a device reset recovers (a broken ring, a lost back end).
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct HandlerError {
    /// What happened, for the log.
    pub what: String,
}

impl HandlerError {
    /// An error with a text for the log.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into() }
    }

    /// The timer of new limits cannot be watched.
    pub(crate) fn limits(source: io::Error) -> Self {
        Self::new(format!("watching the timer of its limits failed: {source}"))
    }
}

/// Copies what of `[offset, offset + data.len())` lies in a configuration space to `data`; the rest stays as it is.
pub(crate) fn config_bytes(space: &[u8], offset: u64, data: &mut [u8]) {
    let Some(from) = usize::try_from(offset).ok().and_then(|o| space.get(o..)) else {
        return;
    };
    let n = from.len().min(data.len());
    data[..n].copy_from_slice(&from[..n]);
}
