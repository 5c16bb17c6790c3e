//! Disks: what a guest writes and flushes is there after its reset, for it and for the host; what it discards is the
//! host's again.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

use shoal_host::{Disk, DiskEngine, StopReason};

use crate::fleet::{Fleet, jeos, linux_runs, value};
use crate::pattern::{self, DISK};

const BYTES: u64 = 8 << 20;

#[test]
fn what_is_flushed_survives_a_reset() {
    if linux_runs("what_is_flushed_survives_a_reset") {
        flushed_survives(DiskEngine::Sync);
    }
}

/// With all disks on `engine`.
pub fn flushed_survives(engine: DiskEngine) {
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
            engine,
            ..Disk::default()
        });
    }
    spec.disks[0].engine = engine;
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

#[test]
fn what_is_discarded_is_given_back() {
    if linux_runs("what_is_discarded_is_given_back") {
        discarded_is_given_back(DiskEngine::Sync);
    }
}

/// With the disk on `engine`.
pub fn discarded_is_given_back(engine: DiskEngine) {
    const MIB: u64 = 1 << 20;
    let fleet = Fleet::new();
    let data = fleet.disk_file("data", BYTES);
    // Each MiB with its neighbours as they were.
    let script = [
        "echo limits=$(cat /sys/block/vdb/queue/discard_max_bytes) $(cat /sys/block/vdb/queue/write_zeroes_max_bytes)",
        &format!("guest-work disk-write /dev/vdb {BYTES} || exit 1"),
        &format!("blkdiscard -o {} -l {MIB} /dev/vdb || exit 2", MIB),
        &format!("guest-work disk-zero /dev/vdb {} {MIB} || exit 3", 3 * MIB),
        &format!("guest-work disk-punch /dev/vdb {} {MIB} || exit 4", 5 * MIB),
        "for at in 0 1 3 5; do dd if=/dev/vdb bs=1M skip=$at count=1 2>/dev/null | tr -d '\\000' | wc -c; done",
    ];
    let mut spec = jeos("", &script);
    spec.disks.push(Disk {
        id: "data".into(),
        path: data.clone(),
        engine,
        ..Disk::default()
    });
    let end = fleet.start(spec).end();
    end.assert_is(StopReason::PowerOff, Some(0));
    assert_eq!(
        value(&end.console, "limits"),
        "1073741824 1073741824",
        "{}",
        end.console
    );
    let left: Vec<u64> = end
        .console
        .lines()
        .filter_map(|line| line.trim().parse().ok())
        .collect();
    assert!(
        left[0] > MIB / 2 && left[1..] == [0, 0, 0],
        "{left:?} of {}",
        end.console
    );

    let (mut wanted, found) = (Vec::new(), fs::read(&data).unwrap());
    pattern::send(&mut wanted, DISK, BYTES).unwrap();
    for at in [1, 3, 5] {
        wanted[(at * MIB) as usize..][..MIB as usize].fill(0);
    }
    assert!(
        found == wanted,
        "the ranges beside those that were zeroed are not as they were"
    );
    // Zeroing may leave the blocks; the others are holes now.
    let allocated = fs::metadata(&data).unwrap().blocks() * 512;
    assert!(allocated <= BYTES - 2 * MIB, "{allocated} bytes are allocated");
}
