//! Rings of a network device, and packets from the wire.
#![no_main]

use std::io::Write;

use libfuzzer_sys::fuzz_target;
use shoal_devices::testing::Bench;

fuzz_target!(|bytes: &[u8]| {
    let (device, mut far) = shoal_fuzz::net();
    let (&features, bytes) = bytes.split_first().unwrap_or((&0, &[]));
    // With and without mergeable buffers and large packets.
    let without = u64::from(features & 1) << 15 | u64::from(features & 2) << 6;
    let offered = device.features();
    let mut bench = Bench::with_features(device, offered & !without);
    far.set_nonblocking(true).expect("a socket");
    for len in [bytes.len() * 3, 1500, 40] {
        let _ = far.write(&vec![1; len + 12]);
    }
    shoal_fuzz::drive_rings(&mut bench, bytes);
    bench.pause_and_resume();
});
