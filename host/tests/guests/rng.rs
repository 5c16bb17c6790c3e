//! The entropy device.

use shoal_host::StopReason;

use crate::fleet::{Fleet, jeos, linux_runs, value};

#[test]
fn random_numbers_come_from_the_host() {
    if !linux_runs("random_numbers_come_from_the_host") {
        return;
    }
    let fleet = Fleet::new();
    let script = [
        "echo source=$(cat /sys/class/misc/hw_random/rng_current)",
        "echo first=$(head -c 4096 /dev/hwrng | sha256sum)",
        "echo second=$(head -c 4096 /dev/hwrng | sha256sum)",
        "echo length=$(head -c 100000 /dev/hwrng | wc -c)",
        "exit 42",
    ];
    let end = fleet.start(jeos("", &script)).end();
    end.assert_is(StopReason::PowerOff, Some(42));
    assert_eq!(value(&end.console, "source"), "virtio_rng.0");
    assert_eq!(value(&end.console, "length"), "100000");
    let (first, second) = (value(&end.console, "first"), value(&end.console, "second"));
    assert_ne!(first, second);
    // What 4096 zeros give.
    assert!(!first.starts_with("ad7facb2586fc6e9"), "{first}");
}
