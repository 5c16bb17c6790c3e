//! Packets from the guest.

use std::io::ErrorKind;

use vm_memory::GuestMemoryMmap;

use super::super::ring::{Budget, Buffers, Chain, MAX_SEGMENTS, copy_from};
use super::tap::Tap;
use super::{HEADER, header};
use crate::sys::IoVecs;

/// Ethernet: the least and the most that a packet can be (bytes, without the header of virtio): addresses and type; the
/// largest IP packet behind that and a VLAN tag.
const LENGTHS: std::ops::RangeInclusive<u64> = 14..=65_535 + 18;

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It was sent, or was of no use to anybody.
    Done,
    /// The TAP takes nothing at the moment; the chain is to be put back.
    Busy,
}

/// The transmit side; its buffers are reused from packet to packet.
pub struct Transmitter {
    buffers: Buffers,
    vecs: IoVecs,
    features: u64,
    /// Length of the packet that was sent last (bytes, without header).
    last_len: u64,
}

impl Transmitter {
    /// For a driver with `features`.
    pub fn new(features: u64) -> Self {
        Self {
            buffers: Buffers::new(),
            vecs: IoVecs::with_capacity(MAX_SEGMENTS + 16),
            features,
            last_len: 0,
        }
    }

    /// Length of the packet that was sent last (bytes, without the header of virtio); zero when there was none in it.
    pub fn last_len(&self) -> u64 {
        self.last_len
    }

    /// Sends one packet. A malformed one, or one that the TAP refuses, is dropped, as a wire would.
    pub fn send(
        &mut self,
        tap: &Tap,
        memory: &GuestMemoryMmap,
        chain: Chain<'_>,
        budget: &mut Budget,
    ) -> Sent {
        self.last_len = 0;
        let mut raw = [0; HEADER];
        if self.buffers.collect(chain).is_err() || !copy_from(memory, self.buffers.readable(), 0, &mut raw) {
            return Sent::Done;
        }
        let len = self.buffers.readable_len() - HEADER as u64;
        let Some(header) = header::check(&raw, self.features).filter(|_| LENGTHS.contains(&len)) else {
            return Sent::Done;
        };
        budget.charge(len);
        self.last_len = len;
        let data = (HEADER as u64, len);
        match self
            .vecs
            .writev_after(tap, &header, memory, self.buffers.readable(), data)
        {
            Err(e) if e.kind() == ErrorKind::WouldBlock => Sent::Busy,
            _ => Sent::Done,
        }
    }
}
