//! virtio over MMIO, version 2 (virtio 1.2 §4.2): the register file of one device.
//!
//! Registers are reached from vCPU threads, under a mutex of the caller. The event loop never takes that mutex: what it
//! changes (interrupt status, DEVICE_NEEDS_RESET, the configuration's generation) is atomic, in [`MmioInterrupt`].
//! Register accesses that the guest makes and the device does not understand read as zero and write nothing.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::core::{BadCoreState, BadQueue, CoreState, QueueArea, StatusChange, VirtioCore, status};
use super::{ActivateError, Activation, ActiveQueue, DeviceKind, Interrupt, Stopped, VirtioDevice};
use crate::GuestMemory;
use crate::event::{EventLoop, LoopError, LoopHandle, Slot};
use crate::log_limit::{LimitedLog, Log};
use crate::spec::{SaveError, Section, Versioned};

/// Size of a device's register range (bytes).
pub const MMIO_SIZE: u64 = 0x1000;
/// The QueueNotify register: an ioeventfd stands here for each queue, with the queue's index as data.
pub const NOTIFY_OFFSET: u64 = 0x50;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"SHOL");
const CONFIG: u64 = 0x100;

const INT_USED: u32 = 1;
const INT_CONFIG: u32 = 2;

/// The interrupt of one device: an irqfd and the registers that go with it.
pub struct MmioInterrupt {
    status: AtomicU32,
    generation: AtomicU32,
    needs_reset: AtomicBool,
    irq: Arc<EventFd>,
    log: LimitedLog,
    kind: DeviceKind,
}

impl MmioInterrupt {
    fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
        // Fails only when the counter is full, and then the interrupt is pending already.
        let _ = self.irq.write(1);
    }

    fn clear(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }
}

impl Interrupt for MmioInterrupt {
    fn signal_queue(&self, _index: u16) {
        self.raise(INT_USED);
    }

    fn signal_config(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(INT_CONFIG);
    }

    fn signal_needs_reset(&self, why: &str) {
        self.log
            .write(|| format!("{:?} device needs a reset: {why}", self.kind));
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(INT_CONFIG);
    }
}

/// What a transport is made of.
pub struct MmioParts {
    /// The device.
    pub device: Box<dyn VirtioDevice>,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The device's interrupt line, edge-triggered (an irqfd under KVM).
    pub irq: Arc<EventFd>,
    /// The loop that serves the device.
    pub event_loop: LoopHandle,
    /// Where lines that the guest provokes go, limited in number.
    pub log: Log,
}

/// Where the data half is.
enum Run {
    /// There is none: the driver is not ready, or activation failed.
    Inactive,
    /// In the event loop.
    Active(Slot),
    /// Stopped by [`MmioTransport::pause`] or restored; [`MmioTransport::resume`] makes it again.
    Paused,
}

/// Index of a queue and its positions in the available and the used ring.
type QueuePosition = (u16, u16, u16);

/// One device behind MMIO registers.
pub struct MmioTransport {
    core: VirtioCore,
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    event_loop: LoopHandle,
    interrupt: Arc<MmioInterrupt>,
    notify: Vec<Arc<EventFd>>,
    run: Run,
    on_driver_ok: Option<Box<dyn FnMut() + Send>>,
}

/// A transport's saved state with its device's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Which device it is.
    pub kind: DeviceKind,
    /// The device's own state; given to `AnyDeviceSpec::build` before the transport is restored.
    pub device: Section,
    core: CoreState,
    interrupt_status: u32,
    generation: u32,
    needs_reset: bool,
    paused: bool,
}

impl Versioned for TransportState {
    const NAME: &'static str = "virtio-mmio";
    const VERSION: u32 = 1;
}

/// A saved transport was refused.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Another device was saved.
    #[error("the saved device is {found:?}, the configured one is {expected:?}")]
    Kind {
        /// In the state.
        found: DeviceKind,
        /// Configured.
        expected: DeviceKind,
    },
    /// The device differs from the saved one.
    #[error(transparent)]
    Core(#[from] BadCoreState),
    /// Eventfds could not be made.
    #[error("creating a device's eventfds failed")]
    Io(#[from] io::Error),
}

#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(transparent)]
    Queue(#[from] BadQueue),
    #[error("{0}")]
    Activate(String),
}

impl From<ActivateError> for StartError {
    fn from(e: ActivateError) -> Self {
        let why = std::error::Error::source(&e)
            .map(|s| format!(": {s}"))
            .unwrap_or_default();
        StartError::Activate(format!("{e}{why}"))
    }
}

impl MmioTransport {
    /// A transport in its reset state; makes one notification eventfd per queue.
    pub fn new(parts: MmioParts) -> io::Result<Self> {
        let core = VirtioCore::new(parts.device.features(), parts.device.queue_max_sizes());
        Self::with_core(parts, core)
    }

    /// A transport as it was saved. The device stays stopped until [`MmioTransport::resume`].
    pub fn restore(parts: MmioParts, state: &TransportState) -> Result<Self, RestoreError> {
        let expected = parts.device.kind();
        if state.kind != expected {
            return Err(RestoreError::Kind {
                found: state.kind,
                expected,
            });
        }
        let core = VirtioCore::restore(
            parts.device.features(),
            parts.device.queue_max_sizes(),
            &state.core,
        )?;
        let mut t = Self::with_core(parts, core)?;
        t.interrupt.status.store(state.interrupt_status, Ordering::SeqCst);
        t.interrupt.generation.store(state.generation, Ordering::SeqCst);
        t.interrupt.needs_reset.store(state.needs_reset, Ordering::SeqCst);
        if state.paused && t.core.is_running() {
            t.run = Run::Paused;
        }
        Ok(t)
    }

    fn with_core(parts: MmioParts, core: VirtioCore) -> io::Result<Self> {
        let MmioParts {
            device,
            memory,
            irq,
            event_loop,
            log,
        } = parts;
        let notify = (0..core.queue_count())
            .map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new))
            .collect::<io::Result<_>>()?;
        let interrupt = Arc::new(MmioInterrupt {
            status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            irq,
            log: LimitedLog::new(log),
            kind: device.kind(),
        });
        let run = Run::Inactive;
        Ok(Self {
            core,
            device,
            memory,
            event_loop,
            interrupt,
            notify,
            run,
            on_driver_ok: None,
        })
    }

    /// One eventfd per queue, to be registered as ioeventfds at [`NOTIFY_OFFSET`] with the index as data (32 bits).
    pub fn notify_fds(&self) -> &[Arc<EventFd>] {
        &self.notify
    }

    /// Which device this is.
    pub fn kind(&self) -> DeviceKind {
        self.interrupt.kind
    }

    /// The device status register.
    pub fn status(&self) -> u8 {
        let needs_reset = self.interrupt.needs_reset.load(Ordering::SeqCst);
        self.core.status() | if needs_reset { status::NEEDS_RESET } else { 0 }
    }

    /// Calls `hook` whenever the driver has set DRIVER_OK and the device runs.
    pub fn on_driver_ok(&mut self, hook: Box<dyn FnMut() + Send>) {
        self.on_driver_ok = Some(hook);
    }

    /// The guest reads `data.len()` bytes at `offset` of the register range.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG {
            self.device.read_config(offset - CONFIG, data);
        } else if offset.is_multiple_of(4)
            && let Ok(out) = <&mut [u8; 4]>::try_from(data)
        {
            *out = self.read_register(offset).to_le_bytes();
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => self.kind() as u32,
            0x0c => VENDOR,
            0x10 => self.core.device_features(),
            0x34 => u32::from(self.core.queue_max()),
            0x44 => u32::from(self.core.queue().is_some_and(|q| q.ready)),
            0x60 => self.interrupt.status.load(Ordering::SeqCst),
            0x70 => u32::from(self.status()),
            // There is no shared memory region: length and base are all ones (§4.2.2.1).
            0xb0 | 0xb4 | 0xb8 | 0xbc => u32::MAX,
            0xfc => self.interrupt.generation.load(Ordering::SeqCst),
            _ => 0,
        }
    }

    /// The guest writes `data` at `offset` of the register range.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= CONFIG {
            self.device.write_config(offset - CONFIG, data);
        } else if offset.is_multiple_of(4)
            && let Ok(value) = <[u8; 4]>::try_from(data)
        {
            self.write_register(offset, u32::from_le_bytes(value));
        } else {
            self.log(|| {
                format!(
                    "wrote {} bytes at {offset:#x}, where there is no register",
                    data.len()
                )
            });
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        let core = &mut self.core;
        let taken = match offset {
            0x14 => return core.select_device_features(value),
            0x24 => return core.select_driver_features(value),
            0x30 => return core.select_queue(value),
            0x20 => core.write_driver_features(value),
            0x38 => core.set_queue(|q| q.size = value),
            // Drivers write zero here after a reset as well, when there is nothing to take back.
            0x44 => core.set_queue(|q| q.ready = value & 1 == 1) || value & 1 == 0,
            0x80 => core.set_queue_address(QueueArea::Desc, false, value),
            0x84 => core.set_queue_address(QueueArea::Desc, true, value),
            0x90 => core.set_queue_address(QueueArea::Driver, false, value),
            0x94 => core.set_queue_address(QueueArea::Driver, true, value),
            0xa0 => core.set_queue_address(QueueArea::Device, false, value),
            0xa4 => core.set_queue_address(QueueArea::Device, true, value),
            NOTIFY_OFFSET => self.kick(value),
            0x64 => {
                self.interrupt.status.fetch_and(!value, Ordering::SeqCst);
                true
            }
            0x70 => {
                self.write_status(value as u8);
                true
            }
            // Selects a shared memory region; there is none.
            0xac => true,
            _ => false,
        };
        if !taken {
            let phase = self.core.phase();
            self.log(|| format!("wrote {value:#x} to register {offset:#x} in phase {phase:?}, ignored"));
        }
    }

    /// A notification that did not go through an ioeventfd.
    fn kick(&self, queue: u32) -> bool {
        let Some(notify) = self.notify.get(queue as usize) else {
            return false;
        };
        // Fails only when the counter is full, and then it is pending already.
        let _ = notify.write(1);
        true
    }

    fn write_status(&mut self, value: u8) {
        match self.core.write_status(value) {
            StatusChange::None => {}
            StatusChange::Reset => self.reset(),
            StatusChange::Start => {
                self.start();
                if let (Run::Active(_), Some(hook)) = (&self.run, &mut self.on_driver_ok) {
                    hook();
                }
            }
        }
    }

    fn reset(&mut self) {
        if let Run::Active(slot) = self.run {
            let stopped = self.event_loop.detach(slot);
            // Where the queues stopped means nothing after a reset.
            self.take_back(stopped);
        }
        self.run = Run::Inactive;
        self.device.reset();
        self.interrupt.clear();
        for notify in &self.notify {
            // Drops a notification of the time before; empty is as good.
            let _ = notify.read();
        }
    }

    /// Gives the back end back to the device; returns the queues as they stopped.
    fn take_back(&mut self, stopped: Result<Option<Stopped>, LoopError>) -> Vec<QueuePosition> {
        match stopped {
            Ok(Some(stopped)) => {
                let at = |q: &ActiveQueue| (q.index, q.queue.next_avail(), q.queue.next_used());
                let positions = stopped.queues.iter().map(at).collect();
                self.device.deactivate(stopped);
                positions
            }
            Ok(None) => Vec::new(),
            Err(e) => {
                self.log(|| e.to_string());
                Vec::new()
            }
        }
    }

    fn start(&mut self) {
        let event_loop = self.event_loop.clone();
        self.start_with(|handler, interrupt| event_loop.attach(handler, interrupt));
    }

    fn start_with(
        &mut self,
        attach: impl FnOnce(Box<dyn super::QueueHandler>, Arc<dyn Interrupt>) -> Result<Slot, LoopError>,
    ) {
        self.run = Run::Inactive;
        match self.try_start(attach) {
            Ok(slot) => self.run = Run::Active(slot),
            Err(e) => self.interrupt.signal_needs_reset(&e.to_string()),
        }
    }

    fn try_start(
        &mut self,
        attach: impl FnOnce(Box<dyn super::QueueHandler>, Arc<dyn Interrupt>) -> Result<Slot, LoopError>,
    ) -> Result<Slot, StartError> {
        let mut queues = Vec::with_capacity(self.notify.len());
        for (index, notify) in (0u16..).zip(&self.notify) {
            if let Some(queue) = self.core.build_queue(index, &self.memory)? {
                queues.push(ActiveQueue {
                    index,
                    queue,
                    notify: notify.clone(),
                });
            }
        }
        let handler = self.device.activate(Activation {
            memory: self.memory.clone(),
            queues,
            interrupt: self.interrupt.clone(),
            features: self.core.features(),
        })?;
        let slot = attach(handler, self.interrupt.clone()).map_err(ActivateError::from)?;
        // What was made available before is looked at without a notification: after a resume none will come.
        for notify in &self.notify {
            let _ = notify.write(1);
        }
        Ok(slot)
    }

    /// Stops the data half, so that the device can be saved and nothing changes guest memory. The vCPUs must be paused.
    /// Must not be called from the event loop's thread; see [`MmioTransport::pause_in`].
    pub fn pause(&mut self) {
        let event_loop = self.event_loop.clone();
        self.pause_with(|slot| event_loop.detach(slot));
    }

    /// As [`MmioTransport::pause`], from the event loop's own thread.
    pub fn pause_in(&mut self, event_loop: &mut EventLoop) {
        self.pause_with(|slot| Ok(event_loop.detach(slot)));
    }

    fn pause_with(&mut self, detach: impl FnOnce(Slot) -> Result<Option<Stopped>, LoopError>) {
        if let Run::Active(slot) = self.run {
            let stopped = detach(slot);
            for (index, next_avail, next_used) in self.take_back(stopped) {
                self.core.keep_position(index, next_avail, next_used);
            }
            self.run = Run::Paused;
        }
    }

    /// Starts the data half again after a pause or a restore. Does nothing to a device that was not running.
    /// Must not be called from the event loop's thread; see [`MmioTransport::resume_in`].
    pub fn resume(&mut self) {
        if self.resumable() {
            self.start();
        }
    }

    /// As [`MmioTransport::resume`], from the event loop's own thread.
    pub fn resume_in(&mut self, event_loop: &mut EventLoop) {
        if self.resumable() {
            self.start_with(|handler, interrupt| {
                event_loop.attach(handler, interrupt).map_err(LoopError::Register)
            });
        }
    }

    /// A device that waits for a reset stays stopped.
    fn resumable(&self) -> bool {
        matches!(self.run, Run::Paused) && !self.interrupt.needs_reset.load(Ordering::SeqCst)
    }

    /// The state of the transport and its device. Pauses the device first, if that was not done; it goes on after
    /// [`MmioTransport::resume`].
    pub fn save(&mut self) -> Result<TransportState, SaveError> {
        self.pause();
        Ok(TransportState {
            kind: self.kind(),
            device: self.device.save()?,
            core: self.core.state(),
            interrupt_status: self.interrupt.status.load(Ordering::SeqCst),
            generation: self.interrupt.generation.load(Ordering::SeqCst),
            needs_reset: self.interrupt.needs_reset.load(Ordering::SeqCst),
            paused: matches!(self.run, Run::Paused),
        })
    }

    fn log(&self, line: impl FnOnce() -> String) {
        self.interrupt
            .log
            .write(|| format!("{:?} device: {}", self.kind(), line()));
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
