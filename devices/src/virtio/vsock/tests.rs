use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::broker::{BrokerRequest, MESSAGE, send_reply};
use super::connection::BUFFER;
use super::packet::*;
use super::*;
use crate::limit::{LimitBoard, Rate};
use crate::testing::{Bench, DATA, readable, sockets, writable};

const CID: u64 = 42;
/// Transmitted packets lie here, one after the other.
const TX: u64 = DATA;
/// Buffers for received packets.
const RX: u64 = DATA + 0x10_0000;
const RX_LEN: u32 = 4096;

/// Plays the guest's driver and the programs of the host.
struct World {
    b: Bench,
    listener: OwnedFd,
    broker_listener: OwnedFd,
    broker: Option<UnixStream>,
    next_rx: u64,
    limits: LimitBoard,
}

fn spec() -> VsockSpec {
    VsockSpec {
        cid: CID,
        listener: FdSlot(0),
        broker: FdSlot(1),
        ..VsockSpec::default()
    }
}

fn build(saved: Option<VsockState>) -> (Box<dyn VirtioDevice>, OwnedFd, OwnedFd) {
    let (device, listener, broker, _) = build_limited(saved);
    (device, listener, broker)
}

fn build_limited(saved: Option<VsockState>) -> (Box<dyn VirtioDevice>, OwnedFd, OwnedFd, LimitBoard) {
    let listener = sockets::listener(libc::SOCK_STREAM);
    let broker = sockets::listener(libc::SOCK_SEQPACKET);
    let fds = vec![listener.try_clone().unwrap(), broker.try_clone().unwrap()];
    let mut env = BuildEnv::new(fds);
    let device = spec().build(&mut env, saved).unwrap();
    (device, listener, broker, env.limits())
}

impl World {
    fn new() -> Self {
        let mut w = Self::without_buffers();
        w.give_buffers(16);
        w
    }

    fn without_buffers() -> Self {
        let (device, listener, broker_listener, limits) = build_limited(None);
        let mut b = Bench::new(device);
        let broker = Some(sockets::connect(&broker_listener, libc::SOCK_SEQPACKET));
        b.turn();
        Self {
            b,
            listener,
            broker_listener,
            broker,
            next_rx: 0,
            limits,
        }
    }

    fn give_buffers(&mut self, n: u64) {
        for _ in 0..n {
            let at = RX + self.next_rx % 256 * u64::from(RX_LEN);
            self.b.queues[0].add(&[writable(at, RX_LEN)]);
            self.next_rx += 1;
        }
        self.b.kick(0);
    }

    fn header(op: Op, host: u32, guest: u32) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: guest,
            dst_port: host,
            kind: TYPE_STREAM,
            op: op as u16,
            buf_alloc: 65536,
            ..Header::default()
        }
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let header = Header {
            len: data.len() as u32,
            ..header
        };
        self.send_raw(&header.encode(), data);
    }

    fn send_raw(&mut self, header: &[u8], data: &[u8]) {
        self.b.write(TX, header);
        self.b.write(TX + 0x100, data);
        let chain = [
            readable(TX, header.len() as u32),
            readable(TX + 0x100, data.len() as u32),
        ];
        self.b.queues[1].add(&chain[..if data.is_empty() { 1 } else { 2 }]);
        self.b.kick(1);
        assert!(self.b.queues[1].used().is_some(), "every packet is taken");
        assert!(!self.b.needs_reset());
    }

    /// The next packet to the guest, if there is one now.
    fn poll(&mut self) -> Option<(Header, Vec<u8>)> {
        self.b.turn();
        let (head, len) = self.b.queues[0].used()?;
        // Descriptors are used in turn, one to a chain.
        let table = self.b.queues[0].desc + u64::from(head) * 16;
        let at = u64::from_le_bytes(self.b.read(table, 8).try_into().unwrap());
        let bytes = self.b.read(at, len as usize);
        let header = Header::decode(bytes[..HEADER].try_into().unwrap());
        assert_eq!(
            (header.src_cid, header.dst_cid, header.kind),
            (HOST_CID, CID, TYPE_STREAM)
        );
        assert_eq!(header.len as usize, bytes.len() - HEADER);
        Some((header, bytes[HEADER..].to_vec()))
    }

    fn receive(&mut self) -> (Header, Vec<u8>) {
        let start = std::time::Instant::now();
        loop {
            if let Some(packet) = self.poll() {
                return packet;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "no packet came");
            self.b.turn_once(100);
        }
    }

    fn expect(&mut self, op: Op) -> Header {
        let (h, _) = self.receive();
        assert_eq!(h.operation(), Some(op), "{h:?}");
        h
    }

    fn expect_nothing(&mut self) {
        assert_eq!(self.poll(), None);
    }

    /// The question that the host is asked.
    fn question(&mut self) -> BrokerRequest {
        let mut bytes = [0; MESSAGE + 1];
        let n = self.broker.as_mut().unwrap().read(&mut bytes).unwrap();
        BrokerRequest::decode(&bytes[..n]).unwrap()
    }

    /// Connects from the guest to a program of the host.
    fn connect_from_guest(&mut self, host: u32, guest: u32) -> UnixStream {
        self.send(Self::header(Op::Request, host, guest), &[]);
        let question = self.question();
        assert_eq!(question.port, host);
        let (ours, theirs) = UnixStream::pair().unwrap();
        send_reply(self.broker.as_ref().unwrap(), question.cookie, Ok(theirs.as_fd())).unwrap();
        drop(theirs);
        let h = self.expect(Op::Response);
        assert_eq!((h.src_port, h.dst_port, h.buf_alloc), (host, guest, BUFFER));
        ours.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        ours
    }

    /// Connects from a program of the host to the guest; returns its port.
    fn connect_from_host(&mut self, guest: u32) -> (UnixStream, u32) {
        let mut s = sockets::connect(&self.listener, libc::SOCK_STREAM);
        s.write_all(format!("CONNECT {guest}\n").as_bytes()).unwrap();
        s.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let h = self.expect(Op::Request);
        assert_eq!(h.dst_port, guest);
        self.send(Self::header(Op::Response, h.src_port, guest), &[]);
        let ok = format!("OK {}\n", h.src_port);
        assert_eq!(read_some(&mut s, ok.len()), ok.as_bytes());
        (s, h.src_port)
    }
}

fn read_some(s: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut v = vec![0; len];
    s.read_exact(&mut v).unwrap();
    v
}

fn read_end(s: &mut UnixStream) -> Vec<u8> {
    let mut v = Vec::new();
    s.read_to_end(&mut v).unwrap();
    v
}

#[test]
fn the_guest_connects_and_data_goes_both_ways() {
    let mut w = World::new();
    let mut host = w.connect_from_guest(1024, 5000);
    w.send(World::header(Op::Data, 1024, 5000), b"ping");
    assert_eq!(read_some(&mut host, 4), b"ping");
    host.write_all(b"pong").unwrap();
    let (h, data) = w.receive();
    assert_eq!((h.operation(), &data[..]), (Some(Op::Data), &b"pong"[..]));
    assert_eq!(h.fwd_cnt, 4, "the host has taken what the guest sent");
}

#[test]
fn the_host_connects_and_data_goes_both_ways() {
    let mut w = World::new();
    let (mut host, port) = w.connect_from_host(80);
    host.write_all(b"GET /").unwrap();
    assert_eq!(w.receive().1, b"GET /");
    w.send(World::header(Op::Data, port, 80), b"200");
    assert_eq!(read_some(&mut host, 3), b"200");
}

#[test]
fn a_line_may_come_in_pieces_and_with_data_behind_it() {
    let mut w = World::new();
    let mut host = sockets::connect(&w.listener, libc::SOCK_STREAM);
    for piece in ["CONN", "ECT ", "80"] {
        host.write_all(piece.as_bytes()).unwrap();
        w.expect_nothing();
    }
    host.write_all(b"\nearly").unwrap();
    let h = w.expect(Op::Request);
    w.expect_nothing();
    w.send(World::header(Op::Response, h.src_port, 80), &[]);
    assert_eq!(w.receive().1, b"early");
}

#[test]
fn a_wrong_line_ends_the_connection() {
    for line in [
        "HELLO 80\n",
        "CONNECT\n",
        "CONNECT +80\n",
        "CONNECT 4294967296\n",
        "CONNECT 80 \n",
        "\n",
    ] {
        let mut w = World::new();
        let mut host = sockets::connect(&w.listener, libc::SOCK_STREAM);
        host.write_all(line.as_bytes()).unwrap();
        w.expect_nothing();
        assert_eq!(read_end(&mut host), b"", "{line:?}");
    }
    let mut w = World::new();
    let mut host = sockets::connect(&w.listener, libc::SOCK_STREAM);
    host.write_all(&[b'x'; 32]).unwrap();
    w.expect_nothing();
    // What was not read makes it a reset rather than an end.
    assert!(host.read(&mut [0]).is_err());
}

#[test]
fn the_guest_refuses_a_connection() {
    let mut w = World::new();
    let mut host = sockets::connect(&w.listener, libc::SOCK_STREAM);
    host.write_all(b"CONNECT 9\n").unwrap();
    let h = w.expect(Op::Request);
    w.send(World::header(Op::Reset, h.src_port, 9), &[]);
    assert_eq!(read_end(&mut host), b"");
    w.expect_nothing();
}

#[test]
fn without_a_broker_the_guest_is_refused_at_once() {
    let mut w = World::new();
    w.broker = None;
    w.b.turn();
    w.send(World::header(Op::Request, 1024, 1), &[]);
    let h = w.expect(Op::Reset);
    assert_eq!((h.src_port, h.dst_port), (1024, 1));
}

#[test]
fn a_broker_that_refuses_or_goes_leads_to_a_reset() {
    let mut w = World::new();
    w.send(World::header(Op::Request, 1024, 1), &[]);
    let cookie = w.question().cookie;
    let refused = Err(std::io::Error::from_raw_os_error(libc::ECONNREFUSED));
    send_reply(w.broker.as_ref().unwrap(), cookie, refused).unwrap();
    w.expect(Op::Reset);
    // An answer too many, to nobody.
    let (ours, theirs) = UnixStream::pair().unwrap();
    send_reply(w.broker.as_ref().unwrap(), cookie, Ok(theirs.as_fd())).unwrap();
    drop(theirs);
    w.expect_nothing();
    assert_eq!((&ours).read(&mut [0]).unwrap(), 0, "its socket is closed");

    w.send(World::header(Op::Request, 1024, 2), &[]);
    w.broker = None;
    assert_eq!(w.expect(Op::Reset).dst_port, 2);
    // A host that comes back is asked again.
    w.broker = Some(sockets::connect(&w.broker_listener, libc::SOCK_SEQPACKET));
    w.b.turn();
    w.connect_from_guest(1024, 3);
}

#[test]
fn packets_that_break_the_rules_get_a_reset() {
    let mut w = World::new();
    let good = World::header(Op::Data, 7, 8);
    for (bad, what) in [
        (good, "data without a connection"),
        (Header { kind: 2, ..good }, "another type"),
        (Header { op: 0, ..good }, "operation 0"),
        (Header { op: 8, ..good }, "operation 8"),
        (Header { src_cid: 43, ..good }, "another sender"),
        (
            Header {
                op: Op::Response as u16,
                ..good
            },
            "a response to nothing",
        ),
        (
            Header {
                op: Op::CreditUpdate as u16,
                ..good
            },
            "credit for nothing",
        ),
        (
            Header {
                op: Op::Shutdown as u16,
                ..good
            },
            "an end of nothing",
        ),
    ] {
        w.send(bad, &[]);
        let (h, _) = w.receive();
        assert_eq!(h.operation(), Some(Op::Reset), "{what}");
        assert_eq!((h.src_port, h.dst_port), (7, 8), "{what}");
    }
    w.send(World::header(Op::Reset, 7, 8), &[]);
    w.expect_nothing();
    // Too short to be answered.
    w.send_raw(&[0; HEADER - 1], &[]);
    w.expect_nothing();
}

#[test]
fn a_connection_that_breaks_the_rules_is_ended() {
    let data = World::header(Op::Data, 1024, 5000);
    for (bad, what) in [
        (Header { len: 10_000, ..data }, "more data than the chain has"),
        (
            Header {
                len: u32::MAX,
                ..data
            },
            "far more",
        ),
        (Header { op: 99, ..data }, "an unknown operation"),
        (
            Header {
                op: Op::Request as u16,
                ..data
            },
            "asking twice",
        ),
        (
            Header {
                op: Op::Response as u16,
                ..data
            },
            "a response out of turn",
        ),
    ] {
        let mut w = World::new();
        let mut host = w.connect_from_guest(1024, 5000);
        w.send_raw(&bad.encode(), &[1; 100]);
        w.expect(Op::Reset);
        assert_eq!(read_end(&mut host), b"", "{what}");
    }
}

#[test]
fn the_guest_cannot_send_more_than_it_has_room_for() {
    let mut w = World::new();
    let mut host = w.connect_from_guest(1024, 5000);
    let mut sent = 0;
    let reset = loop {
        w.send(World::header(Op::Data, 1024, 5000), &[7; 60_000]);
        sent += 60_000;
        if let Some((h, _)) = w.poll()
            && h.operation() == Some(Op::Reset)
        {
            break h;
        }
        assert!(sent < 10 << 20, "a guest that ignores credit is not stopped");
    };
    assert_eq!(reset.dst_port, 5000);
    assert!(read_end(&mut host).iter().all(|&b| b == 7));
}

#[test]
fn what_the_host_does_not_read_waits_and_credit_follows() {
    let mut w = World::new();
    let mut host = w.connect_from_guest(1024, 5000);
    let stream: Vec<u8> = (0..3 << 20).map(|n: u32| (n % 253) as u8).collect();
    let (mut sent, mut forwarded, mut got) = (0usize, 0u32, Vec::new());
    while sent < stream.len() {
        let room = (BUFFER - (sent as u32).wrapping_sub(forwarded)) as usize;
        let n = room.min(30_000).min(stream.len() - sent);
        if n == 0 {
            // All that fits is sent: the host reads some, and the guest is told.
            let mut some = vec![0; 100_000];
            let n = host.read(&mut some).unwrap();
            got.extend(&some[..n]);
        } else {
            let header = World::header(Op::Data, 1024, 5000);
            w.send(header, &stream[sent..sent + n]);
            sent += n;
        }
        while let Some((h, _)) = w.poll() {
            assert_eq!(h.operation(), Some(Op::CreditUpdate));
            forwarded = h.fwd_cnt;
            w.give_buffers(1);
        }
    }
    w.send(
        Header {
            flags: SHUTDOWN_BOTH,
            ..World::header(Op::Shutdown, 1024, 5000)
        },
        &[],
    );
    let rest = std::thread::spawn(move || read_end(&mut host));
    w.expect(Op::Reset);
    got.extend(rest.join().unwrap());
    assert!(got == stream, "{} of {} bytes", got.len(), stream.len());
}

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let mut w = World::new();
    let mut host = w.connect_from_guest(1024, 5000);
    let told = |fwd_cnt| Header {
        buf_alloc: 100,
        fwd_cnt,
        ..World::header(Op::CreditUpdate, 1024, 5000)
    };
    w.send(told(0), &[]);
    host.write_all(&[5; 250]).unwrap();
    assert_eq!(w.receive().1.len(), 100);
    w.expect(Op::CreditRequest);
    w.expect_nothing();
    w.send(told(30), &[]);
    assert_eq!(w.receive().1.len(), 30);
    w.expect(Op::CreditRequest);
    w.send(told(130), &[]);
    assert_eq!(w.receive().1.len(), 100);
    // More taken than was sent.
    w.send(told(4_000_000_000), &[]);
    w.send(told(230), &[]);
    while let Some((h, data)) = w.poll() {
        assert!(
            h.operation() == Some(Op::CreditRequest) || data.len() == 20,
            "{h:?}"
        );
    }
}

#[test]
fn without_buffers_the_guest_gets_what_waits_later() {
    let mut w = World::without_buffers();
    let (ours, theirs) = UnixStream::pair().unwrap();
    w.send(World::header(Op::Request, 1, 2), &[]);
    let cookie = w.question().cookie;
    send_reply(w.broker.as_ref().unwrap(), cookie, Ok(theirs.as_fd())).unwrap();
    (&ours).write_all(&[9; 10_000]).unwrap();
    w.expect_nothing();
    w.give_buffers(1);
    w.expect(Op::Response);
    w.expect_nothing();
    w.give_buffers(8);
    let mut got = 0;
    while let Some((_, data)) = w.poll() {
        got += data.len();
    }
    assert_eq!(got, 10_000);
}

#[test]
fn the_host_closes_half_then_all() {
    let mut w = World::new();
    let mut host = w.connect_from_guest(1024, 5000);
    host.write_all(b"last words").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(w.receive().1, b"last words");
    assert_eq!(w.expect(Op::Shutdown).flags, SHUTDOWN_SEND);
    w.send(World::header(Op::Data, 1024, 5000), b"answer");
    assert_eq!(read_some(&mut host, 6), b"answer");
    drop(host);
    assert_eq!(w.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
    // The guest closes as well.
    w.send(World::header(Op::Reset, 1024, 5000), &[]);
    w.expect_nothing();
    w.send(World::header(Op::Data, 1024, 5000), b"?");
    w.expect(Op::Reset);
}

#[test]
fn the_guest_closes_half_then_all() {
    let mut w = World::new();
    let mut host = w.connect_from_guest(1024, 5000);
    w.send(World::header(Op::Data, 1024, 5000), b"request");
    w.send(
        Header {
            flags: SHUTDOWN_SEND,
            ..World::header(Op::Shutdown, 1024, 5000)
        },
        &[],
    );
    assert_eq!(read_end(&mut host), b"request");
    host.write_all(b"reply").unwrap();
    assert_eq!(w.receive().1, b"reply");
    w.send(World::header(Op::Data, 1024, 5000), b"after the end");
    w.expect(Op::Reset);
}

#[test]
fn both_ends_close_and_the_guest_takes_no_notice() {
    // The guest has given no buffers, so that it cannot be told; nothing may spin meanwhile.
    let mut w = World::without_buffers();
    w.give_buffers(1);
    let host = w.connect_from_guest(1024, 5000);
    w.send(
        Header {
            flags: SHUTDOWN_SEND,
            ..World::header(Op::Shutdown, 1024, 5000)
        },
        &[],
    );
    (&host).write_all(b"unread").unwrap();
    drop(host);
    w.expect_nothing();
    assert!(!w.b.turn_once(0), "nothing is ready any more");
    w.give_buffers(3);
    assert_eq!(w.receive().1, b"unread");
    assert_eq!(w.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
}

#[test]
fn greetings_are_limited() {
    let mut w = World::new();
    let all: Vec<_> = (0..table::MAX_GREETINGS + 10)
        .map(|_| {
            let s = sockets::connect(&w.listener, libc::SOCK_STREAM);
            w.b.turn();
            s.set_nonblocking(true).unwrap();
            s
        })
        .collect();
    let closed = all
        .iter()
        .filter(|s| matches!((&**s).read(&mut [0]), Ok(0)))
        .count();
    assert_eq!(closed, 10);
    drop(all);
    w.b.turn();
    w.connect_from_host(80);
}

#[test]
fn connections_are_limited() {
    let mut w = World::new();
    let mut cookies = Vec::new();
    let n = table::MAX_CONNECTIONS as u32;
    for guest in 0..n {
        w.send(World::header(Op::Request, 1024, guest), &[]);
        if w.poll().is_some_and(|(h, _)| h.operation() == Some(Op::Reset)) {
            // The broker's socket holds only so many questions: the guest is refused at once.
            w.give_buffers(1);
            continue;
        }
        cookies.push(w.question().cookie);
    }
    assert!(!cookies.is_empty());
    assert!(cookies.len() <= table::MAX_CONNECTIONS);
    w.send(World::header(Op::Request, 1025, 1), &[]);
    w.expect(Op::Reset);
}

#[test]
fn overdue_connections_are_ended() {
    let mut w = World::new();
    let mut silent = sockets::connect(&w.listener, libc::SOCK_STREAM);
    w.send(World::header(Op::Request, 1024, 1), &[]);
    w.question();
    // The deadline is some seconds away; the test waits for what it leads to.
    assert_eq!(w.expect(Op::Reset).dst_port, 1);
    w.b.until(|_| {
        silent.set_nonblocking(true).unwrap();
        matches!(silent.read(&mut [0]), Ok(0)).then_some(())
    });
}

#[test]
fn connections_outlive_a_pause_and_not_a_reset() {
    let mut w = World::new();
    let mut host = w.connect_from_guest(1024, 5000);
    w.b.pause_and_resume();
    host.write_all(b"still there").unwrap();
    assert_eq!(w.receive().1, b"still there");
    w.b.deactivate();
    w.b.device.reset();
    assert_eq!(read_end(&mut host), b"");
    w.b.activate();
    w.next_rx = 0;
    w.give_buffers(8);
    w.expect_nothing();
    w.connect_from_guest(1024, 5000);
}

#[test]
fn a_restored_guest_is_told_that_its_connections_are_gone() {
    let saved = build(None).0.save().unwrap().decode().unwrap();
    let (device, _listener, _broker) = build(Some(saved));
    let mut b = Bench::new(device);
    b.turn();
    b.queues[2].add(&[writable(DATA, 4)]);
    b.write(DATA, &[0xff; 4]);
    b.kick(2);
    assert_eq!(b.queues[2].used(), Some((0, 4)));
    assert_eq!(b.read(DATA, 4), [0; 4]);
    b.queues[2].add(&[writable(DATA, 4)]);
    b.kick(2);
    assert_eq!(b.queues[2].used(), None, "once");
}

#[test]
fn wrong_sockets_and_cids_are_refused() {
    let refuse = |spec: VsockSpec, fds| {
        spec.build(&mut BuildEnv::new(fds), None)
            .err()
            .unwrap()
            .to_string()
    };
    for cid in [0, 1, 2, u64::from(u32::MAX), u64::MAX] {
        assert!(
            refuse(VsockSpec { cid, ..spec() }, vec![]).contains("is reserved"),
            "{cid}"
        );
    }
    let (stream, seqpacket) = (
        sockets::listener(libc::SOCK_STREAM),
        sockets::listener(libc::SOCK_SEQPACKET),
    );
    assert!(refuse(spec(), vec![seqpacket, stream]).contains("expected a listening stream socket"));
    let (a, b) = UnixStream::pair().unwrap();
    assert!(refuse(spec(), vec![a.into(), b.into()]).contains("expected a listening stream socket"));
}

#[test]
fn what_a_limit_holds_back_comes_when_it_is_lifted() {
    let mut w = World::new();
    let mut host = w.connect_from_guest(1024, 5000);
    let slow = Limits {
        bandwidth: Some(Rate {
            per_second: 1,
            burst: 3,
        }),
        ..Limits::default()
    };
    w.b.set_limits(&w.limits, DeviceLimits::All(slow));
    host.write_all(b"more than a burst").unwrap();
    assert_eq!(w.receive().1, b"more than a burst");
    // Now it owes, both ways.
    host.write_all(b"later").unwrap();
    w.expect_nothing();
    let header = Header {
        len: 4,
        ..World::header(Op::Data, 1024, 5000)
    };
    w.b.write(TX, &header.encode());
    w.b.write(TX + 0x100, b"also");
    w.b.queues[1].add(&[readable(TX, HEADER as u32), readable(TX + 0x100, 4)]);
    w.b.kick(1);
    assert_eq!(w.b.queues[1].used(), None);
    assert!(
        !w.b.turn_once(0),
        "what is held back does not keep the loop awake"
    );

    w.b.set_limits(&w.limits, DeviceLimits::All(Limits::default()));
    assert_eq!(w.receive().1, b"later");
    assert!(w.b.queues[1].used().is_some());
    assert_eq!(read_some(&mut host, 4), b"also");
}
