//! Guest memory: what guests share, and the smallest and a large one.

use std::fs;

use shoal_host::StopReason;

use crate::fleet::{Fleet, jeos, linux_runs, value};

/// Sums up (KiB) a key of smaps over the mappings of the kernel's memfd.
fn kernel_figure(pid: u32, key: &str) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("reading a VMM's smaps");
    let (mut sum, mut of_kernel, mut mappings) = (0, false, 0);
    for line in smaps.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if !first.ends_with(':') {
            of_kernel = line.contains("memfd:shoal-kernel");
            mappings += u32::from(of_kernel);
        } else if of_kernel && first.trim_end_matches(':') == key {
            let kib = line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok());
            sum += kib.unwrap_or_else(|| panic!("{line}"));
        }
    }
    assert!(mappings > 0, "process {pid} maps no kernel:\n{smaps}");
    sum
}

#[test]
fn two_guests_share_their_kernel() {
    if !linux_runs("two_guests_share_their_kernel") {
        return;
    }
    let fleet = Fleet::new();
    let guests = [(); 2].map(|()| {
        let guest = fleet.start(jeos("", &["exec sleep 100000"]));
        guest.await_output("shoal-init: ready");
        guest
    });
    for guest in &guests {
        let of = |key| kernel_figure(guest.pid(), key);
        // Pages of a memfd count as dirty once it was written, by whoever made it.
        let (resident, shared) = (of("Rss"), of("Shared_Clean") + of("Shared_Dirty"));
        println!(
            "two_guests_share_their_kernel: VMM {}: {resident} KiB of the kernel's memfd resident, {shared} KiB shared with \
             the other guest",
            guest.pid(),
        );
        // Code that both have run; what a kernel writes anyway is copied. A kernel of its own for each guest would show
        // nothing as shared.
        assert!(shared > 512 && shared <= resident, "{shared} of {resident} KiB");
    }
}

/// Boots a guest of `mib`; returns what it says of its memory: MemTotal (KiB) and its ranges of RAM.
fn boots(test: &str, mib: u64) -> Option<(u64, String)> {
    if !linux_runs(test) {
        return None;
    }
    let fleet = Fleet::new();
    let script = [
        "echo total=$(grep MemTotal /proc/meminfo)",
        "echo free=$(grep MemAvailable /proc/meminfo)",
        "echo ram=$(grep RAM /proc/iomem)",
        "exit 42",
    ];
    let mut spec = jeos("", &script);
    spec.memory_mib = mib;
    let end = fleet.start(spec).end();
    end.assert_is(StopReason::PowerOff, Some(42));
    let total = value(&end.console, "total").split_whitespace().nth(1);
    let total = total
        .and_then(|n| n.parse().ok())
        .unwrap_or_else(|| panic!("{}", end.console));
    println!(
        "{test}: of {mib} MiB, MemTotal is {total} KiB, {}",
        value(&end.console, "free")
    );
    Some((total, value(&end.console, "ram").to_owned()))
}

#[test]
fn the_smallest_guest_boots() {
    if let Some((total, _)) = boots("the_smallest_guest_boots", 16) {
        assert!(total < 16 << 10, "{total} KiB");
    }
}

#[test]
fn memory_goes_on_above_the_gap() {
    if let Some((total, ram)) = boots("memory_goes_on_above_the_gap", 4096) {
        assert!(total > 3900 << 10, "{total} KiB");
        assert!(ram.contains("100000000-13fffffff"), "{ram}");
        assert!(ram.contains("-bfffffff"), "{ram}");
    }
}
