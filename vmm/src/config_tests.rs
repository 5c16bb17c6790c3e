//! A configuration that is right, and each way to be wrong.

use super::*;
use crate::protocol::{InitrdConfig, KernelConfig, KernelRange, MemoryConfig, Pages, PhysRange};
use shoal_devices::spec::{AnyDeviceSpec, FdSlot};
use shoal_devices::virtio::rng::RngSpec;

const MIB: u64 = 1 << 20;

fn good() -> VmConfig {
    VmConfig {
        guest_id: "g-1".into(),
        kvm: FdSlot(0),
        vcpus: 1,
        memory: MemoryConfig {
            bytes: 128 * MIB,
            pages: Pages::Small,
        },
        kernel: KernelConfig {
            fd: FdSlot(1),
            layout: KernelLayout {
                ranges: vec![KernelRange {
                    range: PhysRange {
                        start: 16 * MIB,
                        len: 8 * MIB,
                    },
                    copied: false,
                }],
                end: 26 * MIB,
                entry: KernelEntry::Pvh {
                    entry: 16 * MIB as u32,
                },
                setup_header: None,
            },
        },
        initrd: None,
        cmdline: "console=ttyS0".into(),
        console: ConsoleConfig::Null,
        devices: vec![],
        exit_record: None,
    }
}

fn rng() -> AnyDeviceSpec {
    AnyDeviceSpec::Rng(RngSpec::default())
}

#[test]
fn devices_are_announced_before_what_belongs_to_pid_1() {
    let mut c = good();
    c.devices = vec![rng(), rng()];
    c.cmdline = "quiet -- one two".into();
    assert_eq!(
        c.validate().unwrap().cmdline,
        "quiet virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6 -- one two"
    );
    let mut c = good();
    c.cmdline = String::new();
    c.devices = vec![rng()];
    assert_eq!(
        c.validate().unwrap().cmdline,
        "virtio_mmio.device=4K@0xd0000000:5"
    );
}

#[test]
fn an_initrd_lies_at_the_end_of_low_memory() {
    let mut c = good();
    c.initrd = Some(InitrdConfig {
        fd: FdSlot(2),
        len: 5000,
    });
    assert_eq!(c.clone().validate().unwrap().initrd_at, Some(128 * MIB - 8192));
    c.memory.bytes = 8 << 30;
    assert_eq!(c.validate().unwrap().initrd_at, Some((2 << 30) - 8192));
}

#[test]
fn what_is_wrong_is_named() {
    type Change = fn(&mut VmConfig);
    let cases: [(&str, Change); 20] = [
        ("guest_id", |c| c.guest_id.clear()),
        ("guest_id", |c| c.guest_id = "../x".into()),
        ("guest_id", |c| c.guest_id = "x".repeat(65)),
        ("vcpus", |c| c.vcpus = 0),
        ("vcpus", |c| c.vcpus = 33),
        ("memory.bytes", |c| c.memory.bytes = 0),
        ("memory.bytes", |c| c.memory.bytes = u64::MAX),
        ("memory.bytes", |c| c.memory.bytes = 128 * MIB + 1),
        ("kernel", |c| c.memory.bytes = 24 * MIB),
        ("kernel", |c| c.kernel.layout.end = 200 * MIB),
        ("kernel.layout.ranges", |c| c.kernel.layout.ranges.clear()),
        ("kernel.layout.ranges", |c| {
            c.kernel.layout.ranges[0].range.start = 0
        }),
        ("kernel.layout.ranges", |c| {
            c.kernel.layout.ranges[0].range.len = u64::MAX - 4095
        }),
        ("kernel.layout.entry", |c| {
            c.kernel.layout.entry = KernelEntry::Linux64 { entry: 5 }
        }),
        ("kernel.layout.setup_header", |c| {
            c.kernel.layout.setup_header = Some(vec![0; 1000])
        }),
        ("initrd", |c| {
            c.initrd = Some(InitrdConfig {
                fd: FdSlot(2),
                len: 0,
            })
        }),
        ("initrd", |c| {
            c.initrd = Some(InitrdConfig {
                fd: FdSlot(2),
                len: 110 * MIB,
            })
        }),
        ("cmdline", |c| c.cmdline = "x".repeat(2048)),
        ("cmdline", |c| c.cmdline = "a\nb".into()),
        ("devices", |c| c.devices = vec![rng(); 16]),
    ];
    for (i, (field, change)) in cases.into_iter().enumerate() {
        let mut c = good();
        change(&mut c);
        assert_eq!(c.validate().unwrap_err().field, field, "case {i}");
    }
}

#[test]
fn the_limits_themselves_are_allowed() {
    let mut c = good();
    c.vcpus = 32;
    c.memory.bytes = 1 << 40;
    c.devices = vec![rng(); 15];
    c.cmdline = "x".repeat(cmdline_room(15));
    let valid = c.clone().validate().unwrap();
    assert_eq!(valid.cmdline.len(), 2047);
    c.cmdline.push('x');
    assert_eq!(c.validate().unwrap_err().field, "cmdline");
}

#[test]
fn only_a_disk_on_io_uring_widens_the_event_loop_s_filter() {
    let disk = |engine| {
        AnyDeviceSpec::Block(shoal_devices::virtio::block::BlockSpec {
            id: "d".into(),
            fd: FdSlot(2),
            engine,
            ..Default::default()
        })
    };
    let mut c = good();
    c.devices = vec![rng(), disk(EngineKind::Sync)];
    assert_eq!(c.event_loop_kind(), ThreadKind::EventLoop);
    c.devices.push(disk(EngineKind::IoUring));
    assert_eq!(c.event_loop_kind(), ThreadKind::EventLoopUring);
}

#[test]
fn a_device_has_a_queue_for_each_vcpu_at_most() {
    let field = |vcpus, queues| {
        let disk = shoal_devices::virtio::block::BlockSpec {
            queues,
            ..Default::default()
        };
        let mut c = good();
        c.vcpus = vcpus;
        c.devices = vec![rng(), AnyDeviceSpec::Block(disk)];
        c.validate().err().map(|e| e.field)
    };
    assert_eq!((field(1, 1), field(4, 4), field(4, 2)), (None, None, None));
    for (vcpus, queues) in [(1, 0), (1, 2), (4, 5), (32, 33)] {
        assert_eq!(field(vcpus, queues).as_deref(), Some("devices[1].queues"));
    }
}
