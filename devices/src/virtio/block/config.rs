//! The configuration space of a block device (`struct virtio_blk_config`, virtio 1.2 §5.2.4).

use super::super::config_bytes;
use super::job::{MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS};
use super::request::MAX_DATA_SEGMENTS;
use super::{QUEUE_SIZE, SECTOR};

const _: () = assert!(MAX_DATA_SEGMENTS + 2 <= QUEUE_SIZE as u32);

/// Reads `data.len()` bytes at `offset`; what lies outside is left as it is.
pub fn read(sectors: u64, queues: u16, offset: u64, data: &mut [u8]) {
    let mut c = [0u8; 60];
    let mut put = |at: usize, bytes: &[u8]| c[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &sectors.to_le_bytes());
    put(12, &MAX_DATA_SEGMENTS.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    put(34, &queues.to_le_bytes());
    put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
    put(40, &MAX_DISCARD_SEGMENTS.to_le_bytes());
    put(44, &1u32.to_le_bytes());
    put(48, &MAX_DISCARD_SECTORS.to_le_bytes());
    put(52, &MAX_DISCARD_SEGMENTS.to_le_bytes());
    // A zeroed range may be unmapped.
    put(56, &[1]);
    config_bytes(&c, offset, data);
}
