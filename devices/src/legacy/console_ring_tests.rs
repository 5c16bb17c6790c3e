use super::*;

const SMALL: u64 = 4 * MAX_WRITE;

fn ring() -> (ConsoleRingWriter, ConsoleRingReader, File) {
    let file = tempfile::tempfile().unwrap();
    let writer = ConsoleRingWriter::open(file.try_clone().unwrap(), SMALL).unwrap();
    (
        writer,
        ConsoleRingReader::open(file.try_clone().unwrap()).unwrap(),
        file,
    )
}

/// Byte number `n` of a stream that does not repeat with the ring's capacity.
fn byte(n: u64) -> u8 {
    (n % 251) as u8
}

fn stream(from: u64, len: u64) -> Vec<u8> {
    (from..from + len).map(byte).collect()
}

#[test]
fn what_is_written_is_read() {
    let (mut w, r, _) = ring();
    assert_eq!(
        r.read_from(0, 100).unwrap(),
        Piece {
            lost: 0,
            bytes: vec![],
            next: 0
        }
    );
    w.write(b"hello\n");
    w.write(b"world\n");
    assert_eq!(
        r.read_from(0, 100).unwrap(),
        Piece {
            lost: 0,
            bytes: b"hello\nworld\n".into(),
            next: 12
        }
    );
    assert_eq!(
        r.read_from(6, 3).unwrap(),
        Piece {
            lost: 0,
            bytes: b"wor".into(),
            next: 9
        }
    );
    assert_eq!(r.read_from(99, 3).unwrap().next, 12, "beyond the end");
    assert_eq!(r.tail(4).unwrap().bytes, b"rld\n");
}

#[test]
fn the_oldest_bytes_are_lost_and_counted() {
    let (mut w, r, _) = ring();
    w.write(&stream(0, 3 * SMALL + 17));
    let total = 3 * SMALL + 17;
    assert_eq!(r.total().unwrap(), total);
    let piece = r.read_from(5, 1 << 30).unwrap();
    let kept = SMALL - MAX_WRITE;
    assert_eq!(piece.lost, total - kept - 5);
    assert_eq!(piece.bytes, stream(total - kept, kept));
    assert_eq!(piece.next, total);
}

#[test]
fn a_reader_beside_a_writer_never_sees_a_wrong_byte() {
    let (mut w, r, _) = ring();
    const ALL: u64 = 200 * SMALL;
    std::thread::scope(|s| {
        s.spawn(|| {
            let mut random = crate::testing::Random::new(3);
            let mut at = 0;
            while at < ALL {
                let n = (1 + random.below(2 * MAX_WRITE)).min(ALL - at);
                w.write(&stream(at, n));
                at += n;
            }
        });
        let (mut at, mut seen, mut lost) = (0, 0, 0);
        while at < ALL {
            let piece = r.read_from(at, 6000).unwrap();
            let first = at + piece.lost;
            assert_eq!(piece.bytes, stream(first, piece.bytes.len() as u64));
            assert_eq!(piece.next, first + piece.bytes.len() as u64);
            (at, seen, lost) = (piece.next, seen + piece.bytes.len() as u64, lost + piece.lost);
        }
        assert_eq!(seen + lost, ALL);
        assert!(seen > 0);
    });
}

#[test]
fn a_ring_is_gone_on_with_or_replaced() {
    let (mut w, r, file) = ring();
    w.write(b"before ");
    drop(w);
    let mut w = ConsoleRingWriter::open(file.try_clone().unwrap(), SMALL).unwrap();
    w.write(b"after");
    assert_eq!(r.read_from(0, 100).unwrap().bytes, b"before after");
    ConsoleRingWriter::open(file.try_clone().unwrap(), 2 * SMALL).unwrap();
    assert!(
        matches!(r.total(), Err(RingError::Invalid(_))),
        "the capacity has changed"
    );
    assert_eq!(ConsoleRingReader::open(file).unwrap().total().unwrap(), 0);
}

#[test]
fn every_bad_header_is_refused() {
    let (_, _, file) = ring();
    let good = Header {
        capacity: SMALL,
        total: 5,
    }
    .encode();
    let bad = |at: usize, value: u8| {
        let mut b = good;
        b[at] = value;
        file.write_all_at(&b, 0).unwrap();
        ConsoleRingReader::open(file.try_clone().unwrap())
            .err()
            .expect("refused")
            .to_string()
    };
    assert!(bad(0, b'X').contains("its mark"));
    assert!(bad(8, 9).contains("version 9"));
    assert!(bad(23, 0x80).contains("a capacity of"));
    assert!(bad(17, 0).contains("a capacity of"));
    assert!(bad(24, 6).contains("complement"));
    assert!(bad(18, 1).contains("bytes long with a capacity"));
    file.set_len(20).unwrap();
    assert!(matches!(
        ConsoleRingReader::open(file.try_clone().unwrap()),
        Err(RingError::Io(..))
    ));
    assert!(matches!(
        ConsoleRingWriter::open(file, 5),
        Err(RingError::Capacity(5))
    ));
}

#[test]
fn a_total_that_lies_costs_no_more_than_the_ring() {
    let (_, r, file) = ring();
    for total in [u64::MAX, u64::MAX - 3, 1 << 63] {
        file.write_all_at(
            &Header {
                capacity: SMALL,
                total,
            }
            .encode(),
            0,
        )
        .unwrap();
        let piece = r.read_from(0, usize::MAX).unwrap();
        assert!(piece.bytes.len() as u64 <= SMALL);
        assert_eq!(piece.next, total);
        r.read_from(u64::MAX, usize::MAX).unwrap();
        r.tail(usize::MAX).unwrap();
    }
    file.set_len(DATA_OFFSET).unwrap();
    assert!(
        matches!(r.read_from(0, 10), Err(RingError::Io(..))),
        "a ring that was cut off"
    );
}
