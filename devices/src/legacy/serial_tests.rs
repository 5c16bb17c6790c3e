use std::sync::Mutex;

use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::register::*;
use super::*;
use crate::testing::is_readable;

#[derive(Clone, Default)]
struct Pieces(Arc<Mutex<Vec<Vec<u8>>>>);

impl ConsoleSink for Pieces {
    fn write(&mut self, bytes: &[u8]) {
        self.0.lock().unwrap().push(bytes.to_vec());
    }
}

struct Port {
    serial: Serial,
    irq: Arc<EventFd>,
    pieces: Pieces,
}

impl Port {
    fn new() -> Self {
        let (irq, pieces) = (Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()), Pieces::default());
        let serial = Serial::new(irq.clone(), Box::new(pieces.clone())).unwrap();
        Self { serial, irq, pieces }
    }

    fn print(&mut self, text: &str) {
        text.bytes().for_each(|b| self.serial.write(DATA, b));
    }

    fn pieces(&self) -> Vec<String> {
        let pieces = self.pieces.0.lock().unwrap();
        pieces
            .iter()
            .map(|p| String::from_utf8_lossy(p).into_owned())
            .collect()
    }

    fn interrupted(&self) -> bool {
        self.irq.read().is_ok()
    }
}

#[test]
fn the_first_byte_goes_at_once_and_a_line_is_one_piece() {
    let mut p = Port::new();
    p.print("hello\nwor");
    assert_eq!(p.pieces(), ["h", "ello\n"]);
    p.print("ld\n");
    assert_eq!(p.pieces(), ["h", "ello\n", "world\n"]);
    p.print(&"x".repeat(BATCH + 1));
    assert_eq!(p.pieces()[3].len(), BATCH);
}

#[test]
fn a_prompt_without_an_end_of_line_comes_after_a_while() {
    let mut p = Port::new();
    p.print("login: ");
    let timer = p.serial.flush_timer();
    assert!(is_readable(&timer, 10_000));
    assert_eq!(p.pieces(), ["l"], "the first byte does not wait");
    p.serial.flush();
    assert_eq!(p.pieces(), ["l", "ogin: "]);
    assert!(!is_readable(&timer, 0), "the timer has been taken");
    p.print("x");
    assert!(is_readable(&timer, 10_000), "and is set again");
}

#[test]
fn input_is_read_in_order_and_bounded() {
    let mut p = Port::new();
    p.serial.write(INTERRUPT_ENABLE, IER_RECEIVED);
    assert!(!p.interrupted());
    assert_eq!(p.serial.enqueue_input(b"ab"), 2);
    assert!(p.interrupted());
    assert_eq!(p.serial.read(INTERRUPT_ID) & 0xf, IIR_RECEIVED);
    assert_eq!(p.serial.read(LINE_STATUS), 0x61);
    assert_eq!(
        [p.serial.read(DATA), p.serial.read(DATA), p.serial.read(DATA)],
        [b'a', b'b', 0]
    );
    assert_eq!(p.serial.read(INTERRUPT_ID) & 0xf, IIR_NONE);
    assert_eq!(p.serial.enqueue_input(&[0; INPUT_LIMIT + 5]), INPUT_LIMIT);
    assert_eq!(p.serial.enqueue_input(b"more"), 0);
}

#[test]
fn the_empty_transmitter_interrupts_as_linux_tests_it() {
    // serial8250_do_startup: the interrupt must come again when it is enabled again.
    let mut p = Port::new();
    for _ in 0..2 {
        p.serial.write(INTERRUPT_ENABLE, IER_EMPTY);
        assert!(p.interrupted());
        assert_eq!(p.serial.read(INTERRUPT_ID) & 0xf, IIR_EMPTY);
        assert_eq!(p.serial.read(INTERRUPT_ID) & 0xf, IIR_NONE, "reading takes it");
        p.serial.write(INTERRUPT_ENABLE, 0);
    }
    p.serial.write(INTERRUPT_ENABLE, IER_EMPTY);
    assert!(p.interrupted());
    p.print("x");
    assert!(p.interrupted(), "empty again at once");
}

#[test]
fn linux_recognizes_a_16550a() {
    // autoconfig(): interrupt enable, loop-back, FIFO, and no registers of later chips.
    let mut p = Port::new();
    p.serial.write(INTERRUPT_ENABLE, 0xff);
    assert_eq!(p.serial.read(INTERRUPT_ENABLE), 0x0f);
    p.serial.write(INTERRUPT_ENABLE, 0);
    p.serial.write(MODEM_CONTROL, 0x1a);
    assert_eq!(p.serial.read(MODEM_STATUS) & 0xf0, 0x90);
    p.serial.write(DATA, b'!');
    assert_eq!(p.serial.read(DATA), b'!');
    p.serial.write(MODEM_CONTROL, 8);
    p.serial.write(INTERRUPT_ID, FCR_ENABLE);
    assert_eq!(p.serial.read(INTERRUPT_ID) >> 6, 3);
    p.serial.write(LINE_CONTROL, 0x80);
    p.serial.write(DATA, 1);
    p.serial.write(INTERRUPT_ENABLE, 0);
    assert_eq!([p.serial.read(DATA), p.serial.read(INTERRUPT_ENABLE)], [1, 0]);
    p.serial.write(LINE_CONTROL, 3);
    p.serial.write(SCRATCH, 0x5a);
    assert_eq!(p.serial.read(SCRATCH), 0x5a);
    assert!(p.pieces().is_empty());
}

#[test]
fn state_comes_back() {
    let mut p = Port::new();
    p.serial.write(INTERRUPT_ENABLE, 3);
    p.serial.enqueue_input(b"typed");
    p.print("half a li");
    let state = p.serial.save();
    assert_eq!(p.pieces().concat(), "half a li", "nothing put out is lost");
    let mut back = Serial::restore(p.irq.clone(), Box::new(p.pieces.clone()), state.clone()).unwrap();
    assert_eq!(back.read(DATA), b't');
    assert_eq!(back.read(INTERRUPT_ENABLE), 3);
    let section = crate::spec::Section::encode(&state).unwrap();
    assert_eq!(section.decode::<SerialState>().unwrap(), state);
}

#[test]
fn no_sequence_of_accesses_upsets_it() {
    let mut r = crate::testing::Random::new(7);
    let mut p = Port::new();
    for _ in 0..200_000 {
        let (offset, value) = (r.below(10) as u8, r.next() as u8);
        p.serial.write(offset, value);
        p.serial.read(offset);
    }
    assert!(p.serial.save().input.len() <= INPUT_LIMIT);
}
