//! Does requests, one after the other, with blocking system calls straight between the file and guest memory.

use std::fs::File;
use std::io;

use vm_memory::GuestMemoryMmap;

use super::super::ring::{copy_from, copy_to};
use super::request::{Operation, Request, Status};
use super::{ID_LEN, SECTOR};
use crate::sys::{IoVecs, fallocate};

/// The most sectors of one discard or write-zeroes range (1 GiB), which bounds how long it takes.
pub const MAX_DISCARD_SECTORS: u32 = (1 << 30) / SECTOR as u32;
/// The most ranges of one such request.
pub const MAX_DISCARD_SEGMENTS: u32 = 4;
const RANGE: u64 = 16;
const WRITE_ZEROES_UNMAP: u32 = 1;

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

impl Disk {
    /// Does `request`; returns its status and the bytes of data that were written to the guest.
    pub fn execute(&self, memory: &GuestMemoryMmap, request: &Request, vecs: &mut IoVecs) -> (Status, u32) {
        let result = match request.operation {
            Operation::Read { sector } => self.read(memory, request, sector, vecs),
            Operation::Write { sector } => self.write(memory, request, sector, vecs),
            Operation::Flush => self.flush(),
            Operation::GetId => self.get_id(memory, request),
            Operation::Discard => self.ranges(memory, request, discard_mode),
            Operation::WriteZeroes => self.ranges(memory, request, write_zeroes_mode),
            Operation::Unknown => Err(Status::Unsupported),
        };
        match result {
            Ok(written) => (Status::Ok, written),
            Err(status) => (status, 0),
        }
    }

    fn read(&self, m: &GuestMemoryMmap, r: &Request, sector: u64, vecs: &mut IoVecs) -> Result<u32, Status> {
        let (start, len) = r.data_in();
        let offset = self.offset(sector, len)?;
        whole(len, |done| {
            vecs.preadv(
                &self.file,
                m,
                r.writable(),
                (start + done, len - done),
                offset + done,
            )
        })?;
        // At most MAX_DATA.
        Ok(len as u32)
    }

    fn write(&self, m: &GuestMemoryMmap, r: &Request, sector: u64, vecs: &mut IoVecs) -> Result<u32, Status> {
        let (start, len) = r.data_out();
        let offset = self.offset(sector, len)?;
        self.check_writable()?;
        whole(len, |done| {
            vecs.pwritev(
                &self.file,
                m,
                r.readable(),
                (start + done, len - done),
                offset + done,
            )
        })?;
        if self.write_through {
            self.flush()?;
        }
        Ok(0)
    }

    fn flush(&self) -> Result<u32, Status> {
        if self.read_only {
            return Ok(0);
        }
        self.file.sync_data().map(|()| 0).map_err(|_| Status::IoErr)
    }

    fn get_id(&self, memory: &GuestMemoryMmap, r: &Request) -> Result<u32, Status> {
        let (start, len) = r.data_in();
        let n = len.min(ID_LEN as u64) as usize;
        // A driver's buffer has room for all of it (§5.2.6.1).
        if n < ID_LEN || !copy_to(memory, r.writable(), start, &self.id[..n]) {
            return Err(Status::IoErr);
        }
        Ok(n as u32)
    }

    /// Applies `mode`, which chooses fallocate's mode from a range's flags, to each range of the request.
    fn ranges(
        &self,
        memory: &GuestMemoryMmap,
        r: &Request,
        mode: impl Fn(u32) -> Result<i32, Status>,
    ) -> Result<u32, Status> {
        self.check_writable()?;
        let (start, len) = r.data_out();
        if len == 0 || !len.is_multiple_of(RANGE) || len / RANGE > u64::from(MAX_DISCARD_SEGMENTS) {
            return Err(Status::IoErr);
        }
        for n in 0..len / RANGE {
            let mut range = [0; RANGE as usize];
            if !copy_from(memory, r.readable(), start + n * RANGE, &mut range) {
                return Err(Status::IoErr);
            }
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = range;
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let mode = mode(u32::from_le_bytes(flags))?;
            self.deallocate(
                u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
                sectors,
                mode,
            )?;
        }
        if self.write_through {
            self.flush()?;
        }
        Ok(0)
    }

    fn deallocate(&self, sector: u64, sectors: u32, mode: i32) -> Result<(), Status> {
        if sectors > MAX_DISCARD_SECTORS {
            return Err(Status::IoErr);
        }
        let len = u64::from(sectors) * SECTOR;
        let offset = self.offset(sector, len)?;
        if len == 0 {
            return Ok(());
        }
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let unsupported = |e: &io::Error| e.raw_os_error() == Some(libc::EOPNOTSUPP);
        match fallocate(&self.file, mode, offset, len) {
            // A hole reads as zeros as well.
            Err(e) if unsupported(&e) && mode != punch => fallocate(&self.file, punch, offset, len),
            r => r,
        }
        .map_err(|e| {
            if unsupported(&e) {
                Status::Unsupported
            } else {
                Status::IoErr
            }
        })
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
    Ok(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
}

fn write_zeroes_mode(flags: u32) -> Result<i32, Status> {
    match flags {
        0 => Ok(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE),
        WRITE_ZEROES_UNMAP => Ok(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE),
        // Reserved flags (§5.2.6.2).
        _ => Err(Status::Unsupported),
    }
}

/// Calls `some`, which moves some bytes from `done` on, until `len` bytes were moved.
fn whole(len: u64, mut some: impl FnMut(u64) -> io::Result<usize>) -> Result<(), Status> {
    let mut done = 0;
    while done < len {
        match some(done) {
            // The file has become shorter than the disk.
            Ok(0) => return Err(Status::IoErr),
            Ok(n) => done += n as u64,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err(Status::IoErr),
        }
    }
    Ok(())
}
