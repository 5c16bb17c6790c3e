/// Port of the ACPI sleep control register that `exit=poweroff` writes; equal to `shoal_vmm::layout`'s.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// What it writes there: sleep type 5 in bits 2 to 4, and SLP_EN, bit 5 (ACPI 6.4 §4.8.3.7).
pub const SLEEP_CONTROL_S5: u8 = (5 << 2) | 0x20;
/// Port of the boot timeline's marks, `mark=N`; equal to `shoal_vmm::layout`'s.
pub const MARK_PORT: u16 = 0xf8e;
/// Where the first of the virtio-mmio windows lies (guest-physical) that `garbage` writes to.
pub const MMIO_BASE: u64 = 0xd000_0000;
/// Size of one virtio-mmio window, in bytes.
pub const MMIO_WINDOW: u64 = 0x1000;
/// How many windows `garbage` writes to, whether there is a device or not.
pub const MMIO_WINDOWS: u64 = 32;
