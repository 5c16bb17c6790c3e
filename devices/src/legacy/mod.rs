//! Devices of a PC that Linux expects without asking: the serial port, the keyboard controller (for its reset line), and
//! the file that the console's output goes to.

pub mod console_ring;
pub mod i8042;
pub mod serial;

/// Takes the guest's console output. It must not block: it is called from vCPU threads.
pub trait ConsoleSink: Send {
    /// Takes `bytes`. What cannot be kept is lost.
    fn write(&mut self, bytes: &[u8]);
}
