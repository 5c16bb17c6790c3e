//! The data half of a network device.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::super::ring::{Budget, Buffers};
use super::super::{ActiveQueue, HandlerError, Interrupt, MAX_QUEUES, QueueHandler, Stopped};
use super::pair::{Pair, Wire};
use super::tap::Tap;
use super::{Backend, Link, control, feature};
use crate::GuestMemory;
use crate::event::{Readiness, Registrar, Token};
use crate::limit::Limiter;

/// Tokens of a pair: its position times [`PER_PAIR`] and one of these.
const RX: u32 = 0;
const TX: u32 = 1;
const TAP: u32 = 2;
const PER_PAIR: u32 = 4;
/// Tokens of the whole device.
const CONTROL: Token = Token(1000);
const RX_TIMER: Token = Token(1001);
const TX_TIMER: Token = Token(1002);
const _: () = assert!(MAX_QUEUES as u32 * PER_PAIR < CONTROL.0);

const COMMANDS_PER_WAKE: u32 = 16;

/// The TAP is watched edge-triggered: what it is ready for is remembered, so that a lack of buffers costs no system
/// call. It says that it takes packets again only after it has refused one.
const WATCHED: Readiness = Readiness::IN
    .union(Readiness::OUT)
    .union(Readiness::EDGE_TRIGGERED);

/// Queues as they were set up: pairs in order, and the control queue.
pub struct Queues {
    pub pairs: Vec<(ActiveQueue, ActiveQueue)>,
    pub control: Option<ActiveQueue>,
    /// What the driver has set up and this device has no use for.
    pub others: Vec<ActiveQueue>,
}

/// Serves all queues and the TAP.
pub struct NetHandler {
    pairs: Vec<Pair>,
    /// How many pairs are in use: the first is from the start, the others when the driver says so.
    active: usize,
    control: Option<ActiveQueue>,
    others: Vec<ActiveQueue>,
    /// Queues of the TAP that no pair belongs to.
    spare: Vec<Tap>,
    buffers: Buffers,
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    rx_limiter: Limiter,
    tx_limiter: Limiter,
    link: Arc<Link>,
    features: u64,
}

impl NetHandler {
    /// A handler of `queues`; there is at least one pair, and a queue of the TAP for each.
    pub fn new(
        memory: GuestMemory,
        interrupt: Arc<dyn Interrupt>,
        queues: Queues,
        Backend {
            mut taps,
            active,
            limiters,
        }: Backend,
        features: u64,
        mtu: u16,
        link: Arc<Link>,
    ) -> Self {
        let [rx_limiter, tx_limiter] = limiters;
        let spare = taps.split_off(queues.pairs.len().min(taps.len()));
        let pairs = queues.pairs.into_iter().zip(taps);
        let pairs: Vec<_> = pairs
            .map(|((rx, tx), tap)| Pair::new(rx, tx, tap, features, mtu))
            .collect();
        Self {
            active: active.min(pairs.len()),
            pairs,
            control: queues.control,
            others: queues.others,
            spare,
            buffers: Buffers::new(),
            memory,
            interrupt,
            rx_limiter,
            tx_limiter,
            link,
            features,
        }
    }

    fn receive(&mut self, at: usize, events: &mut Registrar<'_>) -> Result<(), HandlerError> {
        let pair = &mut self.pairs[at];
        let wire = pair.receive(&self.memory, &self.interrupt, &mut self.rx_limiter)?;
        if wire == Wire::Lost {
            self.lose_tap(events);
        }
        Ok(())
    }

    /// The host has removed the interface: the guest sees the cable pulled, what it sends is dropped.
    fn lose_tap(&mut self, events: &mut Registrar<'_>) {
        for pair in &mut self.pairs {
            (pair.readable, pair.busy) = (false, false);
            // Fails only when the kernel has done so already.
            let _ = events.remove(&pair.tap);
            // What waited for the TAP is dropped now.
            pair.tx.rearm();
        }
        if !self.link.lost.swap(true, Ordering::SeqCst) && self.features & feature::STATUS != 0 {
            self.interrupt.signal_config();
        }
    }

    fn transmit(&mut self, at: usize) -> Result<(), HandlerError> {
        self.pairs[at].transmit(&self.memory, &self.interrupt, &mut self.tx_limiter)
    }

    /// Does what can be done for each pair in use.
    fn each(
        &mut self,
        mut f: impl FnMut(&mut Self, usize) -> Result<(), HandlerError>,
    ) -> Result<(), HandlerError> {
        (0..self.active).try_for_each(|at| f(self, at))
    }

    fn serve_control(&mut self, events: &mut Registrar<'_>) -> Result<(), HandlerError> {
        let memory = self.memory.clone();
        let Some(mut queue) = self.control.take() else {
            return Ok(());
        };
        queue.clear_notification();
        let result = self.serve_commands(&mut queue, &memory, events);
        self.control = Some(queue);
        result
    }

    fn serve_commands(
        &mut self,
        queue: &mut ActiveQueue,
        memory: &GuestMemory,
        events: &mut Registrar<'_>,
    ) -> Result<(), HandlerError> {
        let mut budget = Budget::new(COMMANDS_PER_WAKE, u64::MAX);
        while !budget.is_spent() {
            budget.chains -= 1;
            let Some(chain) = queue.pop(memory)? else {
                if queue.allow_notifications(memory)? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            let mut buffers = std::mem::take(&mut self.buffers);
            let mut result = Ok(true);
            let written = control::serve(memory, chain, &mut buffers, |pairs| {
                result = self.use_pairs(pairs.into(), events);
                matches!(result, Ok(true))
            });
            self.buffers = buffers;
            queue.push_used(memory, head, written)?;
            queue.signal(memory, &*self.interrupt)?;
            result?;
        }
        queue.rearm();
        Ok(())
    }

    /// Uses the first `count` pairs from now on. False when there are not as many.
    fn use_pairs(&mut self, count: usize, events: &mut Registrar<'_>) -> Result<bool, HandlerError> {
        if !(1..=self.pairs.len()).contains(&count) {
            return Ok(false);
        }
        for at in (count..self.active).rev() {
            if self.pairs[at].tap.set_attached(false).is_err() {
                return Ok(false);
            }
            self.active = at;
        }
        while self.active < count {
            let at = self.active;
            let pair = &mut self.pairs[at];
            if pair.tap.set_attached(true).is_err() {
                return Ok(false);
            }
            self.active += 1;
            (pair.readable, pair.busy) = (true, false);
            self.receive(at, events)?;
            self.transmit(at)?;
        }
        Ok(true)
    }

    fn serve_pair(
        &mut self,
        at: usize,
        source: u32,
        ready: Readiness,
        events: &mut Registrar<'_>,
    ) -> Result<(), HandlerError> {
        let pair = &mut self.pairs[at];
        match source {
            RX => {
                pair.rx.clear_notification();
                self.receive(at, events)
            }
            TX => self.transmit(at),
            TAP => {
                let writable = ready.contains(Readiness::OUT) && std::mem::take(&mut pair.busy);
                pair.readable |= ready.intersects(Readiness::IN | Readiness::ERROR | Readiness::HANG_UP);
                if writable {
                    self.transmit(at)?;
                }
                self.receive(at, events)
            }
            _ => Ok(()),
        }
    }
}

impl QueueHandler for NetHandler {
    fn register(&mut self, events: &mut Registrar<'_>) -> io::Result<()> {
        for (at, pair) in (0..).step_by(PER_PAIR as usize).zip(&mut self.pairs) {
            events.add(&*pair.rx.notify, Token(at + RX), Readiness::IN)?;
            events.add(&*pair.tx.notify, Token(at + TX), Readiness::IN)?;
            events.add(&pair.tap, Token(at + TAP), WATCHED)?;
        }
        if let Some(control) = &self.control {
            events.add(&*control.notify, CONTROL, Readiness::IN)?;
        }
        let taps = self.pairs.iter_mut().map(|p| &mut p.tap);
        for (at, tap) in taps.chain(&mut self.spare).enumerate() {
            tap.set_attached(at < self.active)?;
        }
        self.rx_limiter.register(events, RX_TIMER)?;
        self.tx_limiter.register(events, TX_TIMER)
    }

    fn unregister(&mut self, events: &mut Registrar<'_>) {
        // Each fails only when it was not registered.
        for pair in &self.pairs {
            let _ = events.remove(&*pair.rx.notify);
            let _ = events.remove(&*pair.tx.notify);
            let _ = events.remove(&pair.tap);
        }
        if let Some(control) = &self.control {
            let _ = events.remove(&*control.notify);
        }
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
            CONTROL => self.serve_control(events),
            RX_TIMER => {
                self.rx_limiter.woken();
                self.each(|net, at| net.receive(at, events))
            }
            TX_TIMER => {
                self.tx_limiter.woken();
                self.each(Self::transmit)
            }
            Token::LIMITS => {
                self.rx_limiter
                    .register(events, RX_TIMER)
                    .and_then(|()| self.tx_limiter.register(events, TX_TIMER))
                    .map_err(HandlerError::limits)?;
                self.each(Self::transmit)?;
                self.each(|net, at| net.receive(at, events))
            }
            Token(n) => {
                let at = (n / PER_PAIR) as usize;
                // A driver may notify, and a detached queue be ready for, what is looked at when it is in use.
                if at < self.active {
                    return self.serve_pair(at, n % PER_PAIR, ready, events);
                }
                if let Some(pair) = self.pairs.get(at) {
                    pair.rx.clear_notification();
                    pair.tx.clear_notification();
                }
                Ok(())
            }
        }
    }

    fn stop(self: Box<Self>) -> Stopped {
        let (mut queues, mut taps) = (Vec::new(), Vec::new());
        for mut pair in self.pairs {
            pair.receiver.put_back(&mut pair.rx);
            queues.extend([pair.rx, pair.tx]);
            taps.push(pair.tap);
        }
        queues.extend(self.control);
        queues.extend(self.others);
        taps.extend(self.spare);
        Stopped {
            queues,
            backend: Box::new(Backend {
                taps,
                active: self.active,
                limiters: [self.rx_limiter, self.tx_limiter],
            }),
        }
    }
}
