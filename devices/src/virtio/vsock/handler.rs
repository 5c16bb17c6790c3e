//! The queues of a socket device.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::GuestMemoryMmap;

use super::super::ring::{Budget, Buffers, Chain, MAX_SEGMENTS, Serve, copy_from, copy_to};
use super::super::{ActiveQueue, HandlerError, Interrupt, QueueHandler, Stopped};
use super::connection::Key;
use super::hub::{CLOSE_WITHIN, Hub, token};
use super::packet::{HEADER, HOST_CID, Header, Op, TYPE_STREAM};
use crate::GuestMemory;
use crate::event::{Readiness, Registrar, Token};
use crate::sys::IoVecs;

const RX: Token = Token(0);
const TX: Token = Token(1);
const EVENT: Token = Token(2);

const PACKETS_PER_WAKE: u32 = 128;
const BYTES_PER_WAKE: u64 = 2 << 20;

/// Serves the three queues.
pub struct VsockHandler {
    rx: ActiveQueue,
    tx: ActiveQueue,
    event: ActiveQueue,
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    hub: Hub,
    scratch: Scratch,
}

/// Reused from packet to packet.
struct Scratch {
    buffers: Buffers,
    vecs: IoVecs,
}

/// Serves the guest's packets.
struct Sender<'a, 'e> {
    hub: &'a mut Hub,
    scratch: &'a mut Scratch,
    events: &'a mut Registrar<'e>,
}

impl Serve for Sender<'_, '_> {
    fn is_ready(&mut self) -> bool {
        self.hub.limiter.admits()
    }

    fn serve(&mut self, memory: &GuestMemoryMmap, chain: Chain<'_>, budget: &mut Budget) -> Option<u32> {
        let bytes = from_guest(self.hub, self.scratch, memory, chain, budget, self.events);
        self.hub.limiter.count(bytes);
        Some(0)
    }
}

impl VsockHandler {
    /// A handler of the three queues: to the guest, from it, and events.
    pub fn new(
        memory: GuestMemory,
        interrupt: Arc<dyn Interrupt>,
        [rx, tx, event]: [ActiveQueue; 3],
        hub: Hub,
    ) -> Self {
        let scratch = Scratch {
            buffers: Buffers::new(),
            vecs: IoVecs::with_capacity(MAX_SEGMENTS + 16),
        };
        Self {
            rx,
            tx,
            event,
            memory,
            interrupt,
            hub,
            scratch,
        }
    }

    fn serve_tx(&mut self, events: &mut Registrar<'_>) -> Result<(), HandlerError> {
        let mut budget = Budget::new(PACKETS_PER_WAKE, BYTES_PER_WAKE);
        let mut sender = Sender {
            hub: &mut self.hub,
            scratch: &mut self.scratch,
            events,
        };
        self.tx
            .drain(&self.memory, &*self.interrupt, &mut budget, &mut sender)
    }

    /// Tells the guest what there is to tell, as long as it has given buffers for it.
    fn serve_rx(&mut self) -> Result<(), HandlerError> {
        let memory = &*self.memory;
        let mut budget = Budget::new(PACKETS_PER_WAKE, BYTES_PER_WAKE);
        let mut served = false;
        while self.hub.has_something() {
            if budget.is_spent() {
                self.rx.rearm();
                break;
            }
            if !self.hub.limiter.admits() {
                break;
            }
            budget.chains -= 1;
            let Some(chain) = self.rx.pop(memory)? else {
                if self.rx.allow_notifications(memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            match to_guest(&mut self.hub, &mut self.scratch, memory, chain) {
                Some(written) => {
                    budget.charge(u64::from(written));
                    self.hub
                        .limiter
                        .count(u64::from(written).saturating_sub(HEADER as u64));
                    self.rx.push_used(memory, head, written)?;
                    served = true;
                }
                None => self.rx.unpop(),
            }
        }
        if served {
            self.rx.signal(memory, &*self.interrupt)
        } else {
            Ok(())
        }
    }

    /// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (virtio 1.2 §5.10.6.7), once there is a buffer for it.
    fn announce(&mut self) -> Result<(), HandlerError> {
        self.event.clear_notification();
        if !self.hub.announce_reset {
            return Ok(());
        }
        let memory = &*self.memory;
        let Some(chain) = self.event.pop(memory)? else {
            if self.event.allow_notifications(memory)? {
                self.event.rearm();
            }
            return Ok(());
        };
        let head = chain.head_index();
        let event = [0; 4];
        let written = self.scratch.buffers.collect(chain).is_ok()
            && copy_to(memory, self.scratch.buffers.writable(), 0, &event);
        self.hub.announce_reset = !written;
        self.event
            .push_used(memory, head, if written { event.len() as u32 } else { 0 })?;
        if !written {
            self.event.rearm();
        }
        self.event.signal(memory, &*self.interrupt)
    }
}

/// Fills one chain with the next packet; returns its length. Zero: the chain is of no use. `None`: there is nothing to
/// say after all, and the chain is untouched.
fn to_guest(hub: &mut Hub, scratch: &mut Scratch, memory: &GuestMemoryMmap, chain: Chain<'_>) -> Option<u32> {
    let Scratch { buffers, vecs } = scratch;
    let usable = buffers.collect(chain).is_ok()
        && buffers.writable_len() > HEADER as u64
        && buffers.are_inside(memory);
    if !usable {
        return Some(0);
    }
    if let Some(reset) = hub.resets.pop_front() {
        return Some(if copy_to(memory, buffers.writable(), 0, &reset.encode()) {
            HEADER as u32
        } else {
            0
        });
    }
    let room = (
        buffers.writable(),
        HEADER as u64,
        buffers.writable_len() - HEADER as u64,
    );
    let packet = hub.next_packet(memory, room, vecs)?;
    let written = copy_to(memory, buffers.writable(), 0, &packet.encode());
    Some(if written { HEADER as u32 + packet.len } else { 0 })
}

/// Does what one packet of the guest asks for; returns how much data it carries. What breaks the rules is answered with a
/// reset.
fn from_guest(
    hub: &mut Hub,
    scratch: &mut Scratch,
    memory: &GuestMemoryMmap,
    chain: Chain<'_>,
    budget: &mut Budget,
    events: &mut Registrar<'_>,
) -> u64 {
    let Scratch { buffers, vecs } = scratch;
    let mut header = [0; HEADER];
    if buffers.collect(chain).is_err() || !copy_from(memory, buffers.readable(), 0, &mut header) {
        // Nobody could be told.
        return 0;
    }
    let h = Header::decode(&header);
    let key = Key {
        host: h.dst_port,
        guest: h.src_port,
    };
    let connection = hub.table.find(key);
    let fits = u64::from(h.len) <= buffers.readable_len() - HEADER as u64;
    let addressed = h.src_cid == hub.cid() && h.dst_cid == HOST_CID && h.kind == TYPE_STREAM;
    let op = h.operation().filter(|_| addressed && fits);
    match (op, connection) {
        (Some(Op::Reset), Some(token)) => hub.end(token, false),
        (Some(Op::Reset), None) => {}
        (Some(Op::Request), None) => hub.connect_to_host(&h),
        (None | Some(Op::Request), Some(token)) if addressed => hub.end(token, true),
        (Some(op), Some(token)) => {
            budget.charge(u64::from(h.len));
            hub.with_connection(token, events, |c| {
                if op == Op::Response {
                    return c.accepted(&h);
                }
                c.update_credit(&h);
                match op {
                    Op::Shutdown => c.guest_shut_down(h.flags, Instant::now() + CLOSE_WITHIN),
                    Op::Data => c.receive(memory, buffers.readable(), (HEADER as u64, h.len), vecs),
                    Op::CreditRequest => {
                        c.owe_credit_update();
                        Ok(())
                    }
                    _ => Ok(()),
                }
            });
        }
        // No such connection, or not addressed to one. A reset is not answered.
        _ if h.operation() == Some(Op::Reset) => {}
        _ => hub.reset(h.dst_cid, key),
    }
    buffers.readable_len() - HEADER as u64
}

impl QueueHandler for VsockHandler {
    fn register(&mut self, events: &mut Registrar<'_>) -> io::Result<()> {
        for (queue, token) in [(&self.rx, RX), (&self.tx, TX), (&self.event, EVENT)] {
            events.add(&*queue.notify, token, Readiness::IN)?;
        }
        self.hub.register(events)
    }

    fn unregister(&mut self, events: &mut Registrar<'_>) {
        for queue in [&self.rx, &self.tx, &self.event] {
            // Fails only when it was not registered.
            let _ = events.remove(&*queue.notify);
        }
        self.hub.unregister(events);
    }

    fn handle(
        &mut self,
        token: Token,
        ready: Readiness,
        events: &mut Registrar<'_>,
    ) -> Result<(), HandlerError> {
        self.hub.limiter.begin();
        match token {
            RX => self.rx.clear_notification(),
            TX => {
                self.tx.clear_notification();
                self.serve_tx(events)?;
            }
            token::LIMITER => {
                self.hub.limiter.woken();
                self.serve_tx(events)?;
            }
            Token::LIMITS => {
                let limiter = &mut self.hub.limiter;
                limiter
                    .register(events, token::LIMITER)
                    .map_err(HandlerError::limits)?;
                self.serve_tx(events)?;
            }
            EVENT => self.announce()?,
            _ => self.hub.serve(token, ready, events),
        }
        self.serve_rx()
    }

    fn stop(self: Box<Self>) -> Stopped {
        Stopped {
            queues: vec![self.rx, self.tx, self.event],
            backend: Box::new(self.hub),
        }
    }
}
