//! The device over a real TAP, in a network namespace that each test makes for itself.

use std::fs::File;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;

use super::tests::spec;
use super::*;
use crate::testing::{Bench, DATA, readable, writable};

const RX: u64 = DATA + 0x10_0000;

/// Runs `f` with a TAP of the address 10.9.8.1/24 in a thread with a network namespace of its own; says aloud when that
/// cannot be.
fn with_tap(name: &'static str, f: fn(File)) {
    with_queues(name, 0, move |queues| f(queues.into_iter().next().unwrap()));
}

/// The same with as many queues as `more` says beside the first.
fn with_queues(name: &'static str, more: usize, f: impl FnOnce(Vec<File>) + Send + 'static) {
    let body = move || match make_tap(more) {
        Ok(queues) => f(queues),
        Err((what, e)) => println!("SKIP: {name}: {what}: {e}"),
    };
    std::thread::spawn(body)
        .join()
        .expect("the test in its namespace passes");
}

type Why = (&'static str, std::io::Error);

fn ok(what: &'static str, r: libc::c_int) -> Result<libc::c_int, Why> {
    if r < 0 {
        Err((what, std::io::Error::last_os_error()))
    } else {
        Ok(r)
    }
}

fn request() -> libc::ifreq {
    // SAFETY: zeroes are a valid request.
    let mut r: libc::ifreq = unsafe { std::mem::zeroed() };
    r.ifr_name[..4].copy_from_slice(&b"tap0".map(|b| b as libc::c_char));
    r
}

fn make_tap(more: usize) -> Result<Vec<File>, Why> {
    // SAFETY: takes no pointers; concerns this thread only.
    ok("a network namespace cannot be made", unsafe {
        libc::unshare(libc::CLONE_NEWNET)
    })?;
    let several = if more > 0 { libc::IFF_MULTI_QUEUE } else { 0 };
    let mut queues = Vec::new();
    for _ in 0..=more {
        let tap = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .map_err(|e| ("/dev/net/tun cannot be opened", e))?;
        let mut r = request();
        r.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several) as i16;
        // SAFETY: the kernel reads and writes one request.
        ok("TUNSETIFF", unsafe {
            libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &mut r)
        })?;
        queues.push(tap);
    }
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(|e| ("a socket", e))?;
    let set = |what, op, r: &libc::ifreq| {
        // SAFETY: the kernel reads one request.
        ok(what, unsafe {
            libc::ioctl(socket.as_raw_fd(), op, std::ptr::from_ref(r))
        })
    };
    for (what, op, address) in [
        ("SIOCSIFADDR", libc::SIOCSIFADDR, [10, 9, 8, 1]),
        ("SIOCSIFNETMASK", libc::SIOCSIFNETMASK, [255, 255, 255, 0]),
    ] {
        let mut r = request();
        // SAFETY: an address of this family lies at the start of the union, which has room for it.
        unsafe {
            let a: *mut libc::sockaddr_in = (&raw mut r.ifr_ifru.ifru_addr).cast();
            (*a).sin_family = libc::AF_INET as u16;
            (*a).sin_addr.s_addr = u32::from_ne_bytes(address);
        }
        set(what, op, &r)?;
    }
    let mut r = request();
    r.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    set("SIOCSIFFLAGS", libc::SIOCSIFFLAGS, &r)?;
    Ok(queues)
}

fn bench(tap: &File) -> Bench {
    let fds = vec![tap.try_clone().unwrap().into()];
    let mut b = Bench::new(spec().build(&mut BuildEnv::new(fds), None).unwrap());
    for n in 0..64 {
        b.queues[0].add(&[writable(RX + n * 2048, 2048)]);
    }
    b.kick(0);
    b
}

/// The next packet to the guest for which `wanted` holds; the kernel sends its own as well.
fn next_packet(b: &mut Bench, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    b.until(|b| {
        while let Some((head, len)) = b.queues[0].used() {
            let packet = b.read(RX + u64::from(head) * 2048, len as usize);
            b.queues[0].add(&[writable(RX + u64::from(head) * 2048, 2048)]);
            if wanted(&packet[HEADER..]) {
                return Some(packet);
            }
        }
        None
    })
}

fn send(b: &mut Bench, header: [u8; HEADER], data: &[u8]) {
    b.write(DATA, &header);
    b.write(DATA + 12, data);
    b.queues[1].add(&[readable(DATA, (12 + data.len()) as u32)]);
    b.kick(1);
    assert!(b.queues[1].used().is_some());
}

/// An Ethernet packet with ARP's "10.9.8.2 is at 02:00:00:00:00:01", or the question for 10.9.8.1.
fn arp(op: u8) -> Vec<u8> {
    let mut p = vec![0xff; 6];
    p.extend([
        2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, op, 2, 0, 0, 0, 0, 1, 10, 9, 8, 2,
    ]);
    p.extend([0, 0, 0, 0, 0, 0, 10, 9, 8, 1]);
    p
}

#[test]
fn the_kernel_answers_the_guest() {
    with_tap("the_kernel_answers_the_guest", |tap| {
        let mut b = bench(&tap);
        send(&mut b, [0; HEADER], &arp(1));
        let answer = next_packet(&mut b, |p| p[12..14] == [8, 6] && p[21] == 2);
        assert_eq!(num_buffers_of(&answer), 1);
        assert_eq!(answer[HEADER..][..6], [2, 0, 0, 0, 0, 1]);
        assert_eq!(answer[HEADER + 28..][..4], [10, 9, 8, 1]);
    });
}

fn num_buffers_of(packet: &[u8]) -> u16 {
    u16::from_le_bytes([packet[10], packet[11]])
}

#[test]
fn checksums_are_left_to_either_side() {
    with_tap("checksums_are_left_to_either_side", |tap| {
        let mut b = bench(&tap);
        // The guest makes itself known, then the host sends it a datagram.
        send(&mut b, [0; HEADER], &arp(1));
        let socket = UdpSocket::bind("10.9.8.1:4000").unwrap();
        socket
            .send_to(b"to the guest", (Ipv4Addr::new(10, 9, 8, 2), 5000))
            .unwrap();
        let packet = next_packet(&mut b, |p| p[12..14] == [8, 0] && p[23] == 17);
        assert_eq!(&packet[HEADER + 42..], b"to the guest");
        assert_eq!(packet[0], 1, "its checksum is left to the guest");

        // Back with addresses and ports exchanged, and the checksum left to the host: the sum of the pseudo-header
        // stands in its place.
        let mut reply = packet[HEADER..].to_vec();
        let turned = [&packet[HEADER + 6..HEADER + 12], &packet[HEADER..HEADER + 6]].concat();
        reply[..12].copy_from_slice(&turned);
        for (a, b, n) in [(26, 30, 4), (34, 36, 2)] {
            (0..n).for_each(|i| reply.swap(a + i, b + i));
        }
        let mut header = [0; HEADER];
        header[0] = 1;
        header[6..8].copy_from_slice(&34u16.to_le_bytes());
        header[8..10].copy_from_slice(&6u16.to_le_bytes());
        send(&mut b, header, &reply);
        let mut got = [0; 100];
        socket
            .set_read_timeout(Some(std::time::Duration::from_secs(10)))
            .unwrap();
        let (n, from) = socket.recv_from(&mut got).unwrap();
        assert_eq!(
            (&got[..n], from.to_string()),
            (&b"to the guest"[..], "10.9.8.2:5000".to_owned())
        );
    });
}

#[test]
fn a_removed_interface_is_a_pulled_cable() {
    with_tap("a_removed_interface_is_a_pulled_cable", |tap| {
        let mut b = bench(&tap);
        // The interface goes with its last descriptor or by request; the latter keeps this one open.
        let status = std::process::Command::new("ip")
            .args(["link", "delete", "tap0"])
            .status();
        if !status.is_ok_and(|s| s.success()) {
            println!("SKIP: a_removed_interface_is_a_pulled_cable: the command `ip` is missing");
            return;
        }
        b.until(|b| (b.interrupt.config.load(Ordering::SeqCst) > 0).then_some(()));
        send(&mut b, [0; HEADER], &arp(1));
        assert!(!b.needs_reset());
        assert!(!b.turn_once(0), "nothing is polled");
    });
}

#[test]
fn a_tap_that_was_opened_otherwise_is_refused() {
    with_tap("a_tap_that_was_opened_otherwise_is_refused", |_| {
        let tap = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .unwrap();
        let refuse = |tap: &File| {
            let fds = vec![tap.try_clone().unwrap().into()];
            spec()
                .build(&mut BuildEnv::new(fds), None)
                .err()
                .expect("refused")
                .to_string()
        };
        assert!(refuse(&tap).contains("no TAP with an interface"));
        let mut r = request();
        r.ifr_name[3] = b'1' as libc::c_char;
        r.ifr_ifru.ifru_flags = libc::IFF_TAP as i16;
        // SAFETY: the kernel reads and writes one request.
        assert!(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &mut r) } == 0);
        assert!(refuse(&tap).contains("it must be opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"));
    });
}

/// Sends the question for 10.9.8.1 by pair `by` and waits for the answer; the pair that it came to.
fn ask(b: &mut Bench, by: usize, pairs: usize) -> usize {
    b.write(DATA, &[0; HEADER]);
    b.write(DATA + 12, &arp(1));
    b.queues[2 * by + 1].add(&[readable(DATA, 12 + arp(1).len() as u32)]);
    b.kick(2 * by + 1);
    assert!(b.queues[2 * by + 1].used().is_some());
    b.until(|b| {
        (0..pairs).find(|pair| {
            while let Some((head, len)) = b.queues[2 * pair].used() {
                let at = RX + *pair as u64 * 0x10_0000 + u64::from(head) * 2048;
                let packet = b.read(at, len as usize);
                b.queues[2 * pair].add(&[writable(at, 2048)]);
                if packet[HEADER + 12..][..2] == [8, 6] && packet[HEADER + 21] == 2 {
                    return true;
                }
            }
            false
        })
    })
}

#[test]
fn queues_of_a_tap_come_and_go_as_the_driver_says() {
    with_queues("queues_of_a_tap_come_and_go_as_the_driver_says", 1, |queues| {
        let many = NetSpec {
            fds: vec![FdSlot(0), FdSlot(1)],
            ..spec()
        };
        let fds = queues.iter().map(|q| q.try_clone().unwrap().into()).collect();
        let mut b = Bench::new(many.build(&mut BuildEnv::new(fds), None).unwrap());
        for pair in 0..2 {
            for n in 0..64 {
                b.queues[2 * pair].add(&[writable(RX + pair as u64 * 0x10_0000 + n * 2048, 2048)]);
            }
            b.kick(2 * pair);
        }
        let set = |b: &mut Bench, pairs: u8| {
            b.write(DATA, &[4, 0, pairs, 0, 0xff]);
            b.queues[4].add(&[readable(DATA, 4), writable(DATA + 4, 1)]);
            b.kick(4);
            assert!(b.queues[4].used().is_some());
            b.read(DATA + 4, 1)[0]
        };
        for _ in 0..3 {
            // All that comes comes to the one that is in use.
            assert_eq!(ask(&mut b, 0, 2), 0);
            assert_eq!(set(&mut b, 2), 0);
            ask(&mut b, 1, 2);
            ask(&mut b, 0, 2);
            b.pause_and_resume();
            ask(&mut b, 1, 2);
            assert_eq!(set(&mut b, 1), 0);
        }
        assert_eq!(ask(&mut b, 0, 2), 0);
        assert!(!b.needs_reset() && b.interrupt.config.load(Ordering::SeqCst) == 0);
        assert!(!b.turn_once(0), "nothing is polled");
    });
}

#[test]
fn queues_of_a_tap_that_was_made_for_one_are_refused() {
    with_tap("queues_of_a_tap_that_was_made_for_one_are_refused", |tap| {
        let fds = vec![tap.try_clone().unwrap().into(), tap.try_clone().unwrap().into()];
        let many = NetSpec {
            fds: vec![FdSlot(0), FdSlot(1)],
            ..spec()
        };
        let text = many
            .build(&mut BuildEnv::new(fds), None)
            .err()
            .unwrap()
            .to_string();
        assert!(text.contains("IFF_MULTI_QUEUE"), "{text}");
    });
}
