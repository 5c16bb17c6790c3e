//! Loads kernels and initial RAM disks once per host, into sealed memfds laid out as the guest will see them. A guest
//! maps its kernel's code private, so that pages that no guest writes are shared by all of them; what the kernel writes
//! anyway is copied (`placing.rs`).
//!
//! A kernel's memfd is addressed by guest-physical address and is sparse elsewhere. Only ranges with bytes from the
//! file come into the guest; a kernel's bss is the guest's own anonymous memory.
//!
//! Kernel files come from API users: every number in them is checked before it is used.

mod bzimage;
mod elf;
mod initrd;
mod placing;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, FileTypeExt};

pub use initrd::load_initrd;

use crate::arch::x86_64::layout::{GAP_START, HIGH_MEMORY, PAGE};
use crate::protocol::{KernelLayout, PhysRange};
use crate::sys;

/// The largest kernel file (bytes).
pub const MAX_KERNEL: u64 = 512 << 20;
/// The largest initial RAM disk (bytes).
pub const MAX_INITRD: u64 = 2 << 30;
/// Most separate parts that a kernel may have.
const MAX_PARTS: usize = 16;
/// Most ranges that a kernel may consist of: each part may be cut where what is mapped meets what is copied, at both ends
/// of each of its segments.
pub const MAX_RANGES: usize = 4 * MAX_PARTS;

/// A kernel ready to be mapped into guests.
#[derive(Debug)]
pub struct LoadedKernel {
    /// Sealed; offsets are guest-physical addresses.
    pub memfd: OwnedFd,
    /// What lies in it.
    pub layout: KernelLayout,
}

/// An initial RAM disk ready to be mapped into guests.
#[derive(Debug)]
pub struct LoadedInitrd {
    /// Sealed; padded with zeros to whole pages.
    pub memfd: OwnedFd,
    /// Length of the data (bytes); of the unpacked archive when the file was a compressed one.
    pub len: u64,
}

/// A file cannot serve as a kernel or an initial RAM disk.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file could not be read.
    #[error("reading the file failed")]
    Read(#[source] io::Error),
    /// Not a regular file.
    #[error("it is {0}, not a regular file")]
    NotAFile(&'static str),
    /// An empty file.
    #[error("the file is empty")]
    Empty,
    /// Larger than any sensible file.
    #[error("the file has {size} bytes, the limit is {limit}")]
    TooLarge {
        /// Its size (bytes).
        size: u64,
        /// The limit (bytes).
        limit: u64,
    },
    /// Neither format was recognised.
    #[error(
        "it is neither an ELF vmlinux nor a bzImage (it begins with {0:02x?}); a compressed vmlinux must be unpacked first"
    )]
    Unknown([u8; 4]),
    /// The file ends before what its headers promise.
    #[error("the file is truncated: {what} ends at byte {end}, the file at {size}")]
    Truncated {
        /// Which part.
        what: &'static str,
        /// Where it should end.
        end: u64,
        /// The file's size.
        size: u64,
    },
    /// A header field has a value that cannot be used.
    #[error("{what} ({value:#x}) is not usable: {why}")]
    Invalid {
        /// Which field.
        what: &'static str,
        /// Its value.
        value: u64,
        /// Why it is refused.
        why: &'static str,
    },
    /// The memfd could not be made.
    #[error("preparing {what} in a memfd failed")]
    Memfd {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// A part of the file and the guest-physical address it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    file_offset: u64,
    phys: u64,
    len: u64,
    /// The guest's kernel writes there.
    writable: bool,
}

/// What a format's parser finds out.
struct Parsed {
    segments: Vec<Segment>,
    /// End of everything, bss included (guest-physical).
    end: u64,
    entry: crate::protocol::KernelEntry,
    setup_header: Option<Vec<u8>>,
}

/// A file with its size, read at checked offsets only.
struct Source<'a> {
    file: &'a File,
    size: u64,
}

impl Source<'_> {
    fn read<const N: usize>(&self, what: &'static str, offset: u64) -> Result<[u8; N], KernelError> {
        let mut bytes = [0; N];
        self.read_into(what, offset, &mut bytes)?;
        Ok(bytes)
    }

    fn read_into(&self, what: &'static str, offset: u64, into: &mut [u8]) -> Result<(), KernelError> {
        self.check(what, offset, into.len() as u64)?;
        self.file.read_exact_at(into, offset).map_err(KernelError::Read)
    }

    fn check(&self, what: &'static str, offset: u64, len: u64) -> Result<(), KernelError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            end => Err(KernelError::Truncated {
                what,
                end: end.unwrap_or(u64::MAX),
                size: self.size,
            }),
        }
    }
}

/// Loads an ELF vmlinux or a bzImage.
///
/// An ELF kernel is entered by PVH when it carries the note, else at its 64-bit entry; a bzImage at its 64-bit entry.
///
/// # Errors
/// Every way in which the file is no kernel that this VMM can boot; see [`KernelError`].
pub fn load(file: &File) -> Result<LoadedKernel, KernelError> {
    let source = Source {
        file,
        size: regular_size(file, MAX_KERNEL)?,
    };
    let magic: [u8; 4] = source.read("the file's first four bytes", 0)?;
    let parsed = if magic == elf::MAGIC {
        elf::parse(&source)?
    } else if bzimage::recognise(&source)? {
        bzimage::parse(&source)?
    } else {
        return Err(KernelError::Unknown(magic));
    };
    let ranges = page_ranges(&parsed.segments)?;
    let memfd_len = ranges.last().map_or(0, |r| r.start + r.len);
    let error = |what| move |source| KernelError::Memfd { what, source };
    let memfd = sys::memfd(c"shoal-kernel", memfd_len).map_err(error("the kernel"))?;
    for s in &parsed.segments {
        copy(&source, s, &memfd)?;
    }
    let ranges = without_gaps(ranges, &memfd).map_err(error("the kernel"))?;
    sys::seal(&memfd).map_err(error("the kernel"))?;
    let layout = KernelLayout {
        ranges: placing::place(&ranges, &parsed.segments, parsed.end),
        end: parsed.end,
        entry: parsed.entry,
        setup_header: parsed.setup_header,
    };
    Ok(LoadedKernel {
        memfd: memfd.into(),
        layout,
    })
}

fn regular_size(file: &File, limit: u64) -> Result<u64, KernelError> {
    let meta = file.metadata().map_err(KernelError::Read)?;
    let kind = meta.file_type();
    if !kind.is_file() {
        return Err(KernelError::NotAFile(match () {
            () if kind.is_dir() => "a directory",
            () if kind.is_fifo() => "a pipe",
            () if kind.is_socket() => "a socket",
            () => "a device",
        }));
    }
    match meta.len() {
        0 => Err(KernelError::Empty),
        size if size > limit => Err(KernelError::TooLarge { size, limit }),
        size => Ok(size),
    }
}

fn copy(source: &Source<'_>, segment: &Segment, into: &File) -> Result<(), KernelError> {
    const PIECE: u64 = 1 << 20;
    let mut buffer = vec![0; PIECE.min(segment.len) as usize];
    let mut done = 0;
    while done < segment.len {
        let n = PIECE.min(segment.len - done);
        let piece = &mut buffer[..n as usize];
        source
            .file
            .read_exact_at(piece, segment.file_offset + done)
            .map_err(KernelError::Read)?;
        into.write_all_at(piece, segment.phys + done)
            .map_err(|source| KernelError::Memfd {
                what: "a segment",
                source,
            })?;
        done += n;
    }
    Ok(())
}

/// A run of zeros at least this long (bytes) is left out.
const GAP: u64 = 64 << 10;

/// Cuts long runs of zeros out of `ranges`. Linux aligns its sections to 2 MiB and frees what lies between them: mapped
/// from the file, those pages would cost each guest a fault and a copy to become the zeros that fresh memory has anyway.
fn without_gaps(ranges: Vec<PhysRange>, memfd: &File) -> io::Result<Vec<PhysRange>> {
    let mut kept: Vec<PhysRange> = Vec::new();
    let mut block = vec![0; GAP as usize];
    for range in ranges {
        let end = range.start + range.len;
        let mut at = range.start;
        while at < end {
            // Blocks end at multiples of their size, so that only a range's first and last one are shorter.
            let len = (end - at).min(GAP - at % GAP);
            let block = &mut block[..len as usize];
            memfd.read_exact_at(block, at)?;
            let full = kept.len() >= MAX_PARTS;
            match kept.last_mut() {
                _ if !full && len == GAP && block.iter().all(|b| *b == 0) => {}
                Some(last) if last.start + last.len == at => last.len += len,
                // Ranges are few: when they run out, the zeros stay in the last one.
                Some(last) if full => last.len = at + len - last.start,
                _ => kept.push(PhysRange { start: at, len }),
            }
            at += len;
        }
    }
    Ok(kept)
}

/// The page-aligned ranges that hold all segments, sorted, those that touch joined.
fn page_ranges(segments: &[Segment]) -> Result<Vec<PhysRange>, KernelError> {
    let mut sorted: Vec<_> = segments.iter().filter(|s| s.len > 0).collect();
    sorted.sort_by_key(|s| s.phys);
    let mut ranges: Vec<PhysRange> = Vec::new();
    for s in sorted {
        if s.phys < HIGH_MEMORY || s.phys >= GAP_START || s.len > GAP_START - s.phys {
            return Err(KernelError::Invalid {
                what: "the address of a segment",
                value: s.phys,
                why: "a kernel must lie between 1 MiB and 3 GiB",
            });
        }
        let start = s.phys / PAGE * PAGE;
        let end = (s.phys + s.len).next_multiple_of(PAGE);
        match ranges.last_mut() {
            Some(last) if start <= last.start + last.len => {
                last.len = last.len.max(end - last.start);
            }
            _ => ranges.push(PhysRange {
                start,
                len: end - start,
            }),
        }
    }
    match ranges.len() {
        0 => Err(KernelError::Invalid {
            what: "the number of segments",
            value: 0,
            why: "there is nothing to load",
        }),
        n if n > MAX_PARTS => Err(KernelError::Invalid {
            what: "the number of separate segments",
            value: n as u64,
            why: "more than 16 are no Linux kernel",
        }),
        _ => Ok(ranges),
    }
}
