//! Where a vCPU's port and memory accesses go. Addresses are fixed, so finding a device is arithmetic, not a search.
//!
//! What nothing answers to reads as all ones, as on a PC; writes to it vanish.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use shoal_devices::legacy::i8042::{I8042, I8042Event};
use shoal_devices::legacy::serial::Serial;
use shoal_devices::virtio::core::status::DRIVER_OK;
use shoal_devices::virtio::mmio::MmioTransport;

use crate::arch::x86_64::layout::{
    ACPI_RESET, ACPI_RESET_VALUE, ACPI_S5, ACPI_SLEEP_CONTROL, ACPI_SLEEP_STATUS, I8042_COMMAND, I8042_DATA,
    MARK_PORT, SERIAL_PORT, VIRTIO_MMIO, VIRTIO_MMIO_STRIDE,
};
use crate::protocol::{ExitReason, Step, mark};
use crate::shared::Shared;

const SLEEP_ENABLE: u8 = 1 << 5;
/// Status register of virtio-mmio (virtio 1.2 §4.2.2).
const VIRTIO_STATUS: u64 = 0x70;

/// A virtio device at its place on the bus.
pub struct Window {
    transport: Mutex<MmioTransport>,
    probed: AtomicBool,
    came_up: AtomicBool,
}

impl Window {
    /// The device's place.
    pub fn new(transport: MmioTransport) -> Self {
        Self {
            transport: Mutex::new(transport),
            probed: AtomicBool::new(false),
            came_up: AtomicBool::new(false),
        }
    }
}

/// All devices of a machine.
pub struct Bus {
    /// COM1.
    pub serial: Mutex<Serial>,
    serial_probed: AtomicBool,
    i8042: Mutex<I8042>,
    windows: Vec<Window>,
    shared: Arc<Shared>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bus {
    /// A bus with the virtio devices in the order of their addresses.
    pub fn new(serial: Serial, windows: Vec<Window>, shared: Arc<Shared>) -> Self {
        Self {
            serial: Mutex::new(serial),
            serial_probed: AtomicBool::new(false),
            i8042: Mutex::new(I8042::new()),
            windows,
            shared,
        }
    }

    /// A write to an I/O port. Returns why the guest ends, if it does.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<ExitReason> {
        match (port, data) {
            (SERIAL_PORT..=0x3ff, [value]) => {
                self.once(&self.serial_probed, Step::ConsoleProbed);
                lock(&self.serial).write((port - SERIAL_PORT) as u8, *value);
            }
            (MARK_PORT, [mark @ mark::KERNEL_BEGUN..=mark::ROOT_MOUNTED]) => {
                // The host is told with the next step, as by `once`.
                self.shared.stamp(Step::Mark(*mark));
            }
            (MARK_PORT, [mark]) => self.shared.stamp_and_tell(Step::Mark(*mark)),
            (I8042_DATA | I8042_COMMAND, [value]) => {
                let event = lock(&self.i8042).write((port - I8042_DATA) as u8, *value);
                return event.map(|I8042Event::Reset| ExitReason::Reset);
            }
            (ACPI_SLEEP_CONTROL, [value]) if *value == SLEEP_ENABLE | ACPI_S5 << 2 => {
                return Some(ExitReason::PowerOff);
            }
            (ACPI_RESET, [ACPI_RESET_VALUE]) => return Some(ExitReason::Reset),
            _ => {}
        }
        None
    }

    /// A read from an I/O port.
    pub fn port_read(&self, port: u16, data: &mut [u8]) -> Option<ExitReason> {
        data.fill(0xff);
        if let [value] = data {
            *value = match port {
                SERIAL_PORT..=0x3ff => {
                    self.once(&self.serial_probed, Step::ConsoleProbed);
                    lock(&self.serial).read((port - SERIAL_PORT) as u8)
                }
                I8042_DATA | I8042_COMMAND => lock(&self.i8042).read((port - I8042_DATA) as u8),
                ACPI_SLEEP_CONTROL | ACPI_SLEEP_STATUS => 0,
                _ => 0xff,
            };
        }
        None
    }

    /// A write to memory that is no RAM.
    pub fn mmio_write(&self, address: u64, data: &[u8]) -> Option<ExitReason> {
        if let Some((index, offset)) = self.window(address) {
            let window = &self.windows[index];
            let mut transport = lock(&window.transport);
            transport.write(offset, data);
            if offset == VIRTIO_STATUS
                && transport.status() & DRIVER_OK != 0
                && !window.came_up.swap(true, Ordering::Relaxed)
            {
                self.shared.stamp_and_tell(Step::DriverOk(index as u8));
            }
        }
        None
    }

    /// A read from memory that is no RAM.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) -> Option<ExitReason> {
        match self.window(address) {
            Some((index, offset)) => {
                let window = &self.windows[index];
                self.once(&window.probed, Step::DeviceProbed(index as u8));
                lock(&window.transport).read(offset, data);
            }
            None => data.fill(0xff),
        }
        None
    }

    /// Stamps a step that the guest can bring about any number of times when it does so first. The host is told with the
    /// next step that it is told of: waking the event loop would cost the boot more than the step.
    fn once(&self, flag: &AtomicBool, step: Step) {
        if !flag.load(Ordering::Relaxed) && !flag.swap(true, Ordering::Relaxed) {
            self.shared.stamp(step);
        }
    }

    fn window(&self, address: u64) -> Option<(usize, u64)> {
        let offset = address.checked_sub(VIRTIO_MMIO)?;
        let index = (offset / VIRTIO_MMIO_STRIDE) as usize;
        (index < self.windows.len()).then_some((index, offset % VIRTIO_MMIO_STRIDE))
    }
}
