//! The device over a packet socket, which tells one packet from the next as a TAP does.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use super::*;
use crate::testing::{Bench, DATA, END, readable, sockets, writable};

const RX: u64 = DATA + 0x10_0000;
const TX: u64 = DATA;
const ETHERNET: [u8; 14] = [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];

pub fn spec() -> NetSpec {
    NetSpec {
        fds: vec![FdSlot(0)],
        mac: [2, 0, 0, 0, 0, 1],
        mtu: Some(1400),
        ..NetSpec::default()
    }
}

struct Wire {
    b: Bench,
    /// The far end.
    far: UnixStream,
}

impl Wire {
    fn new(features: impl FnOnce(u64) -> u64) -> Self {
        Self::of(&spec(), &mut BuildEnv::new(Vec::new()), features)
    }

    fn of(spec: &NetSpec, env: &mut BuildEnv, features: impl FnOnce(u64) -> u64) -> Self {
        let listener = sockets::listener(libc::SOCK_SEQPACKET);
        let far = sockets::connect(&listener, libc::SOCK_SEQPACKET);
        let near = std::os::unix::net::UnixListener::from(listener)
            .accept()
            .unwrap()
            .0;
        far.set_nonblocking(true).unwrap();
        let device = spec.over_sockets(vec![near.into()], env, None).unwrap();
        let features = features(device.features());
        let mut b = Bench::with_features(device, features);
        b.turn();
        Self { b, far }
    }

    /// A packet as it comes from the wire: a header and `len` bytes.
    fn packet(len: usize) -> Vec<u8> {
        let mut p = vec![0; HEADER];
        p.extend((0..len).map(|n| (n % 251) as u8));
        p
    }

    fn arrive(&mut self, len: usize) {
        self.far.write_all(&Self::packet(len)).unwrap();
        self.b.turn();
    }

    fn give(&mut self, n: u64, at: u64, len: u32) {
        for i in 0..n {
            self.b.queues[0].add(&[writable(at + i * u64::from(len), len)]);
        }
        self.b.kick(0);
    }

    fn send(&mut self, header: [u8; HEADER], data: &[u8]) {
        self.b.write(TX, &header);
        self.b.write(TX + 0x100, data);
        self.b.queues[1].add(&[
            readable(TX, HEADER as u32),
            readable(TX + 0x100, data.len() as u32),
        ]);
        self.b.kick(1);
    }

    fn sent(&mut self) -> Option<Vec<u8>> {
        let mut v = vec![0; 70_000];
        match self.far.read(&mut v) {
            Ok(n) => v.truncate(n),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return None,
            Err(e) => panic!("{e}"),
        }
        Some(v)
    }

    fn used(&mut self, queue: usize) -> Option<(u32, u32)> {
        self.b.queues[queue].used()
    }
}

fn num_buffers(b: &Bench, at: u64) -> u16 {
    u16::from_le_bytes(b.read(at + 10, 2).try_into().unwrap())
}

#[test]
fn a_packet_goes_out_as_it_lies_in_memory() {
    let mut w = Wire::new(|f| f);
    let mut data = ETHERNET.to_vec();
    data.extend([9; 500]);
    w.send([0; HEADER], &data);
    assert_eq!(w.sent().unwrap()[HEADER..], data);
    assert_eq!(w.used(1), Some((0, 0)));
    // In pieces, the first of which cuts the header.
    let chain: Vec<_> = (0..26).map(|n| readable(TX + 0x100 - 12 + n, 1)).collect();
    w.b.write(TX + 0x100 - 12, &[0; 12]);
    w.b.queues[1].add(&chain);
    w.b.kick(1);
    assert_eq!(w.sent().unwrap()[HEADER..], ETHERNET);
}

#[test]
fn bad_packets_are_dropped_and_given_back() {
    let mut w = Wire::new(|f| f & !feature::HOST_TSO6);
    let mut tso6 = [0; HEADER];
    tso6[1] = 4;
    w.send(tso6, &ETHERNET);
    w.send([0; HEADER], &ETHERNET[..13]);
    w.b.queues[1].add(&[readable(TX, 11)]);
    w.b.queues[1].add(&[readable(END, 100)]);
    w.b.queues[1].add(&[readable(TX, 100), readable(END - 10, 100)]);
    w.b.queues[1].add(&[readable(TX, 100), readable(DATA, 100_000)]);
    w.b.queues[1].add(&[writable(TX, 100)]);
    w.b.kick(1);
    let back = std::iter::from_fn(|| w.b.queues[1].used()).count();
    assert_eq!(back, 7);
    assert_eq!(w.sent(), None);
    assert!(!w.b.needs_reset());
}

#[test]
fn a_full_wire_holds_packets_back_without_spinning() {
    let mut w = Wire::new(|f| f);
    for n in 0..250u8 {
        let at = DATA + 0x1000 + u64::from(n) * 0x1000;
        w.b.write(at, &[0; HEADER]);
        w.b.write(at + 12, &ETHERNET);
        w.b.write(at + 26, &[n; 2000]);
        w.b.queues[1].add(&[readable(at, 2026)]);
    }
    w.b.kick(1);
    let mut got = Vec::new();
    loop {
        match w.sent() {
            Some(p) => got.push(p[26]),
            None if got.len() == 250 => break,
            None => assert!(w.b.turn_once(1000), "the rest is sent once there is room"),
        }
    }
    assert_eq!(got, (0..250).collect::<Vec<u8>>());
}

#[test]
fn a_packet_fills_one_buffer_or_several() {
    let mut w = Wire::new(|f| f);
    w.give(100, RX, 1000);
    w.arrive(500);
    assert_eq!(w.used(0), Some((0, 512)));
    assert_eq!(num_buffers(&w.b, RX), 1);
    assert_eq!(w.b.read(RX + 12, 500), Wire::packet(500)[12..]);
    w.arrive(2500);
    assert_eq!(
        [w.used(0), w.used(0), w.used(0)],
        [Some((1, 1000)), Some((2, 1000)), Some((3, 512))]
    );
    assert_eq!(num_buffers(&w.b, RX + 1000), 3);
    assert_eq!(w.b.read(RX + 1012, 2500), Wire::packet(2500)[12..]);
    // Chains that were taken ahead are put back and used again.
    w.b.pause_and_resume();
    w.arrive(988);
    assert_eq!(w.used(0), Some((4, 1000)));
    assert_eq!(w.b.interrupts(), 3);
}

#[test]
fn a_large_packet_waits_for_the_buffers_that_it_takes() {
    let mut w = Wire::new(|f| f);
    w.give(3, RX, 1000);
    w.arrive(5000);
    assert_eq!(w.used(0), None);
    w.give(1, RX + 3000, 1000);
    assert_eq!(w.used(0), None);
    w.arrive(10);
    w.give(6, RX + 4000, 1000);
    let lens: Vec<_> = std::iter::from_fn(|| w.used(0)).map(|(_, len)| len).collect();
    assert_eq!(lens, [1000, 1000, 1000, 1000, 1000, 12, 22]);
    assert_eq!(w.b.read(RX + 12, 5000), Wire::packet(5000)[12..]);
}

#[test]
fn a_packet_that_the_whole_ring_cannot_hold_is_dropped() {
    let mut w = Wire::new(|f| f);
    w.give(256, RX, 100);
    w.arrive(60_000);
    w.arrive(50);
    assert_eq!(w.used(0), Some((0, 62)));
    assert_eq!(w.used(0), None);
}

#[test]
fn without_mergeable_buffers_a_packet_has_one_chain() {
    let mut w = Wire::new(|f| f & !feature::MRG_RXBUF);
    w.b.queues[0].add(&[writable(RX, 12), writable(RX + 100, 1514)]);
    w.give(1, RX + 0x1000, 500);
    w.give(1, RX + 0x2000, 2000);
    w.arrive(1500);
    assert_eq!(w.used(0), Some((0, 1512)));
    assert_eq!(num_buffers(&w.b, RX), 1);
    w.arrive(600);
    assert_eq!(w.used(0), None, "too long for the chain, dropped");
    w.arrive(400);
    assert_eq!(w.used(0), Some((2, 412)));
}

#[test]
fn useless_buffers_are_given_back_empty() {
    let mut w = Wire::new(|f| f);
    w.b.queues[0].add(&[writable(RX, 11)]);
    w.b.queues[0].add(&[readable(RX, 2000)]);
    w.b.queues[0].add(&[writable(END - 100, 2000)]);
    w.b.queues[0].add(&[writable(u64::MAX - 100, 200)]);
    w.b.queues[0].add(&[writable(RX, 2000)]);
    w.b.queues[0].add(&[writable(END, 2000)]);
    w.arrive(100);
    w.b.kick(0);
    for head in 0..4 {
        assert_eq!(w.used(0), Some((head, 0)));
    }
    assert_eq!(w.used(0), Some((4, 112)));
}

#[test]
fn packets_wait_on_the_wire_while_there_are_no_buffers() {
    let mut w = Wire::new(|f| f);
    (0..20).for_each(|_| w.arrive(100));
    assert!(!w.b.turn_once(0), "nothing is polled");
    w.give(20, RX, 2000);
    let back = std::iter::from_fn(|| w.b.queues[0].used())
        .filter(|(_, len)| *len == 112)
        .count();
    assert_eq!(back, 20);
}

#[test]
fn a_lost_tap_is_a_pulled_cable() {
    let mut w = Wire::new(|f| f);
    let status = |b: &Bench| {
        let mut s = [0; 2];
        b.device.read_config(6, &mut s);
        s[0]
    };
    assert_eq!(status(&w.b), 1);
    w.give(2, RX, 2000);
    let (other, _) = UnixStream::pair().unwrap();
    drop(std::mem::replace(&mut w.far, other));
    w.b.turn();
    assert_eq!(status(&w.b), 0);
    assert_eq!(w.b.interrupt.config.load(Ordering::SeqCst), 1);
    w.send([0; HEADER], &ETHERNET);
    assert_eq!(w.used(1), Some((0, 0)), "dropped");
    assert!(!w.b.needs_reset());
}

#[test]
fn configuration_space_has_address_status_and_mtu() {
    let w = Wire::new(|f| f);
    let mut c = [0xee; 14];
    w.b.device.read_config(0, &mut c);
    assert_eq!(c, [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0x78, 5, 0xee, 0xee]);
}

#[test]
fn wrong_addresses_mtus_and_descriptors_are_refused() {
    let refuse = |s: NetSpec| {
        let fd = tempfile::tempfile().unwrap().into();
        s.build(&mut BuildEnv::new(vec![fd]), None)
            .err()
            .unwrap()
            .to_string()
    };
    assert!(
        refuse(NetSpec {
            mac: [0; 6],
            ..spec()
        })
        .contains("00:00:00:00:00:00 is no unicast")
    );
    assert!(
        refuse(NetSpec {
            mac: [1, 2, 3, 4, 5, 6],
            ..spec()
        })
        .contains("no unicast")
    );
    assert!(
        refuse(NetSpec {
            mtu: Some(67),
            ..spec()
        })
        .contains("an MTU of 67")
    );
    assert!(refuse(spec()).contains("the descriptor is no TAP"));
}

#[test]
fn offloads_follow_from_features() {
    use feature::*;
    assert_eq!(offloads(u64::MAX), 31);
    assert_eq!(offloads(!GUEST_CSUM), 0);
    assert_eq!(offloads(GUEST_CSUM | GUEST_ECN), 1);
    assert_eq!(offloads(GUEST_CSUM | GUEST_TSO6 | GUEST_ECN), 13);
}

/// Two packets, and hardly any more while the test runs.
fn two_packets() -> Limits {
    Limits {
        operations: Some(crate::limit::Rate {
            per_second: 1,
            burst: 2,
        }),
        ..Limits::default()
    }
}

#[test]
fn each_direction_keeps_its_own_limit_and_loses_nothing() {
    let limited = NetSpec {
        tx_limits: two_packets(),
        ..spec()
    };
    let mut env = BuildEnv::new(Vec::new());
    let board = env.limits();
    let mut w = Wire::of(&limited, &mut env, |f| f);
    let mut data = ETHERNET.to_vec();
    for n in 0..6 {
        data.push(n);
        w.send([0; HEADER], &data);
    }
    assert_eq!(std::iter::from_fn(|| w.used(1)).count(), 2);
    assert!(
        !w.b.turn_once(0),
        "what is held back does not keep the loop awake"
    );
    // The other direction is free.
    w.give(8, RX, 2048);
    (0..8).for_each(|_| w.arrive(100));
    assert_eq!(std::iter::from_fn(|| w.used(0)).count(), 8);

    let (rx, tx) = (two_packets(), Limits::default());
    w.b.set_limits(&board, DeviceLimits::Net { rx, tx });
    w.b.turn();
    assert_eq!(std::iter::from_fn(|| w.used(1)).count(), 4);
    // All lie in the same place, so the last one's bytes were sent thrice or more.
    let sent: Vec<_> = std::iter::from_fn(|| w.sent()).collect();
    let lengths: Vec<_> = sent.iter().map(|p| p.len() - HEADER - ETHERNET.len()).collect();
    assert_eq!(lengths, [1, 2, 3, 4, 5, 6]);
    w.give(8, RX, 2048);
    (0..5).for_each(|n| w.arrive(100 + n));
    assert_eq!(std::iter::from_fn(|| w.used(0)).count(), 2);
    assert!(
        !w.b.turn_once(0),
        "what waits in the TAP does not keep the loop awake"
    );
    w.b.set_limits(
        &board,
        DeviceLimits::Net {
            rx: Limits::default(),
            tx,
        },
    );
    w.b.turn();
    let rest: Vec<_> = std::iter::from_fn(|| w.used(0))
        .map(|(_, len)| len as usize - HEADER)
        .collect();
    assert_eq!(rest, [102, 103, 104]);
}

#[test]
fn a_limited_packet_goes_when_its_time_has_come() {
    let limited = NetSpec {
        tx_limits: Limits {
            bandwidth: Some(crate::limit::Rate {
                per_second: 100_000,
                burst: 14,
            }),
            ..Limits::default()
        },
        ..spec()
    };
    let mut w = Wire::of(&limited, &mut BuildEnv::new(Vec::new()), |f| f);
    let mut data = ETHERNET.to_vec();
    data.extend([1; 1000]);
    let start = std::time::Instant::now();
    (0..3).for_each(|_| w.send([0; HEADER], &data));
    for _ in 0..3 {
        w.b.until(|b| b.queues[1].used());
    }
    // Each but the first waits for what the one before owes: 1,001 bytes.
    assert!(start.elapsed().as_micros() >= 2 * 10_010);
    assert_eq!(std::iter::from_fn(|| w.sent()).count(), 3);
}

/// A device with several pairs of queues, and the far ends of its wires.
struct Wires {
    b: Bench,
    far: Vec<UnixStream>,
}

const CONTROL: u64 = DATA + 0x8_0000;

impl Wires {
    fn new(pairs: usize, saved: Option<NetState>, features: impl FnOnce(u64) -> u64) -> Self {
        let (mut near, mut far) = (Vec::new(), Vec::new());
        for _ in 0..pairs {
            let listener = sockets::listener(libc::SOCK_SEQPACKET);
            far.push(sockets::connect(&listener, libc::SOCK_SEQPACKET));
            let listener = std::os::unix::net::UnixListener::from(listener);
            near.push(listener.accept().unwrap().0.into());
        }
        far.iter().for_each(|f| f.set_nonblocking(true).unwrap());
        let mut env = BuildEnv::new(Vec::new());
        let device = spec().over_sockets(near, &mut env, saved).unwrap();
        let features = features(device.features());
        let mut b = Bench::with_features(device, features);
        b.turn();
        Self { b, far }
    }

    /// Asks for `pairs` in queue `queue`; returns the answer.
    fn set_pairs(&mut self, queue: usize, pairs: u16) -> u8 {
        let mut command = vec![4, 0];
        command.extend(pairs.to_le_bytes());
        self.command(queue, &command)
    }

    fn command(&mut self, queue: usize, command: &[u8]) -> u8 {
        self.b.write(CONTROL, command);
        self.b.write(CONTROL + 0x100, &[0xff]);
        let (head, ack) = (&command[..2.min(command.len())], writable(CONTROL + 0x100, 1));
        // As Linux does: class and command, what belongs to it, the answer.
        let rest = readable(CONTROL + head.len() as u64, (command.len() - head.len()) as u32);
        self.b.queues[queue].add(&[readable(CONTROL, head.len() as u32), rest, ack]);
        self.b.kick(queue);
        assert_eq!(self.b.queues[queue].used().map(|(_, len)| len), Some(1));
        self.b.read(CONTROL + 0x100, 1)[0]
    }

    /// Which pairs carry packets, to the guest and from it.
    fn alive(&mut self) -> Vec<(bool, bool)> {
        let packet = Wire::packet(60);
        (0..self.far.len())
            .map(|at| {
                let (rx, tx) = (2 * at, 2 * at + 1);
                self.b.queues[rx].add(&[writable(RX + at as u64 * 0x1000, 2048)]);
                self.b.kick(rx);
                self.far[at].write_all(&packet).unwrap();
                self.b.write(TX, &packet);
                self.b.queues[tx].add(&[readable(TX, packet.len() as u32)]);
                self.b.kick(tx);
                let received = self.b.queues[rx].used().is_some();
                let mut bytes = [0; 100];
                (received, self.far[at].read(&mut bytes).is_ok())
            })
            .collect()
    }
}

#[test]
fn pairs_are_used_when_the_driver_says_so() {
    let mut w = Wires::new(3, None, |f| f);
    let mut pairs = [0; 2];
    w.b.device.read_config(8, &mut pairs);
    assert_eq!(u16::from_le_bytes(pairs), 3);
    let (on, off) = ((true, true), (false, false));
    assert_eq!(w.alive(), [on, off, off]);
    assert_eq!(w.set_pairs(6, 3), 0);
    // What waited on the others went when they were switched on, and they go on.
    for queue in 2..6 {
        assert!(w.b.queues[queue].used().is_some(), "queue {queue}");
    }
    for far in &w.far[1..] {
        assert_ne!((&*far).read(&mut [0; 100]).unwrap(), 0);
    }
    assert_eq!(w.alive(), [on, on, on]);
    assert_eq!(w.set_pairs(6, 2), 0);
    assert_eq!(w.alive(), [on, on, off]);
    for wrong in [0, 4, 256, u16::MAX] {
        assert_eq!(w.set_pairs(6, wrong), 1, "{wrong} pairs");
    }
    // A pause keeps them, a reset begins anew.
    w.b.pause_and_resume();
    assert_eq!(w.alive()[..2], [on, on]);
    w.b.deactivate();
    let saved = w.b.device.save().unwrap().decode::<NetState>().unwrap();
    assert_eq!(saved, NetState { pairs: 2 });
    w.b.device.reset();
    w.b.activate();
    assert_eq!(w.alive(), [on, off, off]);
}

#[test]
fn the_control_queue_answers_every_command() {
    let mut w = Wires::new(2, None, |f| f);
    for command in [
        &[][..],
        &[4],
        &[4, 0],
        &[4, 0, 1],
        &[4, 1, 1, 0],
        &[0, 0, 1, 0],
        &[0xff, 0xff, 0xff, 0xff],
    ] {
        assert_eq!(w.command(4, command), 1, "{command:?}");
    }
    assert_eq!(w.set_pairs(4, 2), 0);
    // Nowhere to answer to.
    let queue = &mut w.b.queues[4];
    queue.add(&[readable(CONTROL, 4)]);
    queue.add(&[readable(CONTROL, 4), writable(END, 1)]);
    queue.add(&[readable(END, 4), writable(CONTROL, 1)]);
    w.b.kick(4);
    let used: Vec<_> = std::iter::from_fn(|| w.b.queues[4].used())
        .map(|(_, len)| len)
        .collect();
    assert_eq!(used, [0, 0, 1]);
    assert!(!w.b.needs_reset());
}

#[test]
fn a_driver_that_knows_one_pair_finds_its_control_queue_behind_it() {
    let mut w = Wires::new(2, None, |f| f & !feature::MQ);
    assert_eq!(w.set_pairs(2, 1), 0);
    assert_eq!(w.set_pairs(2, 2), 1, "it has set up one");
    let mut w = Wires::new(2, None, |f| f & !feature::MQ & !feature::CTRL_VQ);
    w.b.queues[2].add(&[readable(CONTROL, 4), writable(CONTROL + 0x100, 1)]);
    w.b.kick(2);
    assert_eq!(w.b.queues[2].used(), None, "it has not asked for one");
    assert!(!w.b.needs_reset());
    assert_eq!(Wires::new(1, None, |f| f).b.device.queue_max_sizes().len(), 2);
}

#[test]
fn a_restored_driver_uses_the_pairs_that_it_used() {
    let mut w = Wires::new(3, Some(NetState { pairs: 2 }), |f| f);
    let (on, off) = ((true, true), (false, false));
    assert_eq!(w.alive(), [on, on, off]);
    for pairs in [0, 3] {
        let socket = sockets::listener(libc::SOCK_SEQPACKET);
        let sockets = vec![socket.try_clone().unwrap(), socket];
        let mut env = BuildEnv::new(Vec::new());
        let refused = spec().over_sockets(sockets, &mut env, Some(NetState { pairs }));
        assert!(refused.is_err(), "{pairs} pairs of 2");
    }
}
