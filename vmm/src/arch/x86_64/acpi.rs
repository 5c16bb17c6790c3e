//! ACPI tables (ACPI 6.5): hardware-reduced, so that the guest programs neither a PM timer nor a PIC.
//!
//! RSDP → XSDT → FADT (→ DSDT), MADT. The DSDT names the serial port, the virtio-mmio devices (`LNRO0005`, the
//! identifier that Linux and QEMU agreed on), a power button and the generic event device that presses it.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, ONE, Package, Path,
    ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::layout::{
    ACPI, ACPI_END, ACPI_RESET, ACPI_RESET_VALUE, ACPI_S5, ACPI_SLEEP_CONTROL, ACPI_SLEEP_STATUS, GED_GSI,
    IOAPIC, LOCAL_APIC, SERIAL_GSI, SERIAL_PORT, VIRTIO_GSIS, VIRTIO_MMIO, VIRTIO_MMIO_STRIDE,
};

const OEM: [u8; 6] = *b"SHOAL ";
const TABLE: [u8; 8] = *b"SHOALVM ";
const REVISION: u32 = 1;
/// FADT boot flags (ACPI 6.5 table 5.11): no VGA, no CMOS clock; bit 1 (8042) clear, so that no driver probes it.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;

/// The tables as one block of bytes that belongs at [`ACPI`]; it begins with the RSDP.
pub fn tables(vcpus: u8, devices: usize) -> Vec<u8> {
    // The RSDP comes first, but points to the XSDT, which comes last.
    let mut block = vec![0; Rsdp::len()];
    let dsdt = append(&mut block, &dsdt(devices));
    let fadt = append(&mut block, &fadt(dsdt).finalize());
    let madt = append(&mut block, &madt(vcpus));
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = append(&mut block, &xsdt);
    let mut rsdp = Vec::with_capacity(Rsdp::len());
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    block[..rsdp.len()].copy_from_slice(&rsdp);
    debug_assert!(ACPI + block.len() as u64 <= ACPI_END);
    block
}

/// Appends a table, aligned to 16 bytes, and returns its guest-physical address.
fn append(block: &mut Vec<u8>, table: &dyn Aml) -> u64 {
    block.resize(block.len().next_multiple_of(16), 0);
    let at = ACPI + block.len() as u64;
    table.to_aml_bytes(block);
    at
}

fn fadt(dsdt: u64) -> FADTBuilder {
    let register = |port: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            u64::from(port),
        )
    };
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = register(ACPI_RESET);
    fadt.reset_value = ACPI_RESET_VALUE;
    fadt.sleep_control_reg = register(ACPI_SLEEP_CONTROL);
    fadt.sleep_status_reg = register(ACPI_SLEEP_STATUS);
    fadt
}

fn madt(vcpus: u8) -> MADT {
    let mut madt = MADT::new(
        OEM,
        TABLE,
        REVISION,
        LocalInterruptController::Address(LOCAL_APIC as u32),
    );
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(vcpus, IOAPIC as u32, 0));
    madt
}

fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn dsdt(devices: usize) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, REVISION);
    Name::new("_S5_".into(), &Package::new(vec![&ACPI_S5, &0_u8, &0_u8, &0_u8])).to_aml_bytes(&mut dsdt);
    serial().to_aml_bytes(&mut dsdt);
    power_button(&mut dsdt);
    for index in 0..devices {
        virtio(index, &mut dsdt);
    }
    dsdt
}

/// A device below `\_SB`.
fn in_scope(device: Device<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    Scope::new("_SB_".into(), vec![&device]).to_aml_bytes(&mut bytes);
    bytes
}

/// AML that was generated already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn serial() -> Raw {
    Raw(in_scope(Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0_u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(SERIAL_PORT, SERIAL_PORT, 1, 8), &edge(SERIAL_GSI)]),
            ),
        ],
    )))
}

/// The generic event device (ACPI 6.5 §5.6.9) has one interrupt, so its event method needs no look at which.
fn power_button(dsdt: &mut Sdt) {
    let button = in_scope(Device::new(
        "PWRB".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
            &Name::new("_UID".into(), &0_u8),
        ],
    ));
    let press = Notify::new(&Path::new("\\_SB_.PWRB"), &0x80_u8).to_raw();
    let events = in_scope(Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &0_u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&edge(GED_GSI)])),
            &Method::new("_EVT".into(), 1, true, vec![&press]),
        ],
    ));
    dsdt.append_slice(&button);
    dsdt.append_slice(&events);
}

fn virtio(index: usize, dsdt: &mut Sdt) {
    let base = VIRTIO_MMIO + index as u64 * VIRTIO_MMIO_STRIDE;
    let name = format!("V{index:03}");
    dsdt.append_slice(&in_scope(Device::new(
        name.as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &(index as u8)),
            &Name::new("_CCA".into(), &ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, base as u32, VIRTIO_MMIO_STRIDE as u32),
                    &edge(VIRTIO_GSIS[index]),
                ]),
            ),
        ],
    )));
}

trait ToRaw {
    fn to_raw(&self) -> Raw;
}

impl<T: Aml> ToRaw for T {
    fn to_raw(&self) -> Raw {
        let mut bytes = Vec::new();
        self.to_aml_bytes(&mut bytes);
        Raw(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |a, b| a.wrapping_add(*b))
    }

    #[test]
    fn every_table_has_a_valid_checksum_and_is_reachable() {
        let block = tables(4, 15);
        assert_eq!(&block[..8], b"RSD PTR ");
        assert_eq!((sum(&block[..20]), sum(&block[..36])), (0, 0));
        let at = |address: u64| {
            let from = &block[(address - ACPI) as usize..];
            let len = u32::from_le_bytes(from[4..8].try_into().unwrap()) as usize;
            assert_eq!(sum(&from[..len]), 0, "{:?}", &from[..4]);
            &from[..len]
        };
        let xsdt = at(u64::from_le_bytes(block[24..32].try_into().unwrap()));
        let entry = |i: usize| u64::from_le_bytes(xsdt[36 + i * 8..44 + i * 8].try_into().unwrap());
        let (fadt, madt) = (at(entry(0)), at(entry(1)));
        assert_eq!(
            (&xsdt[..4], &fadt[..4], &madt[..4]),
            (&b"XSDT"[..], &b"FACP"[..], &b"APIC"[..])
        );
        let dsdt = at(u64::from_le_bytes(fadt[140..148].try_into().unwrap()));
        assert_eq!(dsdt.windows(8).filter(|w| w == b"LNRO0005").count(), 15);
        assert_eq!(madt.len(), 44 + 4 * 8 + 12);
    }

    #[test]
    fn the_largest_set_fits_its_area() {
        assert!(tables(32, VIRTIO_GSIS.len()).len() as u64 <= ACPI_END - ACPI);
    }
}
