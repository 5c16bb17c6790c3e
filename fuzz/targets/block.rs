//! Block requests of every form.
#![no_main]

use libfuzzer_sys::fuzz_target;
use shoal_devices::testing::Bench;

fuzz_target!(|bytes: &[u8]| {
    shoal_fuzz::drive_rings(&mut Bench::new(shoal_fuzz::block()), bytes);
});
