//! The project's own kernel, by each way into it and with one and several vCPUs.

use shoal_host::StopReason;

use crate::fleet::{Fleet, image, jeos, linux_runs, value};

/// Boots `kernel` and has the guest tell what machine it sees.
fn boots(test: &str, kernel: &str, vcpus: u32) {
    if !linux_runs(test) {
        return;
    }
    let fleet = Fleet::new();
    let script = [
        "echo release=$(uname -r)",
        "echo cpus=$(nproc)",
        "cat /proc/cpuinfo",
        "echo clock=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)",
        "exit 7",
    ];
    let mut spec = jeos("", &script);
    spec.kernel = image(kernel);
    spec.vcpus = vcpus;
    let guest = fleet.start(spec);
    let end = guest.end();
    end.assert_is(StopReason::PowerOff, Some(7));

    let console = &end.console;
    assert!(value(console, "release").ends_with("-shoal"), "{console}");
    assert_eq!(value(console, "cpus"), vcpus.to_string());
    assert_eq!(value(console, "clock"), "kvm-clock");
    let all = |key: &str| -> Vec<u32> {
        let lines = console.lines().filter_map(|line| line.split_once(':'));
        let values = lines.filter(|(k, _)| k.trim() == key).map(|(_, v)| v.trim());
        values
            .map(|v| v.parse().unwrap_or_else(|e| panic!("{key}: {v}: {e}")))
            .collect()
    };
    let n = vcpus as usize;
    let ids: Vec<u32> = (0..vcpus).collect();
    assert_eq!(all("processor"), ids);
    assert_eq!(all("apicid"), ids);
    assert_eq!(all("core id"), ids, "each vCPU is a core of its own");
    assert_eq!(all("physical id"), vec![0; n], "all in one package");
    assert_eq!(
        (all("siblings"), all("cpu cores")),
        (vec![vcpus; n], vec![vcpus; n])
    );

    let timeline = &guest.view().timeline;
    let at = |step: &str| {
        let found = timeline.iter().find(|(s, _)| s == step);
        found.unwrap_or_else(|| panic!("no {step} in {timeline:?}")).1
    };
    let steps = [
        "request-received",
        "admitted",
        "resources-opened",
        "process-begun",
        "jailed",
        "vmm-main",
        "vm-created",
        "memory-mapped",
        "first-instruction",
        "kernel-begun",
        "console-ready",
        "devices-probed",
        "root-mounted",
        "init",
        "workload",
        "guest-ready",
    ];
    assert!(steps.is_sorted_by(|a, b| at(a) < at(b)), "{timeline:?}");
    println!(
        "{test}: init after {:.0} ms, ready after {:.0} ms",
        at("init"),
        at("guest-ready")
    );
}

#[test]
fn vmlinux_with_1_vcpu() {
    boots("vmlinux_with_1_vcpu", "vmlinux", 1);
}

#[test]
fn vmlinux_with_4_vcpus() {
    boots("vmlinux_with_4_vcpus", "vmlinux", 4);
}

#[test]
fn bzimage_with_1_vcpu() {
    boots("bzimage_with_1_vcpu", "bzImage", 1);
}

#[test]
fn bzimage_with_4_vcpus() {
    boots("bzimage_with_4_vcpus", "bzImage", 4);
}
