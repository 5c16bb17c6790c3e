//! Packets to a socket device whose host answers, and rings of every form.
#![no_main]

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use libfuzzer_sys::fuzz_target;
use shoal_devices::testing::{Bench, DATA, readable, sockets, writable};
use shoal_devices::virtio::vsock::broker::{BrokerRequest, send_reply};
use shoal_fuzz::Bytes;

/// A header whose fields are mostly plausible, so that connections come about.
fn packet(b: &mut Bytes<'_>) -> [u8; 44] {
    let mut h = [0; 44];
    let mut put = |at: usize, bytes: &[u8]| h[at..at + bytes.len()].copy_from_slice(bytes);
    let odd = b.u8();
    put(0, &(if odd & 1 == 0 { 3 } else { b.u64() }).to_le_bytes());
    put(8, &(if odd & 2 == 0 { 2 } else { b.u64() }).to_le_bytes());
    put(16, &u32::from(b.u8() % 4).to_le_bytes());
    put(
        20,
        &(if odd & 4 == 0 {
            u32::from(b.u8() % 4)
        } else {
            (1 << 30) + u32::from(b.u8() % 4)
        })
        .to_le_bytes(),
    );
    put(
        24,
        &(if odd & 8 == 0 { u32::from(b.u16()) } else { b.u32() }).to_le_bytes(),
    );
    put(28, &(if odd & 16 == 0 { 1 } else { b.u16() }).to_le_bytes());
    put(30, &u16::from(b.u8() % 9).to_le_bytes());
    put(32, &u32::from(b.u8()).to_le_bytes());
    put(
        36,
        &(if odd & 32 == 0 { 0x1_0000 } else { b.u32() }).to_le_bytes(),
    );
    put(40, &b.u32().to_le_bytes());
    h
}

/// Answers what the device asks; keeps the host's ends of the connections.
fn answer(broker: &mut UnixStream, hosts: &mut Vec<UnixStream>) {
    let mut message = [0; 8];
    while let Ok(8) = broker.read(&mut message) {
        let question = BrokerRequest::decode(&message).expect("a request");
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        ours.set_nonblocking(true).expect("a socket");
        send_reply(&*broker, question.cookie, Ok(theirs.as_fd())).expect("an answer");
        hosts.push(ours);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let (device, [listener, broker_listener]) = shoal_fuzz::vsock();
    let mut bench = Bench::new(device);
    let mut broker = sockets::connect(&broker_listener, libc::SOCK_SEQPACKET);
    broker.set_nonblocking(true).expect("a socket");
    bench.turn();
    let (mut hosts, mut b) = (Vec::new(), Bytes(bytes));
    for n in 0..200u64 {
        if b.is_empty() {
            break;
        }
        match b.u8() % 8 {
            0 => {
                let rx = &mut bench.queues[0];
                rx.add(&[writable(DATA + 0x10_0000, 44 + u32::from(b.u16() % 5000))]);
                bench.kick(0);
            }
            1 => {
                let mut host = sockets::connect(&listener, libc::SOCK_STREAM);
                host.set_nonblocking(true).expect("a socket");
                let _ = host.write(b"CONNECT 1\n");
                hosts.push(host);
            }
            2 if !hosts.is_empty() => {
                let at = usize::from(b.u8()) % hosts.len();
                let _ = hosts[at].write(b.take(300));
                let _ = hosts[at].read(&mut [0; 4096]);
            }
            3 if !hosts.is_empty() => drop(hosts.swap_remove(usize::from(b.u8()) % hosts.len())),
            4 => {
                let mut host = sockets::connect(&listener, libc::SOCK_STREAM);
                let _ = host.write(b.take(40));
            }
            _ => {
                let header = packet(&mut b);
                bench.write(DATA + n * 64, &header);
                let chain = [readable(DATA + n * 64, 44), readable(DATA, u32::from(b.u16()))];
                bench.queues[1].add(&chain);
                bench.kick(1);
            }
        }
        bench.turn();
        answer(&mut broker, &mut hosts);
        (0..3).for_each(|q| while bench.queues[q].used().is_some() {});
        if bench.needs_reset() {
            bench.deactivate();
            bench.device.reset();
            bench.activate();
        }
    }
    shoal_fuzz::drive_rings(&mut bench, b.0);
});
