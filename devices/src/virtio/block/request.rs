//! One block request, owned: the guest's header is copied once and never looked at again, so that whatever the guest
//! does to its memory meanwhile, a completion acts upon what was checked.

use vm_memory::GuestMemoryMmap;

use super::super::ring::{Buffers, Chain, MAX_SEGMENTS, copy_from, copy_to};
use crate::sys::Segment;

/// `seg_max`: the most data segments of a request; header and status come on top.
pub const MAX_DATA_SEGMENTS: u32 = 254;
const _: () = assert!(MAX_DATA_SEGMENTS as usize + 2 <= MAX_SEGMENTS);

/// The most data of one request (bytes). Far above what Linux asks for (1.25 MiB unless told otherwise); it bounds
/// how long one request can hold up the others.
pub const MAX_DATA: u64 = 64 << 20;

const HEADER: u64 = 16;

/// The status byte of a request (virtio 1.2 §5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Failed, or malformed.
    IoErr = 1,
    /// Unknown to this device.
    Unsupported = 2,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read from `sector` on.
    Read {
        /// First sector.
        sector: u64,
    },
    /// Write from `sector` on.
    Write {
        /// First sector.
        sector: u64,
    },
    /// Make everything written durable.
    Flush,
    /// Return the disk's identity.
    GetId,
    /// Forget the contents of ranges.
    Discard,
    /// Zero ranges.
    WriteZeroes,
    /// Anything else.
    Unknown,
}

impl Operation {
    fn parse(header: [u8; HEADER as usize]) -> Self {
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([k0, k1, k2, k3]) {
            0 => Self::Read { sector },
            1 => Self::Write { sector },
            4 => Self::Flush,
            8 => Self::GetId,
            11 => Self::Discard,
            13 => Self::WriteZeroes,
            _ => Self::Unknown,
        }
    }
}

/// A request and its buffers. Reused from request to request; holds addresses, no pointers.
pub struct Request {
    /// Index of the chain's head, for the used ring.
    pub head: u16,
    /// What is asked for.
    pub operation: Operation,
    buffers: Buffers,
}

/// A chain that is no request, but has a place for a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

impl Request {
    /// An empty request with room for the longest chain.
    pub fn new() -> Self {
        Self {
            head: 0,
            operation: Operation::Unknown,
            buffers: Buffers::new(),
        }
    }

    /// Reads a request out of `chain`. After an error the request can still be completed.
    pub fn parse(&mut self, memory: &GuestMemoryMmap, chain: Chain<'_>) -> Result<(), Malformed> {
        self.head = chain.head_index();
        self.operation = Operation::Unknown;
        let mut header = [0; HEADER as usize];
        self.buffers.collect(chain).map_err(|_| Malformed)?;
        if self.buffers.writable_len() == 0
            || !copy_from(memory, self.buffers.readable(), 0, &mut header)
            || self.data_out().1 > MAX_DATA
            || self.data_in().1 > MAX_DATA
        {
            return Err(Malformed);
        }
        self.operation = Operation::parse(header);
        Ok(())
    }

    /// Data from the driver: all readable buffers, and which part of them (start, length in bytes) is data.
    pub fn data_out(&self) -> (u64, u64) {
        (HEADER, self.buffers.readable_len().saturating_sub(HEADER))
    }

    /// Data to the driver: which part of the writable buffers (start, length in bytes) is data. The last byte is the
    /// status.
    pub fn data_in(&self) -> (u64, u64) {
        (0, self.buffers.writable_len().saturating_sub(1))
    }

    /// The buffers that [`Request::data_out`] is a part of.
    pub fn readable(&self) -> &[Segment] {
        self.buffers.readable()
    }

    /// The buffers that [`Request::data_in`] is a part of.
    pub fn writable(&self) -> &[Segment] {
        self.buffers.writable()
    }

    /// Writes the status and returns what goes into the used ring: the bytes written, `data` of them before the
    /// status. Zero when the status cannot be reached.
    pub fn complete(&self, memory: &GuestMemoryMmap, status: Status, data: u32) -> u32 {
        let Some(at) = self.buffers.writable_len().checked_sub(1) else {
            return 0;
        };
        if copy_to(memory, self.writable(), at, &[status as u8]) {
            data.saturating_add(1)
        } else {
            0
        }
    }
}
