//! ELF64 vmlinux (System V ABI, gABI 4.1), and the Xen note that names its PVH entry.

use super::{KernelError, Parsed, Segment, Source};
use crate::arch::x86_64::layout::GAP_START;
use crate::protocol::KernelEntry;

pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// Kernels have a handful; this bounds what a hostile file makes us read.
const MAX_PROGRAM_HEADERS: u16 = 128;
const MAX_NOTES: u64 = 1 << 16;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const PF_W: u32 = 2;
const EM_X86_64: u16 = 62;
/// XEN_ELFNOTE_PHYS32_ENTRY of the Xen ABI (`elfnote.h`).
const PHYS32_ENTRY: u32 = 18;

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}

pub(super) fn parse(source: &Source<'_>) -> Result<Parsed, KernelError> {
    let header: [u8; HEADER] = source.read("the ELF header", 0)?;
    let invalid = |what, value, why| Err(KernelError::Invalid { what, value, why });
    if header[4] != 2 || header[5] != 1 {
        return invalid(
            "the ELF class",
            u64::from(header[4]),
            "only 64-bit little-endian kernels boot here",
        );
    }
    let machine = u16_at(&header, 18);
    if machine != EM_X86_64 {
        return invalid(
            "the ELF machine",
            u64::from(machine),
            "the kernel is built for another processor",
        );
    }
    let entry = u64_at(&header, 24);
    let (offset, size, count) = (u64_at(&header, 32), u16_at(&header, 54), u16_at(&header, 56));
    if usize::from(size) != PROGRAM_HEADER {
        return invalid(
            "the size of a program header",
            u64::from(size),
            "56 is the only size there is",
        );
    }
    if count == 0 || count > MAX_PROGRAM_HEADERS {
        return invalid(
            "the number of program headers",
            u64::from(count),
            "it must be 1 to 128",
        );
    }
    let mut table = vec![0; usize::from(count) * PROGRAM_HEADER];
    source.read_into("the program header table", offset, &mut table)?;

    let (mut segments, mut end, mut pvh) = (Vec::new(), 0, None);
    let mut note_budget = MAX_NOTES;
    for h in table.chunks_exact(PROGRAM_HEADER) {
        let (kind, flags, file_offset) = (u32_at(h, 0), u32_at(h, 4), u64_at(h, 8));
        let (phys, file_size, mem_size) = (u64_at(h, 24), u64_at(h, 32), u64_at(h, 40));
        match kind {
            PT_LOAD => {
                source.check("a segment", file_offset, file_size)?;
                if mem_size < file_size {
                    return invalid(
                        "a segment's size in memory",
                        mem_size,
                        "it is smaller than in the file",
                    );
                }
                match phys.checked_add(mem_size) {
                    Some(e) if e <= GAP_START => end = end.max(e),
                    _ => return invalid("a segment's address", phys, "it does not end below 3 GiB"),
                }
                segments.push(Segment {
                    file_offset,
                    phys,
                    len: file_size,
                    writable: flags & PF_W != 0,
                });
            }
            // Hostile files may point many note headers at the same large area: all notes share one budget.
            PT_NOTE if pvh.is_none() && file_size <= note_budget => {
                note_budget -= file_size;
                let mut notes = vec![0; file_size as usize];
                source.read_into("a note segment", file_offset, &mut notes)?;
                pvh = pvh_entry(&notes);
            }
            _ => {}
        }
    }
    let inside = |address: u64| {
        segments
            .iter()
            .any(|s: &Segment| address >= s.phys && address - s.phys < s.len)
    };
    let entry = match pvh {
        Some(entry) if inside(u64::from(entry)) => KernelEntry::Pvh { entry },
        Some(entry) => return invalid("the PVH entry point", u64::from(entry), "no segment holds it"),
        None if inside(entry) => KernelEntry::Linux64 { entry },
        None => return invalid("the entry point", entry, "no segment holds it"),
    };
    Ok(Parsed {
        segments,
        end,
        entry,
        setup_header: None,
    })
}

/// Finds the 32-bit PVH entry among notes (each: name size, descriptor size, type, name, descriptor, 4-byte aligned).
fn pvh_entry(mut notes: &[u8]) -> Option<u32> {
    while notes.len() >= 12 {
        let (name_len, desc_len) = (u32_at(notes, 0) as usize, u32_at(notes, 4) as usize);
        let kind = u32_at(notes, 8);
        let desc_at = 12_usize.checked_add(name_len.checked_next_multiple_of(4)?)?;
        let next = desc_at.checked_add(desc_len.checked_next_multiple_of(4)?)?;
        let name = notes.get(12..12 + name_len)?;
        let desc = notes.get(desc_at..desc_at.checked_add(desc_len)?)?;
        if kind == PHYS32_ENTRY && name == b"Xen\0" && desc.len() >= 4 {
            return Some(u32_at(desc, 0));
        }
        notes = notes.get(next..).unwrap_or_default();
    }
    None
}
