//! What was chosen for speed changes nothing that a guest sees: the tests of disks again, on io_uring. And limits, which a
//! guest sees as a slow device.

use shoal_host::{Disk, DiskEngine, LimitChanges, Rate, RateLimits, StopReason};

use crate::fleet::{Fleet, Tap, jeos, linux_runs, value};
use crate::{block, net};

#[test]
fn what_is_flushed_through_io_uring_survives_a_reset() {
    if linux_runs("what_is_flushed_through_io_uring_survives_a_reset") {
        block::flushed_survives(DiskEngine::IoUring);
    }
}

#[test]
fn what_is_discarded_through_io_uring_is_given_back() {
    if linux_runs("what_is_discarded_through_io_uring_is_given_back") {
        block::discarded_is_given_back(DiskEngine::IoUring);
    }
}

#[test]
fn a_limit_that_is_set_on_a_running_guest_is_kept() {
    const TEST: &str = "a_limit_that_is_set_on_a_running_guest_is_kept";
    if !linux_runs(TEST) {
        return;
    }
    let fleet = Fleet::new();
    let data = fleet.disk_file("data", 1 << 20);
    let time = "cut -d. -f1 /proc/uptime";
    let read = |kib: u32| format!("dd if=/dev/vdb of=/dev/null bs=4k count={} 2>/dev/null", kib / 4);
    let script = [
        &format!("before=$({time})"),
        &read(256),
        &format!("after=$({time})"),
        "echo took=$((after - before))",
        "echo now",
        "cat /dev/vdb > /dev/null",
        "exit 42",
    ];
    let mut spec = jeos("", &script);
    spec.disks.push(Disk {
        id: "data".into(),
        path: data,
        ..Disk::default()
    });
    let guest = fleet.start(spec);
    // Long before the guest has come to its script. Its read-ahead takes 128 KiB at once, which pays off afterwards.
    let slow = |per_second| LimitChanges {
        disks: vec![(
            "data".into(),
            RateLimits {
                bandwidth: Some(Rate {
                    per_second,
                    burst: 4096,
                }),
                ..RateLimits::default()
            },
        )],
        ..LimitChanges::default()
    };
    let set = |changes| fleet.wait("setting limits", fleet.host.set_limits(&guest.id, changes));
    set(slow(64 << 10)).expect("the VMM takes them");
    guest.await_output("now");
    // The rest would take an hour.
    set(slow(200)).expect("the VMM takes them");
    let mut lifted = slow(1);
    lifted.disks[0].1 = RateLimits::default();
    set(lifted).expect("the VMM takes them");
    let end = guest.end();
    end.assert_is(StopReason::PowerOff, Some(42));
    // The first request costs the others their time, so that all but the last are paid for.
    let took: u64 = value(&end.console, "took").parse().unwrap();
    assert!(took >= 1, "{}", end.console);
}

#[test]
fn every_queue_of_a_disk_carries_its_part() {
    if !linux_runs("every_queue_of_a_disk_carries_its_part") {
        return;
    }
    const BYTES: u64 = 4 << 20;
    let fleet = Fleet::new();
    let engines = [DiskEngine::Sync, DiskEngine::IoUring];
    let mut script = Vec::new();
    let mut spec = jeos("", &[]);
    for (name, engine) in ["b", "c"].into_iter().zip(engines) {
        spec.disks.push(Disk {
            id: name.into(),
            path: fleet.disk_file(name, BYTES),
            engine,
            queues: 2,
            ..Disk::default()
        });
        script.push(format!("echo vd{name}=$(ls /sys/block/vd{name}/mq | wc -l)"));
        // From one processor after the other, each of which has a queue of its own.
        script.push(format!(
            "taskset 1 guest-work disk-write /dev/vd{name} {BYTES} || exit 1"
        ));
        script.push("echo 3 > /proc/sys/vm/drop_caches".into());
        script.push(format!(
            "taskset 2 guest-work disk-verify /dev/vd{name} {BYTES} || exit 2"
        ));
    }
    script.push("exit 42".into());
    let script: Vec<&str> = script.iter().map(String::as_str).collect();
    spec.cmdline = jeos("", &script).cmdline;
    spec.vcpus = 2;
    let end = fleet.start(spec).end();
    end.assert_is(StopReason::PowerOff, Some(42));
    for name in ["vdb", "vdc"] {
        assert_eq!(value(&end.console, name), "2", "{}", end.console);
    }
}

#[test]
fn tcp_through_a_tap_with_two_queues() {
    const TEST: &str = "tcp_through_a_tap_with_two_queues";
    if !linux_runs(TEST) {
        return;
    }
    match Tap::with_queues() {
        Ok(tap) => net::tcp_both_ways(&tap, 2),
        Err(why) => println!("SKIP: {TEST}: no TAP can be made: {why}"),
    }
}
