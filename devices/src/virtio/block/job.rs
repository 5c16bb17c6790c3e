//! What a request comes down to: a few system calls on the disk's file, one after the other. Both engines go through
//! the same steps; they differ in how a step is done.

use std::fs::File;
use std::io;

use vm_memory::GuestMemoryMmap;

use super::super::ring::{copy_from, copy_to};
use super::request::{Operation, Request, Status};
use super::{ID_LEN, SECTOR};

/// The most sectors of one discard or write-zeroes range (1 GiB), which bounds how long it takes.
pub const MAX_DISCARD_SECTORS: u32 = (1 << 30) / SECTOR as u32;
/// The most ranges of one such request.
pub const MAX_DISCARD_SEGMENTS: u32 = 4;
const RANGE: u64 = 16;
const WRITE_ZEROES_UNMAP: u32 = 1;
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// A disk and what may be done to it.
pub struct Disk {
    /// The back end.
    pub file: File,
    /// Capacity.
    pub sectors: u64,
    /// Refuse what would write.
    pub read_only: bool,
    /// Make each write durable before it completes.
    pub write_through: bool,
    /// Answer to GET_ID.
    pub id: [u8; ID_LEN],
}

/// A system call on the disk's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Read into the request's writable buffers.
    Read {
        /// Which bytes of the buffers: start and length.
        part: (u64, u64),
        /// Where in the file (bytes).
        offset: u64,
    },
    /// Write from the request's readable buffers.
    Write {
        /// Which bytes of the buffers: start and length.
        part: (u64, u64),
        /// Where in the file (bytes).
        offset: u64,
    },
    /// Make everything written durable.
    Sync,
    /// Zero or forget a range of the file.
    Allocate {
        /// fallocate's mode.
        mode: i32,
        /// First byte.
        offset: u64,
        /// Length (bytes).
        len: u64,
    },
}

/// A range of a discard or write-zeroes request, checked.
#[derive(Clone, Copy, Debug, Default)]
struct Range {
    mode: i32,
    offset: u64,
    len: u64,
}

#[derive(Clone, Copy, Debug)]
enum Work {
    Nothing,
    Read { start: u64, len: u64, offset: u64 },
    Write { start: u64, len: u64, offset: u64 },
    Allocate([Range; MAX_DISCARD_SEGMENTS as usize]),
}

/// A request that was checked, and how far it has come. Holds nothing that the guest can change.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    work: Work,
    /// Bytes moved, or ranges done.
    done: u64,
    /// The file is to be synchronized when the work is done.
    sync: bool,
    /// Bytes of data that the guest is given.
    written: u32,
}

impl Job {
    const NOTHING: Self = Self {
        work: Work::Nothing,
        done: 0,
        sync: false,
        written: 0,
    };

    /// What is to be done next; `None` when all is done.
    pub fn step(&self) -> Option<Step> {
        let done = self.done;
        let step = match self.work {
            Work::Read { start, len, offset } if done < len => Step::Read {
                part: (start + done, len - done),
                offset: offset + done,
            },
            Work::Write { start, len, offset } if done < len => Step::Write {
                part: (start + done, len - done),
                offset: offset + done,
            },
            Work::Allocate(ranges) => match ranges.get(done as usize).filter(|r| r.len > 0) {
                Some(&Range { mode, offset, len }) => Step::Allocate { mode, offset, len },
                None if self.sync => Step::Sync,
                None => return None,
            },
            _ if self.sync => Step::Sync,
            _ => return None,
        };
        Some(step)
    }

    /// Takes the result of `step`, which [`Job::step`] returned. An error ends the job with that status.
    pub fn advance(&mut self, step: Step, result: io::Result<usize>) -> Result<(), Status> {
        match (step, result) {
            (_, Err(e)) if e.kind() == io::ErrorKind::Interrupted => Ok(()),
            (Step::Allocate { mode, .. }, Err(e)) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                self.punch_instead(mode)
            }
            // The file has become shorter than the disk.
            (_, Err(_)) | (Step::Read { .. } | Step::Write { .. }, Ok(0)) => Err(Status::IoErr),
            (Step::Read { .. } | Step::Write { .. }, Ok(n)) => {
                self.done += n as u64;
                Ok(())
            }
            (Step::Allocate { .. }, Ok(_)) => {
                self.done += 1;
                self.skip_empty();
                Ok(())
            }
            (Step::Sync, Ok(_)) => {
                self.sync = false;
                Ok(())
            }
        }
    }

    /// A hole reads as zeros as well.
    fn punch_instead(&mut self, tried: i32) -> Result<(), Status> {
        match &mut self.work {
            Work::Allocate(ranges) if tried != PUNCH => {
                ranges.iter_mut().for_each(|r| r.mode = PUNCH);
                Ok(())
            }
            _ => Err(Status::Unsupported),
        }
    }

    /// The ranges behind those of the request are empty; one within it may be, too.
    fn skip_empty(&mut self) {
        if let Work::Allocate(ranges) = &self.work {
            while ranges.get(self.done as usize).is_some_and(|r| r.len == 0) {
                self.done += 1;
            }
        }
    }

    /// Bytes of data that were written to the guest when the job has succeeded.
    pub fn written(&self) -> u32 {
        self.written
    }
}

impl Disk {
    /// Checks a request and says what is to be done for it. What the guest's memory is asked for is asked here.
    pub fn plan(&self, memory: &GuestMemoryMmap, request: &Request) -> Result<Job, Status> {
        match request.operation {
            Operation::Read { sector } => {
                let (start, len) = request.data_in();
                let offset = self.offset(sector, len)?;
                Ok(Job {
                    work: Work::Read { start, len, offset },
                    // At most MAX_DATA.
                    written: len as u32,
                    ..Job::NOTHING
                })
            }
            Operation::Write { sector } => {
                let (start, len) = request.data_out();
                let offset = self.offset(sector, len)?;
                self.check_writable()?;
                Ok(Job {
                    work: Work::Write { start, len, offset },
                    sync: self.write_through,
                    ..Job::NOTHING
                })
            }
            Operation::Flush => Ok(Job {
                sync: !self.read_only,
                ..Job::NOTHING
            }),
            Operation::GetId => self.get_id(memory, request),
            Operation::Discard => self.ranges(memory, request, discard_mode),
            Operation::WriteZeroes => self.ranges(memory, request, write_zeroes_mode),
            Operation::Unknown => Err(Status::Unsupported),
        }
    }

    fn get_id(&self, memory: &GuestMemoryMmap, r: &Request) -> Result<Job, Status> {
        let (start, len) = r.data_in();
        let n = len.min(ID_LEN as u64) as usize;
        // A driver's buffer has room for all of it (§5.2.6.1).
        if n < ID_LEN || !copy_to(memory, r.writable(), start, &self.id[..n]) {
            return Err(Status::IoErr);
        }
        Ok(Job {
            written: n as u32,
            ..Job::NOTHING
        })
    }

    /// Checks the ranges of the request; `mode` chooses fallocate's mode from a range's flags.
    fn ranges(
        &self,
        memory: &GuestMemoryMmap,
        r: &Request,
        mode: impl Fn(u32) -> Result<i32, Status>,
    ) -> Result<Job, Status> {
        self.check_writable()?;
        let (start, len) = r.data_out();
        if len == 0 || !len.is_multiple_of(RANGE) || len / RANGE > u64::from(MAX_DISCARD_SEGMENTS) {
            return Err(Status::IoErr);
        }
        let mut ranges = [Range::default(); MAX_DISCARD_SEGMENTS as usize];
        for (n, to) in (0..len / RANGE).zip(&mut ranges) {
            let mut range = [0; RANGE as usize];
            if !copy_from(memory, r.readable(), start + n * RANGE, &mut range) {
                return Err(Status::IoErr);
            }
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = range;
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            if sectors > MAX_DISCARD_SECTORS {
                return Err(Status::IoErr);
            }
            let len = u64::from(sectors) * SECTOR;
            *to = Range {
                mode: mode(u32::from_le_bytes(flags))?,
                offset: self.offset(u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]), len)?,
                len,
            };
        }
        let mut job = Job {
            work: Work::Allocate(ranges),
            sync: self.write_through,
            ..Job::NOTHING
        };
        job.skip_empty();
        Ok(job)
    }

    fn check_writable(&self) -> Result<(), Status> {
        if self.read_only {
            Err(Status::IoErr)
        } else {
            Ok(())
        }
    }

    /// Where `[sector, sector + len)` begins in the file, if it is made of whole sectors of the disk.
    fn offset(&self, sector: u64, len: u64) -> Result<u64, Status> {
        let end = sector.checked_add(len / SECTOR);
        match end {
            // The capacity in bytes fits, so the offset does.
            Some(end) if len.is_multiple_of(SECTOR) && end <= self.sectors => Ok(sector * SECTOR),
            _ => Err(Status::IoErr),
        }
    }
}

fn discard_mode(flags: u32) -> Result<i32, Status> {
    // The unmap flag is reserved here (§5.2.6.2).
    if flags != 0 {
        return Err(Status::Unsupported);
    }
    Ok(PUNCH)
}

fn write_zeroes_mode(flags: u32) -> Result<i32, Status> {
    match flags {
        0 => Ok(ZERO),
        WRITE_ZEROES_UNMAP => Ok(PUNCH),
        // Reserved flags (§5.2.6.2).
        _ => Err(Status::Unsupported),
    }
}

#[cfg(test)]
#[path = "job_tests.rs"]
mod tests;
