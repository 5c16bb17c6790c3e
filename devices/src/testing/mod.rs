//! Plays the guest: fake queues in fake memory, a bench that drives a device's data half step by step, a bench that
//! drives a whole transport, and the rubbish that a hostile guest would write. For tests and fuzz targets only.
#![allow(clippy::unwrap_used, missing_docs)]

mod bench;
pub mod hostile;
pub mod sockets;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueState};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::GuestMemory;
pub use bench::{Bench, CountingInterrupt, LoopThread, MANY_TURNS, MmioBench};

/// End of the first memory region; the second follows it directly, so that a buffer can cross both.
pub const SEAM: u64 = 4 << 20;
/// End of guest memory.
pub const END: u64 = 8 << 20;
/// Rings lie from here on.
pub const RINGS: u64 = 0x1_0000;
const RING_STRIDE: u64 = 0x1_0000;
/// Buffers may lie from here on.
pub const DATA: u64 = 0x20_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Two adjacent regions from zero to [`END`].
pub fn memory() -> GuestMemory {
    let ranges = [
        (GuestAddress(0), SEAM as usize),
        (GuestAddress(SEAM), (END - SEAM) as usize),
    ];
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

/// Writes guest memory.
pub fn write(memory: &GuestMemoryMmap, addr: u64, bytes: &[u8]) {
    memory.write_slice(bytes, GuestAddress(addr)).unwrap();
}

/// Waits until `fd` is readable; false after `timeout_ms`.
pub fn is_readable(fd: &impl AsRawFd, timeout_ms: i32) -> bool {
    let mut p = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&mut p, 1, timeout_ms) > 0 }
}

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Buf {
    pub addr: u64,
    pub len: u32,
    pub write: bool,
}

/// A buffer that the device may read.
pub fn readable(addr: u64, len: u32) -> Buf {
    Buf {
        addr,
        len,
        write: false,
    }
}

/// A buffer that the device may write.
pub fn writable(addr: u64, len: u32) -> Buf {
    Buf {
        addr,
        len,
        write: true,
    }
}

/// The driver's side of one split queue.
pub struct FakeQueue {
    pub memory: GuestMemory,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    pub size: u16,
    next_desc: u16,
    avail_idx: u16,
    used_idx: u16,
}

impl FakeQueue {
    pub fn new(memory: GuestMemory, index: u16, size: u16) -> Self {
        let desc = RINGS + u64::from(index) * RING_STRIDE;
        let (avail, used) = (desc + 0x8000, desc + 0xa000);
        let q = Self {
            memory,
            desc,
            avail,
            used,
            size,
            next_desc: 0,
            avail_idx: 0,
            used_idx: 0,
        };
        q.memory
            .write_slice(&vec![0; RING_STRIDE as usize], GuestAddress(desc))
            .unwrap();
        q
    }

    /// The ring as the core would build it.
    pub fn build(&self, event_idx: bool, next: u16) -> Queue {
        let state = QueueState {
            max_size: self.size,
            next_avail: next,
            next_used: next,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: true,
            desc_table: self.desc,
            avail_ring: self.avail,
            used_ring: self.used,
        };
        Queue::try_from(state).unwrap()
    }

    pub fn write_desc(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(table + u64::from(index) * 16);
        let mut d = [0; 16];
        d[..8].copy_from_slice(&addr.to_le_bytes());
        d[8..12].copy_from_slice(&len.to_le_bytes());
        d[12..14].copy_from_slice(&flags.to_le_bytes());
        d[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&d, at).unwrap();
    }

    /// Adds a chain of `bufs` and makes it available; returns its head. Descriptors are taken in a circle.
    pub fn add(&mut self, bufs: &[Buf]) -> u16 {
        let head = self.next_desc;
        for (n, b) in bufs.iter().enumerate() {
            let at = self.next_desc;
            self.next_desc = (at + 1) % self.size;
            let next = if n + 1 < bufs.len() { NEXT } else { 0 };
            let flags = next | if b.write { WRITE } else { 0 };
            self.write_desc(self.desc, at, b.addr, b.len, flags, self.next_desc);
        }
        self.publish(head);
        head
    }

    /// Adds a chain as an indirect table at `table`.
    pub fn add_indirect(&mut self, table: u64, bufs: &[Buf]) -> u16 {
        for (n, b) in bufs.iter().enumerate() {
            let next = if n + 1 < bufs.len() { NEXT } else { 0 };
            let flags = next | if b.write { WRITE } else { 0 };
            self.write_desc(table, n as u16, b.addr, b.len, flags, n as u16 + 1);
        }
        let head = self.next_desc;
        self.next_desc = (head + 1) % self.size;
        self.write_desc(self.desc, head, table, bufs.len() as u32 * 16, INDIRECT, 0);
        self.publish(head);
        head
    }

    /// Makes the chain at `head` available, whatever it is.
    pub fn publish(&mut self, head: u16) {
        let slot = self.avail + 4 + u64::from(self.avail_idx % self.size) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.memory
            .store(self.avail_idx, GuestAddress(self.avail + 2), Ordering::Release)
            .unwrap();
    }

    /// The next chain that the device gave back: its head and the bytes written.
    pub fn used(&mut self) -> Option<(u32, u32)> {
        let idx: u16 = self
            .memory
            .load(GuestAddress(self.used + 2), Ordering::Acquire)
            .unwrap();
        if idx == self.used_idx {
            return None;
        }
        let at = self.used + 4 + u64::from(self.used_idx % self.size) * 8;
        self.used_idx = self.used_idx.wrapping_add(1);
        // With EVENT_IDX: interrupt at the next one.
        let event = self.avail + 4 + u64::from(self.size) * 2;
        self.memory.write_obj(self.used_idx, GuestAddress(event)).unwrap();
        Some((
            self.memory.read_obj(GuestAddress(at)).unwrap(),
            self.memory.read_obj(GuestAddress(at + 4)).unwrap(),
        ))
    }
}

/// A small generator of pseudo-random numbers, so that a failure can be repeated from its seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}
