//! The probe's drivers against a device of this file's own, which follows virtio 1.2 as long as it is not told to break.

mod machine;

use machine::{Entry, Mmio, kvm, run_with};
use shoal_probe as probe;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const BLOCK: u32 = 2;
const NET: u32 = 1;
const WINDOW: u64 = 0xd000_0000;
const ANNOUNCED: &str = "virtio_mmio.device=4K@0xd0000000:5";
const PATTERN: u64 = 0x9e37_79b9_7f4a_7c15;
const DISK_SECTORS: u64 = 8192;
const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;
const RX: usize = 0;
const TX: usize = 1;

/// What the device does wrong, from its hundredth chain on where that matters.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Fault {
    #[default]
    None,
    Data,
    Short,
    Status,
    NoStatus,
    Head,
    Silence,
    NeedsReset,
    Features,
    NoQueue,
    Frame,
}

/// Address, length and flags of a descriptor.
type Descriptor = (u64, u32, u16);

#[derive(Clone, Copy, Default)]
struct Queue {
    size: u32,
    desc: u64,
    driver: u64,
    device: u64,
    seen: u16,
    used: u16,
}

#[derive(Default)]
struct Device {
    kind: u32,
    fault: Fault,
    offered: u64,
    driver_features: u64,
    feature_page: [u32; 2],
    selected: usize,
    queues: [Queue; 3],
    status: u32,
    chains: u64,
    /// Frames that wait for a receive buffer.
    frames: Vec<Vec<u8>>,
    sent: u64,
}

impl Device {
    fn new(kind: u32, fault: Fault) -> Self {
        Self {
            kind,
            fault,
            offered: VERSION_1 | EVENT_IDX,
            ..Self::default()
        }
    }

    fn broken(&self, fault: Fault) -> bool {
        self.fault == fault && self.chains >= 100
    }

    fn register(&self, offset: u64) -> u32 {
        match offset {
            0x00 => u32::from_le_bytes(*b"virt"),
            0x04 => 2,
            0x08 => self.kind,
            0x10 => (self.offered >> (32 * self.feature_page[0])) as u32,
            0x34 if self.fault == Fault::NoQueue => 0,
            0x34 => 256,
            0x70 if self.broken(Fault::NeedsReset) => self.status | 0x40,
            0x70 => self.status,
            0x100 => DISK_SECTORS as u32,
            _ => 0,
        }
    }

    fn set_register(&mut self, memory: &GuestMemoryMmap, offset: u64, value: u32) {
        let q = &mut self.queues[self.selected];
        match offset {
            0x14 => self.feature_page[0] = value,
            0x24 => self.feature_page[1] = value,
            0x20 => self.driver_features |= u64::from(value) << (32 * self.feature_page[1]),
            0x30 => self.selected = value as usize,
            0x38 => q.size = value,
            0x50 => self.serve(memory, value as usize),
            0x70 if self.fault == Fault::Features => self.status = value & !8,
            0x70 => self.status = value,
            0x80 => q.desc = value.into(),
            0x90 => q.driver = value.into(),
            0xa0 => q.device = value.into(),
            _ => {}
        }
    }

    /// Serves a queue, and then what has become possible by it.
    fn serve(&mut self, memory: &GuestMemoryMmap, index: usize) {
        if self.fault == Fault::Silence || self.broken(Fault::NeedsReset) {
            return;
        }
        if self.kind == BLOCK || index == TX {
            while let Some((head, chain)) = self.next(memory, index) {
                let written = self.chain(memory, &chain);
                self.complete(memory, index, head, written);
            }
        }
        while self.kind == NET && !self.frames.is_empty() {
            let Some((head, chain)) = self.next(memory, RX) else {
                break;
            };
            let mut frame = self.frames.remove(0);
            if self.broken(Fault::Frame) {
                frame.truncate(30);
            }
            memory.write_slice(&frame, GuestAddress(chain[0].0)).unwrap();
            self.complete(memory, RX, head, frame.len() as u32);
        }
    }

    /// The next chain: its head, and its descriptors.
    fn next(&mut self, m: &GuestMemoryMmap, index: usize) -> Option<(u16, Vec<Descriptor>)> {
        let q = &mut self.queues[index];
        let available: u16 = m.read_obj(GuestAddress(q.driver + 2)).unwrap();
        // avail_event: the next one is to be told.
        let event = GuestAddress(q.device + 4 + 8 * u64::from(q.size));
        m.write_obj(available, event).unwrap();
        if q.seen == available {
            return None;
        }
        let at = u64::from(q.seen) % u64::from(q.size);
        let head: u16 = m.read_obj(GuestAddress(q.driver + 4 + 2 * at)).unwrap();
        q.seen = q.seen.wrapping_add(1);
        let (mut chain, mut next) = (Vec::new(), head);
        loop {
            let d = GuestAddress(q.desc + 16 * u64::from(next));
            let bytes: [u8; 16] = m.read_obj(d).unwrap();
            let word = |from: usize| u16::from_le_bytes([bytes[from], bytes[from + 1]]);
            let address = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            let length = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
            chain.push((address, length, word(12)));
            if word(12) & 1 == 0 {
                return Some((head, chain));
            }
            next = word(14);
        }
    }

    fn complete(&mut self, m: &GuestMemoryMmap, index: usize, head: u16, written: u32) {
        let wrong_head = self.broken(Fault::Head);
        let q = &mut self.queues[index];
        let at = GuestAddress(q.device + 4 + 8 * (u64::from(q.used) % u64::from(q.size)));
        let head = if wrong_head { 1 } else { head };
        m.write_obj([u32::from(head), written], at).unwrap();
        q.used = q.used.wrapping_add(1);
        m.write_obj(q.used, GuestAddress(q.device + 2)).unwrap();
    }

    /// Does what a chain from the guest asks for; returns the bytes written to it.
    fn chain(&mut self, m: &GuestMemoryMmap, chain: &[Descriptor]) -> u32 {
        self.chains += 1;
        if self.kind == NET {
            let mut frame = vec![0; chain[0].1 as usize];
            m.read_slice(&mut frame, GuestAddress(chain[0].0)).unwrap();
            assert_eq!(frame[24..26], [0x88, 0xb5], "the type of the probe's frames");
            self.sent += 1;
            self.frames.push(frame);
            return 0;
        }
        let [kind, _, sector, _]: [u32; 4] = m.read_obj(GuestAddress(chain[0].0)).unwrap();
        let (data, status) = (chain[1], chain[chain.len() - 1]);
        let mut written = 1;
        if kind == 0 {
            self.put_pattern(m, u64::from(sector) * 512, data);
            written += if self.broken(Fault::Short) {
                data.1 - 512
            } else {
                data.1
            };
        } else if kind == 1 {
            let word: u64 = m.read_obj(GuestAddress(data.0)).unwrap();
            assert_eq!(
                word,
                (u64::from(sector) * 64 + 1).wrapping_mul(PATTERN),
                "what the guest writes"
            );
        }
        if !self.broken(Fault::NoStatus) {
            let value = u8::from(self.broken(Fault::Status));
            m.write_obj(value, GuestAddress(status.0)).unwrap();
        }
        written
    }

    fn put_pattern(&self, m: &GuestMemoryMmap, byte: u64, (address, length, flags): Descriptor) {
        assert_eq!(flags & 2, 2, "the buffer of a read is for the device to write");
        assert!(
            byte + u64::from(length) <= DISK_SECTORS * 512,
            "inside of the disk"
        );
        for i in 0..u64::from(length) / 8 {
            let wrong = self.broken(Fault::Data) && i == 100;
            let word = (byte / 8 + i + 1).wrapping_mul(PATTERN) ^ u64::from(wrong);
            m.write_obj(word, GuestAddress(address + 8 * i)).unwrap();
        }
    }
}

impl Mmio for Device {
    fn read(&mut self, address: u64, data: &mut [u8]) {
        assert_eq!(data.len(), 4, "registers are read as 32 bits");
        let value = self.register(address.checked_sub(WINDOW).expect("inside of the window"));
        data.copy_from_slice(&value.to_le_bytes());
    }

    fn write(&mut self, memory: &GuestMemoryMmap, address: u64, data: &[u8]) {
        let value = u32::from_le_bytes(data.try_into().expect("registers are written as 32 bits"));
        self.set_register(
            memory,
            address.checked_sub(WINDOW).expect("inside of the window"),
            value,
        );
    }
}

/// What the probe prints between `ready` and `done`, and the device afterwards.
fn obey(words: &str, kind: u32, fault: Fault) -> Option<(Vec<String>, Device)> {
    let mut device = Device::new(kind, fault);
    let cmdline = format!("patience=20000000 warm=50 ops=500 {words} exit=reset {ANNOUNCED}");
    let run = run_with(&kvm()?, probe::PROBE, Entry::Pvh, &cmdline, &mut device);
    let lines = run.output.lines().skip(1).map(str::to_owned).collect();
    Some((lines, device))
}

/// How many operations these lines tell the latencies of, which have to grow from one to the next.
fn latencies(lines: &[String]) -> u64 {
    let (mut sum, mut before) = (0, 0);
    for line in lines {
        assert!(line.len() < 512, "{line}");
        let pairs = line.strip_prefix("probe: latencies ").expect(line);
        for pair in pairs.split(' ') {
            let (cycles, count) = pair.split_once(':').expect(line);
            let (cycles, count): (u64, u64) = (cycles.parse().unwrap(), count.parse().unwrap());
            assert!(cycles > before && count > 0, "{lines:?}");
            (sum, before) = (sum + count, cycles);
        }
    }
    sum
}

#[test]
fn every_pattern_of_block_is_done_and_counted() {
    for (words, chains) in [
        ("depth=32 check=1 block=randread", 550),
        ("depth=1 size=512 block=read", 550),
        ("depth=8 block=randwrite", 550),
        ("depth=64 size=8192 block=write", 550),
        ("depth=2 block=flush", 550),
    ] {
        let Some((lines, device)) = obey(words, BLOCK, Fault::None) else {
            return;
        };
        assert_eq!(lines[..2], ["probe: begins", "probe: ends"], "{words}");
        assert!(lines[2].starts_with("probe: block 500 in "), "{words}: {lines:?}");
        assert_eq!(latencies(&lines[3..lines.len() - 1]), 500, "{words}: {lines:?}");
        assert!(
            lines[lines.len() - 1].starts_with("probe: kicks "),
            "{words}: {lines:?}"
        );
        assert_eq!(device.chains, chains, "{words}: {lines:?}");
        // It takes what it knows of what is offered.
        assert_eq!(device.driver_features, VERSION_1 | EVENT_IDX);
    }
}

#[test]
fn a_block_device_that_errs_is_told_and_not_measured() {
    for (fault, check, why) in [
        (Fault::Data, 1, "what was read is not what the disk holds at "),
        (Fault::Short, 0, "what was read is not what the disk holds at "),
        (Fault::Status, 0, "the request failed at "),
        (Fault::NoStatus, 0, "no status was written at "),
        (Fault::Head, 0, "a request was completed that was not made at 1"),
        (Fault::Silence, 0, "nothing was completed any more"),
        (Fault::NeedsReset, 0, "the device needs a reset"),
        (Fault::Features, 0, "the device refuses the features"),
        (Fault::NoQueue, 0, "the device lacks a queue"),
    ] {
        let words = format!("check={check} block=randread");
        let Some((lines, _)) = obey(&words, BLOCK, fault) else {
            return;
        };
        let told = format!("probe: block error: {why}");
        assert!(lines.iter().any(|l| l.starts_with(&told)), "{fault:?}: {lines:?}");
        assert!(
            !lines.iter().any(|l| l.contains("cycles")),
            "{fault:?}: {lines:?}"
        );
    }
}

#[test]
fn what_cannot_be_done_is_refused() {
    for (words, kind, told) in [
        (
            "block=backwards",
            BLOCK,
            "block error: there is randread, read, randwrite, write and flush",
        ),
        (
            "depth=0 block=read",
            BLOCK,
            "block error: depth is not from 1 to 64",
        ),
        (
            "depth=65 block=read",
            BLOCK,
            "block error: depth is not from 1 to 64",
        ),
        (
            "size=100 block=read",
            BLOCK,
            "block error: size is no multiple of 512, or too much for the depth",
        ),
        (
            "size=1048576 block=read",
            BLOCK,
            "block error: size is no multiple of 512, or too much for the depth",
        ),
        (
            "size=6291456 depth=1 block=read",
            BLOCK,
            "block error: the disk is smaller than one request",
        ),
        (
            "block=read",
            NET,
            "block error: no such device is announced on the command line",
        ),
        ("net=up", NET, "net error: there is send, receive and ping"),
        ("size=59 net=send", NET, "net error: size is not from 60 to 1514"),
        (
            "size=60 depth=257 net=send",
            NET,
            "net error: depth is not from 1 to 256",
        ),
        ("vsock=up", NET, "vsock error: there is send, receive and ping"),
        (
            "size=12 vsock=send",
            NET,
            "vsock error: size is no multiple of 8 up to 61440",
        ),
        (
            "size=64 depth=65 vsock=send",
            NET,
            "vsock error: depth is not from 1 to 64",
        ),
        (
            "size=64 vsock=send",
            NET,
            "vsock error: no such device is announced on the command line",
        ),
    ] {
        let Some((lines, device)) = obey(words, kind, Fault::None) else {
            return;
        };
        assert_eq!(lines, [format!("probe: {told}")], "{words}");
        assert_eq!(device.chains, 0, "{words}");
    }
}

#[test]
fn frames_are_sent_and_come_back() {
    for (words, sent) in [("size=1514 depth=256 net=send", 550), ("size=60 net=ping", 550)] {
        let Some((lines, device)) = obey(words, NET, Fault::None) else {
            return;
        };
        assert_eq!(
            lines[..3],
            ["probe: listens", "probe: begins", "probe: ends"],
            "{words}: {lines:?}"
        );
        assert!(lines[3].starts_with("probe: net 500 in "), "{words}: {lines:?}");
        assert_eq!(device.sent, sent, "{words}");
    }
}

#[test]
fn a_frame_that_does_not_come_back_whole_is_missed() {
    for fault in [Fault::Frame, Fault::Silence, Fault::NeedsReset] {
        let Some((lines, _)) = obey("size=60 net=ping", NET, fault) else {
            return;
        };
        let told = lines.iter().any(|l| l.starts_with("probe: net error: "));
        assert!(
            told && !lines.iter().any(|l| l.contains("cycles")),
            "{fault:?}: {lines:?}"
        );
    }
}
