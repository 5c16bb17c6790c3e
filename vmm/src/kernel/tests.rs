//! Kernel files made by hand, good ones and every sort of bad one.

use std::io::Write;
use std::os::unix::fs::FileExt;

use super::*;
use crate::protocol::{KernelEntry, KernelRange};

fn file(bytes: &[u8]) -> File {
    let mut f = tempfile::tempfile().unwrap();
    f.write_all(bytes).unwrap();
    f
}

fn put(into: &mut [u8], at: usize, bytes: &[u8]) {
    into[at..at + bytes.len()].copy_from_slice(bytes);
}

/// One program header: (type, offset, physical address, size in the file, size in memory).
type Phdr = (u32, u64, u64, u64, u64);

fn elf(entry: u64, phdrs: &[Phdr], len: usize) -> Vec<u8> {
    let mut b = vec![0xcc; len];
    b[..64].fill(0);
    put(&mut b, 0, b"\x7fELF\x02\x01\x01");
    put(&mut b, 18, &62_u16.to_le_bytes());
    put(&mut b, 24, &entry.to_le_bytes());
    put(&mut b, 32, &64_u64.to_le_bytes());
    put(&mut b, 54, &56_u16.to_le_bytes());
    put(&mut b, 56, &(phdrs.len() as u16).to_le_bytes());
    for (i, (kind, offset, phys, filesz, memsz)) in phdrs.iter().enumerate() {
        let at = 64 + i * 56;
        put(&mut b, at, &kind.to_le_bytes());
        for (field, value) in [(8, offset), (24, phys), (32, filesz), (40, memsz)] {
            put(&mut b, at + field, &value.to_le_bytes());
        }
    }
    b
}

const MIB: u64 = 1 << 20;
const TEXT: Phdr = (1, 0x1000, 16 * MIB + 0x80, 0x1800, 0x1800);

#[test]
fn an_elf_kernel_is_laid_out_by_physical_address() {
    let data = (1, 0x3000, 18 * MIB, 0x10, 0x10_0000);
    let mut bytes = elf(16 * MIB + 0x100, &[TEXT, data], 0x4000);
    put(&mut bytes, 0x1000, b"text");
    put(&mut bytes, 0x3000, b"data");
    let kernel = load(&file(&bytes)).unwrap();
    let range = |start, len, copied| KernelRange {
        range: PhysRange { start, len },
        copied,
    };
    assert_eq!(
        kernel.layout.ranges,
        [range(16 * MIB, 0x2000, true), range(18 * MIB, 0x1000, false)]
    );
    assert_eq!(kernel.layout.end, 19 * MIB);
    assert_eq!(
        kernel.layout.entry,
        KernelEntry::Linux64 {
            entry: 16 * MIB + 0x100
        }
    );
    let memfd = File::from(kernel.memfd);
    let mut got = [0; 4];
    memfd.read_exact_at(&mut got, 16 * MIB + 0x80).unwrap();
    assert_eq!(&got, b"text");
    memfd.read_exact_at(&mut got, 18 * MIB).unwrap();
    assert_eq!(&got, b"data");
    assert!(memfd.write_at(b"x", 16 * MIB).is_err(), "the memfd is sealed");
    assert!(memfd.set_len(0).is_err(), "the memfd is sealed");
}

fn pvh_note(entry: u32) -> Vec<u8> {
    let mut note = Vec::new();
    // Another note stands before it.
    note.extend([4_u32, 8, 1].iter().flat_map(|v| v.to_le_bytes()));
    note.extend(b"GNU\0abcdefgh");
    note.extend([4_u32, 4, 18].iter().flat_map(|v| v.to_le_bytes()));
    note.extend(b"Xen\0");
    note.extend(entry.to_le_bytes());
    note
}

#[test]
fn the_pvh_note_wins_over_the_elf_entry() {
    let entry = 16 * MIB as u32 + 0x90;
    let note = pvh_note(entry);
    let mut bytes = elf(
        16 * MIB + 0x100,
        &[TEXT, (4, 0x3000, 0, note.len() as u64, 0)],
        0x4000,
    );
    put(&mut bytes, 0x3000, &note);
    assert_eq!(
        load(&file(&bytes)).unwrap().layout.entry,
        KernelEntry::Pvh { entry }
    );
}

fn bz_image() -> Vec<u8> {
    let mut b = vec![0; 0x400 + 0x1000];
    b[0x1f1] = 1;
    put(&mut b, 0x1f4, &0x100_u32.to_le_bytes());
    put(&mut b, 0x200, &[0xeb, 0x6a]);
    put(&mut b, 0x202, b"HdrS");
    put(&mut b, 0x206, &0x20f_u16.to_le_bytes());
    b[0x211] = 1;
    put(&mut b, 0x236, &1_u16.to_le_bytes());
    put(&mut b, 0x258, &(16 * MIB).to_le_bytes());
    put(&mut b, 0x260, &(4 * MIB as u32).to_le_bytes());
    put(&mut b, 0x400, b"payload");
    b
}

#[test]
fn a_bzimage_is_entered_at_its_64_bit_entry() {
    let kernel = load(&file(&bz_image())).unwrap();
    assert_eq!(
        kernel.layout.entry,
        KernelEntry::Linux64 {
            entry: 16 * MIB + 0x200
        }
    );
    assert_eq!(
        kernel.layout.ranges,
        [KernelRange {
            range: PhysRange {
                start: 16 * MIB,
                len: 0x1000
            },
            copied: true
        }]
    );
    assert_eq!(kernel.layout.end, 20 * MIB);
    let header = kernel.layout.setup_header.unwrap();
    assert_eq!(&header[0x202 - 0x1f1..][..4], b"HdrS");
    assert_eq!(header.len(), 0x26c - 0x1f1);
    let mut got = [0; 7];
    File::from(kernel.memfd)
        .read_exact_at(&mut got, 16 * MIB)
        .unwrap();
    assert_eq!(&got, b"payload");
}

#[test]
fn what_is_no_kernel_is_refused_with_the_reason() {
    let bz = |at: usize, bytes: &[u8]| {
        let mut b = bz_image();
        put(&mut b, at, bytes);
        b
    };
    let short = |mut b: Vec<u8>, len| {
        b.truncate(len);
        b
    };
    let one = |phdr: Phdr| elf(16 * MIB + 0x100, &[phdr], 0x4000);
    let mut arm = one(TEXT);
    arm[18] = 183;
    let mut elf32 = one(TEXT);
    elf32[4] = 1;
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "empty"),
        (b"MZ".to_vec(), "truncated"),
        (
            b"#!/bin/sh\necho no kernel\n".to_vec(),
            "neither an ELF vmlinux nor a bzImage",
        ),
        (
            b"\x1f\x8b\x08\0 a gzip file, long enough".to_vec(),
            "must be unpacked",
        ),
        (arm, "another processor"),
        (elf32, "64-bit"),
        (short(one(TEXT), 60), "ELF header"),
        (short(one(TEXT), 100), "program header table"),
        (short(one(TEXT), 0x1100), "a segment ends at"),
        (one((1, u64::MAX - 5, 16 * MIB, 0x1000, 0x1000)), "truncated"),
        (one((1, 0x1000, u64::MAX - 5, 0x1000, 0x1000)), "below 3 GiB"),
        (one((1, 0x1000, 0x8000, 0x1000, 0x1000)), "no segment holds it"),
        (
            elf(0x8100, &[(1, 0x1000, 0x8000, 0x1000, 0x1000)], 0x4000),
            "between 1 MiB and 3 GiB",
        ),
        (
            one((1, 0x1000, 16 * MIB, 0x1000, 0x10)),
            "smaller than in the file",
        ),
        (one((2, 0x1000, 16 * MIB, 0x1000, 0x1000)), "no segment holds it"),
        (elf(0, &[], 0x4000), "1 to 128"),
        (elf(5, &[TEXT], 0x4000), "no segment holds it"),
        (short(bz_image(), 0x800), "compressed kernel"),
        (bz(0x206, &[0x0b, 2]), "2.12"),
        (bz(0x236, &[0, 0]), "64-bit entry"),
        (bz(0x211, &[0]), "zImage"),
        (bz(0x1f4, &[1, 0, 0, 0]), "entry point"),
        (bz(0x1f4, &[0xff; 4]), "truncated"),
        (bz(0x258, &[1]), "page-aligned"),
        (bz(0x258, &[0, 0, 0, 0, 0xff, 0, 0, 0]), "below 3 GiB"),
        (bz(0x260, &[0xff; 4]), "init_size"),
    ];
    for (bytes, expected) in cases {
        let error = load(&file(&bytes)).unwrap_err().to_string();
        assert!(error.contains(expected), "expected {expected:?} in {error:?}");
    }
    let directory = File::open("/").unwrap();
    assert!(load(&directory).unwrap_err().to_string().contains("a directory"));
}

#[test]
fn sizes_are_limited_before_anything_is_read() {
    let f = tempfile::tempfile().unwrap();
    f.set_len(MAX_KERNEL + 1).unwrap();
    assert!(matches!(load(&f), Err(KernelError::TooLarge { .. })));
    f.set_len(MAX_INITRD + 1).unwrap();
    assert!(matches!(load_initrd(&f), Err(KernelError::TooLarge { .. })));
    f.set_len(0).unwrap();
    assert!(matches!(load_initrd(&f), Err(KernelError::Empty)));
}

#[test]
fn an_initrd_is_padded_to_whole_pages() {
    let loaded = load_initrd(&file(&[7; 5000])).unwrap();
    assert_eq!(loaded.len, 5000);
    assert_eq!(File::from(loaded.memfd).metadata().unwrap().len(), 8192);
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn a_compressed_archive_is_unpacked_once_and_nothing_else_is() {
    let archive = [&b"070701"[..], &[b'x'; 700_000]].concat();
    let packed = gzip(&archive);
    let unpacked = load_initrd(&file(&packed)).unwrap();
    assert_eq!(unpacked.len, archive.len() as u64);
    let mut got = vec![0; archive.len()];
    File::from(unpacked.memfd).read_exact_at(&mut got, 0).unwrap();
    assert!(got == archive);

    let damaged = packed[..packed.len() - 9].to_vec();
    let no_archive = gzip(&[7; 5000]);
    let two = [&packed[..], b"070701 and another archive"].concat();
    let bomb = gzip(&[&b"070701"[..], &vec![0; 257 << 20]].concat());
    for (name, bytes) in [
        ("damaged", damaged),
        ("no archive", no_archive),
        ("two", two),
        ("bomb", bomb),
    ] {
        let loaded = load_initrd(&file(&bytes)).unwrap();
        assert_eq!(loaded.len, bytes.len() as u64, "{name} is handed over as it is");
        let mut got = vec![0; bytes.len()];
        File::from(loaded.memfd).read_exact_at(&mut got, 0).unwrap();
        assert!(got == bytes, "{name}");
    }
}

#[test]
fn rubbish_never_panics() {
    // A small generator, so that a failure can be repeated.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..2000 {
        let mut bytes = if round % 2 == 0 {
            elf(16 * MIB + 0x100, &[TEXT, TEXT], 0x4000)
        } else {
            bz_image()
        };
        for _ in 0..1 + next() % 8 {
            let at = (next() % if round % 2 == 0 { 200 } else { 0x270 }) as usize;
            bytes[at] = next() as u8;
        }
        // Only that it returns: most are refused, some are still kernels.
        let _ = load(&file(&bytes));
    }
}
