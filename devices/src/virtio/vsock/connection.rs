//! One stream between a guest's socket and a host's: credit both ways, half-closing, and what is still to be said to
//! the guest. Knows neither queues nor the event loop.
//!
//! ```text
//!  guest connects ──▶ Brokering ──host gave a socket──▶ Established ──▶ (removed, guest gets RST)
//!  host connects ───▶ Requested ──guest's RESPONSE──────▲     │ both sides have shut down, or RST, or a broken rule
//!                         │ refused or too late                │ a deadline runs while one side waits for the other
//!                         └──────────▶ (removed)
//! ```

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use vm_memory::GuestMemoryMmap;

use super::super::ring::copy_from;
use super::packet::{HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use crate::sys::{IoVecs, Segment};

/// What the guest may send before the host has taken it (bytes); allocated only as far as it is used.
pub const BUFFER: u32 = 128 * 1024;
/// An empty buffer that has grown beyond this is given back.
const KEEP: usize = 4096;

/// Names a connection: its two ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The host's port.
    pub host: u32,
    /// The guest's port.
    pub guest: u32,
}

/// How far a connection has come; see the diagram above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The guest has asked; the host has been asked for a socket.
    Brokering,
    /// The host has asked; the guest is to answer.
    Requested,
    /// Data flows.
    Established,
}

/// What the guest is still to be told, apart from data.
#[derive(Clone, Copy, Debug, Default)]
struct Due {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
}

/// The connection is over; the guest is to get an RST unless it sent one.
#[derive(Debug, PartialEq, Eq)]
pub struct Over;

/// One connection.
pub struct Connection {
    /// Its ports.
    pub key: Key,
    /// Its state.
    pub state: State,
    /// The host's side; none while brokering.
    pub stream: Option<UnixStream>,
    /// When it is ended unless something happens.
    pub deadline: Option<Instant>,
    /// It is in the list of those with something for the guest.
    pub queued: bool,
    /// The event loop tells when the stream takes data again.
    pub watched_for_write: bool,
    due: Due,
    /// The stream may have something to read.
    readable: bool,
    /// The host sends no more (SEND) or takes no more (RECEIVE).
    host_shutdown: u32,
    /// As much of `host_shutdown` as the guest knows.
    told_shutdown: u32,
    guest_shutdown: u32,
    /// The stream has been told that the guest sends no more. Telling it again would be an event each time.
    told_host: bool,
    /// From the guest, not yet taken by the host.
    buffer: VecDeque<u8>,
    /// Bytes to the guest; the guest's room and how much of it has become free. Modulo 2³².
    sent: u32,
    guest_alloc: u32,
    guest_forwarded: u32,
    /// There is no room, and the guest has been asked to tell when there is.
    asked_for_credit: bool,
    /// Bytes from the guest, how many of them have left the buffer, and how many of those the guest knows of.
    received: u32,
    forwarded: u32,
    told_forwarded: u32,
}

impl Connection {
    fn new(key: Key, state: State, stream: Option<UnixStream>, due: Due, deadline: Instant) -> Self {
        Self {
            key,
            state,
            stream,
            deadline: Some(deadline),
            queued: false,
            watched_for_write: false,
            due,
            readable: true,
            host_shutdown: 0,
            told_shutdown: 0,
            guest_shutdown: 0,
            told_host: false,
            buffer: VecDeque::new(),
            sent: 0,
            guest_alloc: 0,
            guest_forwarded: 0,
            asked_for_credit: false,
            received: 0,
            forwarded: 0,
            told_forwarded: 0,
        }
    }

    /// The guest has asked for it with `request`.
    pub fn from_guest(request: &Header, deadline: Instant) -> Self {
        let key = Key {
            host: request.dst_port,
            guest: request.src_port,
        };
        let mut c = Self::new(key, State::Brokering, None, Due::default(), deadline);
        c.update_credit(request);
        c
    }

    /// The host has asked for it.
    pub fn from_host(key: Key, stream: UnixStream, deadline: Instant) -> Self {
        let due = Due {
            request: true,
            ..Due::default()
        };
        Self::new(key, State::Requested, Some(stream), due, deadline)
    }

    /// The host has given the socket that was asked for.
    pub fn brokered(&mut self, stream: UnixStream) {
        self.stream = Some(stream);
        self.due.response = true;
        self.state = State::Established;
        self.deadline = None;
    }

    /// The guest has accepted; the host's program is told by a line of text. False: it does not take it.
    pub fn accepted(&mut self, response: &Header) -> Result<(), Over> {
        if self.state != State::Requested {
            return Err(Over);
        }
        self.update_credit(response);
        let line = format!("OK {}\n", self.key.host);
        match self.stream.as_mut().map(|s| s.write(line.as_bytes())) {
            Some(Ok(n)) if n == line.len() => {
                self.state = State::Established;
                self.deadline = None;
                Ok(())
            }
            _ => Err(Over),
        }
    }

    /// Takes the room that the guest tells of.
    pub fn update_credit(&mut self, h: &Header) {
        self.guest_alloc = h.buf_alloc;
        self.guest_forwarded = h.fwd_cnt;
        self.asked_for_credit &= self.credit() == 0;
    }

    /// Room at the guest (bytes). What a guest makes up gives it no more than it says its buffer has.
    fn credit(&self) -> u32 {
        self.guest_alloc
            .saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// Bytes that wait for the host.
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// The stream has become readable, or may have.
    pub fn set_readable(&mut self) {
        self.readable = true;
    }

    /// Answers a credit request.
    pub fn owe_credit_update(&mut self) {
        self.due.credit_update = true;
    }

    /// Data from the guest: `len` bytes from `skip` bytes into `segments`.
    pub fn receive(
        &mut self,
        memory: &GuestMemoryMmap,
        segments: &[Segment],
        (skip, len): (u64, u32),
        vecs: &mut IoVecs,
    ) -> Result<(), Over> {
        let room = BUFFER.saturating_sub(self.buffer.len() as u32);
        if self.state != State::Established || self.guest_shutdown & SHUTDOWN_SEND != 0 || len > room {
            return Err(Over);
        }
        self.received = self.received.wrapping_add(len);
        let mut taken = 0;
        if self.host_shutdown & SHUTDOWN_RECEIVE != 0 {
            taken = len;
        } else if self.buffer.is_empty()
            && let Some(stream) = &self.stream
        {
            match vecs.writev(stream, memory, segments, (skip, u64::from(len))) {
                Ok(n) => taken = n as u32,
                Err(e) if is_busy(&e) => {}
                // Outside of guest memory.
                Err(e) if e.kind() == ErrorKind::InvalidInput => return Err(Over),
                Err(_) => {
                    self.host_takes_no_more();
                    taken = len;
                }
            }
        }
        self.forward(taken);
        self.keep(memory, segments, skip + u64::from(taken), len - taken)
    }

    fn keep(
        &mut self,
        memory: &GuestMemoryMmap,
        segments: &[Segment],
        mut skip: u64,
        mut len: u32,
    ) -> Result<(), Over> {
        let mut piece = [0; 4096];
        while len > 0 {
            let n = len.min(piece.len() as u32);
            let piece = &mut piece[..n as usize];
            if !copy_from(memory, segments, skip, piece) {
                return Err(Over);
            }
            self.buffer.extend(&*piece);
            (skip, len) = (skip + u64::from(n), len - n);
        }
        Ok(())
    }

    /// `n` bytes have left the buffer. The guest is told when half of its room is used up by those it does not know of.
    fn forward(&mut self, n: u32) {
        self.forwarded = self.forwarded.wrapping_add(n);
        if self.received.wrapping_sub(self.told_forwarded) > BUFFER / 2
            && self.forwarded != self.told_forwarded
        {
            self.due.credit_update = true;
        }
    }

    /// What the guest sends is dropped from now on.
    pub fn host_takes_no_more(&mut self) {
        self.host_shutdown |= SHUTDOWN_RECEIVE;
        let dropped = self.buffer.len() as u32;
        self.buffer = VecDeque::new();
        self.forward(dropped);
    }

    /// Writes what waits for the host, as far as it takes it.
    pub fn flush(&mut self) -> Result<(), Over> {
        while !self.buffer.is_empty() {
            let Some(mut stream) = self.stream.as_ref() else {
                break;
            };
            let (a, b) = self.buffer.as_slices();
            match stream.write_vectored(&[IoSlice::new(a), IoSlice::new(b)]) {
                Ok(n) if n > 0 => {
                    self.buffer.drain(..n);
                    self.forward(n as u32);
                }
                Err(e) if is_busy(&e) => return Ok(()),
                _ => self.host_takes_no_more(),
            }
        }
        if self.buffer.capacity() > KEEP {
            self.buffer = VecDeque::new();
        }
        self.after_flush()
    }

    /// What the guest's shutdown asks for, once everything before it was delivered.
    fn after_flush(&mut self) -> Result<(), Over> {
        if self.guest_shutdown & SHUTDOWN_BOTH == SHUTDOWN_BOTH {
            return Err(Over);
        }
        if self.guest_shutdown & SHUTDOWN_SEND != 0
            && !self.told_host
            && let Some(stream) = &self.stream
        {
            self.told_host = true;
            // Fails when the host has closed its side already.
            let _ = stream.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    /// The guest will send or receive no more. What it sent before is still delivered, until `deadline`.
    pub fn guest_shut_down(&mut self, flags: u32, deadline: Instant) -> Result<(), Over> {
        if self.state != State::Established {
            return Err(Over);
        }
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown == SHUTDOWN_BOTH {
            self.deadline.get_or_insert(deadline);
        }
        self.flush()
    }

    /// There is something to say to the guest, as far as can be known without trying.
    pub fn has_something(&self) -> bool {
        let d = &self.due;
        d.request
            || d.response
            || self.state == State::Established
                && (d.credit_update
                    || d.credit_request
                    || self.host_shutdown != self.told_shutdown
                    || self.may_read() && !self.asked_for_credit)
    }

    fn may_read(&self) -> bool {
        self.readable
            && self.host_shutdown & SHUTDOWN_SEND == 0
            && self.guest_shutdown & SHUTDOWN_RECEIVE == 0
    }

    /// The next packet to the guest. Data has been read into `room`: bytes from the second on, as many as the third,
    /// of the segments. `None`: there is nothing to say after all.
    pub fn next_packet(
        &mut self,
        memory: &GuestMemoryMmap,
        room: (&[Segment], u64, u64),
        vecs: &mut IoVecs,
        closing_deadline: Instant,
    ) -> Option<Header> {
        let (op, flags, len) = self.next_operation(memory, room, vecs, closing_deadline)?;
        self.told_forwarded = self.forwarded;
        self.due.credit_update = false;
        Some(Header {
            src_cid: HOST_CID,
            src_port: self.key.host,
            dst_port: self.key.guest,
            len,
            kind: TYPE_STREAM,
            op: op as u16,
            flags,
            buf_alloc: BUFFER,
            fwd_cnt: self.forwarded,
            // The device knows it.
            dst_cid: 0,
        })
    }

    fn next_operation(
        &mut self,
        memory: &GuestMemoryMmap,
        room: (&[Segment], u64, u64),
        vecs: &mut IoVecs,
        closing_deadline: Instant,
    ) -> Option<(Op, u32, u32)> {
        if std::mem::take(&mut self.due.request) {
            return Some((Op::Request, 0, 0));
        }
        if std::mem::take(&mut self.due.response) {
            return Some((Op::Response, 0, 0));
        }
        if self.state != State::Established {
            return None;
        }
        if let Some(len) = self.read_stream(memory, room, vecs) {
            return Some((Op::Data, 0, len));
        }
        if self.host_shutdown != self.told_shutdown {
            self.told_shutdown = self.host_shutdown;
            if self.told_shutdown == SHUTDOWN_BOTH {
                self.deadline.get_or_insert(closing_deadline);
            }
            return Some((Op::Shutdown, self.told_shutdown, 0));
        }
        if std::mem::take(&mut self.due.credit_request) {
            return Some((Op::CreditRequest, 0, 0));
        }
        self.due.credit_update.then_some((Op::CreditUpdate, 0, 0))
    }

    fn read_stream(
        &mut self,
        memory: &GuestMemoryMmap,
        (segments, skip, room): (&[Segment], u64, u64),
        vecs: &mut IoVecs,
    ) -> Option<u32> {
        if !self.may_read() {
            return None;
        }
        let len = room.min(u64::from(self.credit()));
        if len == 0 {
            // Waits for the guest's credit update, which it is asked for once.
            self.due.credit_request |= !self.asked_for_credit;
            self.asked_for_credit = true;
            return None;
        }
        match vecs.readv(self.stream.as_ref()?, memory, segments, (skip, len)) {
            Ok(0) => self.host_shutdown |= SHUTDOWN_SEND,
            Ok(n) => {
                self.sent = self.sent.wrapping_add(n as u32);
                return Some(n as u32);
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if is_busy(&e) => self.readable = false,
            Err(_) => {
                self.host_shutdown |= SHUTDOWN_SEND;
                self.host_takes_no_more();
            }
        }
        None
    }
}

fn is_busy(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
