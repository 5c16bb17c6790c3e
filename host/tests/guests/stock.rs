//! Debian's own cloud kernel: it knows nothing of Shoal and finds all devices by ACPI, its drivers are modules.

use shoal_host::{Disk, GuestSpec, StopReason, Vsock};

use crate::fleet::{Fleet, PATIENCE, image, linux_runs, value};
use crate::pattern::{self, DISK};

const BYTES: u64 = 1 << 20;

#[test]
fn a_stock_kernel_finds_its_devices_by_acpi() {
    works("a_stock_kernel_finds_its_devices_by_acpi", Some(Vsock::default()));
}

#[test]
fn a_stock_kernel_stops_at_the_power_button_alone() {
    works("a_stock_kernel_stops_at_the_power_button_alone", None);
}

/// Boots the kernel, lets it work on its devices and stops it: by its power button, and over vsock when it has that.
fn works(test: &str, vsock: Option<Vsock>) {
    if !linux_runs(test) {
        return;
    }
    let has_vsock = vsock.is_some();
    let fleet = Fleet::new();
    let disk = fleet.disk_file("disk", BYTES);
    let write = format!("guest-work disk-write /dev/vda {BYTES}");
    let script = [
        "echo release=$(uname -r)",
        "echo cpus=$(nproc)",
        "cd /sys/bus/platform/drivers/virtio-mmio && echo found=$(ls -d LNRO0005:*)",
        "echo serial=$(cat /sys/block/vda/serial)",
        "echo random=$(cat /sys/class/misc/hw_random/rng_current)",
        &write,
        "exec sleep 100000",
    ];
    let spec = GuestSpec {
        cmdline: format!("console=ttyS0 panic=-1 quiet -- sh -c \"{}\"", script.join("; ")),
        initrd: Some(image("stock/initramfs.cpio.gz")),
        disks: vec![Disk {
            id: "data".into(),
            path: disk.clone(),
            ..Disk::default()
        }],
        vsock,
        ..GuestSpec::new(image("stock/vmlinuz"), 2, 256)
    };
    let guest = fleet.start(spec);
    guest.await_output("shoal-init: ready");
    guest.await_output("guest-work: disk-write");
    // The button comes by the generic event device and the kernel's modules. Then S5.
    let end = guest.stop(PATIENCE);
    assert_eq!(end.reason, StopReason::PowerOff, "{}", end.console);
    let console = &end.console;
    assert!(value(console, "release").contains("cloud"), "{console}");
    assert_eq!(value(console, "cpus"), "2");
    // The disk, the socket device if there is one, and the entropy device.
    let found = ["LNRO0005:00", "LNRO0005:01", "LNRO0005:02"];
    let found = found[..2 + usize::from(has_vsock)].join(" ");
    assert_eq!(value(console, "found"), found);
    assert_eq!(value(console, "serial"), "data");
    assert_eq!(value(console, "random"), "virtio_rng.0");
    assert!(console.contains("shoal-init: asked to stop"), "{console}");
    // SIGTERM ended the workload. The host learns that over vsock only.
    assert!(console.contains("workload exited with code 143"), "{console}");
    assert_eq!(end.exit_code, has_vsock.then_some(143), "{console}");
    pattern::expect(&mut std::fs::File::open(&disk).unwrap(), DISK, BYTES).expect("the guest's data");
}
