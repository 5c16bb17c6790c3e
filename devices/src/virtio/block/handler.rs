//! The data half of a block device.

use std::io;

use super::super::ring::{Budget, Chain, MAX_SEGMENTS};
use super::super::{Activation, ActiveQueue, HandlerError, QueueHandler, Stopped};
use super::QUEUE_SIZE;
use super::engine::Disk;
use super::request::{Operation, Request, Status};
use crate::event::{Readiness, Registrar, Token};
use crate::sys::IoVecs;

const QUEUE: Token = Token(0);
/// Data moved in one wake-up before other devices are served (bytes).
const BYTES_PER_WAKE: u64 = 8 << 20;

/// Serves the request queue.
pub struct BlockHandler {
    queue: ActiveQueue,
    /// Without its queue.
    activation: Activation,
    worker: Worker,
}

/// What serves one request; apart from the queue, so that both can be borrowed.
struct Worker {
    disk: Disk,
    request: Request,
    vecs: IoVecs,
}

impl BlockHandler {
    /// A handler of `queue`, taken out of `activation`.
    pub fn new(activation: Activation, queue: ActiveQueue, disk: Disk) -> Self {
        // A buffer can lie in more than one memory region; a few such are no reason to allocate.
        let vecs = IoVecs::with_capacity(MAX_SEGMENTS + 16);
        Self {
            queue,
            activation,
            worker: Worker {
                disk,
                request: Request::new(),
                vecs,
            },
        }
    }
}

impl Worker {
    fn serve(&mut self, memory: &vm_memory::GuestMemoryMmap, chain: Chain<'_>, budget: &mut Budget) -> u32 {
        let (status, data) = match self.request.parse(memory, chain) {
            Ok(()) => self.disk.execute(memory, &self.request, &mut self.vecs),
            Err(_) => (Status::IoErr, 0),
        };
        budget.charge(cost(&self.request));
        self.request.complete(memory, status, data)
    }
}

/// What a request takes from a wake-up's budget (bytes, or as much time as moving them).
fn cost(request: &Request) -> u64 {
    match request.operation {
        Operation::Flush | Operation::Discard | Operation::WriteZeroes => BYTES_PER_WAKE / 4,
        _ => request.data_in().1 + request.data_out().1,
    }
}

impl QueueHandler for BlockHandler {
    fn register(&mut self, events: &mut Registrar<'_>) -> io::Result<()> {
        events.add(&*self.queue.notify, QUEUE, Readiness::IN)
    }

    fn unregister(&mut self, events: &mut Registrar<'_>) {
        // Fails only when it was not registered.
        let _ = events.remove(&*self.queue.notify);
    }

    fn handle(
        &mut self,
        token: Token,
        _ready: Readiness,
        _events: &mut Registrar<'_>,
    ) -> Result<(), HandlerError> {
        if token != QUEUE {
            return Ok(());
        }
        let memory = &*self.activation.memory;
        let mut budget = Budget::new(u32::from(QUEUE_SIZE), BYTES_PER_WAKE);
        let worker = &mut self.worker;
        self.queue.drain(
            memory,
            &*self.activation.interrupt,
            &mut budget,
            |chain, budget| worker.serve(memory, chain, budget),
        )
    }

    fn stop(self: Box<Self>) -> Stopped {
        Stopped {
            queues: vec![self.queue],
            backend: Box::new(self.worker.disk.file),
        }
    }
}
