//! What a hostile guest puts into rings.

use vm_memory::{Bytes, GuestAddress};

use super::{Bench, DATA, END, FakeQueue, INDIRECT, MmioBench, NEXT, RINGS, Random, SEAM, WRITE};
use crate::virtio::VirtioDevice;

fn address(r: &mut Random) -> u64 {
    match r.below(8) {
        0 => r.pick(&[
            0,
            END,
            END - 1,
            SEAM - 3,
            u64::MAX,
            u64::MAX - 7,
            1 << 63,
            0xfee0_0000,
        ]),
        1 => r.next(),
        // Over the rings themselves.
        2 => RINGS + r.below(0x2_0000),
        _ => DATA + r.below(END - DATA),
    }
}

fn length(r: &mut Random) -> u32 {
    match r.below(6) {
        0 => 0,
        1 => r.pick(&[u32::MAX, 1, 15, 16, 17, 0x8000_0000, 0x10_0000]),
        2 => r.next() as u32,
        3 => 512 * r.below(9) as u32,
        _ => r.below(4096) as u32,
    }
}

/// Fills the descriptors of a queue, and some indirect tables, with rubbish; publishes some heads.
pub fn rubbish(q: &mut FakeQueue, r: &mut Random) {
    let table = DATA + r.below(0x1000) * 16;
    for n in 0..q.size {
        let flags = match r.below(8) {
            0 => r.next() as u16,
            1 => INDIRECT,
            n => (n as u16) & (NEXT | WRITE),
        };
        let next = if r.below(4) == 0 {
            r.next() as u16
        } else {
            r.below(u64::from(q.size)) as u16
        };
        q.write_desc(q.desc, n, address(r), length(r), flags, next);
        q.write_desc(table, n, address(r), length(r), flags & !INDIRECT, next);
    }
    // Loops, and a table that is as long as can be.
    q.write_desc(q.desc, 0, DATA, 16, NEXT, 0);
    q.write_desc(q.desc, 1, table, 16 * u32::from(q.size), INDIRECT, 0);
    q.write_desc(q.desc, 2, DATA, 16 * 65535, INDIRECT, 0);
    q.write_desc(q.desc, 3, DATA, 16, NEXT, 4);
    // Types of block requests and operations of sockets among them, so that more than the first check is met.
    let mut header = [0; 64];
    header.fill_with(|| {
        if r.below(3) == 0 {
            r.next() as u8
        } else {
            r.below(14) as u8
        }
    });
    q.memory.write_slice(&header, GuestAddress(DATA)).unwrap();
    for _ in 0..r.below(u64::from(q.size)) {
        let head = if r.below(16) == 0 {
            r.next() as u16
        } else {
            r.below(u64::from(q.size)) as u16
        };
        q.publish(head);
    }
    if r.below(8) == 0 {
        let idx = r.next() as u16;
        q.memory.write_obj(idx, GuestAddress(q.avail + 2)).unwrap();
    }
}

/// Rounds of rubbish in every ring of a device. It must come to rest each time, and be usable after a reset.
pub fn rings(device: Box<dyn VirtioDevice>, seed: u64, rounds: usize) {
    let mut r = Random::new(seed);
    let mut bench = Bench::new(device);
    for _ in 0..rounds {
        for q in 0..bench.queues.len() {
            rubbish(&mut bench.queues[q], &mut r);
            bench.notify(q);
        }
        bench.turn();
        bench.deactivate();
        bench.activate();
    }
    bench.turn();
    assert!(!bench.needs_reset(), "fresh rings are enough to get going again");
}

/// Random accesses to a transport's registers, with rings that lie anywhere. It must answer afterwards.
pub fn registers(device: Box<dyn VirtioDevice>, seed: u64, rounds: usize) {
    let mut r = Random::new(seed);
    let kind = device.kind();
    let mut bench = MmioBench::new(device);
    for _ in 0..rounds {
        match r.below(64) {
            0 => bench.set(0x70, 0),
            1 => drop(bench.drive()),
            2 => {
                bench.set(0x70, 0);
                for mut q in bench.drive() {
                    rubbish(&mut q, &mut r);
                }
                (0..4).for_each(|q| bench.set(0x50, q));
            }
            n if n < 32 => {
                let offset = r.pick(&[
                    0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4,
                    0xac, 0xc0, 0x100, 0x108,
                ]);
                let wild = r.next() as u32;
                let value = r.pick(&[0, 1, 2, 3, 0xb, 0xf, 0x80, 256, u32::MAX, wild]);
                bench.set(offset, value);
            }
            _ => {
                let wild = r.next();
                let (mut data, len) = ([0; 16], r.below(17) as usize);
                let offset = r.pick(&[wild % 0x1200, wild, u64::MAX, 0xfff, 0x101]);
                bench.transport.read(offset, &mut data[..len]);
                bench.transport.write(offset, &data[..len]);
            }
        }
    }
    bench.set(0x70, 0);
    bench.drive();
    assert_eq!(bench.get(0x70), 0xf, "{kind:?} runs after a reset");
}
