//! Plays the guest: fake queues in fake memory, a bench that drives a device's data half step by step, a bench that
//! drives a whole transport, and the rubbish that a hostile guest would write. For tests and fuzz targets only.
#![allow(clippy::unwrap_used, missing_docs)]

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;

use virtio_queue::{Queue, QueueState};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::GuestMemory;
use crate::event::{EventLoop, LoopHandle, Slot};
use crate::virtio::core::F_EVENT_IDX;
use crate::virtio::mmio::{MmioParts, MmioTransport};
use crate::virtio::{Activation, ActiveQueue, Interrupt, VirtioDevice};

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

/// Counts what a device signals.
#[derive(Default)]
pub struct CountingInterrupt {
    pub queue: AtomicU32,
    pub config: AtomicU32,
    pub needs_reset: AtomicBool,
}

impl Interrupt for CountingInterrupt {
    fn signal_queue(&self, _index: u16) {
        self.queue.fetch_add(1, Ordering::SeqCst);
    }
    fn signal_config(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }
    fn signal_needs_reset(&self, _why: &str) {
        self.needs_reset.store(true, Ordering::SeqCst);
    }
}

/// A device with its data half in an event loop that the test turns by hand.
pub struct Bench {
    pub memory: GuestMemory,
    pub queues: Vec<FakeQueue>,
    pub device: Box<dyn VirtioDevice>,
    pub interrupt: Arc<CountingInterrupt>,
    event_loop: EventLoop,
    notify: Vec<Arc<EventFd>>,
    features: u64,
    slot: Option<Slot>,
}

/// Turns of the loop after which a device that is still busy without cause counts as spinning.
pub const MANY_TURNS: usize = 2000;

impl Bench {
    /// Activates `device` with all it offers.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let features = device.features();
        Self::with_features(device, features)
    }

    /// Activates `device` with `features` negotiated.
    pub fn with_features(device: Box<dyn VirtioDevice>, features: u64) -> Self {
        let count = device.queue_max_sizes().len();
        let mut bench = Self {
            memory: memory(),
            queues: Vec::new(),
            device,
            interrupt: Arc::default(),
            event_loop: EventLoop::new().unwrap(),
            notify: (0..count)
                .map(|_| Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()))
                .collect(),
            features,
            slot: None,
        };
        bench.activate();
        bench
    }

    /// Sets up fresh rings and starts the data half.
    pub fn activate(&mut self) {
        let sizes = self.device.queue_max_sizes().to_vec();
        self.queues = (0..)
            .zip(sizes)
            .map(|(i, size)| FakeQueue::new(self.memory.clone(), i, size))
            .collect();
        let built = self
            .queues
            .iter()
            .map(|q| q.build(self.features & F_EVENT_IDX != 0, 0))
            .collect();
        self.start(built);
    }

    fn start(&mut self, queues: Vec<Queue>) {
        let queues = (0..)
            .zip(queues.into_iter().zip(&self.notify))
            .map(|(index, (queue, notify))| ActiveQueue {
                index,
                queue,
                notify: notify.clone(),
            })
            .collect();
        self.interrupt.needs_reset.store(false, Ordering::SeqCst);
        let activation = Activation {
            memory: self.memory.clone(),
            queues,
            interrupt: self.interrupt.clone(),
            features: self.features,
        };
        let handler = self.device.activate(activation).expect("the device activates");
        self.slot = Some(self.event_loop.attach(handler, self.interrupt.clone()).unwrap());
    }

    /// Stops the data half; gives the rings' positions back.
    pub fn deactivate(&mut self) -> Vec<Queue> {
        let mut stopped = self.event_loop.detach(self.slot.take().unwrap()).unwrap();
        let queues = stopped
            .queues
            .iter_mut()
            .map(|q| std::mem::take(&mut q.queue))
            .collect();
        self.device.deactivate(stopped);
        queues
    }

    /// Stops the data half and starts it where it stopped, as a pause does.
    pub fn pause_and_resume(&mut self) {
        let queues = self.deactivate();
        self.start(queues);
        (0..self.notify.len()).for_each(|q| self.notify[q].write(1).unwrap());
        self.turn();
    }

    /// Replaces the inactive device and goes on with its rings, as a restore does.
    pub fn replace(&mut self, build: impl FnOnce(&mut dyn VirtioDevice) -> Box<dyn VirtioDevice>) {
        let queues = self.deactivate();
        self.device = build(&mut *self.device);
        self.start(queues);
    }

    /// Notifies a queue without turning the loop.
    pub fn notify(&self, queue: usize) {
        self.notify[queue].write(1).unwrap();
    }

    /// Notifies a queue and turns the loop until nothing is ready. Panics when that never comes.
    pub fn kick(&mut self, queue: usize) {
        self.notify(queue);
        self.turn();
    }

    /// Turns the loop until nothing is ready.
    pub fn turn(&mut self) {
        assert!(self.turn_up_to(MANY_TURNS), "the device spins");
    }

    /// Turns the loop until nothing is ready, at most `turns` times. False: still busy.
    pub fn turn_up_to(&mut self, turns: usize) -> bool {
        (0..turns).any(|_| !self.turn_once(0))
    }

    /// Turns the loop once, waiting for up to `timeout_ms`. False: nothing was ready.
    pub fn turn_once(&mut self, timeout_ms: i32) -> bool {
        let ready = is_readable(&self.event_loop, timeout_ms);
        if ready {
            self.event_loop.run_once(0, &mut Vec::new()).unwrap();
        }
        ready
    }

    /// Turns the loop until `done` says so; panics after ten seconds.
    pub fn until<T>(&mut self, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let start = std::time::Instant::now();
        loop {
            if let Some(t) = done(self) {
                return t;
            }
            assert!(
                start.elapsed().as_secs() < 10,
                "waited ten seconds for the device"
            );
            self.turn_once(100);
        }
    }

    pub fn needs_reset(&self) -> bool {
        self.interrupt.needs_reset.load(Ordering::SeqCst)
    }

    pub fn interrupts(&self) -> u32 {
        self.interrupt.queue.load(Ordering::SeqCst)
    }

    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut v = vec![0; len];
        self.memory.read_slice(&mut v, GuestAddress(addr)).unwrap();
        v
    }

    pub fn write(&self, addr: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(addr)).unwrap();
    }
}

/// An event loop in a thread of its own; ends with the guard.
pub struct LoopThread {
    pub handle: LoopHandle,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl LoopThread {
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        let mut event_loop = EventLoop::new().unwrap();
        let (handle, end) = (event_loop.handle(), Arc::new(AtomicBool::new(false)));
        let stop = end.clone();
        let thread = std::thread::spawn(move || {
            let mut own = Vec::new();
            while !stop.load(Ordering::SeqCst) {
                event_loop.run_once(-1, &mut own).unwrap();
            }
        });
        Self {
            handle,
            end,
            thread: Some(thread),
        }
    }
}

impl Drop for LoopThread {
    fn drop(&mut self) {
        self.end.store(true, Ordering::SeqCst);
        self.handle.wake();
        self.thread.take().unwrap().join().unwrap();
    }
}

/// A transport whose event loop runs in a thread, as in a VMM.
pub struct MmioBench {
    pub transport: MmioTransport,
    pub memory: GuestMemory,
    pub irq: Arc<EventFd>,
    pub event_loop: LoopThread,
}

impl MmioBench {
    pub fn parts(device: Box<dyn VirtioDevice>, memory: GuestMemory, event_loop: &LoopThread) -> MmioParts {
        let irq = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        MmioParts {
            device,
            memory,
            irq,
            event_loop: event_loop.handle.clone(),
            log: Arc::new(|l| println!("{l}")),
        }
    }

    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let (memory, event_loop) = (memory(), LoopThread::new());
        let parts = Self::parts(device, memory.clone(), &event_loop);
        let irq = parts.irq.clone();
        Self {
            transport: MmioTransport::new(parts).unwrap(),
            memory,
            irq,
            event_loop,
        }
    }

    pub fn get(&mut self, offset: u64) -> u32 {
        let mut b = [0; 4];
        self.transport.read(offset, &mut b);
        u32::from_le_bytes(b)
    }

    pub fn set(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    /// Goes through the driver's steps up to FEATURES_OK with all that is offered.
    pub fn negotiate(&mut self) {
        self.set(0x70, 1);
        self.set(0x70, 3);
        for page in 0..2 {
            self.set(0x14, page);
            let offered = self.get(0x10);
            self.set(0x24, page);
            self.set(0x20, offered);
        }
        self.set(0x70, 0xb);
    }

    /// Sets up queue `index` in memory.
    pub fn set_up_queue(&mut self, index: u16) -> FakeQueue {
        self.set(0x30, u32::from(index));
        let q = FakeQueue::new(self.memory.clone(), index, self.get(0x34) as u16);
        self.set(0x38, u32::from(q.size));
        for (low, address) in [(0x80, q.desc), (0x90, q.avail), (0xa0, q.used)] {
            self.set(low, address as u32);
            self.set(low + 4, (address >> 32) as u32);
        }
        self.set(0x44, 1);
        q
    }

    /// All the driver's steps up to DRIVER_OK.
    pub fn drive(&mut self) -> Vec<FakeQueue> {
        self.negotiate();
        let count = self.transport.notify_fds().len() as u16;
        let queues = (0..count).map(|i| self.set_up_queue(i)).collect();
        self.set(0x70, 0xf);
        queues
    }

    /// Waits for the next interrupt; false after ten seconds.
    pub fn wait_irq(&self) -> bool {
        is_readable(&*self.irq, 10_000) && self.irq.read().is_ok()
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

/// What a hostile guest puts into rings.
pub mod hostile {
    use super::*;

    fn address(r: &mut Random) -> u64 {
        match r.below(8) {
            0 => r.pick(&[
                0,
                END,
                END - 1,
                SEAM - 3,
                u64::MAX,
                u64::MAX - 7,
                1 << 63,
                0xfee0_0000,
            ]),
            1 => r.next(),
            // Over the rings themselves.
            2 => RINGS + r.below(0x2_0000),
            _ => DATA + r.below(END - DATA),
        }
    }

    fn length(r: &mut Random) -> u32 {
        match r.below(6) {
            0 => 0,
            1 => r.pick(&[u32::MAX, 1, 15, 16, 17, 0x8000_0000, 0x10_0000]),
            2 => r.next() as u32,
            3 => 512 * r.below(9) as u32,
            _ => r.below(4096) as u32,
        }
    }

    /// Fills the descriptors of a queue, and some indirect tables, with rubbish; publishes some heads.
    pub fn rubbish(q: &mut FakeQueue, r: &mut Random) {
        let table = DATA + r.below(0x1000) * 16;
        for n in 0..q.size {
            let flags = match r.below(8) {
                0 => r.next() as u16,
                1 => INDIRECT,
                n => (n as u16) & (NEXT | WRITE),
            };
            let next = if r.below(4) == 0 {
                r.next() as u16
            } else {
                r.below(u64::from(q.size)) as u16
            };
            q.write_desc(q.desc, n, address(r), length(r), flags, next);
            q.write_desc(table, n, address(r), length(r), flags & !INDIRECT, next);
        }
        // Loops, and a table that is as long as can be.
        q.write_desc(q.desc, 0, DATA, 16, NEXT, 0);
        q.write_desc(q.desc, 1, table, 16 * u32::from(q.size), INDIRECT, 0);
        q.write_desc(q.desc, 2, DATA, 16 * 65535, INDIRECT, 0);
        q.write_desc(q.desc, 3, DATA, 16, NEXT, 4);
        // Types of block requests and operations of sockets among them, so that more than the first check is met.
        let mut header = [0; 64];
        header.fill_with(|| {
            if r.below(3) == 0 {
                r.next() as u8
            } else {
                r.below(14) as u8
            }
        });
        q.memory.write_slice(&header, GuestAddress(DATA)).unwrap();
        for _ in 0..r.below(u64::from(q.size)) {
            let head = if r.below(16) == 0 {
                r.next() as u16
            } else {
                r.below(u64::from(q.size)) as u16
            };
            q.publish(head);
        }
        if r.below(8) == 0 {
            let idx = r.next() as u16;
            q.memory.write_obj(idx, GuestAddress(q.avail + 2)).unwrap();
        }
    }

    /// Rounds of rubbish in every ring of a device. It must come to rest each time, and be usable after a reset.
    pub fn rings(device: Box<dyn VirtioDevice>, seed: u64, rounds: usize) {
        let mut r = Random::new(seed);
        let mut bench = Bench::new(device);
        for _ in 0..rounds {
            for q in 0..bench.queues.len() {
                rubbish(&mut bench.queues[q], &mut r);
                bench.notify(q);
            }
            bench.turn();
            bench.deactivate();
            bench.activate();
        }
        bench.turn();
        assert!(!bench.needs_reset(), "fresh rings are enough to get going again");
    }

    /// Random accesses to a transport's registers, with rings that lie anywhere. It must answer afterwards.
    pub fn registers(device: Box<dyn VirtioDevice>, seed: u64, rounds: usize) {
        let mut r = Random::new(seed);
        let kind = device.kind();
        let mut bench = MmioBench::new(device);
        for _ in 0..rounds {
            match r.below(64) {
                0 => bench.set(0x70, 0),
                1 => drop(bench.drive()),
                2 => {
                    bench.set(0x70, 0);
                    for mut q in bench.drive() {
                        rubbish(&mut q, &mut r);
                    }
                    (0..4).for_each(|q| bench.set(0x50, q));
                }
                n if n < 32 => {
                    let offset = r.pick(&[
                        0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0,
                        0xa4, 0xac, 0xc0, 0x100, 0x108,
                    ]);
                    let wild = r.next() as u32;
                    let value = r.pick(&[0, 1, 2, 3, 0xb, 0xf, 0x80, 256, u32::MAX, wild]);
                    bench.set(offset, value);
                }
                _ => {
                    let (mut data, len) = ([0; 16], r.below(17) as usize);
                    let offset = r.pick(&[r.0 % 0x1200, r.0, u64::MAX, 0xfff, 0x101]);
                    bench.transport.read(offset, &mut data[..len]);
                    bench.transport.write(offset, &data[..len]);
                }
            }
        }
        bench.set(0x70, 0);
        bench.drive();
        assert_eq!(bench.get(0x70), 0xf, "{kind:?} runs after a reset");
    }
}

/// Unix sockets of the host for a socket device, without files: they are bound to names that the kernel chooses.
pub mod sockets {
    use std::os::fd::{FromRawFd, OwnedFd};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn socket(kind: i32) -> OwnedFd {
        // SAFETY: takes no pointers; the descriptor is new and ours.
        unsafe {
            let fd = libc::socket(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0);
            assert!(fd >= 0);
            OwnedFd::from_raw_fd(fd)
        }
    }

    /// A listening socket of `kind`.
    pub fn listener(kind: i32) -> OwnedFd {
        let s = socket(kind);
        let family = libc::AF_UNIX as libc::sa_family_t;
        let len = size_of::<libc::sa_family_t>() as libc::socklen_t;
        // SAFETY: the address is as long as is said: a family and no path, which asks for a name.
        let bound = unsafe { libc::bind(s.as_raw_fd(), std::ptr::from_ref(&family).cast(), len) };
        // SAFETY: takes no pointers.
        assert!(bound == 0 && unsafe { libc::listen(s.as_raw_fd(), 128) } == 0);
        s
    }

    /// Connects to a listener of `kind`.
    pub fn connect(listener: &impl AsRawFd, kind: i32) -> UnixStream {
        let s = socket(kind);
        // SAFETY: zeroes are a valid address.
        let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
        let mut len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
        let p = std::ptr::from_mut(&mut address);
        // SAFETY: the address has room for `len` bytes, and as many as the kernel said are given back to it.
        let done = unsafe {
            libc::getsockname(listener.as_raw_fd(), p.cast(), &mut len) == 0
                && libc::connect(s.as_raw_fd(), p.cast(), len) == 0
        };
        assert!(done, "{}", std::io::Error::last_os_error());
        UnixStream::from(s)
    }
}
