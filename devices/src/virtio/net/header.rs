//! The header that every packet begins with (`struct virtio_net_hdr_v1`, virtio 1.2 §5.1.6.1; the TAP's is the same).

use super::{HEADER, feature};

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_UDP: u8 = 3;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// Where the number of buffers stands.
const NUM_BUFFERS: u64 = 10;

/// Number of buffers as it is written to the header, and where.
pub fn num_buffers(n: u16) -> (u64, [u8; 2]) {
    (NUM_BUFFERS, n.to_le_bytes())
}

/// A header from the guest as it goes to the TAP; `None` when the guest asks for what was not negotiated. The fields
/// that are left to the kernel are checked by it against the packet.
pub fn check(header: &[u8; HEADER], features: u64) -> Option<[u8; HEADER]> {
    let [flags, gso, ..] = *header;
    let needed = match gso & !GSO_ECN {
        GSO_NONE => 0,
        GSO_TCPV4 => feature::HOST_TSO4,
        GSO_TCPV6 => feature::HOST_TSO6,
        GSO_UDP => feature::HOST_UFO,
        _ => return None,
    };
    let ecn = if gso & GSO_ECN == 0 {
        0
    } else if gso == GSO_ECN {
        // ECN is a property of segmented TCP.
        return None;
    } else {
        feature::HOST_ECN
    };
    let csum = if flags & NEEDS_CSUM != 0 { feature::CSUM } else { 0 };
    let needed = needed | ecn | csum;
    if features & needed != needed {
        return None;
    }
    let mut checked = *header;
    // The other flags are the device's to set, and so is the number of buffers.
    checked[0] = flags & NEEDS_CSUM;
    checked[NUM_BUFFERS as usize..].fill(0);
    Some(checked)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(flags: u8, gso: u8) -> [u8; HEADER] {
        let mut h = [7; HEADER];
        (h[0], h[1]) = (flags, gso);
        h
    }

    #[test]
    fn only_what_was_negotiated_passes() {
        use feature::*;
        for (flags, gso, needed) in [
            (NEEDS_CSUM, GSO_NONE, CSUM),
            (NEEDS_CSUM, GSO_TCPV4, CSUM | HOST_TSO4),
            (NEEDS_CSUM, GSO_TCPV6, CSUM | HOST_TSO6),
            (NEEDS_CSUM, GSO_TCPV4 | GSO_ECN, CSUM | HOST_TSO4 | HOST_ECN),
            (0, GSO_UDP, HOST_UFO),
        ] {
            assert!(check(&header(flags, gso), needed).is_some());
            assert!(check(&header(flags, gso), !needed).is_none());
        }
        assert!(check(&header(0, 0), 0).is_some());
        for gso in [2, 5, 6, 0x7f, GSO_ECN] {
            assert!(check(&header(0, gso), u64::MAX).is_none(), "{gso}");
        }
    }

    #[test]
    fn what_is_the_devices_is_cleared() {
        let h = check(&header(0xff, 0), u64::MAX).unwrap();
        assert_eq!(
            (h[0], &h[2..10], &h[10..]),
            (NEEDS_CSUM, &[7; 8][..], &[0, 0][..])
        );
    }
}
