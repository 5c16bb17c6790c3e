//! What shoal-perf reads: consoles of guests that measure, results, baselines.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| shoal_perf::fuzzing::parse(bytes));
