//! Which parts of a kernel are mapped into a guest, and which are copied.
//!
//! A mapped page costs a fault when the guest first reads it, and two more and a copy when the guest writes it. Where a
//! kernel is writable, or aligned with gaps that it frees for other uses, nearly every page comes to be written while it
//! boots. A block of 2 MiB that is mostly such is copied into fresh memory, which is one huge page where the host has
//! them, and one fault. In the lab that took 10 of 108 ms from a boot (docs/performance.md).

use super::Segment;
use crate::protocol::{KernelRange, PhysRange};

/// A huge page (bytes).
const BLOCK: u64 = 2 << 20;
/// A block with at least this much read-only contents (bytes) is worth sharing.
const SHARED: u64 = BLOCK / 2;

/// Cuts `ranges`, which hold all contents of `segments` and are sorted, at the borders of blocks where what is mapped and
/// what is copied meet. The kernel uses memory up to `end`: a block that reaches further is mapped, since the rest of it
/// may be memory that the guest never touches.
pub(super) fn place(ranges: &[PhysRange], segments: &[Segment], end: u64) -> Vec<KernelRange> {
    let first = ranges.first().map_or(0, |r| r.start);
    let copied = |block: u64| {
        let whole = first <= block && block + BLOCK <= end;
        whole && read_only(ranges, segments, block) < SHARED
    };
    let mut placed: Vec<KernelRange> = Vec::new();
    for range in ranges {
        let range_end = range.start + range.len;
        let mut at = range.start;
        while at < range_end {
            let block = at / BLOCK * BLOCK;
            let len = range_end.min(block + BLOCK) - at;
            let copied = copied(block);
            match placed.last_mut() {
                Some(last) if last.copied == copied && last.range.start + last.range.len == at => {
                    last.range.len += len;
                }
                _ => placed.push(KernelRange {
                    range: PhysRange { start: at, len },
                    copied,
                }),
            }
            at += len;
        }
    }
    placed
}

/// Bytes of a block that have contents and that the kernel does not write, as its file says.
fn read_only(ranges: &[PhysRange], segments: &[Segment], block: u64) -> u64 {
    let overlap = |start: u64, len: u64| {
        let end = (start + len).min(block + BLOCK);
        end.saturating_sub(start.max(block))
    };
    let contents: u64 = ranges.iter().map(|r| overlap(r.start, r.len)).sum();
    let writable = segments.iter().filter(|s| s.writable);
    let writable: u64 = writable.map(|s| overlap(s.phys, s.len)).sum();
    contents.saturating_sub(writable)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn range(start: u64, end: u64) -> PhysRange {
        PhysRange {
            start,
            len: end - start,
        }
    }

    fn segment(start: u64, end: u64, writable: bool) -> Segment {
        Segment {
            file_offset: 0,
            phys: start,
            len: end - start,
            writable,
        }
    }

    fn placed(ranges: &[PhysRange], segments: &[Segment], end: u64) -> Vec<(u64, u64, bool)> {
        let placed = place(ranges, segments, end);
        let parts = placed
            .iter()
            .map(|r| (r.range.start, r.range.start + r.range.len, r.copied));
        parts.collect()
    }

    #[test]
    fn code_is_mapped_and_what_is_written_is_copied() {
        // Code of 5 MiB and a page, data of 1 MiB at the next 2 MiB, bss.
        let code_end = 21 * MIB + 4096;
        let ranges = [range(16 * MIB, code_end), range(22 * MIB, 23 * MIB)];
        let segments = [
            segment(16 * MIB, code_end, false),
            segment(22 * MIB, 23 * MIB, true),
        ];
        assert_eq!(
            placed(&ranges, &segments, 25 * MIB),
            [(16 * MIB, code_end, false), (22 * MIB, 23 * MIB, true)]
        );
        // A tail of less than half a block is copied, since the kernel frees the rest of the block.
        let tail = 20 * MIB + 4096;
        let ranges = [range(16 * MIB, tail), ranges[1]];
        let segments = [segment(16 * MIB, tail, false), segments[1]];
        assert_eq!(
            placed(&ranges, &segments, 25 * MIB),
            [
                (16 * MIB, 20 * MIB, false),
                (20 * MIB, tail, true),
                (22 * MIB, 23 * MIB, true)
            ]
        );
    }

    #[test]
    fn blocks_that_are_not_all_the_kernels_are_mapped() {
        let small = [range(2 * MIB, 2 * MIB + 0xb000)];
        let segments = [segment(2 * MIB, 2 * MIB + 0xb000, true)];
        assert_eq!(
            placed(&small, &segments, 3 * MIB),
            [(2 * MIB, 2 * MIB + 0xb000, false)]
        );
        // One that begins in the middle of a block.
        let odd = [range(3 * MIB, 3 * MIB + 0x1000)];
        let segments = [segment(3 * MIB, 3 * MIB + 0x1000, true)];
        assert_eq!(
            placed(&odd, &segments, 9 * MIB),
            [(3 * MIB, 3 * MIB + 0x1000, false)]
        );
    }

    #[test]
    fn overlapping_segments_confuse_nothing() {
        let ranges = [range(16 * MIB, 18 * MIB)];
        let segments = [
            segment(16 * MIB, 18 * MIB, true),
            segment(16 * MIB, 18 * MIB, true),
        ];
        assert_eq!(placed(&ranges, &segments, 18 * MIB), [(16 * MIB, 18 * MIB, true)]);
    }
}
