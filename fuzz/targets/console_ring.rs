//! A console ring whose file is the fuzzer's.
#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;

use libfuzzer_sys::fuzz_target;
use shoal_devices::legacy::ConsoleSink;
use shoal_devices::legacy::console_ring::{CAPACITY, ConsoleRingReader, ConsoleRingWriter, DATA_OFFSET};
use shoal_fuzz::Bytes;

fuzz_target!(|bytes: &[u8]| {
    let mut b = Bytes(bytes);
    let file: File = tempfile::tempfile().expect("a temporary file");
    let again = || file.try_clone().expect("a descriptor");
    let capacity = *CAPACITY.start();
    if b.u8() % 2 == 0 {
        // A valid ring, whose header is then overwritten here and there.
        let mut w = ConsoleRingWriter::open(again(), capacity).expect("a ring");
        w.write(b.take(100));
        for _ in 0..b.u8() % 4 {
            let _ = file.write_all_at(b.take(8), u64::from(b.u8() % 48));
        }
    } else {
        file.set_len(DATA_OFFSET + capacity).expect("a size");
        let _ = file.write_all_at(b.take(48), 0);
    }
    if b.u8() == 0 {
        file.set_len(u64::from(b.u16())).expect("a size");
    }
    if let Ok(r) = ConsoleRingReader::open(again()) {
        for _ in 0..8 {
            let (from, max) = (b.u64(), usize::from(b.u16()));
            if let Ok(piece) = r.read_from(from, max) {
                assert!(piece.bytes.len() <= max);
            }
            let _ = r.tail(max);
        }
    }
    if let Ok(mut w) = ConsoleRingWriter::open(again(), capacity) {
        w.write(b.0);
        let r = ConsoleRingReader::open(again()).expect("what was opened for writing is a ring");
        let read = r.tail(b.0.len()).expect("what was written can be read");
        assert!(read.bytes.len() == b.0.len().min((capacity - 4096) as usize) || b.0.is_empty());
        assert!(b.0.ends_with(&read.bytes));
    }
});
