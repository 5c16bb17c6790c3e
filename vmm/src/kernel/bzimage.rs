//! bzImage (Linux boot protocol, Documentation/arch/x86/boot.rst), entered at its 64-bit entry point.

use super::{KernelError, Parsed, Segment, Source};
use crate::arch::x86_64::layout::GAP_START;
use crate::protocol::KernelEntry;

/// Offset of the setup header in the file.
pub(crate) const SETUP_HEADER: usize = 0x1f1;
/// Its largest length: it may reach up to the end of the area that boot parameters keep for it.
const SETUP_HEADER_MAX: usize = 0x290 - SETUP_HEADER;
/// Boot protocol 2.12 (Linux 3.8) introduced the 64-bit entry.
const OLDEST_VERSION: u16 = 0x20c;
const XLF_KERNEL_64: u16 = 1;
const LOADED_HIGH: u8 = 1;
/// Where a kernel without a preferred address is loaded.
const DEFAULT_LOAD: u64 = 0x10_0000;
const ENTRY_64: u64 = 0x200;

struct Setup([u8; SETUP_HEADER_MAX]);

impl Setup {
    fn bytes<const N: usize>(&self, file_offset: usize) -> [u8; N] {
        let mut b = [0; N];
        b.copy_from_slice(&self.0[file_offset - SETUP_HEADER..][..N]);
        b
    }

    fn u16(&self, file_offset: usize) -> u16 {
        u16::from_le_bytes(self.bytes(file_offset))
    }

    fn u32(&self, file_offset: usize) -> u32 {
        u32::from_le_bytes(self.bytes(file_offset))
    }
}

pub(super) fn recognise(source: &Source<'_>) -> Result<bool, KernelError> {
    if source.size < (SETUP_HEADER + SETUP_HEADER_MAX) as u64 {
        return Ok(false);
    }
    let magic: [u8; 4] = source.read("the setup header's magic", 0x202)?;
    Ok(&magic == b"HdrS")
}

pub(super) fn parse(source: &Source<'_>) -> Result<Parsed, KernelError> {
    let setup = Setup(source.read("the setup header", SETUP_HEADER as u64)?);
    let invalid = |what, value: u64, why| Err(KernelError::Invalid { what, value, why });
    let version = setup.u16(0x206);
    if version < OLDEST_VERSION {
        return invalid(
            "the boot protocol version",
            version.into(),
            "2.12 (Linux 3.8) is the oldest that boots here",
        );
    }
    if setup.u16(0x236) & XLF_KERNEL_64 == 0 {
        return invalid(
            "xloadflags",
            setup.u16(0x236).into(),
            "the kernel has no 64-bit entry point",
        );
    }
    if setup.bytes::<1>(0x211)[0] & LOADED_HIGH == 0 {
        return invalid(
            "loadflags",
            setup.bytes::<1>(0x211)[0].into(),
            "a zImage does not boot here",
        );
    }
    let setup_sectors = match setup.bytes::<1>(SETUP_HEADER)[0] {
        0 => 4,
        n => u64::from(n),
    };
    let offset = (setup_sectors + 1) * 512;
    let len = u64::from(setup.u32(0x1f4)) * 16;
    source.check("the compressed kernel", offset, len)?;
    if len <= ENTRY_64 {
        return invalid(
            "the compressed kernel's length",
            len,
            "it does not reach its entry point",
        );
    }
    let preferred = u64::from_le_bytes(setup.bytes(0x258));
    let load = if preferred == 0 { DEFAULT_LOAD } else { preferred };
    if !load.is_multiple_of(4096) || load >= GAP_START {
        return invalid(
            "the preferred load address",
            load,
            "it must be page-aligned and below 3 GiB",
        );
    }
    // The decompressor works in place: init_size covers the loaded image and the unpacked kernel.
    let end = load + u64::from(setup.u32(0x260)).max(len);
    if end > GAP_START {
        return invalid(
            "init_size",
            u64::from(setup.u32(0x260)),
            "the kernel does not end below 3 GiB",
        );
    }
    // The header's length: a short jump at 0x200 leads over it.
    let header_end = 0x202 + usize::from(setup.bytes::<1>(0x201)[0]);
    let header_len = header_end.clamp(0x268, SETUP_HEADER + SETUP_HEADER_MAX) - SETUP_HEADER;
    Ok(Parsed {
        segments: vec![Segment {
            writable: false,
            file_offset: offset,
            phys: load,
            len,
        }],
        end,
        entry: KernelEntry::Linux64 {
            entry: load + ENTRY_64,
        },
        setup_header: Some(setup.0[..header_len].to_vec()),
    })
}
