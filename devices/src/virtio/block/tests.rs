use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use super::*;
use crate::testing::{Bench, Buf, DATA, END, NEXT, SEAM, readable, writable};
use request::Status;

const HEADER: u64 = DATA;
const STATUS: u64 = DATA + 0x100;
const BUFFER: u64 = DATA + 0x1000;

fn disk_file(sectors: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(sectors * SECTOR).unwrap();
    file
}

fn spec(read_only: bool) -> BlockSpec {
    BlockSpec {
        id: "disk-0".into(),
        fd: FdSlot(0),
        read_only,
    }
}

fn build(spec: &BlockSpec, file: impl Into<OwnedFd>) -> Result<Box<dyn VirtioDevice>, BuildError> {
    spec.build(&mut BuildEnv::new(vec![file.into()]), None)
}

struct Disk {
    b: Bench,
    file: File,
}

impl Disk {
    fn new(sectors: u64) -> Self {
        let file = disk_file(sectors);
        let b = Bench::new(build(&spec(false), file.try_clone().unwrap()).unwrap());
        Self { b, file }
    }

    fn header(&self, kind: u32, sector: u64) -> Buf {
        self.b.write(HEADER, &kind.to_le_bytes());
        self.b.write(HEADER + 8, &sector.to_le_bytes());
        self.b.write(STATUS, &[0xff]);
        readable(HEADER, 16)
    }

    /// Does a request; returns its status and the length in the used ring.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buf]) -> (u8, u32) {
        let mut chain = vec![self.header(kind, sector)];
        chain.extend_from_slice(data);
        chain.push(writable(STATUS, 1));
        self.b.queues[0].add(&chain);
        self.finish()
    }

    fn finish(&mut self) -> (u8, u32) {
        self.b.kick(0);
        assert!(!self.b.needs_reset());
        let (_, len) = self.b.queues[0].used().expect("the request is completed");
        (self.b.read(STATUS, 1)[0], len)
    }

    fn range(&self, sector: u64, sectors: u32, flags: u32) -> Buf {
        self.b.write(BUFFER, &sector.to_le_bytes());
        self.b.write(BUFFER + 8, &sectors.to_le_bytes());
        self.b.write(BUFFER + 12, &flags.to_le_bytes());
        readable(BUFFER, 16)
    }
}

const OK: u8 = Status::Ok as u8;
const IOERR: u8 = Status::IoErr as u8;
const UNSUPPORTED: u8 = Status::Unsupported as u8;

#[test]
fn what_is_written_is_read_back_and_lies_in_the_file() {
    let mut d = Disk::new(64);
    let data: Vec<u8> = (0..2048).map(|n| (n * 7) as u8).collect();
    d.b.write(BUFFER, &data);
    let pieces = [
        readable(BUFFER, 100),
        readable(BUFFER + 100, 1436),
        readable(BUFFER + 1536, 512),
    ];
    assert_eq!(d.request(1, 3, &pieces), (OK, 1));
    // Across the seam of two memory regions.
    assert_eq!(d.request(0, 3, &[writable(SEAM - 700, 2048)]), (OK, 2049));
    assert_eq!(d.b.read(SEAM - 700, 2048), data);
    let mut all = Vec::new();
    d.file.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 64 * 512);
    assert_eq!(all[3 * 512..][..2048], data);
    assert_eq!(d.request(4, 0, &[]), (OK, 1));
}

#[test]
fn identity_is_returned() {
    let mut d = Disk::new(1);
    assert_eq!(d.request(8, 0, &[writable(BUFFER, 20)]), (OK, 21));
    assert_eq!(d.b.read(BUFFER, 20), b"disk-0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(d.request(8, 0, &[writable(BUFFER, 19)]), (IOERR, 1));
}

#[test]
fn nothing_beyond_the_capacity_is_reached() {
    let mut d = Disk::new(8);
    let one = [writable(BUFFER, 512)];
    assert_eq!(d.request(0, 7, &one).0, OK);
    for sector in [8, 9, u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(d.request(0, sector, &one), (IOERR, 1), "read at {sector}");
        assert_eq!(
            d.request(1, sector, &[readable(BUFFER, 512)]).0,
            IOERR,
            "write at {sector}"
        );
    }
    assert_eq!(d.request(0, 7, &[writable(BUFFER, 1024)]).0, IOERR);
    assert_eq!(
        d.request(0, 0, &[writable(BUFFER, 511)]).0,
        IOERR,
        "not whole sectors"
    );
    assert_eq!(d.file.metadata().unwrap().len(), 8 * 512);
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut d = Disk::new(8);
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 16, u32::MAX] {
        assert_eq!(d.request(kind, 0, &[]), (UNSUPPORTED, 1), "type {kind}");
    }
}

#[test]
fn a_read_only_disk_is_not_written() {
    let file = disk_file(8);
    let b = Bench::new(build(&spec(true), file.try_clone().unwrap()).unwrap());
    assert_ne!(b.device.features() & feature::RO, 0);
    let mut d = Disk { b, file };
    d.b.write(BUFFER, &[1; 512]);
    assert_eq!(d.request(1, 0, &[readable(BUFFER, 512)]).0, IOERR);
    let range = d.range(0, 1, 0);
    assert_eq!(d.request(13, 0, &[range]).0, IOERR);
    assert_eq!(d.request(0, 0, &[writable(BUFFER, 512)]).0, OK);
    assert_eq!(d.b.read(BUFFER, 512), [0; 512]);
}

#[test]
fn ranges_are_zeroed_and_discarded() {
    let mut d = Disk::new(64);
    d.file.write_all(&[7; 64 * 512]).unwrap();
    for (kind, flags) in [(13, 0), (13, 1), (11, 0)] {
        d.b.write(BUFFER + 0x1000, &[7; 512]);
        assert_eq!(d.request(1, 8, &[readable(BUFFER + 0x1000, 512)]).0, OK);
        let range = d.range(8, 8, flags);
        assert_eq!(
            d.request(kind, 0, &[range]),
            (OK, 1),
            "type {kind}, flags {flags}"
        );
        assert_eq!(d.request(0, 7, &[writable(BUFFER + 0x1000, 512 * 10)]).0, OK);
        let read = d.b.read(BUFFER + 0x1000, 512 * 10);
        assert!(read[..512].iter().all(|&x| x == 7), "before the range");
        assert!(read[512..512 * 9].iter().all(|&x| x == 0), "the range");
        assert!(read[512 * 9..].iter().all(|&x| x == 7), "behind the range");
    }
    for (kind, sector, sectors, flags, status) in [
        (11, 60, 8, 0, IOERR),
        (13, u64::MAX, 1, 0, IOERR),
        (13, 0, u32::MAX, 0, IOERR),
        (13, 0, 1, 2, UNSUPPORTED),
        (11, 0, 1, 1, UNSUPPORTED),
    ] {
        let range = d.range(sector, sectors, flags);
        assert_eq!(d.request(kind, 0, &[range]).0, status);
    }
    assert_eq!(d.request(11, 0, &[readable(BUFFER, 15)]).0, IOERR);
    assert_eq!(d.request(11, 0, &[readable(BUFFER, 16 * 100)]).0, IOERR);
}

#[test]
fn chains_of_every_bad_form_are_completed() {
    let mut d = Disk::new(8);
    let header = d.header(0, 0);
    let status = writable(STATUS, 1);
    for (chain, len, what) in [
        (vec![header], 0, "no status"),
        (vec![readable(HEADER, 15), status], 1, "a short header"),
        (vec![status], 1, "no header"),
        (vec![readable(END, 16), status], 1, "a header outside of memory"),
        (
            vec![header, writable(BUFFER, 512), writable(END, 1)],
            0,
            "a status outside of memory",
        ),
        (
            vec![header, writable(END - 256, 512), status],
            1,
            "a buffer that leaves memory",
        ),
        (
            vec![header, writable(u64::MAX - 100, 512), status],
            1,
            "a buffer that wraps around",
        ),
        (
            vec![header, writable(BUFFER, u32::MAX), status],
            0,
            "more than 4 GiB",
        ),
        (
            vec![header, writable(BUFFER, 128 << 20), status],
            1,
            "more than the limit",
        ),
        (
            vec![header, status, readable(BUFFER, 512)],
            1,
            "readable behind writable",
        ),
    ] {
        d.b.queues[0].add(&chain);
        assert_eq!(d.finish().1, len, "{what}");
    }
}

#[test]
fn a_chain_that_bites_its_tail_ends() {
    let mut d = Disk::new(8);
    let q = &mut d.b.queues[0];
    q.write_desc(q.desc, 0, HEADER, 16, NEXT, 1);
    q.write_desc(q.desc, 1, BUFFER, 16, NEXT, 0);
    q.publish(0);
    q.publish(0x7fff);
    d.b.kick(0);
    assert_eq!(d.b.queues[0].used(), Some((0, 0)));
    assert!(
        d.b.needs_reset(),
        "a head outside of the ring cannot be given back"
    );
}

#[test]
fn an_indirect_chain_with_many_segments_works() {
    let mut d = Disk::new(1024);
    let mut chain = vec![d.header(0, 0)];
    chain.extend((0..request::MAX_DATA_SEGMENTS).map(|n| writable(BUFFER + u64::from(n) * 1024, 512)));
    chain.push(writable(STATUS, 1));
    d.b.queues[0].add_indirect(DATA + 0x10_0000, &chain);
    assert_eq!(d.finish(), (OK, request::MAX_DATA_SEGMENTS * 512 + 1));
    chain.insert(1, writable(BUFFER, 512));
    d.b.queues[0].add_indirect(DATA + 0x10_0000, &chain);
    assert_eq!(d.finish().1, 1, "one too many");
}

#[test]
fn a_file_that_became_shorter_gives_errors() {
    let mut d = Disk::new(8);
    d.file.set_len(512).unwrap();
    assert_eq!(d.request(0, 0, &[writable(BUFFER, 512)]).0, OK);
    assert_eq!(d.request(0, 0, &[writable(BUFFER, 1024)]).0, IOERR);
}

#[test]
fn what_cannot_be_a_disk_is_refused() {
    let text = |r: Result<Box<dyn VirtioDevice>, BuildError>| r.err().expect("refused").to_string();
    let odd = disk_file(1);
    odd.set_len(1000).unwrap();
    assert!(text(build(&spec(false), odd)).contains("1000 bytes long"));
    assert!(text(build(&spec(false), disk_file(0))).contains("0 bytes long"));
    assert!(text(build(&spec(true), File::open("/").unwrap())).contains("a directory"));
    assert!(text(build(&spec(true), File::open("/dev/null").unwrap())).contains("not a regular file"));
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(512).unwrap();
    let reading = File::open(file.path()).unwrap();
    assert!(text(build(&spec(false), reading)).contains("opened for reading only"));
    let long = BlockSpec {
        id: "x".repeat(21),
        ..spec(false)
    };
    assert!(text(build(&long, disk_file(1))).contains("20 or fewer"));
    let missing = spec(false).build(&mut BuildEnv::new(Vec::new()), None);
    assert!(text(missing).contains("was not handed over"));
}

#[test]
fn configuration_space_tells_the_capacity() {
    let device = build(&spec(false), disk_file(4711)).unwrap();
    let mut data = [0; 8];
    device.read_config(0, &mut data);
    assert_eq!(u64::from_le_bytes(data), 4711);
    let mut data = [0xee; 8];
    device.read_config(56, &mut data);
    assert_eq!(data, [1, 0, 0, 0, 0xee, 0xee, 0xee, 0xee]);
    device.read_config(u64::MAX, &mut data);
}

#[test]
fn state_comes_back_and_another_disk_is_refused() {
    let mut d = Disk::new(8);
    let file = d.file.try_clone().unwrap();
    d.b.replace(|old| {
        let saved = old.save().unwrap().decode().unwrap();
        spec(false)
            .build(&mut BuildEnv::new(vec![file.into()]), Some(saved))
            .unwrap()
    });
    assert_eq!(d.request(0, 0, &[writable(BUFFER, 512)]).0, OK);
    let saved = BlockState { sectors: 9 };
    let refused = spec(false).build(&mut BuildEnv::new(vec![disk_file(8).into()]), Some(saved));
    assert!(matches!(refused, Err(BuildError::Invalid { .. })));
}
