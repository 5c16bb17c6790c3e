//! As much of the 8042 keyboard controller as Linux's probe needs to go on at once, and the reset line. There is no
//! keyboard: what is sent to one is answered with "resend", and the probe gives up on it without waiting.

use serde::{Deserialize, Serialize};

/// The data port, as an offset from 0x60.
pub const DATA: u8 = 0;
/// The status (read) and command (write) port, as an offset from 0x60.
pub const COMMAND: u8 = 4;

const STATUS_OUTPUT_FULL: u8 = 0x01;
const STATUS_SYSTEM: u8 = 0x04;
const RESEND: u8 = 0xfe;
/// Both ports disabled, no interrupts: nothing is connected.
const INITIAL_CONTROL: u8 = 0x34;

/// What the guest has asked the machine to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum I8042Event {
    /// Reset: the guest has pulsed the processor's reset line.
    Reset,
}

/// The controller. Its state is its saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042 {
    control: u8,
    output: Option<u8>,
    /// A command that waits for its data byte.
    pending: Option<u8>,
}

impl crate::spec::Versioned for I8042 {
    const NAME: &'static str = "i8042";
    const VERSION: u32 = 1;
}

impl Default for I8042 {
    fn default() -> Self {
        Self {
            control: INITIAL_CONTROL,
            output: None,
            pending: None,
        }
    }
}

impl I8042 {
    /// A controller as after power-on.
    pub fn new() -> Self {
        Self::default()
    }

    /// The guest reads a port; unknown offsets read as zero.
    pub fn read(&mut self, offset: u8) -> u8 {
        match offset {
            DATA => self.output.take().unwrap_or(0),
            COMMAND => {
                STATUS_SYSTEM
                    | if self.output.is_some() {
                        STATUS_OUTPUT_FULL
                    } else {
                        0
                    }
            }
            _ => 0,
        }
    }

    /// The guest writes a port.
    pub fn write(&mut self, offset: u8, value: u8) -> Option<I8042Event> {
        match offset {
            COMMAND => self.command(value),
            DATA => self.data(value),
            _ => None,
        }
    }

    fn command(&mut self, value: u8) -> Option<I8042Event> {
        self.pending = None;
        match value {
            0x20 => self.output = Some(self.control),
            // Write the control byte, the output port, or to a device: a data byte follows.
            0x60 | 0xd1..=0xd4 => self.pending = Some(value),
            // Self-test passed.
            0xaa => self.output = Some(0x55),
            // The keyboard's port is fine; the other one is not there.
            0xab => self.output = Some(0x00),
            0xa9 => self.output = Some(0x01),
            0xd0 => self.output = Some(0x03),
            // Pulses output lines; line 0, when its bit is clear, is reset.
            0xf0..=0xff if value & 1 == 0 => return Some(I8042Event::Reset),
            _ => {}
        }
        None
    }

    fn data(&mut self, value: u8) -> Option<I8042Event> {
        match self.pending.take() {
            Some(0x60) => self.control = value,
            // The output port's line 0 is the reset line, active when clear.
            Some(0xd1) if value & 1 == 0 => return Some(I8042Event::Reset),
            Some(0xd1) => {}
            // Loops a byte back as if it came from a device.
            Some(0xd2 | 0xd3) => self.output = Some(value),
            _ => self.output = Some(RESEND),
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reset_commands_reset() {
        assert_eq!(I8042::new().write(COMMAND, 0xfe), Some(I8042Event::Reset));
        let mut c = I8042::new();
        assert_eq!(c.write(COMMAND, 0xd1), None);
        assert_eq!(c.write(DATA, 0xdf & !1), Some(I8042Event::Reset));
        assert_eq!(c.write(COMMAND, 0xff), None);
    }

    #[test]
    fn the_probe_of_linux_gets_its_answers() {
        let mut c = I8042::new();
        assert_eq!(c.read(COMMAND) & STATUS_OUTPUT_FULL, 0, "nothing to flush");
        c.write(COMMAND, 0xaa);
        assert_eq!(c.read(COMMAND) & STATUS_OUTPUT_FULL, 1);
        assert_eq!(c.read(DATA), 0x55);
        c.write(COMMAND, 0x60);
        c.write(DATA, 0x47);
        c.write(COMMAND, 0x20);
        assert_eq!(c.read(DATA), 0x47);
        c.write(DATA, 0xf2);
        assert_eq!(c.read(DATA), RESEND);
        assert_eq!(c.read(COMMAND) & STATUS_OUTPUT_FULL, 0);
    }

    #[test]
    fn no_sequence_of_bytes_upsets_it() {
        let mut r = crate::testing::Random::new(42);
        let mut c = I8042::new();
        for _ in 0..100_000 {
            let (offset, value) = (r.below(8) as u8, r.next() as u8);
            c.write(offset, value);
            c.read(offset);
        }
    }
}
