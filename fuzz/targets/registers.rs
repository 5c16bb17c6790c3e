//! Register accesses and rings, in any order, on any device.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use shoal_devices::testing::{FakeQueue, LoopThread, MmioBench, memory};
use shoal_devices::virtio::mmio::MmioTransport;
use shoal_fuzz::{Bytes, block, fill_ring, net, rng, vsock};

static EVENT_LOOP: OnceLock<LoopThread> = OnceLock::new();

fuzz_target!(|bytes: &[u8]| {
    let mut b = Bytes(bytes);
    let (wire, listeners);
    let device = match b.u8() % 4 {
        0 => rng(),
        1 => block(),
        2 => {
            let made = net();
            wire = made.1;
            let _ = &wire;
            made.0
        }
        _ => {
            let made = vsock();
            listeners = made.1;
            let _ = &listeners;
            made.0
        }
    };
    let event_loop = EVENT_LOOP.get_or_init(LoopThread::new);
    let memory = memory();
    let mut t = MmioTransport::new(MmioBench::parts(device, memory.clone(), event_loop)).expect("eventfds");
    while !b.is_empty() {
        match b.u8() % 8 {
            0 => t.write(b.u64(), b.take(9)),
            1 => {
                let mut data = [0; 9];
                let len = usize::from(b.u8() % 10);
                t.read(b.u64(), &mut data[..len]);
            }
            2 => {
                let index = u16::from(b.u8() % 3);
                let mut q = FakeQueue::new(memory.clone(), index, 256);
                fill_ring(&mut q, &mut b);
                t.write(0x50, &u32::from(index).to_le_bytes());
            }
            3 => {
                // A driver that does everything right up to here.
                for (offset, value) in [(0x70, 0u32), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 0xb)] {
                    t.write(offset, &value.to_le_bytes());
                }
                for index in 0..3u16 {
                    let q = FakeQueue::new(memory.clone(), index, 256);
                    t.write(0x30, &u32::from(index).to_le_bytes());
                    for (offset, address) in [(0x80, q.desc), (0x90, q.avail), (0xa0, q.used)] {
                        t.write(offset, &(address as u32).to_le_bytes());
                    }
                    t.write(0x44, &1u32.to_le_bytes());
                }
                t.write(0x70, &0xfu32.to_le_bytes());
            }
            4 => {
                t.pause();
                t.resume();
            }
            _ => {
                let offset = u64::from(b.u8()) * 4;
                t.write(offset, &b.u32().to_le_bytes());
            }
        }
    }
    t.write(0x70, &0u32.to_le_bytes());
    assert_eq!(t.status(), 0);
});
