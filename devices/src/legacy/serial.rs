//! A 16550A serial port for COM1: registers as the PC16550D data sheet has them, without a line behind them. Output is
//! gathered and given to a [`ConsoleSink`] in pieces, since each piece costs system calls and a guest writes bytes.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::ConsoleSink;
use crate::spec::Versioned;
use crate::sys::Timer;

/// Number of ports (bytes of I/O space).
pub const PORTS: u16 = 8;
/// The most input that waits for the guest (bytes).
pub const INPUT_LIMIT: usize = 4096;
/// Output is given on when it is this long, at the end of a line, after [`FLUSH_AFTER`], or when it is the first in
/// that time.
const BATCH: usize = 512;
/// How long the start of a line may wait.
const FLUSH_AFTER: Duration = Duration::from_millis(5);

mod register {
    pub const DATA: u8 = 0;
    pub const INTERRUPT_ENABLE: u8 = 1;
    /// Read: interrupt identification. Written: FIFO control.
    pub const INTERRUPT_ID: u8 = 2;
    pub const LINE_CONTROL: u8 = 3;
    pub const MODEM_CONTROL: u8 = 4;
    pub const LINE_STATUS: u8 = 5;
    pub const MODEM_STATUS: u8 = 6;
    pub const SCRATCH: u8 = 7;
}

const IER_RECEIVED: u8 = 1;
const IER_EMPTY: u8 = 2;
const IER_MASK: u8 = 0x0f;
const IIR_NONE: u8 = 1;
const IIR_EMPTY: u8 = 2;
const IIR_RECEIVED: u8 = 4;
const IIR_FIFO: u8 = 0xc0;
const FCR_ENABLE: u8 = 1;
const FCR_CLEAR_RECEIVE: u8 = 2;
const LCR_DIVISOR: u8 = 0x80;
const LSR_RECEIVED: u8 = 1;
/// Transmitter and holding register are always empty.
const LSR_EMPTY: u8 = 0x60;
const MCR_MASK: u8 = 0x1f;
const MCR_LOOP: u8 = 0x10;
/// Carrier, data set ready, clear to send.
const MSR_CONNECTED: u8 = 0xb0;

/// The port's registers and the input that waits: its saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    interrupt_enable: u8,
    /// The transmitter has become empty since the guest last looked.
    empty_pending: bool,
    fifo: bool,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    divisor: [u8; 2],
    input: VecDeque<u8>,
}

impl Versioned for SerialState {
    const NAME: &'static str = "serial";
    const VERSION: u32 = 1;
}

impl Default for SerialState {
    fn default() -> Self {
        Self {
            interrupt_enable: 0,
            empty_pending: false,
            fifo: false,
            line_control: 3,
            modem_control: 8,
            scratch: 0,
            // 9600 baud.
            divisor: [12, 0],
            input: VecDeque::new(),
        }
    }
}

/// The port. Reached under a mutex from vCPU threads, and from the event loop for input and for the flush timer.
pub struct Serial {
    s: SerialState,
    irq: Arc<EventFd>,
    sink: Box<dyn ConsoleSink>,
    output: Vec<u8>,
    timer: Timer,
    timer_set: bool,
}

impl Serial {
    /// A port as after power-on. `irq` is written on each new interrupt condition (edge).
    pub fn new(irq: Arc<EventFd>, sink: Box<dyn ConsoleSink>) -> io::Result<Self> {
        Self::restore(irq, sink, SerialState::default())
    }

    /// A port as it was saved. More input than a port holds is cut off.
    pub fn restore(
        irq: Arc<EventFd>,
        sink: Box<dyn ConsoleSink>,
        mut state: SerialState,
    ) -> io::Result<Self> {
        state.input.truncate(INPUT_LIMIT);
        state.interrupt_enable &= IER_MASK;
        state.modem_control &= MCR_MASK;
        Ok(Self {
            s: state,
            irq,
            sink,
            output: Vec::with_capacity(BATCH),
            timer: Timer::new()?,
            timer_set: false,
        })
    }

    /// The registers, after everything put out was given to the sink.
    pub fn save(&mut self) -> SerialState {
        self.flush();
        self.s.clone()
    }

    /// A descriptor for the event loop: when it is readable, [`Serial::flush`] is due. It lives as long as the port.
    pub fn flush_timer(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Gives what was put out to the sink.
    pub fn flush(&mut self) {
        if self.timer_set {
            // Not due yet when a whole line came before: then it fires later, for nothing or for what comes next.
            self.timer_set = !self.timer.take();
        }
        self.give_output();
    }

    fn give_output(&mut self) {
        if !self.output.is_empty() {
            self.sink.write(&self.output);
            self.output.clear();
        }
    }

    /// Input for the guest; returns how many bytes of it were taken.
    pub fn enqueue_input(&mut self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(INPUT_LIMIT.saturating_sub(self.s.input.len()));
        self.s.input.extend(&bytes[..n]);
        if n > 0 {
            self.interrupt_if(IER_RECEIVED);
        }
        n
    }

    /// The guest reads a port; `offset` is from the first one.
    pub fn read(&mut self, offset: u8) -> u8 {
        match offset {
            register::DATA if self.divisor_latch() => self.s.divisor[0],
            register::INTERRUPT_ENABLE if self.divisor_latch() => self.s.divisor[1],
            register::DATA => self.s.input.pop_front().unwrap_or(0),
            register::INTERRUPT_ENABLE => self.s.interrupt_enable,
            register::INTERRUPT_ID => self.identify(),
            register::LINE_CONTROL => self.s.line_control,
            register::MODEM_CONTROL => self.s.modem_control,
            register::LINE_STATUS => LSR_EMPTY | if self.s.input.is_empty() { 0 } else { LSR_RECEIVED },
            register::MODEM_STATUS => self.modem_status(),
            register::SCRATCH => self.s.scratch,
            _ => 0,
        }
    }

    /// The guest writes a port.
    pub fn write(&mut self, offset: u8, value: u8) {
        match offset {
            register::DATA if self.divisor_latch() => self.s.divisor[0] = value,
            register::INTERRUPT_ENABLE if self.divisor_latch() => self.s.divisor[1] = value,
            register::DATA => self.transmit(value),
            register::INTERRUPT_ENABLE => self.enable_interrupts(value),
            register::INTERRUPT_ID => {
                self.s.fifo = value & FCR_ENABLE != 0;
                if value & FCR_CLEAR_RECEIVE != 0 {
                    self.s.input.clear();
                }
            }
            register::LINE_CONTROL => self.s.line_control = value,
            register::MODEM_CONTROL => self.s.modem_control = value & MCR_MASK,
            register::SCRATCH => self.s.scratch = value,
            _ => {}
        }
    }

    fn divisor_latch(&self) -> bool {
        self.s.line_control & LCR_DIVISOR != 0
    }

    fn transmit(&mut self, value: u8) {
        if self.s.modem_control & MCR_LOOP != 0 {
            self.enqueue_input(&[value]);
        } else {
            self.output.push(value);
            // The first byte after a pause goes out at once; those that follow it wait for each other.
            if value == b'\n' || self.output.len() >= BATCH || !self.timer_set {
                self.give_output();
            }
            if !self.timer_set {
                self.timer_set = self.timer.set(FLUSH_AFTER).is_ok();
            }
        }
        self.s.empty_pending = true;
        self.interrupt_if(IER_EMPTY);
    }

    fn enable_interrupts(&mut self, value: u8) {
        let newly = value & !self.s.interrupt_enable;
        self.s.interrupt_enable = value & IER_MASK;
        if newly & IER_EMPTY != 0 {
            self.s.empty_pending = true;
            self.interrupt_if(IER_EMPTY);
        }
        if newly & IER_RECEIVED != 0 && !self.s.input.is_empty() {
            self.interrupt_if(IER_RECEIVED);
        }
    }

    fn interrupt_if(&self, enabled: u8) {
        if self.s.interrupt_enable & enabled != 0 {
            // Fails only when the counter is full, and then the interrupt is pending already.
            let _ = self.irq.write(1);
        }
    }

    fn identify(&mut self) -> u8 {
        let fifo = if self.s.fifo { IIR_FIFO } else { 0 };
        let enabled = self.s.interrupt_enable;
        let cause = if enabled & IER_RECEIVED != 0 && !self.s.input.is_empty() {
            IIR_RECEIVED
        } else if enabled & IER_EMPTY != 0 && std::mem::take(&mut self.s.empty_pending) {
            IIR_EMPTY
        } else {
            IIR_NONE
        };
        fifo | cause
    }

    /// In loop-back the modem's lines show what the port itself puts on them.
    fn modem_status(&self) -> u8 {
        let m = self.s.modem_control;
        if m & MCR_LOOP == 0 {
            return MSR_CONNECTED;
        }
        let (dtr, rts, out1, out2) = (m & 1, m >> 1 & 1, m >> 2 & 1, m >> 3 & 1);
        rts << 4 | dtr << 5 | out1 << 6 | out2 << 7
    }
}

#[cfg(test)]
#[path = "serial_tests.rs"]
mod tests;
