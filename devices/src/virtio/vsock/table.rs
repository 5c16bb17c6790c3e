//! All connections of a device, by ports and by epoll token, with the host's half-open ones among them.

use std::collections::{HashMap, VecDeque};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::connection::{Connection, Key};
use crate::event::Token;

/// The most connections, half-open ones included.
pub const MAX_CONNECTIONS: usize = 1024;
/// The most host programs that have connected and not yet said to which port.
pub const MAX_GREETINGS: usize = 64;
/// Tokens from here on stand for entries of the table.
const FIRST_TOKEN: u32 = 1 << 31;
const SLOT_BITS: u32 = 10;
const _: () = assert!(MAX_CONNECTIONS == 1 << SLOT_BITS);

/// The host's own ports for connections that it makes begin here, above those that people choose.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// One entry of the table.
pub enum Entry {
    /// A host program that has yet to say to which port it wants to connect, and until when.
    Greeting(UnixStream, Instant),
    /// A connection.
    Connection(Box<Connection>),
}

impl Entry {
    /// The host's socket.
    pub fn stream(&self) -> Option<&UnixStream> {
        match self {
            Entry::Greeting(s, _) => Some(s),
            Entry::Connection(c) => c.stream.as_ref(),
        }
    }

    /// When it is ended unless something happens.
    pub fn deadline(&self) -> Option<Instant> {
        match self {
            Entry::Greeting(_, d) => Some(*d),
            Entry::Connection(c) => c.deadline,
        }
    }
}

#[derive(Default)]
struct Slot {
    /// Told apart, in tokens, from the slot's earlier entries.
    generation: u32,
    entry: Option<Entry>,
}

/// The table.
#[derive(Default)]
pub struct Table {
    slots: Vec<Slot>,
    free: Vec<usize>,
    by_key: HashMap<Key, Token>,
    /// Connections that may have something for the guest, each at most once.
    ready: VecDeque<Token>,
    greetings: usize,
    next_port: u32,
}

fn slot_of(token: Token) -> Option<(usize, u32)> {
    let n = token.0.checked_sub(FIRST_TOKEN)?;
    Some(((n & (MAX_CONNECTIONS as u32 - 1)) as usize, n >> SLOT_BITS))
}

impl Table {
    /// No place is left.
    pub fn is_full(&self) -> bool {
        self.free.is_empty() && self.slots.len() == MAX_CONNECTIONS
    }

    /// A host program may still connect.
    pub fn has_room_for_greeting(&self) -> bool {
        self.greetings < MAX_GREETINGS && !self.is_full()
    }

    /// Adds an entry and names it; gives it back when there is no room, or its ports are in use.
    pub fn insert(&mut self, entry: Entry) -> Result<Token, Entry> {
        if self.is_full() || matches!(&entry, Entry::Connection(c) if self.by_key.contains_key(&c.key)) {
            return Err(entry);
        }
        let at = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        let slot = &mut self.slots[at];
        slot.generation = (slot.generation + 1) & ((1 << (31 - SLOT_BITS)) - 1);
        let token = Token(FIRST_TOKEN | slot.generation << SLOT_BITS | at as u32);
        match &entry {
            Entry::Greeting(..) => self.greetings += 1,
            Entry::Connection(c) => _ = self.by_key.insert(c.key, token),
        }
        slot.entry = Some(entry);
        Ok(token)
    }

    /// Takes an entry out.
    pub fn remove(&mut self, token: Token) -> Option<Entry> {
        let at = self.at(token)?;
        let entry = self.slots[at].entry.take()?;
        self.free.push(at);
        match &entry {
            Entry::Greeting(..) => self.greetings -= 1,
            Entry::Connection(c) => _ = self.by_key.remove(&c.key),
        }
        Some(entry)
    }

    fn at(&self, token: Token) -> Option<usize> {
        let (at, generation) = slot_of(token)?;
        let slot = self.slots.get(at)?;
        (slot.generation == generation && slot.entry.is_some()).then_some(at)
    }

    /// The entry that a token names, if it is still there.
    pub fn get(&mut self, token: Token) -> Option<&mut Entry> {
        let at = self.at(token)?;
        self.slots[at].entry.as_mut()
    }

    /// The connection that a token names.
    pub fn connection(&mut self, token: Token) -> Option<&mut Connection> {
        match self.get(token)? {
            Entry::Connection(c) => Some(c),
            Entry::Greeting(..) => None,
        }
    }

    /// The connection between two ports.
    pub fn find(&self, key: Key) -> Option<Token> {
        self.by_key.get(&key).copied()
    }

    /// Notes that a connection has something for the guest, if it has.
    pub fn enqueue(&mut self, token: Token) {
        if let Some(c) = self.connection(token)
            && !c.queued
            && c.has_something()
        {
            c.queued = true;
            self.ready.push_back(token);
        }
    }

    /// The next connection that may have something for the guest.
    pub fn next_ready(&mut self) -> Option<Token> {
        while let Some(token) = self.ready.pop_front() {
            if let Some(c) = self.connection(token) {
                c.queued = false;
                return Some(token);
            }
        }
        None
    }

    /// Some connection may have something for the guest.
    pub fn any_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// A port of the host for a connection to `guest` that is not in use.
    pub fn free_host_port(&mut self, guest: u32) -> u32 {
        loop {
            // There are more ports than connections.
            let host = FIRST_HOST_PORT + self.next_port;
            self.next_port = (self.next_port + 1) % FIRST_HOST_PORT;
            if !self.by_key.contains_key(&Key { host, guest }) {
                return host;
            }
        }
    }

    /// All entries.
    pub fn iter(&self) -> impl Iterator<Item = (Token, &Entry)> {
        self.slots.iter().enumerate().filter_map(|(at, s)| {
            let token = Token(FIRST_TOKEN | s.generation << SLOT_BITS | at as u32);
            s.entry.as_ref().map(|e| (token, e))
        })
    }
}
