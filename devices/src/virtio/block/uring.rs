//! Requests in flight in a ring of io_uring.
//!
//! A request that was begun lives in a slot until it is completed, and with it the list of iovecs that the kernel
//! follows. The slot's number is all that goes to the kernel and comes back. The guest's memory is held as long as
//! anything is in flight.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vm_memory::GuestMemoryMmap;

use super::job::{Job, Step};
use super::request::{Request, Status};
use crate::GuestMemory;
use crate::sys::IoVecs;
use crate::uring::{Op, Ring, passes};

struct Slot {
    queue: usize,
    request: Request,
    job: Job,
    /// The step that the kernel does.
    step: Step,
    vecs: IoVecs,
}

/// A request that is done.
pub struct Completed {
    /// Position of the queue that it came from.
    pub queue: usize,
    /// Index of its chain's head.
    pub head: u16,
    /// Bytes written to the chain, its status included.
    pub written: u32,
}

/// Requests and the ring that they are in.
pub struct Uring {
    ring: Ring,
    /// As many as were ever in flight at once; their lists are reused.
    slots: Vec<Slot>,
    free: Vec<u32>,
    memory: Option<GuestMemory>,
}

impl Uring {
    /// Nothing in flight in `ring`.
    pub fn new(ring: Ring) -> Self {
        Self {
            ring,
            slots: Vec::new(),
            free: Vec::new(),
            memory: None,
        }
    }

    /// From now on requests concern `memory`.
    pub fn start(&mut self, memory: GuestMemory) {
        self.memory = Some(memory);
    }

    /// Whether another request can be begun.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty() || self.slots.len() < self.ring.entries()
    }

    /// Number of requests that were begun and not completed.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// See [`super::engine::Engine::begin`].
    pub fn begin(
        &mut self,
        memory: &GuestMemoryMmap,
        queue: usize,
        request: &mut Request,
        job: Job,
    ) -> Option<(Status, u32)> {
        let Some(step) = job.step() else {
            return Some((Status::Ok, job.written()));
        };
        let at = match self.free.pop() {
            Some(at) => {
                let slot = &mut self.slots[at as usize];
                std::mem::swap(&mut slot.request, request);
                (slot.queue, slot.job, slot.step) = (queue, job, step);
                at
            }
            None => {
                self.slots.push(Slot {
                    queue,
                    request: std::mem::replace(request, Request::new()),
                    job,
                    step,
                    vecs: IoVecs::default(),
                });
                (self.slots.len() - 1) as u32
            }
        };
        if push(&mut self.ring, memory, &mut self.slots[at as usize], at) {
            return None;
        }
        std::mem::swap(&mut self.slots[at as usize].request, request);
        self.free.push(at);
        Some((Status::IoErr, 0))
    }

    /// Takes the next request that is done. One that has steps left goes on, once [`Uring::submit`] is called.
    pub fn completed(&mut self) -> Option<Completed> {
        let memory = self.memory.as_deref()?;
        loop {
            let (id, result) = self.ring.completed()?;
            let at = id as u32;
            let Some(slot) = self.slots.get_mut(at as usize) else {
                continue;
            };
            let result = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
            let mut outcome = slot.job.advance(slot.step, result);
            if outcome.is_ok()
                && let Some(next) = slot.job.step()
            {
                slot.step = next;
                if push(&mut self.ring, memory, slot, at) {
                    continue;
                }
                outcome = Err(Status::IoErr);
            }
            let (status, data) = match outcome {
                Ok(()) => (Status::Ok, slot.job.written()),
                Err(status) => (status, 0),
            };
            self.free.push(at);
            return Some(Completed {
                queue: slot.queue,
                head: slot.request.head,
                written: slot.request.complete(memory, status, data),
            });
        }
    }

    /// Tells the kernel of what was begun, with one system call at most.
    ///
    /// # Errors
    /// When the kernel refuses for good.
    pub fn submit(&mut self) -> io::Result<()> {
        self.ring
            .submit()
            .or_else(|e| if passes(&e) { Ok(()) } else { Err(e) })
    }

    /// Whether there is something that the kernel was not told of.
    pub fn has_pending(&mut self) -> bool {
        self.ring.pending() > 0
    }

    /// Waits until something completes, if anything is in flight. False when nothing will.
    pub fn wait(&mut self) -> bool {
        if self.in_flight() == 0 {
            return false;
        }
        self.ring.submit_and_wait().map_or_else(|e| passes(&e), |()| true)
    }

    /// Nothing is in flight any more: lets go of the guest's memory.
    pub fn stop(&mut self) {
        if self.in_flight() == 0 {
            self.memory = None;
        }
    }
}

/// Queues the step of the slot with number `at`. False when a buffer lies outside of memory, or the ring is full.
fn push(ring: &mut Ring, memory: &GuestMemoryMmap, slot: &mut Slot, at: u32) -> bool {
    let Slot {
        request, step, vecs, ..
    } = slot;
    let op = match *step {
        Step::Read { part, offset } => vecs
            .fill(memory, request.writable(), part)
            .map(|to| Op::Read { to, offset }),
        Step::Write { part, offset } => vecs
            .fill(memory, request.readable(), part)
            .map(|from| Op::Write { from, offset }),
        Step::Sync => Ok(Op::Sync),
        Step::Allocate { mode, offset, len } => Ok(Op::Allocate { mode, offset, len }),
    };
    // SAFETY: the list of iovecs is on the heap, wherever the slot itself is moved to, and not touched before the
    // completion of this step was taken. They point into `memory`, which the caller's `Uring` holds while anything is in
    // flight (see its `drop`); what a read may write to is the guest's, and reached by volatile access only.
    op.is_ok_and(|op| unsafe { ring.push(op, u64::from(at)) })
}

impl AsRawFd for Uring {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl Drop for Uring {
    /// What the kernel still works on keeps its memory, even if that is for ever.
    fn drop(&mut self) {
        loop {
            while self.completed().is_some() {}
            if !self.wait() {
                break;
            }
        }
        if self.in_flight() > 0 {
            std::mem::forget(self.memory.take());
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}
