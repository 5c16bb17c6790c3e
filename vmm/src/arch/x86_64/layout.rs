//! Where things lie in a guest's physical address space and on its I/O ports.
//!
//! ```text
//! 0x0000_0500 GDT             0x0000_6000 PVH start info       0x0000_9000 page tables (PML4, PDPT, PD)
//! 0x0000_7000 boot parameters 0x0002_0000 command line         0x0009_fc00 MP table (EBDA)
//! 0x000e_0000 RSDP and ACPI tables                             0x0010_0000 high memory: kernel, initrd at its end
//! 0xc000_0000 … 0xffff_ffff   no RAM: virtio-mmio at 0xd000_0000, IOAPIC, local APIC, KVM's own pages
//! 0x1_0000_0000 …             the rest of RAM
//! ```

/// Page size (bytes).
pub const PAGE: u64 = 4096;
/// Global descriptor table.
pub const GDT: u64 = 0x500;
/// PVH `hvm_start_info`, followed by its module list and memory map.
pub const PVH_INFO: u64 = 0x6000;
/// Linux boot parameters ("zero page"), one page.
pub const BOOT_PARAMS: u64 = 0x7000;
/// Page tables for the 64-bit entry: PML4, PDPT and one PD per GiB mapped.
pub const PAGE_TABLES: u64 = 0x9000;
/// Initial stack pointer of the 64-bit entry.
pub const BOOT_STACK: u64 = 0x8ff0;
/// The kernel's command line, zero-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// Largest command line, terminator included (bytes; x86 Linux's COMMAND_LINE_SIZE).
pub const CMDLINE_MAX: usize = 2048;
/// Extended BIOS data area: the MP table's place, end of low memory.
pub const EBDA: u64 = 0x9_fc00;
/// Root of the ACPI tables, inside the area that BIOSes keep them in.
pub const ACPI: u64 = 0xe_0000;
/// End of the area for ACPI tables.
pub const ACPI_END: u64 = 0x10_0000;
/// First byte of high memory.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// First byte of the gap below 4 GiB.
pub const GAP_START: u64 = 0xc000_0000;
/// First byte of RAM above the gap.
pub const GAP_END: u64 = 0x1_0000_0000;
/// Base of the virtio-mmio windows, one page each.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Distance of two virtio-mmio windows (bytes).
pub const VIRTIO_MMIO_STRIDE: u64 = PAGE;
/// KVM's identity map page for real mode on VMX.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// KVM's three TSS pages for real mode on VMX.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// IOAPIC registers.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Local APIC registers.
pub const LOCAL_APIC: u64 = 0xfee0_0000;

/// COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// COM1's interrupt.
pub const SERIAL_GSI: u32 = 4;
/// i8042 data and command ports.
pub const I8042_DATA: u16 = 0x60;
/// i8042 command port.
pub const I8042_COMMAND: u16 = 0x64;
/// ACPI sleep control register (8 bits, ACPI 6.5 §4.8.3.7): SLP_TYPx in bits 2 to 4, SLP_EN in bit 5.
pub const ACPI_SLEEP_CONTROL: u16 = 0x600;
/// ACPI sleep status register (8 bits).
pub const ACPI_SLEEP_STATUS: u16 = 0x601;
/// ACPI reset register (8 bits).
pub const ACPI_RESET: u16 = 0x602;
/// What is written to [`ACPI_RESET`] to reset.
pub const ACPI_RESET_VALUE: u8 = 1;
/// SLP_TYP of S5 (soft off).
pub const ACPI_S5: u8 = 5;
/// The generic event device's interrupt (the power button).
pub const GED_GSI: u32 = 9;
/// One byte written here by the guest is stamped into the timeline.
pub const MARK_PORT: u16 = 0xf8e;

/// Interrupts for virtio-mmio devices, in the order in which they are given out: what no legacy device uses, the ones
/// that a PIC can deliver first.
pub const VIRTIO_GSIS: [u32; 15] = [5, 6, 7, 10, 11, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];
