//! Packets to the guest.
//!
//! Chains are taken from the ring ahead, until the largest packet fits, and stay for the next packets when a smaller
//! one comes. A packet that is larger than what the guest has given so far is not lost: what did not fit is kept aside
//! (*held*) until the guest gives more.

use std::collections::VecDeque;
use std::io;

use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;

use super::super::ring::{Buffers, MAX_SEGMENTS, copy_to};
use super::super::{ActiveQueue, HandlerError};
use super::tap::Tap;
use super::{HEADER, feature, header};
use crate::sys::{IoVecs, Segment};

/// The largest packet with its header (bytes): the largest IP packet behind an Ethernet header with a VLAN tag.
const LARGEST: usize = HEADER + 18 + 65_535;
/// What is expected when the guest takes no large packets (bytes), unless its MTU is greater.
const USUAL_MTU: usize = 1500;
/// The most segments that are prepared; the kernel takes 1,024 in one call.
const MAX_PREPARED_SEGMENTS: usize = 1024 - MAX_SEGMENTS - 32;

/// A chain taken from the ring: how many of the segments are its own, and how many bytes they have.
#[derive(Clone, Copy, Debug)]
struct Prepared {
    head: u16,
    segments: usize,
    len: usize,
}

/// What came of trying to receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// A packet of so many bytes, or one that was dropped.
    Packet(usize),
    /// The TAP has nothing.
    Empty,
    /// The guest has to give buffers first.
    Starved,
    /// The TAP is gone.
    Lost,
}

/// How the taking ahead of chains ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Room {
    /// What is wanted fits.
    Enough,
    /// The ring has no more.
    RingEmpty,
    /// There are more chains, and they cannot be added to those that are prepared.
    Blocked,
}

/// A packet whose beginning lies in the prepared chains, and the rest in [`Receiver::overflow`].
#[derive(Clone, Copy, Debug)]
struct Held {
    len: usize,
    /// Length of the beginning.
    delivered: usize,
}

/// The receive side.
pub struct Receiver {
    /// Packets may be spread over several chains.
    mergeable: bool,
    /// What the largest packet that is expected takes (bytes).
    wanted: usize,
    buffers: Buffers,
    prepared: VecDeque<Prepared>,
    segments: Vec<Segment>,
    capacity: usize,
    vecs: IoVecs,
    /// Takes what does not fit into the prepared chains.
    overflow: Box<[u8]>,
    held: Option<Held>,
}

impl Receiver {
    /// For a driver with `features`, and the MTU that it was told of (zero: none).
    pub fn new(features: u64, mtu: u16) -> Self {
        let large = features & feature::GUEST_LARGE != 0;
        let usual = HEADER + 18 + USUAL_MTU.max(usize::from(mtu));
        Self {
            mergeable: features & feature::MRG_RXBUF != 0,
            wanted: if large { LARGEST } else { usual },
            buffers: Buffers::new(),
            prepared: VecDeque::with_capacity(64),
            segments: Vec::with_capacity(MAX_PREPARED_SEGMENTS + MAX_SEGMENTS),
            capacity: 0,
            vecs: IoVecs::with_capacity(MAX_PREPARED_SEGMENTS + MAX_SEGMENTS + 32),
            overflow: vec![0; LARGEST].into(),
            held: None,
        }
    }

    /// Receives one packet, if the TAP has one and the guest has room for it.
    pub fn receive(
        &mut self,
        tap: &Tap,
        memory: &GuestMemoryMmap,
        queue: &mut ActiveQueue,
    ) -> Result<Received, HandlerError> {
        let room = self.prepare(memory, queue)?;
        if let Some(held) = self.held {
            return self.finish_held(memory, queue, held, room);
        }
        if self.prepared.is_empty() {
            return Ok(Received::Starved);
        }
        match self
            .vecs
            .readv_and(tap, memory, &self.segments, &mut self.overflow)
        {
            // Nothing comes without a header.
            Ok(n) if n < HEADER => Ok(Received::Lost),
            Ok(n) if n <= self.capacity => self.deliver(memory, queue, n),
            // What a driver without mergeable buffers has no room for, it cannot take.
            Ok(n) if !self.mergeable => Ok(Received::Packet(n)),
            Ok(len) => {
                self.held = Some(Held {
                    len,
                    delivered: self.capacity,
                });
                Ok(Received::Packet(0))
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Received::Empty),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(Received::Packet(0)),
            Err(_) => Ok(Received::Lost),
        }
    }

    /// Takes chains until what is wanted fits.
    fn prepare(&mut self, memory: &GuestMemoryMmap, queue: &mut ActiveQueue) -> Result<Room, HandlerError> {
        let wanted = self.held.map_or(self.wanted, |h| h.len);
        while if self.mergeable {
            self.capacity < wanted
        } else {
            self.prepared.is_empty()
        } {
            if self.segments.len() > MAX_PREPARED_SEGMENTS {
                return Ok(Room::Blocked);
            }
            let Some(chain) = queue.pop(memory)? else {
                return Ok(Room::RingEmpty);
            };
            let head = chain.head_index();
            let usable = self.buffers.collect(chain).is_ok()
                && self.buffers.writable_len() >= HEADER as u64
                && self.buffers.are_inside(memory);
            if usable {
                let own = self.buffers.writable();
                // Bounded by guest memory and the number of segments; a chain can be longer than any packet.
                let len = usize::try_from(self.buffers.writable_len()).unwrap_or(usize::MAX);
                self.segments.extend_from_slice(own);
                self.prepared.push_back(Prepared {
                    head,
                    segments: own.len(),
                    len,
                });
                self.capacity = self.capacity.saturating_add(len);
            } else if self.prepared.is_empty() {
                queue.push_used_together(memory, [(head, 0)].into_iter())?;
            } else {
                // Chains are given back in the order of the ring, so that a stop can put back what was not used.
                queue.unpop();
                return Ok(Room::Blocked);
            }
        }
        Ok(Room::Enough)
    }

    /// Delivers the held packet if it fits by now. It is dropped when the guest cannot give more.
    fn finish_held(
        &mut self,
        memory: &GuestMemoryMmap,
        queue: &mut ActiveQueue,
        held: Held,
        room: Room,
    ) -> Result<Received, HandlerError> {
        let whole_ring = self.prepared.len() >= usize::from(queue.queue.size());
        match room {
            Room::Enough => {
                self.held = None;
                let rest = &self.overflow[..held.len - held.delivered];
                // The segments lie inside of memory.
                copy_to(memory, &self.segments, held.delivered as u64, rest);
                self.deliver(memory, queue, held.len)
            }
            Room::RingEmpty if !whole_ring => Ok(Received::Starved),
            _ => {
                self.held = None;
                Ok(Received::Packet(held.len))
            }
        }
    }

    /// Gives the chains back that a packet of `len` bytes has filled.
    fn deliver(
        &mut self,
        memory: &GuestMemoryMmap,
        queue: &mut ActiveQueue,
        len: usize,
    ) -> Result<Received, HandlerError> {
        let (mut left, mut chains) = (len, 0);
        while left > 0 {
            let Some(p) = self.prepared.get(chains) else { break };
            left = left.saturating_sub(p.len);
            chains += 1;
        }
        let (at, count) = header::num_buffers(chains as u16);
        // The segments lie inside of memory.
        copy_to(memory, &self.segments, at, &count);
        let mut left = len;
        let used = self.prepared.iter().take(chains).map(|p| {
            let n = left.min(p.len);
            left -= n;
            (p.head, n as u32)
        });
        queue.push_used_together(memory, used)?;
        for p in self.prepared.drain(..chains) {
            self.segments.drain(..p.segments);
            self.capacity = self.capacity.saturating_sub(p.len);
        }
        Ok(Received::Packet(len))
    }

    /// Puts chains back that were taken ahead. A held packet is lost.
    pub fn put_back(&mut self, queue: &mut ActiveQueue) {
        self.prepared.drain(..).for_each(|_| queue.unpop());
        self.segments.clear();
        (self.capacity, self.held) = (0, None);
    }
}
