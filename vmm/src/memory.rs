//! The guest's physical memory: anonymous, lazy, with kernel and initial RAM disk mapped into it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use shoal_devices::GuestMemory;
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use crate::arch::x86_64::layout::{GAP_END, GAP_START};
use crate::protocol::{MemoryConfig, Pages, PhysRange};
use crate::sys::check;

/// The guest's memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Address space could not be reserved.
    #[error("mapping {0} MiB for the guest failed: {1}")]
    Map(u64, String),
    /// A memfd could not be mapped into it.
    #[error("mapping {what} at guest-physical {at:#x} failed")]
    Place {
        /// Kernel or initial RAM disk.
        what: &'static str,
        /// Where.
        at: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An address that configuration checks should have caught.
    #[error("{what} at guest-physical {at:#x} does not lie in the guest's memory")]
    Outside {
        /// Kernel or initial RAM disk.
        what: &'static str,
        /// Where.
        at: u64,
    },
}

/// The ranges of RAM of a guest with `bytes` of memory: all below the gap at 3 GiB, the rest from 4 GiB on.
pub fn ranges(bytes: u64) -> Vec<PhysRange> {
    let low = bytes.min(GAP_START);
    let mut ranges = vec![PhysRange { start: 0, len: low }];
    if bytes > low {
        ranges.push(PhysRange {
            start: GAP_END,
            len: bytes - low,
        });
    }
    ranges
}

/// Reserves the guest's memory. No page of it exists until the guest or a device touches it.
///
/// # Errors
/// When the address space cannot be had (RLIMIT_AS, overcommit).
pub fn create(config: &MemoryConfig) -> Result<GuestMemory, MemoryError> {
    let failed = |e: &dyn std::fmt::Display| MemoryError::Map(config.bytes >> 20, e.to_string());
    let mut regions = Vec::new();
    for range in ranges(config.bytes) {
        let mapping = reserve(range.len as usize).map_err(|e| failed(&e))?;
        advise(&mapping, config.pages);
        let region = GuestRegionMmap::new(mapping, GuestAddress(range.start))
            .ok_or_else(|| failed(&"it wraps around"))?;
        regions.push(region);
    }
    GuestMemoryMmap::from_regions(regions)
        .map(Arc::new)
        .map_err(|e| failed(&e))
}

const HUGE_PAGE: usize = 2 << 20;
const ACCESS: i32 = libc::PROT_READ | libc::PROT_WRITE;
const FLAGS: i32 = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;

/// Reserves `len` bytes at a multiple of 2 MiB: KVM maps a huge page only where guest-physical and host-virtual
/// addresses are aligned alike. What alignment costs stays inaccessible around it, as guard pages.
///
/// The reservation lasts as long as the process, which is as long as the guest; a build that fails leaves address
/// space behind, no memory.
fn reserve(len: usize) -> Result<MmapRegion<()>, String> {
    let map = |at: *mut libc::c_void, len, access, flags| {
        // SAFETY: a fresh mapping, or (MAP_FIXED) one inside of the fresh mapping below that nothing uses yet.
        let p = unsafe { libc::mmap(at, len, access, flags, -1, 0) };
        if p == libc::MAP_FAILED {
            Err(io::Error::last_os_error().to_string())
        } else {
            Ok(p)
        }
    };
    let around = map(std::ptr::null_mut(), len + HUGE_PAGE, libc::PROT_NONE, FLAGS)?;
    let aligned = (around as usize).next_multiple_of(HUGE_PAGE) as *mut libc::c_void;
    let at = map(aligned, len, ACCESS, FLAGS | libc::MAP_FIXED)?;
    // SAFETY: `len` bytes at `at` were just mapped with these flags and are never unmapped.
    unsafe { MmapRegion::build_raw(at.cast(), len, ACCESS, FLAGS) }.map_err(|e| e.to_string())
}

/// Advice is optional: a kernel without huge pages or core dumps refuses it and nothing is lost.
fn advise(mapping: &MmapRegion<()>, pages: Pages) {
    let huge = match pages {
        Pages::Host => None,
        Pages::Small => Some(libc::MADV_NOHUGEPAGE),
        Pages::Transparent => Some(libc::MADV_HUGEPAGE),
    };
    for advice in huge.into_iter().chain([libc::MADV_DONTDUMP]) {
        // SAFETY: the range is exactly the mapping, and neither advice changes its contents.
        unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), advice) };
    }
}

/// Maps `range` of `file`, whose offsets are guest-physical addresses, private over the guest's memory.
///
/// # Errors
/// When the range is not RAM, or the kernel refuses the mapping.
pub fn map_file(
    memory: &GuestMemory,
    what: &'static str,
    file: &File,
    range: PhysRange,
) -> Result<(), MemoryError> {
    let outside = MemoryError::Outside {
        what,
        at: range.start,
    };
    let Some(region) = memory.find_region(GuestAddress(range.start)) else {
        return Err(outside);
    };
    let offset = range.start - region.start_addr().0;
    if range.len > region.len() - offset || range.len == 0 {
        return Err(outside);
    }
    // SAFETY: `offset` lies inside of the region, checked above.
    let at = unsafe { region.as_ptr().add(offset as usize) };
    let failed = |source| MemoryError::Place {
        what,
        at: range.start,
        source,
    };
    // SAFETY: MAP_FIXED replaces `len` bytes inside of one mapping that this process owns for the guest, checked
    // above; nothing holds a Rust reference into guest memory. The new pages are unmapped with the region.
    let mapped = unsafe {
        libc::mmap(
            at.cast(),
            range.len as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            range.start as libc::off_t,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(failed(io::Error::last_os_error()));
    }
    // SAFETY: the range was just mapped; the advice changes no contents.
    check(unsafe { libc::madvise(mapped, range.len as usize, libc::MADV_DONTDUMP) })
        .map(drop)
        .map_err(failed)
}

/// Copies `file` from `offset` (bytes) on into `range` of the guest's memory.
///
/// # Errors
/// When the range is not RAM, or the file is shorter.
pub fn copy_file(
    memory: &GuestMemory,
    what: &'static str,
    file: &File,
    offset: u64,
    range: PhysRange,
) -> Result<(), MemoryError> {
    let at = range.start;
    let mut position = offset;
    for slice in memory.get_slices(GuestAddress(at), range.len as usize) {
        let slice = slice.map_err(|_| MemoryError::Outside { what, at })?;
        let mut rest = slice;
        while !rest.is_empty() {
            let into = rest.ptr_guard_mut();
            // SAFETY: the slice is `rest.len()` bytes of mapped guest memory. The position is given with each call: the
            // descriptor's own is shared with every other guest that boots from this file.
            let n = unsafe {
                libc::pread(
                    file.as_raw_fd(),
                    into.as_ptr().cast(),
                    rest.len(),
                    position as libc::off_t,
                )
            };
            let failed = |source| MemoryError::Place { what, at, source };
            match n {
                0 => return Err(failed(io::ErrorKind::UnexpectedEof.into())),
                n if n < 0 => return Err(failed(io::Error::last_os_error())),
                n => {
                    position += n as u64;
                    rest = rest
                        .offset(n as usize)
                        .map_err(|_| MemoryError::Outside { what, at })?;
                }
            }
        }
    }
    Ok(())
}
