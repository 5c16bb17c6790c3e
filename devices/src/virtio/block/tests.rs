//! Both engines do the same for the guest: the tests of this file run on each of them.

use std::cell::Cell;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use virtio_queue::QueueT;

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
        engine: ENGINE.get(),
        ..BlockSpec::default()
    }
}

thread_local! {
    /// What the test that runs in this thread is about.
    static ENGINE: Cell<EngineKind> = const { Cell::new(EngineKind::Sync) };
}

fn on(engine: EngineKind, name: &str, test: fn()) {
    if engine == EngineKind::IoUring
        && let Err(e) = Ring::new(tempfile::tempfile().unwrap(), 1)
    {
        return println!("SKIP: {name} on io_uring: {e}");
    }
    ENGINE.set(engine);
    test();
}

macro_rules! on_both_engines {
    ($($test:ident),+ $(,)?) => {
        mod sync {
            $(#[test] fn $test() { super::on(super::EngineKind::Sync, stringify!($test), super::$test); })+
        }
        mod io_uring {
            $(#[test] fn $test() { super::on(super::EngineKind::IoUring, stringify!($test), super::$test); })+
        }
    };
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
        self.b.notify(0);
        let (_, len) = self.b.until(|b| b.queues[0].used());
        assert!(!self.b.needs_reset());
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

fn identity_is_returned() {
    let mut d = Disk::new(1);
    assert_eq!(d.request(8, 0, &[writable(BUFFER, 20)]), (OK, 21));
    assert_eq!(d.b.read(BUFFER, 20), b"disk-0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(d.request(8, 0, &[writable(BUFFER, 19)]), (IOERR, 1));
}

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

fn unknown_requests_are_unsupported() {
    let mut d = Disk::new(8);
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 16, u32::MAX] {
        assert_eq!(d.request(kind, 0, &[]), (UNSUPPORTED, 1), "type {kind}");
    }
}

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

fn a_file_that_became_shorter_gives_errors() {
    let mut d = Disk::new(8);
    d.file.set_len(512).unwrap();
    assert_eq!(d.request(0, 0, &[writable(BUFFER, 512)]).0, OK);
    assert_eq!(d.request(0, 0, &[writable(BUFFER, 1024)]).0, IOERR);
}

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

/// A request in memory of its own: header, one sector of data, status.
fn own_request(d: &mut Disk, at: u64, kind: u32, sector: u64) {
    let place = DATA + at * 0x1000;
    d.b.write(place, &kind.to_le_bytes());
    d.b.write(place + 8, &sector.to_le_bytes());
    d.b.write(place + 16, &[0xff]);
    let data = Buf {
        addr: place + 512,
        len: 512,
        write: kind == 0,
    };
    d.b.queues[0].add(&[readable(place, 16), data, writable(place + 16, 1)]);
}

fn own_result(d: &Disk, at: u64) -> (u8, Vec<u8>) {
    let place = DATA + at * 0x1000;
    (d.b.read(place + 16, 1)[0], d.b.read(place + 512, 512))
}

/// As many requests as fit into the ring, each with three descriptors.
const MANY: u64 = QUEUE_SIZE as u64 / 3;

fn many_requests_at_once_are_each_done_once() {
    let mut d = Disk::new(MANY);
    for at in 0..MANY {
        d.b.write(DATA + at * 0x1000 + 512, &[at as u8 + 1; 512]);
        own_request(&mut d, at, 1, at);
    }
    d.b.notify(0);
    for left in (0..MANY).rev() {
        d.b.until(|b| b.queues[0].used());
        assert!(left > 0 || d.b.queues[0].used().is_none());
    }
    // Backwards, so that neither order nor place can be right by accident.
    for at in 0..MANY {
        assert_eq!(own_result(&d, at).0, OK);
        own_request(&mut d, at, 0, MANY - 1 - at);
    }
    d.b.notify(0);
    for _ in 0..MANY {
        d.b.until(|b| b.queues[0].used());
    }
    for at in 0..MANY {
        assert_eq!(
            own_result(&d, at),
            (OK, vec![(MANY - at) as u8; 512]),
            "read {at}"
        );
    }
    assert!(!d.b.needs_reset());
}

fn what_is_in_flight_ends_before_the_device_stops() {
    let mut d = Disk::new(MANY);
    for round in 0..20_u8 {
        for at in 0..MANY {
            d.b.write(DATA + at * 0x1000 + 512, &[round + 1; 512]);
            own_request(&mut d, at, 1, at);
        }
        d.b.notify(0);
        // Begun, and possibly not done.
        d.b.turn_once(0);
        let stopped = d.b.deactivate();
        assert_eq!(
            u64::from(stopped[0].next_used()),
            MANY,
            "every chain was given back"
        );
        let mut all = vec![0; (MANY * SECTOR) as usize];
        std::os::unix::fs::FileExt::read_exact_at(&d.file, &mut all, 0).unwrap();
        assert!(all.iter().all(|b| *b == round + 1), "round {round}");
        d.b.activate();
    }
}

fn what_was_in_flight_at_a_pause_is_not_done_again() {
    let mut d = Disk::new(MANY);
    for at in 0..MANY {
        own_request(&mut d, at, 0, at);
    }
    d.b.notify(0);
    d.b.turn_once(0);
    d.b.pause_and_resume();
    let done = std::iter::from_fn(|| d.b.queues[0].used()).count();
    assert_eq!(done as u64, MANY);
    assert!((0..MANY).all(|at| own_result(&d, at).0 == OK));
}

fn a_driver_without_flush_has_its_writes_synchronized() {
    let file = disk_file(8);
    let device = build(&spec(false), file.try_clone().unwrap()).unwrap();
    let features = device.features() & !feature::FLUSH;
    let mut d = Disk {
        b: Bench::with_features(device, features),
        file,
    };
    d.b.write(BUFFER, &[5; 512]);
    assert_eq!(d.request(1, 1, &[readable(BUFFER, 512)]), (OK, 1));
    let range = d.range(2, 1, 0);
    assert_eq!(d.request(13, 0, &[range]), (OK, 1));
    assert_eq!(d.request(0, 1, &[writable(BUFFER, 512)]), (OK, 513));
    assert_eq!(d.b.read(BUFFER, 512), [5; 512]);
}

fn ranges_of_no_length_are_skipped() {
    let mut d = Disk::new(64);
    d.file.write_all(&[7; 64 * 512]).unwrap();
    let mut ranges = Vec::new();
    for (sector, sectors) in [(0_u64, 0_u32), (8, 1), (20, 0), (9, 1)] {
        ranges.extend(sector.to_le_bytes());
        ranges.extend(sectors.to_le_bytes());
        ranges.extend([0; 4]);
    }
    d.b.write(BUFFER, &ranges);
    assert_eq!(d.request(13, 0, &[readable(BUFFER, 64)]), (OK, 1));
    assert_eq!(d.request(0, 7, &[writable(BUFFER, 4 * 512)]).0, OK);
    let read = d.b.read(BUFFER, 4 * 512);
    assert!(read[..512].iter().chain(&read[3 * 512..]).all(|b| *b == 7));
    assert!(read[512..3 * 512].iter().all(|b| *b == 0));
}

fn limited(limits: Limits) -> (Disk, crate::limit::LimitBoard) {
    let file = disk_file(MANY);
    let mut env = BuildEnv::new(vec![file.try_clone().unwrap().into()]);
    let board = env.limits();
    let spec = BlockSpec {
        limits,
        ..spec(false)
    };
    let b = Bench::new(spec.build(&mut env, None).unwrap());
    (Disk { b, file }, board)
}

fn rate(per_second: u64, burst: u64) -> Option<crate::limit::Rate> {
    Some(crate::limit::Rate { per_second, burst })
}

/// Operations that are far too few to be done while the test runs.
const ONE_A_DAY: Limits = Limits {
    bandwidth: None,
    operations: Some(crate::limit::Rate {
        per_second: 1,
        burst: 10,
    }),
};

fn what_is_limited_comes_late_and_whole() {
    let operations = rate(1000, 1);
    let (mut d, _) = limited(Limits {
        operations,
        ..Limits::default()
    });
    for at in 0..MANY {
        d.b.write(DATA + at * 0x1000 + 512, &[at as u8 + 1; 512]);
        own_request(&mut d, at, 1, at);
    }
    let start = std::time::Instant::now();
    d.b.notify(0);
    d.b.turn();
    let at_once = std::iter::from_fn(|| d.b.queues[0].used()).count() as u64;
    let elapsed = start.elapsed().as_millis() as u64;
    assert!(at_once <= 1 + elapsed, "{at_once} in {elapsed} ms");
    for _ in at_once..MANY {
        d.b.until(|b| b.queues[0].used());
    }
    // The first needs no time, each of the others a millisecond.
    assert!(start.elapsed().as_millis() as u64 >= MANY - 1);
    let mut all = vec![0; (MANY * SECTOR) as usize];
    std::os::unix::fs::FileExt::read_exact_at(&d.file, &mut all, 0).unwrap();
    for (at, sector) in all.chunks(SECTOR as usize).enumerate() {
        assert!(sector.iter().all(|b| *b == at as u8 + 1), "sector {at}");
    }
}

fn a_request_larger_than_a_burst_passes() {
    let (mut d, _) = limited(Limits {
        bandwidth: rate(4_000_000, 512),
        ..Limits::default()
    });
    let start = std::time::Instant::now();
    for _ in 0..5 {
        assert_eq!(d.request(0, 0, &[writable(BUFFER, 16 * 512)]).0, OK);
    }
    // Each but the first waits for what the one before owes.
    assert!(start.elapsed().as_micros() >= 4 * (16 * 512 - 512) / 4);
}

fn limits_hold_from_when_they_are_set_to_when_they_are_lifted() {
    let (mut d, board) = limited(Limits::default());
    assert_eq!(d.request(0, 0, &[writable(BUFFER, 512)]).0, OK);
    d.b.set_limits(&board, DeviceLimits::All(ONE_A_DAY));
    for at in 0..MANY {
        own_request(&mut d, at, 0, at);
    }
    d.b.notify(0);
    d.b.turn();
    // A burst, and what a slow machine adds to it.
    let done = std::iter::from_fn(|| d.b.queues[0].used()).count() as u64;
    assert!((10..MANY / 2).contains(&done), "{done}");
    assert!(
        !d.b.turn_once(0),
        "what is held back does not keep the loop awake"
    );
    // Neither a pause nor a reset brings a new burst.
    d.b.pause_and_resume();
    let more = std::iter::from_fn(|| d.b.queues[0].used()).count() as u64;
    assert!(done + more < MANY / 2, "{done} and {more}");
    d.b.set_limits(&board, DeviceLimits::All(Limits::default()));
    for _ in done + more..MANY {
        d.b.until(|b| b.queues[0].used());
    }
    assert!((0..MANY).all(|at| own_result(&d, at).0 == OK));
    d.b.set_limits(&board, DeviceLimits::All(ONE_A_DAY));
    for at in 0..MANY {
        own_request(&mut d, at, 0, at);
    }
    d.b.notify(0);
    d.b.turn();
    d.b.deactivate();
    d.b.activate();
    for at in 0..MANY {
        own_request(&mut d, at, 0, at);
    }
    d.b.notify(0);
    d.b.turn();
    let done = std::iter::from_fn(|| d.b.queues[0].used()).count() as u64;
    assert!(done < 10, "{done} after a reset");
}

/// Adds a read of sector `at` to `queue`, whose data lies in a place of its own.
fn read_on(d: &mut Disk, queue: usize, at: u64) {
    let place = DATA + at * 0x1000;
    d.b.write(place, &0_u32.to_le_bytes());
    d.b.write(place + 8, &at.to_le_bytes());
    d.b.write(place + 16, &[0xff]);
    d.b.queues[queue].add(&[
        readable(place, 16),
        writable(place + 512, 512),
        writable(place + 16, 1),
    ]);
}

fn with_queues(queues: u8) -> Disk {
    let sectors = 512;
    let mut file = disk_file(sectors);
    for at in 0..sectors {
        file.write_all(&[at as u8 ^ 0x55; 512]).unwrap();
    }
    let spec = BlockSpec { queues, ..spec(true) };
    let b = Bench::new(build(&spec, file.try_clone().unwrap()).unwrap());
    Disk { b, file }
}

fn several_queues_are_served_each_for_itself() {
    let mut d = with_queues(4);
    assert_ne!(d.b.device.features() & feature::MQ, 0);
    let mut count = [0; 2];
    d.b.device.read_config(34, &mut count);
    assert_eq!(u16::from_le_bytes(count), 4);
    // More at once than fit into a ring of io_uring.
    let each = u64::from(QUEUE_SIZE) / 3;
    for at in 0..each {
        for queue in 0..4 {
            read_on(&mut d, queue, at * 4 + queue as u64);
        }
    }
    (0..4).for_each(|queue| d.b.notify(queue));
    for queue in 0..4 {
        for _ in 0..each {
            d.b.until(|b| b.queues[queue].used());
        }
        assert_eq!(d.b.queues[queue].used(), None);
    }
    for at in 0..each * 4 {
        assert_eq!(
            own_result(&d, at),
            (OK, vec![at as u8 ^ 0x55; 512]),
            "sector {at}"
        );
    }
    // A pause finds all of them where they stopped.
    for queue in 0..4 {
        read_on(&mut d, queue, queue as u64);
        d.b.notify(queue);
    }
    d.b.turn_once(0);
    d.b.pause_and_resume();
    for queue in 0..4 {
        assert!(d.b.queues[queue].used().is_some());
        assert_eq!(d.b.queues[queue].used(), None);
    }
}

fn a_queue_that_is_broken_stops_the_others_until_the_reset() {
    let mut d = with_queues(2);
    read_on(&mut d, 0, 1);
    d.b.queues[1].publish(0x7fff);
    d.b.notify(0);
    d.b.notify(1);
    d.b.turn();
    assert!(d.b.needs_reset());
    d.b.deactivate();
    d.b.activate();
    for queue in 0..2 {
        read_on(&mut d, queue, 2);
        d.b.notify(queue);
        d.b.until(|b| b.queues[queue].used());
        assert_eq!(own_result(&d, 2), (OK, vec![2 ^ 0x55; 512]));
    }
}

on_both_engines!(
    what_is_written_is_read_back_and_lies_in_the_file,
    identity_is_returned,
    nothing_beyond_the_capacity_is_reached,
    unknown_requests_are_unsupported,
    a_read_only_disk_is_not_written,
    ranges_are_zeroed_and_discarded,
    chains_of_every_bad_form_are_completed,
    a_chain_that_bites_its_tail_ends,
    an_indirect_chain_with_many_segments_works,
    a_file_that_became_shorter_gives_errors,
    what_cannot_be_a_disk_is_refused,
    configuration_space_tells_the_capacity,
    state_comes_back_and_another_disk_is_refused,
    many_requests_at_once_are_each_done_once,
    what_is_in_flight_ends_before_the_device_stops,
    what_was_in_flight_at_a_pause_is_not_done_again,
    a_driver_without_flush_has_its_writes_synchronized,
    ranges_of_no_length_are_skipped,
    what_is_limited_comes_late_and_whole,
    a_request_larger_than_a_burst_passes,
    limits_hold_from_when_they_are_set_to_when_they_are_lifted,
    several_queues_are_served_each_for_itself,
    a_queue_that_is_broken_stops_the_others_until_the_reset,
);

#[test]
fn limits_that_cannot_be_kept_are_refused() {
    let bad = BlockSpec {
        limits: Limits {
            bandwidth: rate(0, 1),
            ..Limits::default()
        },
        ..spec(false)
    };
    let text = build(&bad, disk_file(1)).err().expect("refused").to_string();
    assert!(text.contains("limits.bandwidth: per_second is 0"), "{text}");
}

#[test]
fn a_disk_has_1_to_32_queues() {
    for queues in [0, 33, 255] {
        let bad = BlockSpec {
            queues,
            ..spec(false)
        };
        let text = build(&bad, disk_file(1)).err().expect("refused").to_string();
        assert!(text.contains("1 to 32"), "{text}");
    }
    let one = build(&spec(false), disk_file(1)).unwrap();
    assert_eq!(one.features() & feature::MQ, 0);
}
