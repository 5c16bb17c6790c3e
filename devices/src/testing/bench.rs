//! Drives a device's data half step by step, and whole transports.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;

use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{FakeQueue, is_readable, memory, write};
use crate::GuestMemory;
use crate::event::{EventLoop, LoopHandle, Slot, Token};
use crate::limit::{DeviceLimits, LimitBoard};
use crate::virtio::core::F_EVENT_IDX;
use crate::virtio::mmio::{MmioParts, MmioTransport};
use crate::virtio::{Activation, ActiveQueue, Interrupt, VirtioDevice};

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

    /// Changes limits as a VMM does.
    pub fn set_limits(&mut self, board: &LimitBoard, limits: DeviceLimits) {
        board.set(0, limits).unwrap();
        self.event_loop.tell(Token::LIMITS);
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
        write(&self.memory, addr, bytes);
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
