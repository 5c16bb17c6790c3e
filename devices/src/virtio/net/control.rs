//! The control queue (virtio 1.2 §5.1.6.5): how many pairs of queues the driver wants to use.

use vm_memory::GuestMemoryMmap;

use super::super::ring::{Buffers, Chain, copy_from, copy_to};

/// VIRTIO_NET_CTRL_MQ and its VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET (§5.1.6.5.5).
const CLASS_MQ: u8 = 4;
const PAIRS_SET: u8 = 0;
/// VIRTIO_NET_OK and VIRTIO_NET_ERR.
const OK: u8 = 0;
const ERR: u8 = 1;

/// Does one command. `set_pairs` is asked to use that many pairs, and says whether it does. Returns the number of bytes
/// written to the chain.
pub fn serve(
    memory: &GuestMemoryMmap,
    chain: Chain<'_>,
    buffers: &mut Buffers,
    set_pairs: impl FnOnce(u16) -> bool,
) -> u32 {
    let mut command = [0; 4];
    if buffers.collect(chain).is_err() || buffers.writable_len() == 0 {
        return 0;
    }
    let done = copy_from(memory, buffers.readable(), 0, &mut command)
        && match command {
            [CLASS_MQ, PAIRS_SET, low, high] => set_pairs(u16::from_le_bytes([low, high])),
            _ => false,
        };
    // The answer is the last byte, behind whatever a command has to tell.
    let at = buffers.writable_len() - 1;
    u32::from(copy_to(
        memory,
        buffers.writable(),
        at,
        &[if done { OK } else { ERR }],
    ))
}
