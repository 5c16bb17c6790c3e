//! The MP configuration table (Intel MultiProcessor Specification 1.4), for kernels without ACPI: processors, one ISA
//! bus, the IOAPIC, and interrupt n of the bus on its pin n.

use super::layout::{EBDA, IOAPIC, LOCAL_APIC};

/// Pins of KVM's IOAPIC.
const PINS: u8 = 24;
const APIC_VERSION: u8 = 0x14;
const ISA_BUS: u8 = 0;

/// Floating pointer and table as one block of bytes that belongs at [`EBDA`].
pub fn table(vcpus: u8) -> Vec<u8> {
    let ioapic_id = vcpus;
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..vcpus {
        // §4.3.1: enabled; the first is the boot processor. Signature: family 6; features: FPU and APIC.
        let flags = if id == 0 { 3 } else { 1 };
        add(&[
            0,
            id,
            APIC_VERSION,
            flags,
            0,
            6,
            0,
            0,
            1,
            2,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
        ]);
    }
    add(b"\x01\x00ISA   ");
    let [a, b, c, d] = (IOAPIC as u32).to_le_bytes();
    add(&[2, ioapic_id, APIC_VERSION, 1, a, b, c, d]);
    for pin in 0..PINS {
        // §4.3.4: a vectored interrupt, polarity and trigger as the bus has them.
        add(&[3, 0, 0, 0, ISA_BUS, pin, ioapic_id, pin]);
    }
    // §4.3.5: the PIC's line and NMI on every local APIC's pins 0 and 1.
    add(&[4, 3, 0, 0, ISA_BUS, 0, 0xff, 0]);
    add(&[4, 1, 0, 0, ISA_BUS, 0, 0xff, 1]);

    let mut block = floating_pointer(EBDA as u32 + 16);
    block.extend(header(&entries, count));
    block.extend(entries);
    block
}

fn floating_pointer(table: u32) -> Vec<u8> {
    let mut p = b"_MP_".to_vec();
    p.extend(table.to_le_bytes());
    p.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    p[10] = checksum(&p);
    p
}

fn header(entries: &[u8], count: u16) -> Vec<u8> {
    let mut h = b"PCMP".to_vec();
    h.extend((44 + entries.len() as u16).to_le_bytes());
    h.extend([4, 0]);
    h.extend(b"SHOAL   MICROVM     ");
    h.extend([0; 6]);
    h.extend(count.to_le_bytes());
    h.extend((LOCAL_APIC as u32).to_le_bytes());
    h.extend([0; 4]);
    h[7] = checksum(&h).wrapping_add(checksum(entries));
    h
}

/// What makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0_u8, |sum, b| sum.wrapping_add(*b))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_and_lengths_hold() {
        for vcpus in [1, 4, 32] {
            let t = table(vcpus);
            assert_eq!((&t[..4], checksum(&t[..16])), (&b"_MP_"[..], 0));
            let body = &t[16..];
            assert_eq!(usize::from(u16::from_le_bytes([body[4], body[5]])), body.len());
            assert_eq!((&body[..4], checksum(body)), (&b"PCMP"[..], 0));
            assert!(t.len() as u64 <= 0xa_0000 - EBDA);
        }
    }
}
