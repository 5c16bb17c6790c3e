//! The data half of a block device.

use std::io;

use vm_memory::GuestMemoryMmap;

use super::super::ring::{Budget, Chain, Serve};
use super::super::{Activation, ActiveQueue, HandlerError, MAX_QUEUES, QueueHandler, Stopped};
use super::engine::Engine;
use super::job::Disk;
use super::request::{Operation, Request, Status};
use super::{Backend, QUEUE_SIZE};
use crate::event::{Readiness, Registrar, Token};
use crate::limit::Limiter;

/// The ring of io_uring; a smaller token is a queue's position.
const RING: Token = Token(64);
const _: () = assert!(MAX_QUEUES <= 64, "positions are bits of a word, too");
/// The limiter's.
const TIMER: Token = Token(65);
/// Requests that io_uring is told of at once: while it does them, the driver takes those before and refills the ring.
const PIECE: usize = 8;
/// Data moved in one wake-up before other devices are served (bytes).
const BYTES_PER_WAKE: u64 = 8 << 20;

/// Serves the request queues.
pub struct BlockHandler {
    queues: Vec<ActiveQueue>,
    /// Without its queues.
    activation: Activation,
    worker: Worker,
}

/// What serves one request; apart from the queues, so that both can be borrowed.
struct Worker {
    disk: Disk,
    request: Request,
    engine: Engine,
    limiter: Limiter,
    /// Position of the queue that is being served.
    queue: usize,
    /// The engine had no room for a request.
    stalled: bool,
    /// The queues are looked at again in this turn.
    comes_back: bool,
    /// Requests that may be taken before the kernel is told.
    room: usize,
}

impl BlockHandler {
    /// A handler of the queues of `activation`.
    pub fn new(mut activation: Activation, disk: Disk, mut engine: Engine, limiter: Limiter) -> Self {
        if let Engine::Uring(uring) = &mut engine {
            uring.start(activation.memory.clone());
        }
        Self {
            queues: std::mem::take(&mut activation.queues),
            activation,
            worker: Worker {
                disk,
                request: Request::new(),
                engine,
                limiter,
                queue: 0,
                stalled: false,
                comes_back: false,
                room: usize::MAX,
            },
        }
    }

    /// How many queues are served each for itself.
    fn separate(&self) -> usize {
        match &self.worker.engine {
            Engine::Sync(_) => self.queues.len(),
            Engine::Uring(_) => 1,
        }
    }

    /// Serves the queue at `at`, or all of them when their requests share a system call.
    fn drain(&mut self, at: usize, budget: &mut Budget) -> Result<(), HandlerError> {
        let count = self.queues.len();
        let (first, some) = match &self.worker.engine {
            Engine::Sync(_) => (at, 1),
            // Each begins once, so that none is left out when there is too much for one turn.
            Engine::Uring(_) => ((self.worker.queue + 1) % count, count),
        };
        let Activation {
            memory, interrupt, ..
        } = &self.activation;
        for n in 0..some {
            self.worker.queue = (first + n) % count;
            let queue = &mut self.queues[self.worker.queue];
            queue.drain(memory, &**interrupt, budget, &mut self.worker)?;
            if budget.is_spent() {
                break;
            }
        }
        Ok(())
    }

    /// Serves the queue at `at`. io_uring is told of a few requests at a time: while the kernel does them, the driver takes
    /// those before and refills the ring, which is looked at again before the driver is asked to notify. That would be an
    /// exit, and the loop would have to be woken.
    fn turn(&mut self, at: usize) -> Result<(), HandlerError> {
        let mut budget = Budget::new(u32::from(QUEUE_SIZE), BYTES_PER_WAKE);
        let by_pieces = matches!(self.worker.engine, Engine::Uring(_));
        self.worker.comes_back = by_pieces;
        loop {
            self.worker.room = if self.worker.comes_back { PIECE } else { usize::MAX };
            self.drain(at, &mut budget)?;
            if !by_pieces {
                return Ok(());
            }
            let took_all = self.worker.room > 0;
            let nothing_new = self.submit()? == 0 && took_all;
            if !self.worker.comes_back {
                return Ok(());
            }
            self.worker.comes_back = !nothing_new && !budget.is_spent();
        }
    }

    /// Gives back what the ring has done; how many requests it was.
    fn complete(&mut self) -> Result<usize, HandlerError> {
        let Engine::Uring(uring) = &mut self.worker.engine else {
            return Ok(0);
        };
        let Activation {
            memory, interrupt, ..
        } = &self.activation;
        // A device has far fewer queues than bits.
        let (mut touched, mut count) = (0_u64, 0);
        while let Some(done) = uring.completed() {
            let Some(queue) = self.queues.get_mut(done.queue) else {
                continue;
            };
            queue.push_used(memory, done.head, done.written)?;
            touched |= 1 << done.queue;
            count += 1;
        }
        for (at, queue) in self.queues.iter_mut().enumerate() {
            if touched & 1 << at != 0 {
                queue.signal(memory, &**interrupt)?;
            }
        }
        Ok(count)
    }

    /// Tells the kernel, once, of all that was begun; what it has done at once is given back at once, and counted.
    fn submit(&mut self) -> Result<usize, HandlerError> {
        let Engine::Uring(uring) = &mut self.worker.engine else {
            return Ok(0);
        };
        uring
            .submit()
            .map_err(|e| HandlerError::new(format!("io_uring refuses requests: {e}")))?;
        let done = self.complete()?;
        let Engine::Uring(uring) = &mut self.worker.engine else {
            return Ok(done);
        };
        // Requests of several steps go on in the next turn, and so does what the kernel had no memory for. One that is
        // stalled is told of room by its completions; there may have been the last of them just now.
        if uring.has_pending() || self.worker.stalled && uring.has_room() {
            self.queues[0].rearm();
        }
        Ok(done)
    }
}

impl Worker {
    fn has_room(&self) -> bool {
        match &self.engine {
            Engine::Sync(_) => true,
            Engine::Uring(uring) => uring.has_room(),
        }
    }
}

impl Serve for Worker {
    fn comes_back(&self) -> bool {
        self.comes_back
    }

    fn is_ready(&mut self) -> bool {
        self.stalled = !self.has_room();
        !self.stalled && self.room > 0 && self.limiter.admits()
    }

    fn serve(&mut self, memory: &GuestMemoryMmap, chain: Chain<'_>, budget: &mut Budget) -> Option<u32> {
        self.room = self.room.saturating_sub(1);
        let parsed = self.request.parse(memory, chain);
        budget.charge(cost(&self.request));
        self.limiter
            .count(self.request.data_in().1 + self.request.data_out().1);
        let (status, data) = match parsed {
            Ok(()) => self
                .engine
                .begin(&self.disk, memory, self.queue, &mut self.request)?,
            Err(_) => (Status::IoErr, 0),
        };
        Some(self.request.complete(memory, status, data))
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
        for (at, queue) in (0..).zip(&self.queues) {
            events.add(&*queue.notify, Token(at), Readiness::IN)?;
        }
        self.worker.limiter.register(events, TIMER)?;
        match &self.worker.engine {
            Engine::Sync(_) => Ok(()),
            Engine::Uring(uring) => events.add(&**uring, RING, Readiness::IN),
        }
    }

    fn unregister(&mut self, events: &mut Registrar<'_>) {
        // Each fails only when it was not registered.
        for queue in &self.queues {
            let _ = events.remove(&*queue.notify);
        }
        self.worker.limiter.unregister(events);
        if let Engine::Uring(uring) = &self.worker.engine {
            let _ = events.remove(&**uring);
        }
    }

    fn handle(
        &mut self,
        token: Token,
        _ready: Readiness,
        events: &mut Registrar<'_>,
    ) -> Result<(), HandlerError> {
        // Those of a ring are served together.
        let queues = match token {
            // What is done makes room for what waits.
            RING => {
                self.complete()?;
                0..1
            }
            TIMER => {
                self.worker.limiter.woken();
                0..self.separate()
            }
            Token::LIMITS => {
                let limiter = &mut self.worker.limiter;
                limiter.register(events, TIMER).map_err(HandlerError::limits)?;
                0..self.separate()
            }
            Token(at) => {
                let Some(queue) = self.queues.get(at as usize) else {
                    return Ok(());
                };
                queue.clear_notification();
                at as usize..at as usize + 1
            }
        };
        self.worker.limiter.begin();
        queues.into_iter().try_for_each(|at| self.turn(at))
    }

    /// Waits for what is in flight, which nothing is added to: at most as many requests as the ring holds.
    fn stop(mut self: Box<Self>) -> Stopped {
        loop {
            // A queue that is broken takes nothing back; the requests have to end all the same.
            let _ = self.complete();
            let Engine::Uring(uring) = &mut self.worker.engine else {
                break;
            };
            if !uring.wait() {
                uring.stop();
                break;
            }
        }
        let Worker {
            disk,
            engine,
            limiter,
            ..
        } = self.worker;
        Stopped {
            queues: self.queues,
            backend: Box::new(Backend {
                file: disk.file,
                engine,
                limiter,
            }),
        }
    }
}
