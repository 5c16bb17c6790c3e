//! Initial RAM disks. A gzip-compressed cpio archive is unpacked here, once per host, so that no guest spends its boot on
//! it: in the lab a kernel takes 45 ms for each MiB. The guest's kernel takes either form
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use flate2::bufread::GzDecoder;

use super::{KernelError, LoadedInitrd, MAX_INITRD, Segment, Source, copy, regular_size};
use crate::arch::x86_64::layout::PAGE;
use crate::sys;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// A "new ASCII" cpio archive, without and with checksums.
const CPIO_MAGIC: [&[u8; 6]; 2] = [b"070701", b"070702"];
/// An archive that is larger than this when unpacked (bytes) is handed over as it is: the guest's kernel frees a
/// compressed image, and a file that grows without measure must not fill the host's memory.
const MAX_UNPACKED: u64 = 256 << 20;

fn memfd_error(source: io::Error) -> KernelError {
    KernelError::Memfd {
        what: "the initial RAM disk",
        source,
    }
}

/// Loads an initial RAM disk.
///
/// # Errors
/// When it is no regular file, empty, larger than [`MAX_INITRD`], or cannot be read.
pub fn load_initrd(file: &File) -> Result<LoadedInitrd, KernelError> {
    let size = regular_size(file, MAX_INITRD)?;
    if let Some(unpacked) = unpack(file, size)? {
        return Ok(unpacked);
    }
    let memfd = sys::memfd(c"shoal-initrd", size.next_multiple_of(PAGE)).map_err(memfd_error)?;
    copy(
        &Source { file, size },
        &Segment {
            writable: true,
            file_offset: 0,
            phys: 0,
            len: size,
        },
        &memfd,
    )?;
    sys::seal(&memfd).map_err(memfd_error)?;
    Ok(LoadedInitrd {
        memfd: memfd.into(),
        len: size,
    })
}

/// Unpacks the file when the whole of it is one gzip member that holds a cpio archive. `None` for everything else,
/// damaged files among it: what the guest's kernel makes of those is not ours to decide.
fn unpack(file: &File, size: u64) -> Result<Option<LoadedInitrd>, KernelError> {
    let mut magic = [0; 2];
    if size < 20 || file.read_exact_at(&mut magic, 0).is_err() || magic != GZIP_MAGIC {
        return Ok(None);
    }
    let mut reader = file.try_clone().map_err(KernelError::Read)?;
    reader.seek(SeekFrom::Start(0)).map_err(KernelError::Read)?;
    let mut gzip = GzDecoder::new(BufReader::new(reader));
    let memfd = sys::memfd(c"shoal-initrd", 0).map_err(memfd_error)?;
    let mut piece = vec![0; 256 << 10];
    let mut len = 0;
    loop {
        let Ok(n) = fill(&mut gzip, &mut piece) else {
            return Ok(None);
        };
        let is_archive = len > 0 || CPIO_MAGIC.iter().any(|magic| piece[..n].starts_with(*magic));
        if !is_archive || len + n as u64 > MAX_UNPACKED {
            return Ok(None);
        }
        memfd.write_all_at(&piece[..n], len).map_err(memfd_error)?;
        len += n as u64;
        if n < piece.len() {
            break;
        }
    }
    // Another archive may follow the first member.
    let mut rest = gzip.into_inner();
    if !matches!(rest.read(&mut [0]), Ok(0)) {
        return Ok(None);
    }
    memfd.set_len(len.next_multiple_of(PAGE)).map_err(memfd_error)?;
    sys::seal(&memfd).map_err(memfd_error)?;
    Ok(Some(LoadedInitrd {
        memfd: memfd.into(),
        len,
    }))
}

/// Reads until the buffer is full or the end is reached.
fn fill(from: &mut impl Read, into: &mut [u8]) -> io::Result<usize> {
    let mut n = 0;
    while n < into.len() {
        match from.read(&mut into[n..])? {
            0 => break,
            more => n += more,
        }
    }
    Ok(n)
}
