//! What a kernel finds in memory when it starts: command line, memory map, tables, and the structure that leads to them
//! (PVH start info, or Linux boot parameters).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use shoal_devices::GuestMemory;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError};

use super::layout::{ACPI, ACPI_END, BOOT_PARAMS, CMDLINE, CMDLINE_MAX, EBDA, HIGH_MEMORY, PVH_INFO};
use super::{acpi, mptable};
use crate::config::ValidConfig;
use crate::memory;
use crate::protocol::{KernelEntry, PhysRange};

const PVH_MAGIC: u32 = 0x336e_c578;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const E820_ACPI: u32 = 3;
/// "A loader without an identifier of its own" (boot protocol, type_of_loader).
const UNDEFINED_LOADER: u8 = 0xff;
/// Offset of the setup header in the boot parameters.
const SETUP_HEADER: usize = 0x1f1;

/// Writes everything.
///
/// # Errors
/// When guest memory cannot be written; with a valid configuration it can.
pub fn write(memory: &GuestMemory, valid: &ValidConfig) -> Result<(), GuestMemoryError> {
    let config = &valid.config;
    let mut cmdline = valid.cmdline.clone().into_bytes();
    cmdline.push(0);
    memory.write_slice(&cmdline, GuestAddress(CMDLINE))?;
    memory.write_slice(
        &acpi::tables(config.vcpus, config.devices.len()),
        GuestAddress(ACPI),
    )?;
    memory.write_slice(&mptable::table(config.vcpus), GuestAddress(EBDA))?;
    let initrd = valid.initrd_at.zip(config.initrd.as_ref().map(|i| i.len));
    let map = memory_map(config.memory.bytes);
    match config.kernel.layout.entry {
        KernelEntry::Pvh { .. } => write_pvh(memory, &map, initrd),
        KernelEntry::Linux64 { .. } => {
            write_boot_params(memory, &map, initrd, config.kernel.layout.setup_header.as_deref())
        }
    }
}

/// The memory map: (range, E820 type).
fn memory_map(bytes: u64) -> Vec<(PhysRange, u32)> {
    let range = |start, end| PhysRange {
        start,
        len: end - start,
    };
    let mut map = vec![
        (range(0, EBDA), E820_RAM),
        (range(EBDA, 0xa_0000), E820_RESERVED),
        (range(ACPI, ACPI_END), E820_ACPI),
    ];
    for r in memory::ranges(bytes) {
        let start = r.start.max(HIGH_MEMORY);
        map.push((range(start, r.start + r.len), E820_RAM));
    }
    map
}

fn write_pvh(
    memory: &GuestMemory,
    map: &[(PhysRange, u32)],
    initrd: Option<(u64, u64)>,
) -> Result<(), GuestMemoryError> {
    let modules_at = PVH_INFO + size_of::<hvm_start_info>() as u64;
    let map_at = modules_at + size_of::<hvm_modlist_entry>() as u64;
    let info = hvm_start_info {
        magic: PVH_MAGIC,
        version: 1,
        nr_modules: initrd.is_some().into(),
        modlist_paddr: if initrd.is_some() { modules_at } else { 0 },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: ACPI,
        memmap_paddr: map_at,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let (paddr, size) = initrd.unwrap_or_default();
    let module = hvm_modlist_entry {
        paddr,
        size,
        ..Default::default()
    };
    let mut bytes = [info.as_slice(), module.as_slice()].concat();
    for (r, kind) in map {
        let entry = hvm_memmap_table_entry {
            addr: r.start,
            size: r.len,
            type_: *kind,
            reserved: 0,
        };
        bytes.extend_from_slice(entry.as_slice());
    }
    memory.write_slice(&bytes, GuestAddress(PVH_INFO))
}

fn write_boot_params(
    memory: &GuestMemory,
    map: &[(PhysRange, u32)],
    initrd: Option<(u64, u64)>,
    setup_header: Option<&[u8]>,
) -> Result<(), GuestMemoryError> {
    let mut params = boot_params::default();
    match setup_header {
        // A valid configuration has none longer than its place.
        Some(header) => params.as_mut_slice()[SETUP_HEADER..][..header.len()].copy_from_slice(header),
        None => {
            params.hdr.boot_flag = 0xaa55;
            params.hdr.header = u32::from_le_bytes(*b"HdrS");
            params.hdr.version = 0x20f;
            params.hdr.kernel_alignment = 0x100_0000;
        }
    }
    params.hdr.type_of_loader = UNDEFINED_LOADER;
    params.hdr.loadflags |= 1;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.hdr.cmdline_size = CMDLINE_MAX as u32;
    let (at, len) = initrd.unwrap_or_default();
    // Placed below 2 GiB and at most 2 GiB long.
    (params.hdr.ramdisk_image, params.hdr.ramdisk_size) = (at as u32, len as u32);
    params.acpi_rsdp_addr = ACPI;
    for (entry, (r, kind)) in params.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry {
            addr: r.start,
            size: r.len,
            r#type: *kind,
        };
    }
    params.e820_entries = map.len() as u8;
    memory.write_slice(params.as_slice(), GuestAddress(BOOT_PARAMS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_leaves_the_gap_below_4_gib() {
        let ram = |bytes| {
            memory_map(bytes)
                .into_iter()
                .filter(|(_, kind)| *kind == E820_RAM)
                .map(|(r, _)| (r.start, r.start + r.len))
                .collect::<Vec<_>>()
        };
        assert_eq!(ram(16 << 20), [(0, EBDA), (HIGH_MEMORY, 16 << 20)]);
        assert_eq!(ram(3 << 30), [(0, EBDA), (HIGH_MEMORY, 3 << 30)]);
        assert_eq!(
            ram(300 << 30),
            [(0, EBDA), (HIGH_MEMORY, 3 << 30), (4 << 30, 301 << 30)]
        );
    }
}
