//! The guest's console output in a file of fixed size: the VMM writes it, the host reads it, neither waits for the other.
//!
//! ```text
//! 0      8        12        16        24       32                 4096            4096 + capacity
//! ┌──────┬────────┬─────────┬─────────┬────────┬── … ─────────────┬── … ──────────┐
//! │magic │version │ zero    │capacity │ total  │ !total           │ ring of bytes  │   little-endian
//! └──────┴────────┴─────────┴─────────┴────────┴── … ─────────────┴── … ──────────┘
//! ```
//!
//! `total` counts all bytes ever written; byte number `n` lies at `4096 + n % capacity`. The writer writes at most
//! [`MAX_WRITE`] bytes beyond `total`, then `total` and its complement. So whoever reads `total` afterwards knows that
//! bytes from `total + MAX_WRITE - capacity` on were not overwritten while it read, whatever the writer was at.
//!
//! The reader takes the file for hostile: the VMM that writes it is presumed taken over.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::ConsoleSink;

/// Where the ring of bytes begins in the file (bytes).
pub const DATA_OFFSET: u64 = 4096;
/// The most bytes that the writer writes before it updates `total`.
pub const MAX_WRITE: u64 = 4096;
/// The smallest and the largest capacity (bytes).
pub const CAPACITY: std::ops::RangeInclusive<u64> = 4 * MAX_WRITE..=1 << 30;
const MAGIC: [u8; 8] = *b"SHOALCON";
const VERSION: u32 = 1;
const HEADER: usize = 40;
const TOTAL: u64 = 24;

/// A console ring could not be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// A system call failed.
    #[error("{0} the console ring failed")]
    Io(&'static str, #[source] io::Error),
    /// The file is no console ring, or one that was tampered with.
    #[error("the file is no console ring: {0}")]
    Invalid(String),
    /// The capacity that was asked for.
    #[error("a console ring of {0} bytes cannot be made: the capacity is from {min} to {max} bytes", min = CAPACITY.start(), max = CAPACITY.end())]
    Capacity(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    capacity: u64,
    total: u64,
}

impl Header {
    fn encode(self) -> [u8; HEADER] {
        let mut b = [0; HEADER];
        b[..8].copy_from_slice(&MAGIC);
        b[8..12].copy_from_slice(&VERSION.to_le_bytes());
        b[16..24].copy_from_slice(&self.capacity.to_le_bytes());
        b[24..40].copy_from_slice(&encode_total(self.total));
        b
    }

    /// `Ok(None)`: `total` was caught in the middle of being written.
    fn decode(b: &[u8; HEADER]) -> Result<Option<Self>, RingError> {
        let u64_at = |at: usize| b[at..at + 8].iter().rev().fold(0, |n, &x| n << 8 | u64::from(x));
        if b[..8] != MAGIC {
            return Err(RingError::Invalid("it does not begin with its mark".into()));
        }
        let version = u64_at(8) as u32;
        if version != VERSION {
            return Err(RingError::Invalid(format!(
                "version {version}, this program knows {VERSION}"
            )));
        }
        let (capacity, total) = (u64_at(16), u64_at(24));
        if !CAPACITY.contains(&capacity) {
            return Err(RingError::Invalid(format!("a capacity of {capacity} bytes")));
        }
        Ok((u64_at(32) == !total).then_some(Self { capacity, total }))
    }

    fn read(file: &File) -> Result<Self, RingError> {
        // Writing `total` takes no time to speak of; a file that stays torn was made so.
        for _ in 0..1000 {
            let mut b = [0; HEADER];
            file.read_exact_at(&mut b, 0)
                .map_err(|e| RingError::Io("reading the header of", e))?;
            if let Some(header) = Self::decode(&b)? {
                return Ok(header);
            }
        }
        Err(RingError::Invalid(
            "its total and the total's complement differ".into(),
        ))
    }
}

fn encode_total(total: u64) -> [u8; 16] {
    let mut b = [0; 16];
    b[..8].copy_from_slice(&total.to_le_bytes());
    b[8..].copy_from_slice(&(!total).to_le_bytes());
    b
}

/// The VMM's half: a [`ConsoleSink`].
pub struct ConsoleRingWriter {
    file: File,
    capacity: u64,
    total: u64,
}

impl ConsoleRingWriter {
    /// Writes to `file`, which is open for reading and writing. A ring of the same capacity that lies there is gone on
    /// with; anything else is replaced by an empty one.
    pub fn open(file: File, capacity: u64) -> Result<Self, RingError> {
        if !CAPACITY.contains(&capacity) {
            return Err(RingError::Capacity(capacity));
        }
        let length = file.metadata().map_err(|e| RingError::Io("examining", e))?.len();
        let total = match Header::read(&file) {
            Ok(h) if h.capacity == capacity && length == DATA_OFFSET + capacity => h.total,
            _ => Self::create(&file, capacity)?,
        };
        Ok(Self {
            file,
            capacity,
            total,
        })
    }

    fn create(file: &File, capacity: u64) -> Result<u64, RingError> {
        let header = Header { capacity, total: 0 }.encode();
        file.set_len(0)
            .and_then(|()| file.set_len(DATA_OFFSET + capacity))
            .and_then(|()| file.write_all_at(&header, 0))
            .map_err(|e| RingError::Io("creating", e))?;
        Ok(0)
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        for piece in bytes.chunks(MAX_WRITE as usize) {
            let at = self.total % self.capacity;
            let before_end = (self.capacity - at).min(piece.len() as u64) as usize;
            let (first, second) = piece.split_at(before_end);
            self.file.write_all_at(first, DATA_OFFSET + at)?;
            self.file.write_all_at(second, DATA_OFFSET)?;
            self.total = self.total.wrapping_add(piece.len() as u64);
            self.file.write_all_at(&encode_total(self.total), TOTAL)?;
        }
        Ok(())
    }
}

impl ConsoleSink for ConsoleRingWriter {
    fn write(&mut self, bytes: &[u8]) {
        // A full file system loses console output; there is nobody to tell it to but the console.
        let _ = self.append(bytes);
    }
}

/// The host's half.
pub struct ConsoleRingReader {
    file: File,
    capacity: u64,
}

/// A piece of console output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Bytes between the position asked for and the first one here that were overwritten before they were read.
    pub lost: u64,
    /// The output.
    pub bytes: Vec<u8>,
    /// Where to go on.
    pub next: u64,
}

impl ConsoleRingReader {
    /// Reads from `file`, which is open for reading.
    pub fn open(file: File) -> Result<Self, RingError> {
        let header = Header::read(&file)?;
        let length = file.metadata().map_err(|e| RingError::Io("examining", e))?.len();
        if length != DATA_OFFSET + header.capacity {
            return Err(RingError::Invalid(format!(
                "{length} bytes long with a capacity of {}",
                header.capacity
            )));
        }
        Ok(Self {
            file,
            capacity: header.capacity,
        })
    }

    /// How many bytes were ever written.
    pub fn total(&self) -> Result<u64, RingError> {
        let header = Header::read(&self.file)?;
        if header.capacity != self.capacity {
            return Err(RingError::Invalid("its capacity has changed".into()));
        }
        Ok(header.total)
    }

    /// The first byte that can still be read when `total` were written.
    fn oldest(&self, total: u64) -> u64 {
        total.saturating_sub(self.capacity - MAX_WRITE)
    }

    /// Reads up to `max` bytes from `position` on (the number of a byte since the beginning). What was overwritten is
    /// skipped and counted. A position beyond the end gives nothing and leads back to the end.
    pub fn read_from(&self, position: u64, max: usize) -> Result<Piece, RingError> {
        let total = self.total()?;
        if position >= total {
            return Ok(Piece {
                lost: 0,
                bytes: Vec::new(),
                next: total,
            });
        }
        let start = position.max(self.oldest(total));
        // Less than the capacity.
        let len = (total - start).min(max as u64) as usize;
        let mut bytes = vec![0; len];
        self.read_ring(start, &mut bytes)?;
        // What the writer has overwritten meanwhile is lost as well.
        let oldest = self.oldest(self.total()?.max(total));
        let overwritten = oldest.saturating_sub(start).min(len as u64);
        bytes.drain(..overwritten as usize);
        Ok(Piece {
            lost: start - position + overwritten,
            bytes,
            next: start + len as u64,
        })
    }

    /// The last `max` bytes.
    pub fn tail(&self, max: usize) -> Result<Piece, RingError> {
        let total = self.total()?;
        self.read_from(total.saturating_sub(max as u64).max(self.oldest(total)), max)
    }

    fn read_ring(&self, start: u64, bytes: &mut [u8]) -> Result<(), RingError> {
        let at = start % self.capacity;
        let before_end = (self.capacity - at).min(bytes.len() as u64) as usize;
        let (first, second) = bytes.split_at_mut(before_end);
        self.file
            .read_exact_at(first, DATA_OFFSET + at)
            .and_then(|()| self.file.read_exact_at(second, DATA_OFFSET))
            .map_err(|e| RingError::Io("reading", e))
    }
}

#[cfg(test)]
#[path = "console_ring_tests.rs"]
mod tests;
