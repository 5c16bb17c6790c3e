//! What every data half does with its queues: take chains, give them back, signal, and do a bounded amount at a time.

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryMmap, Permissions};

use super::{ActiveQueue, HandlerError, Interrupt};
use crate::sys::Segment;

/// A descriptor chain over borrowed guest memory.
pub type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// The most segments that are followed in one chain, whatever the guest links. Longer chains are malformed for every
/// device here (the longest useful one is a block request of `SEG_MAX` segments and two for header and status).
pub const MAX_SEGMENTS: usize = 256;

impl ActiveQueue {
    /// The next available chain, if any. An error means that the ring itself is broken.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemoryMmap) -> Result<Option<Chain<'m>>, HandlerError> {
        match self.queue.iter(memory) {
            Ok(mut chains) => Ok(chains.next()),
            Err(e) => Err(self.broken(e)),
        }
    }

    /// Puts the chain that was popped last back, to be popped again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back to the driver with the number of bytes written to it.
    pub fn push_used(&mut self, memory: &GuestMemoryMmap, head: u16, len: u32) -> Result<(), HandlerError> {
        self.queue.add_used(memory, head, len).map_err(|e| self.broken(e))
    }

    /// Signals the driver, unless it has asked not to be.
    pub fn signal(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &dyn Interrupt,
    ) -> Result<(), HandlerError> {
        if self
            .queue
            .needs_notification(memory)
            .map_err(|e| self.broken(e))?
        {
            interrupt.signal_queue(self.index);
        }
        Ok(())
    }

    /// Gives several chains back at once: the driver sees all of them or none, as it must when they are one packet
    /// (virtio 1.2 §5.1.6.4). To be followed by [`ActiveQueue::signal_since`], not by [`ActiveQueue::signal`].
    pub fn push_used_together(
        &mut self,
        memory: &GuestMemoryMmap,
        chains: impl Iterator<Item = (u16, u32)>,
    ) -> Result<(), HandlerError> {
        let (ring, size) = (self.queue.used_ring(), self.queue.size());
        let mut next = self.queue.next_used();
        for (head, len) in chains {
            let at = GuestAddress(ring + 4 + u64::from(next % size) * 8);
            let element = u64::from(len) << 32 | u64::from(head);
            memory
                .write_obj(element.to_le(), at)
                .map_err(|e| self.unreachable(e))?;
            next = next.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        memory
            .store(next.to_le(), GuestAddress(ring + 2), Ordering::Release)
            .map_err(|e| self.unreachable(e))
    }

    /// Signals the driver if it wants to know of the chains that were given back since the position in the used ring
    /// was `before`.
    pub fn signal_since(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &dyn Interrupt,
        before: u16,
    ) -> Result<(), HandlerError> {
        let now = self.queue.next_used();
        if now == before {
            return Ok(());
        }
        if self.queue.event_idx_enabled() {
            // The used ring's index is out before the driver's wish is read (virtio 1.2 §2.7.10).
            fence(Ordering::SeqCst);
            let at = GuestAddress(self.queue.avail_ring() + 4 + u64::from(self.queue.size()) * 2);
            let event: u16 = memory
                .load(at, Ordering::Relaxed)
                .map_err(|e| self.unreachable(e))?;
            let event = u16::from_le(event);
            if now.wrapping_sub(event).wrapping_sub(1) >= now.wrapping_sub(before) {
                return Ok(());
            }
        }
        interrupt.signal_queue(self.index);
        Ok(())
    }

    /// Asks the driver not to notify while the queue is being served.
    pub fn suppress_notifications(&mut self, memory: &GuestMemoryMmap) -> Result<(), HandlerError> {
        self.queue
            .disable_notification(memory)
            .map_err(|e| self.broken(e))
    }

    /// Asks the driver to notify again. True: chains came in meanwhile, for which no notification will come.
    pub fn allow_notifications(&mut self, memory: &GuestMemoryMmap) -> Result<bool, HandlerError> {
        self.queue.enable_notification(memory).map_err(|e| self.broken(e))
    }

    /// Takes the pending notification, if there is one.
    pub fn clear_notification(&self) {
        // The eventfd is non-blocking; it is empty when the event was served already.
        let _ = self.notify.read();
    }

    /// Notifies itself, so that the event loop comes back after it has served others.
    pub fn rearm(&self) {
        // Fails only when the counter is full, and then it is pending already.
        let _ = self.notify.write(1);
    }

    /// Has `server` serve up to `budget` chains, then signals the driver. What is left over is served at the next wake-up,
    /// which is made sure of, unless the server is not ready: then it has to see to it itself, and the driver is not asked
    /// to notify in between.
    pub fn drain(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &dyn Interrupt,
        budget: &mut Budget,
        server: &mut impl Serve,
    ) -> Result<(), HandlerError> {
        self.suppress_notifications(memory)?;
        let mut served = false;
        loop {
            if budget.is_spent() {
                self.rearm();
                break;
            }
            if !server.is_ready() {
                break;
            }
            match self.pop(memory)? {
                Some(chain) => {
                    let head = chain.head_index();
                    budget.chains = budget.chains.saturating_sub(1);
                    if let Some(written) = server.serve(memory, chain, budget) {
                        self.push_used(memory, head, written)?;
                        served = true;
                    }
                }
                None if server.comes_back() => break,
                None if self.allow_notifications(memory)? => {
                    // A guest that moves its index back and forth must not keep us here.
                    budget.chains = budget.chains.saturating_sub(1);
                    self.suppress_notifications(memory)?;
                }
                None => break,
            }
        }
        if served {
            self.signal(memory, interrupt)
        } else {
            Ok(())
        }
    }

    /// The rings were inside of memory when the queue was built.
    fn unreachable(&self, e: vm_memory::GuestMemoryError) -> HandlerError {
        HandlerError::new(format!("queue {} cannot be reached: {e}", self.index))
    }

    fn broken(&self, e: virtio_queue::Error) -> HandlerError {
        HandlerError::new(format!("queue {} is broken: {e}", self.index))
    }
}

/// Serves the chains of a queue, see [`ActiveQueue::drain`].
pub trait Serve {
    /// Whether another chain may be taken now.
    fn is_ready(&mut self) -> bool {
        true
    }

    /// Whether the ring is looked at again when it is empty without being told, so that the driver need not notify.
    fn comes_back(&self) -> bool {
        false
    }

    /// Serves a chain; returns the number of bytes written to it, or nothing when it will be given back later.
    fn serve(&mut self, memory: &GuestMemoryMmap, chain: Chain<'_>, budget: &mut Budget) -> Option<u32>;
}

/// How much one wake-up may do, so that a busy queue does not keep the event loop from others.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Descriptor chains that may still be served.
    pub chains: u32,
    /// Bytes that may still be moved. The chain that exceeds it is finished.
    pub bytes: u64,
}

impl Budget {
    /// A fresh budget.
    pub fn new(chains: u32, bytes: u64) -> Self {
        Self { chains, bytes }
    }

    /// Counts `bytes` as moved.
    pub fn charge(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    /// Nothing is left of it.
    pub fn is_spent(&self) -> bool {
        self.chains == 0 || self.bytes == 0
    }
}

/// The buffers of one chain by address, readable ones first, as a driver must order them. Reused from chain to chain.
#[derive(Default)]
pub struct Buffers {
    segments: Vec<Segment>,
    readable: usize,
    readable_len: u64,
    writable_len: u64,
}

/// A chain that no driver should make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadChain {
    /// A readable buffer follows a writable one (virtio 1.2 §2.7.4.2).
    #[error("a readable buffer follows a writable one")]
    Order,
    /// More than [`MAX_SEGMENTS`] buffers.
    #[error("more than {MAX_SEGMENTS} buffers")]
    TooLong,
}

impl Buffers {
    /// With room for the longest chain, so that collecting does not allocate.
    pub fn new() -> Self {
        Self {
            segments: Vec::with_capacity(MAX_SEGMENTS),
            ..Self::default()
        }
    }

    /// Collects the buffers of `chain`, replacing what was there. After an error the list holds what came before the
    /// offending descriptor. Buffers of no length are left out.
    pub fn collect(&mut self, chain: Chain<'_>) -> Result<(), BadChain> {
        self.clear();
        for (n, d) in chain.enumerate() {
            if n == MAX_SEGMENTS {
                return Err(BadChain::TooLong);
            }
            if d.len() == 0 {
                continue;
            }
            self.push(
                Segment {
                    addr: d.addr(),
                    len: d.len(),
                },
                d.is_write_only(),
            )?;
        }
        Ok(())
    }

    fn push(&mut self, segment: Segment, writable: bool) -> Result<(), BadChain> {
        if writable {
            self.writable_len += u64::from(segment.len);
        } else if self.readable < self.segments.len() {
            return Err(BadChain::Order);
        } else {
            self.readable += 1;
            self.readable_len += u64::from(segment.len);
        }
        self.segments.push(segment);
        Ok(())
    }

    /// All of them lie in guest memory.
    pub fn are_inside(&self, memory: &GuestMemoryMmap) -> bool {
        // Neither kind of access is restricted in guest memory.
        self.segments
            .iter()
            .all(|s| memory.check_range(s.addr, s.len as usize, Permissions::ReadWrite))
    }

    /// Forgets the buffers.
    pub fn clear(&mut self) {
        self.segments.clear();
        (self.readable, self.readable_len, self.writable_len) = (0, 0, 0);
    }

    /// What the device may read.
    pub fn readable(&self) -> &[Segment] {
        &self.segments[..self.readable]
    }

    /// What the device may write.
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.readable..]
    }

    /// Length of what the device may read (bytes).
    pub fn readable_len(&self) -> u64 {
        self.readable_len
    }

    /// Length of what the device may write (bytes).
    pub fn writable_len(&self) -> u64 {
        self.writable_len
    }
}

/// Copies `buf.len()` bytes from `skip` bytes into `segments`. False when they end before, or lie outside of memory.
pub fn copy_from(memory: &GuestMemoryMmap, segments: &[Segment], skip: u64, buf: &mut [u8]) -> bool {
    let len = buf.len();
    let mut done = 0;
    each_piece(segments, skip, len, |addr, n| {
        let to = &mut buf[done..done + n];
        done += n;
        match vm_memory::GuestMemoryBackend::get_slice(memory, addr, n) {
            Ok(piece) => piece.copy_to(to) == n,
            // In more than one region, or outside.
            Err(_) => memory.read_slice(to, addr).is_ok(),
        }
    }) && done == len
}

/// Copies `buf` to `skip` bytes into `segments`. False when they end before, or lie outside of memory.
pub fn copy_to(memory: &GuestMemoryMmap, segments: &[Segment], skip: u64, buf: &[u8]) -> bool {
    let mut done = 0;
    each_piece(segments, skip, buf.len(), |addr, n| {
        let from = &buf[done..done + n];
        done += n;
        match vm_memory::GuestMemoryBackend::get_slice(memory, addr, n) {
            Ok(piece) => {
                piece.copy_from(from);
                true
            }
            // As above.
            Err(_) => memory.write_slice(from, addr).is_ok(),
        }
    }) && done == buf.len()
}

fn each_piece(
    segments: &[Segment],
    mut skip: u64,
    mut len: usize,
    mut f: impl FnMut(GuestAddress, usize) -> bool,
) -> bool {
    for s in segments {
        if len == 0 {
            break;
        }
        if skip >= u64::from(s.len) {
            skip -= u64::from(s.len);
            continue;
        }
        let Some(addr) = s.addr.0.checked_add(skip) else {
            return false;
        };
        let n = (u64::from(s.len) - skip).min(len as u64) as usize;
        skip = 0;
        if !f(GuestAddress(addr), n) {
            return false;
        }
        len -= n;
    }
    true
}
