//! The data half of a network device.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::QueueT;

use super::super::ring::Budget;
use super::super::{ActiveQueue, HandlerError, Interrupt, QueueHandler, Stopped};
use super::receive::{Received, Receiver};
use super::tap::Tap;
use super::transmit::{Sent, Transmitter};
use super::{Backend, HEADER, Link, feature};
use crate::GuestMemory;
use crate::event::{Readiness, Registrar, Token};
use crate::limit::Limiter;

const RX: Token = Token(0);
const TX: Token = Token(1);
const TAP: Token = Token(2);
const RX_TIMER: Token = Token(3);
const TX_TIMER: Token = Token(4);

const PACKETS_PER_WAKE: u32 = 256;
const BYTES_PER_WAKE: u64 = 4 << 20;

/// The TAP is watched edge-triggered: what it is ready for is remembered, so that a lack of buffers costs no system
/// call. It says that it takes packets again only after it has refused one.
const WATCHED: Readiness = Readiness::IN
    .union(Readiness::OUT)
    .union(Readiness::EDGE_TRIGGERED);

/// Serves both queues and the TAP.
pub struct NetHandler {
    rx: ActiveQueue,
    tx: ActiveQueue,
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    tap: Tap,
    rx_limiter: Limiter,
    tx_limiter: Limiter,
    link: Arc<Link>,
    receiver: Receiver,
    transmitter: Transmitter,
    features: u64,
    /// The TAP may have packets.
    readable: bool,
    /// The TAP has refused a packet, and has not yet said that it takes more.
    busy: bool,
}

impl NetHandler {
    /// A handler of the receive and the transmit queue.
    pub fn new(
        memory: GuestMemory,
        interrupt: Arc<dyn Interrupt>,
        (rx, tx): (ActiveQueue, ActiveQueue),
        Backend { tap, limiters }: Backend,
        features: u64,
        mtu: u16,
        link: Arc<Link>,
    ) -> Self {
        let [rx_limiter, tx_limiter] = limiters;
        Self {
            rx,
            tx,
            memory,
            interrupt,
            tap,
            rx_limiter,
            tx_limiter,
            link,
            receiver: Receiver::new(features, mtu),
            transmitter: Transmitter::new(features),
            features,
            readable: true,
            busy: false,
        }
    }

    fn receive(&mut self, events: &mut Registrar<'_>) -> Result<(), HandlerError> {
        let memory = &*self.memory.clone();
        let mut budget = Budget::new(PACKETS_PER_WAKE, BYTES_PER_WAKE);
        let before = self.rx.queue.next_used();
        self.rx_limiter.begin();
        while self.readable {
            if budget.is_spent() {
                self.rx.rearm();
                break;
            }
            if !self.rx_limiter.admits() {
                break;
            }
            budget.chains -= 1;
            match self.receiver.receive(&self.tap, memory, &mut self.rx)? {
                // Nothing as yet, when it is held.
                Received::Packet(0) => {}
                Received::Packet(n) => {
                    budget.charge(n as u64);
                    self.rx_limiter.count(n as u64 - HEADER as u64);
                }
                Received::Empty => self.readable = false,
                Received::Starved if self.rx.allow_notifications(memory)? => {}
                Received::Starved => break,
                Received::Lost => self.lose_tap(events),
            }
        }
        self.rx.signal_since(&self.memory, &*self.interrupt, before)
    }

    /// The host has removed the interface: the guest sees the cable pulled, what it sends is dropped.
    fn lose_tap(&mut self, events: &mut Registrar<'_>) {
        (self.readable, self.busy) = (false, false);
        // Fails only when the kernel has done so already.
        let _ = events.remove(&self.tap);
        // What waited for the TAP is dropped now.
        self.tx.rearm();
        self.link.lost.store(true, Ordering::SeqCst);
        if self.features & feature::STATUS != 0 {
            self.interrupt.signal_config();
        }
    }

    fn transmit(&mut self) -> Result<(), HandlerError> {
        let memory = &*self.memory;
        self.tx.clear_notification();
        if self.busy {
            return Ok(());
        }
        self.tx.suppress_notifications(memory)?;
        self.tx_limiter.begin();
        let mut budget = Budget::new(PACKETS_PER_WAKE, BYTES_PER_WAKE);
        let before = self.tx.queue.next_used();
        loop {
            if budget.is_spent() {
                self.tx.rearm();
                break;
            }
            // Asked for no notification, the guest leaves it to the timer.
            if !self.tx_limiter.admits() {
                break;
            }
            budget.chains -= 1;
            let Some(chain) = self.tx.pop(memory)? else {
                if self.tx.allow_notifications(memory)? {
                    self.tx.suppress_notifications(memory)?;
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            if self.transmitter.send(&self.tap, memory, chain, &mut budget) == Sent::Busy {
                // The TAP tells when it takes more.
                self.tx.unpop();
                self.busy = true;
                break;
            }
            self.tx_limiter.count(self.transmitter.last_len());
            self.tx.push_used_together(memory, [(head, 0)].into_iter())?;
        }
        self.tx.signal_since(memory, &*self.interrupt, before)
    }
}

impl QueueHandler for NetHandler {
    fn register(&mut self, events: &mut Registrar<'_>) -> io::Result<()> {
        events.add(&*self.rx.notify, RX, Readiness::IN)?;
        events.add(&*self.tx.notify, TX, Readiness::IN)?;
        events.add(&self.tap, TAP, WATCHED)?;
        self.rx_limiter.register(events, RX_TIMER)?;
        self.tx_limiter.register(events, TX_TIMER)
    }

    fn unregister(&mut self, events: &mut Registrar<'_>) {
        // Each fails only when it was not registered.
        let _ = events.remove(&*self.rx.notify);
        let _ = events.remove(&*self.tx.notify);
        let _ = events.remove(&self.tap);
        self.rx_limiter.unregister(events);
        self.tx_limiter.unregister(events);
    }

    fn handle(
        &mut self,
        token: Token,
        ready: Readiness,
        events: &mut Registrar<'_>,
    ) -> Result<(), HandlerError> {
        match token {
            RX => {
                self.rx.clear_notification();
                self.receive(events)
            }
            TX => self.transmit(),
            RX_TIMER => {
                self.rx_limiter.woken();
                self.receive(events)
            }
            TX_TIMER => {
                self.tx_limiter.woken();
                self.transmit()
            }
            Token::LIMITS => {
                self.rx_limiter
                    .register(events, RX_TIMER)
                    .and_then(|()| self.tx_limiter.register(events, TX_TIMER))
                    .map_err(HandlerError::limits)?;
                self.transmit()?;
                self.receive(events)
            }
            TAP => {
                if ready.contains(Readiness::OUT) && std::mem::take(&mut self.busy) {
                    self.transmit()?;
                }
                self.readable |= ready.intersects(Readiness::IN | Readiness::ERROR | Readiness::HANG_UP);
                self.receive(events)
            }
            _ => Ok(()),
        }
    }

    fn stop(mut self: Box<Self>) -> Stopped {
        self.receiver.put_back(&mut self.rx);
        Stopped {
            queues: vec![self.rx, self.tx],
            backend: Box::new(Backend {
                tap: self.tap,
                limiters: [self.rx_limiter, self.tx_limiter],
            }),
        }
    }
}
