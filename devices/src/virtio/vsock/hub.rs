//! The host's side of a socket device: who connects, who is asked for sockets, what has taken too long. It is the back
//! end that outlives the handler.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use vm_memory::GuestMemoryMmap;

use super::broker::{BrokerRequest, receive_reply};
use super::connection::{BUFFER, Connection, Key, Over, State};
use super::packet::{HOST_CID, Header, Op, TYPE_STREAM};
use super::table::{Entry, Table};
use crate::event::{Readiness, Registrar, Token};
use crate::limit::Limiter;
use crate::sys::{IoVecs, Segment, Timer, peek};

/// Until when a host program must have sent its line, the guest must have accepted, or the broker must have answered.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// How long a connection that one side has closed waits for the other.
pub const CLOSE_WITHIN: Duration = Duration::from_secs(10);
/// When to accept again after it failed.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// The longest line that a host program may send.
const GREETING: usize = 32;
/// Resets that wait for the guest to take them; further ones are dropped, which only a hostile guest can bring about.
const MAX_RESETS: usize = 1024;
/// What the guest has sent and the host's programs have not taken, over all connections (bytes).
const MAX_BUFFERED: usize = 32 << 20;
/// Connections accepted and answers taken in one wake-up.
const PER_WAKE: usize = 32;

/// Tokens of the hub's own sources.
pub mod token {
    use crate::event::Token;
    /// Host programs connect.
    pub const LISTENER: Token = Token(16);
    /// The host connects to broker.
    pub const BROKER_LISTENER: Token = Token(17);
    /// The broker answers.
    pub const BROKER: Token = Token(18);
    /// A deadline has come.
    pub const TIMER: Token = Token(19);
    /// The limiter's timer.
    pub const LIMITER: Token = Token(20);
}

/// Connections are watched edge-triggered: what is ready is remembered in the connection.
fn interest(write: bool) -> Readiness {
    let base = Readiness::IN | Readiness::READ_HANG_UP | Readiness::EDGE_TRIGGERED;
    if write { base | Readiness::OUT } else { base }
}

/// The listener is watched edge-triggered as well, since a connection that cannot be accepted for a lack of
/// descriptors would keep the loop awake.
const LISTENING: Readiness = Readiness::IN.union(Readiness::EDGE_TRIGGERED);

/// The host's side.
pub struct Hub {
    cid: u64,
    listener: UnixListener,
    broker_listener: UnixListener,
    broker: Option<UnixStream>,
    /// All connections.
    pub table: Table,
    /// Resets for the guest, which belong to no connection any more.
    pub resets: VecDeque<Header>,
    /// The guest is to be told that all connections are gone: it does not know that it was saved and restored.
    pub announce_reset: bool,
    timer: Timer,
    timer_at: Option<Instant>,
    buffered: usize,
    /// Of packets both ways.
    pub limiter: Limiter,
}

impl Hub {
    /// A hub without connections; those of an earlier machine are announced as gone when `announce_reset`.
    pub fn new(
        cid: u64,
        listener: OwnedFd,
        broker: OwnedFd,
        announce_reset: bool,
        limiter: Limiter,
    ) -> io::Result<Self> {
        let (listener, broker_listener) = (UnixListener::from(listener), UnixListener::from(broker));
        listener.set_nonblocking(true)?;
        broker_listener.set_nonblocking(true)?;
        let timer = Timer::new()?;
        Ok(Self {
            cid,
            listener,
            broker_listener,
            broker: None,
            table: Table::default(),
            resets: VecDeque::new(),
            announce_reset,
            timer,
            timer_at: None,
            buffered: 0,
            limiter,
        })
    }

    /// The guest's CID.
    pub fn cid(&self) -> u64 {
        self.cid
    }

    /// Ends all connections without a word to the guest, which knows.
    pub fn forget_connections(&mut self) {
        self.table = Table::default();
        self.resets.clear();
        self.announce_reset = false;
        self.buffered = 0;
    }

    /// Registers everything there is.
    pub fn register(&mut self, events: &mut Registrar<'_>) -> io::Result<()> {
        events.add(&self.listener, token::LISTENER, LISTENING)?;
        events.add(&self.broker_listener, token::BROKER_LISTENER, Readiness::IN)?;
        events.add(&self.timer, token::TIMER, Readiness::IN)?;
        self.limiter.register(events, token::LIMITER)?;
        if let Some(broker) = &self.broker {
            events.add(broker, token::BROKER, Readiness::IN)?;
        }
        for (token, entry) in self.table.iter() {
            if let Some(stream) = entry.stream() {
                let write = matches!(entry, Entry::Connection(c) if c.watched_for_write);
                events.add(stream, token, interest(write))?;
            }
        }
        Ok(())
    }

    /// Unregisters everything. What was not registered does not matter.
    pub fn unregister(&mut self, events: &mut Registrar<'_>) {
        let _ = events.remove(&self.listener);
        let _ = events.remove(&self.broker_listener);
        let _ = events.remove(&self.timer);
        self.limiter.unregister(events);
        let _ = self.broker.as_ref().map(|b| events.remove(b));
        for (_, entry) in self.table.iter() {
            let _ = entry.stream().map(|s| events.remove(s));
        }
    }

    /// Serves one source, except for queues.
    pub fn serve(&mut self, source: Token, ready: Readiness, events: &mut Registrar<'_>) {
        match source {
            token::LISTENER => self.accept_greetings(events),
            token::BROKER_LISTENER => self.accept_broker(events),
            token::BROKER => self.take_answers(events),
            token::TIMER => {
                self.end_overdue();
                self.watch_listener(events);
            }
            _ => self.serve_entry(source, ready, events),
        }
    }

    fn serve_entry(&mut self, token: Token, ready: Readiness, events: &mut Registrar<'_>) {
        match self.table.get(token) {
            Some(Entry::Greeting(..)) => self.read_greeting(token, events),
            Some(Entry::Connection(_)) => {
                let hung_up = ready.intersects(Readiness::HANG_UP | Readiness::ERROR);
                self.with_connection(token, events, |c| {
                    c.set_readable();
                    if hung_up {
                        c.host_takes_no_more();
                    }
                    c.flush()
                });
            }
            None => {}
        }
    }

    /// There may be something to tell the guest.
    pub fn has_something(&self) -> bool {
        !self.resets.is_empty() || self.table.any_ready()
    }

    /// The next packet of the next connection that has one; see [`Connection::next_packet`].
    pub fn next_packet(
        &mut self,
        memory: &GuestMemoryMmap,
        room: (&[Segment], u64, u64),
        vecs: &mut IoVecs,
    ) -> Option<Header> {
        let token = self.table.next_ready()?;
        let c = self.table.connection(token)?;
        let before = c.buffered();
        let packet = c.next_packet(memory, room, vecs, Instant::now() + CLOSE_WITHIN);
        // A host that takes no more leaves nothing to be buffered.
        let (after, deadline) = (c.buffered(), c.deadline);
        self.buffered = self.buffered.saturating_sub(before) + after;
        if let Some(at) = deadline {
            self.remind(at);
        }
        self.table.enqueue(token);
        Some(Header {
            dst_cid: self.cid,
            ..packet?
        })
    }

    /// Lets `f` work on a connection and sees to what follows from it: its end, its place among the ready ones, what
    /// it is watched for, its deadline.
    pub fn with_connection(
        &mut self,
        token: Token,
        events: &mut Registrar<'_>,
        f: impl FnOnce(&mut Connection) -> Result<(), Over>,
    ) {
        let Some(c) = self.table.connection(token) else {
            return;
        };
        let before = c.buffered();
        let result = f(c);
        let (after, deadline) = (c.buffered(), c.deadline);
        self.buffered = self.buffered.saturating_sub(before) + after;
        if result.is_err() || self.buffered > MAX_BUFFERED && after > before {
            return self.end(token, true);
        }
        let write = after > 0;
        if write != c.watched_for_write
            && let Some(stream) = &c.stream
        {
            c.watched_for_write = events.modify(stream, token, interest(write)).is_ok() && write;
        }
        if let Some(at) = deadline {
            self.remind(at);
        }
        self.table.enqueue(token);
    }

    /// Ends an entry; the guest is told when `tell`.
    pub fn end(&mut self, token: Token, tell: bool) {
        if let Some(Entry::Connection(c)) = self.table.remove(token) {
            self.buffered = self.buffered.saturating_sub(c.buffered());
            if tell {
                self.reset(HOST_CID, c.key);
            }
        }
    }

    /// Has a reset sent for a pair of ports.
    pub fn reset(&mut self, src_cid: u64, key: Key) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(Header {
                src_cid,
                dst_cid: self.cid,
                src_port: key.host,
                dst_port: key.guest,
                kind: TYPE_STREAM,
                op: Op::Reset as u16,
                ..Header::default()
            });
        }
    }

    fn accept_greetings(&mut self, events: &mut Registrar<'_>) {
        for _ in 0..PER_WAKE {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                // The connection is gone already, or there is a lack of descriptors: the timer tries again.
                Err(_) => return self.remind(Instant::now() + RETRY_AFTER),
            };
            if !self.table.has_room_for_greeting() || stream.set_nonblocking(true).is_err() {
                continue;
            }
            let deadline = Instant::now() + CONNECT_WITHIN;
            let Ok(token) = self.table.insert(Entry::Greeting(stream, deadline)) else {
                return;
            };
            self.remind(deadline);
            let added = self
                .table
                .get(token)
                .and_then(|e| e.stream())
                .map(|s| events.add(s, token, interest(false)));
            if !matches!(added, Some(Ok(()))) {
                self.end(token, false);
            }
        }
        self.watch_listener(events);
    }

    /// Has those who wait to be accepted announced (again).
    fn watch_listener(&mut self, events: &mut Registrar<'_>) {
        // It is registered, and the kernel has what it needs for it.
        let _ = events.modify(&self.listener, token::LISTENER, LISTENING);
    }

    /// Takes a host program's line, as soon as it is whole, and nothing behind it.
    fn read_greeting(&mut self, token: Token, events: &mut Registrar<'_>) {
        let Some(Entry::Greeting(stream, _)) = self.table.get(token) else {
            return;
        };
        let mut line = [0; GREETING];
        let n = match peek(&*stream, &mut line) {
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => return,
            Err(_) => 0,
        };
        let Some(end) = line[..n].iter().position(|&b| b == b'\n') else {
            // A hang-up, or longer than any valid line.
            if n == 0 || n == GREETING {
                self.end(token, false);
            }
            return;
        };
        let taken = stream.read(&mut line[..=end]).is_ok_and(|n| n == end + 1);
        match parse_greeting(&line[..end]) {
            Some(port) if taken => self.connect_to_guest(token, port, events),
            _ => self.end(token, false),
        }
    }

    fn connect_to_guest(&mut self, greeting: Token, guest: u32, events: &mut Registrar<'_>) {
        let Some(Entry::Greeting(stream, _)) = self.table.remove(greeting) else {
            return;
        };
        let key = Key {
            host: self.table.free_host_port(guest),
            guest,
        };
        let deadline = Instant::now() + CONNECT_WITHIN;
        let c = Box::new(Connection::from_host(key, stream, deadline));
        // There is room: a place has just become free. The port is not in use.
        let Ok(token) = self.table.insert(Entry::Connection(c)) else {
            return;
        };
        self.rename(token, events);
        self.remind(deadline);
        self.table.enqueue(token);
    }

    /// Has the stream's events carry `token` from now on.
    fn rename(&mut self, token: Token, events: &mut Registrar<'_>) {
        let renamed = self
            .table
            .get(token)
            .and_then(|e| e.stream())
            .map(|s| events.modify(s, token, interest(false)));
        if !matches!(renamed, Some(Ok(()))) {
            self.end(token, false);
        }
    }

    /// The guest asks for a connection.
    pub fn connect_to_host(&mut self, request: &Header) {
        let deadline = Instant::now() + CONNECT_WITHIN;
        let c = Box::new(Connection::from_guest(request, deadline));
        let key = c.key;
        match self.table.insert(Entry::Connection(c)) {
            Ok(token) => {
                self.remind(deadline);
                let question = BrokerRequest {
                    cookie: token.0,
                    port: key.host,
                }
                .encode();
                let asked = self.broker.as_mut().map(|b| b.write(&question));
                if !matches!(asked, Some(Ok(n)) if n == question.len()) {
                    self.end(token, true);
                }
            }
            Err(_) => self.reset(HOST_CID, key),
        }
    }

    fn accept_broker(&mut self, events: &mut Registrar<'_>) {
        for _ in 0..PER_WAKE {
            let Ok((stream, _)) = self.broker_listener.accept() else {
                return;
            };
            if stream.set_nonblocking(true).is_ok()
                && events.add(&stream, token::BROKER, Readiness::IN).is_ok()
            {
                self.lose_broker(events);
                self.broker = Some(stream);
            }
        }
    }

    /// Questions to a broker that is gone stay unanswered.
    fn lose_broker(&mut self, events: &mut Registrar<'_>) {
        let Some(broker) = self.broker.take() else { return };
        let _ = events.remove(&broker);
        let brokering = |e: &Entry| matches!(e, Entry::Connection(c) if c.state == State::Brokering);
        let waiting: Vec<_> = self
            .table
            .iter()
            .filter(|(_, e)| brokering(e))
            .map(|(t, _)| t)
            .collect();
        waiting.into_iter().for_each(|t| self.end(t, true));
    }

    fn take_answers(&mut self, events: &mut Registrar<'_>) {
        for _ in 0..PER_WAKE {
            let Some(broker) = &self.broker else { return };
            match receive_reply(broker) {
                Ok(Some((reply, socket))) => {
                    let socket = socket.filter(|_| reply.status == 0);
                    self.brokered(Token(reply.cookie), socket, events);
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return,
                Ok(None) | Err(_) => return self.lose_broker(events),
            }
        }
    }

    fn brokered(&mut self, token: Token, socket: Option<OwnedFd>, events: &mut Registrar<'_>) {
        match self.table.connection(token) {
            Some(c) if c.state == State::Brokering => {}
            _ => return,
        }
        let stream = socket
            .map(UnixStream::from)
            .filter(|s| s.set_nonblocking(true).is_ok() && events.add(s, token, interest(false)).is_ok());
        self.with_connection(token, events, |c| {
            c.brokered(stream.ok_or(Over)?);
            Ok(())
        });
    }

    /// Has the timer fire at `at`, or earlier.
    pub fn remind(&mut self, at: Instant) {
        if self.timer_at.is_some_and(|t| t <= at) {
            return;
        }
        if self
            .timer
            .set(at.saturating_duration_since(Instant::now()))
            .is_ok()
        {
            self.timer_at = Some(at);
        }
    }

    fn end_overdue(&mut self) {
        if !self.timer.take() {
            return;
        }
        self.timer_at = None;
        let now = Instant::now();
        let overdue = |e: &Entry| e.deadline().is_some_and(|d| d <= now);
        let late: Vec<_> = self
            .table
            .iter()
            .filter(|(_, e)| overdue(e))
            .map(|(t, _)| t)
            .collect();
        late.into_iter().for_each(|t| self.end(t, true));
        if let Some(next) = self.table.iter().filter_map(|(_, e)| e.deadline()).min() {
            self.remind(next);
        }
    }
}

/// The port in `CONNECT <port>`.
fn parse_greeting(line: &[u8]) -> Option<u32> {
    let port = std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?;
    // A sign is no part of a port.
    port.bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| port.parse().ok())
        .flatten()
}

const _: () = assert!((BUFFER as usize) < MAX_BUFFERED);
