//! Disks: what a guest writes and flushes is there after its reset, for it and for the host.

use std::fs::{self, File};

use shoal_host::{Disk, StopReason};

use crate::fleet::{Fleet, jeos, linux_runs, value};
use crate::pattern::{self, DISK};

const BYTES: u64 = 8 << 20;

#[test]
fn what_is_flushed_survives_a_reset() {
    if !linux_runs("what_is_flushed_survives_a_reset") {
        return;
    }
    let fleet = Fleet::new();
    let data = fleet.disk_file("data", BYTES);
    let locked = fleet.disk_file("locked", 1 << 20);
    // The first time it writes and, without another sync, resets the machine. The second time it finds its data.
    let verify = format!("if guest-work disk-verify /dev/vdb {BYTES}; then exit 42; fi");
    let write = format!("guest-work disk-write /dev/vdb {BYTES} && reboot -f");
    let script = [
        "echo serials=$(cat /sys/block/vda/serial) $(cat /sys/block/vdb/serial) $(cat /sys/block/vdc/serial)",
        "echo locks=$(cat /sys/block/vda/ro) $(cat /sys/block/vdb/ro) $(cat /sys/block/vdc/ro)",
        "echo cache=$(cat /sys/block/vdb/queue/write_cache)",
        "if dd if=/dev/zero of=/dev/vdc count=1; then exit 1; fi",
        &verify,
        &write,
        "exit 2",
    ];
    let mut spec = jeos("", &script);
    for (id, path, read_only) in [("data-0.1", &data, false), ("locked", &locked, true)] {
        spec.disks.push(Disk {
            id: id.into(),
            path: path.clone(),
            read_only,
        });
    }
    let guest = fleet.start(spec);
    let end = guest.end();
    assert_eq!(end.reason, StopReason::Reset, "{}", end.console);
    assert_eq!(value(&end.console, "serials"), "root data-0.1 locked");
    assert_eq!(value(&end.console, "locks"), "1 0 1");
    assert_eq!(value(&end.console, "cache"), "write back");
    pattern::expect(&mut File::open(&data).unwrap(), DISK, BYTES).expect("the host finds the guest's data");

    guest.start();
    let end = guest.end();
    assert_eq!(end.reason, StopReason::PowerOff, "{}", end.console);
    assert_eq!(end.exit_code, Some(42), "{}", end.console);
    assert!(
        fs::read(&locked).unwrap().iter().all(|b| *b == 0),
        "the read-only disk was written"
    );
}
