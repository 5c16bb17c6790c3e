//! Kernel files and initial RAM disks as API users hand them over.
#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;

use libfuzzer_sys::fuzz_target;
use shoal_devices::spec::FdSlot;
use shoal_vmm::kernel::{load, load_initrd};
use shoal_vmm::protocol::{ConsoleConfig, KernelConfig, MemoryConfig, Pages, VmConfig};

fn file(bytes: &[u8]) -> File {
    let file = shoal_vmm::sys::memfd(c"fuzz", bytes.len() as u64).expect("a memfd");
    file.write_all_at(bytes, 0).expect("it has that size");
    file
}

fuzz_target!(|bytes: &[u8]| {
    let file = file(bytes);
    // The layout that a loader gives out is one that the VMM accepts, in a guest with all of low memory.
    if let Ok(kernel) = load(&file) {
        let config = VmConfig {
            guest_id: "fuzz".into(),
            kvm: FdSlot(0),
            vcpus: 1,
            memory: MemoryConfig { bytes: 4 << 30, pages: Pages::Host },
            kernel: KernelConfig { fd: FdSlot(1), layout: kernel.layout },
            initrd: None,
            cmdline: String::new(),
            console: ConsoleConfig::Null,
            devices: vec![],
            exit_record: None,
        };
        config.validate().expect("a loaded kernel has a valid layout");
    }
    if let Ok(initrd) = load_initrd(&file) {
        assert!(initrd.len > 0);
    }
});
