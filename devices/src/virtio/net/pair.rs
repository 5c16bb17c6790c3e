//! A receive and a transmit queue, and the queue of the TAP that they belong to.

use std::sync::Arc;

use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;

use super::super::ring::Budget;
use super::super::{ActiveQueue, HandlerError, Interrupt};
use super::HEADER;
use super::receive::{Received, Receiver};
use super::tap::Tap;
use super::transmit::{Sent, Transmitter};
use crate::limit::Limiter;

const PACKETS_PER_WAKE: u32 = 256;
const BYTES_PER_WAKE: u64 = 4 << 20;

/// One pair.
pub struct Pair {
    pub rx: ActiveQueue,
    pub tx: ActiveQueue,
    pub tap: Tap,
    pub receiver: Receiver,
    pub transmitter: Transmitter,
    /// The TAP may have packets.
    pub readable: bool,
    /// The TAP has refused a packet, and has not yet said that it takes more.
    pub busy: bool,
}

/// Whether the interface is there still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    There,
    /// The host has removed it.
    Lost,
}

impl Pair {
    /// A pair whose TAP may have packets already.
    pub fn new(rx: ActiveQueue, tx: ActiveQueue, tap: Tap, features: u64, mtu: u16) -> Self {
        Self {
            rx,
            tx,
            tap,
            receiver: Receiver::new(features, mtu),
            transmitter: Transmitter::new(features),
            readable: true,
            busy: false,
        }
    }

    /// Takes packets from the TAP to the guest, as long as there are some and the guest has room for them.
    pub fn receive(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &Arc<dyn Interrupt>,
        limiter: &mut Limiter,
    ) -> Result<Wire, HandlerError> {
        let mut budget = Budget::new(PACKETS_PER_WAKE, BYTES_PER_WAKE);
        let before = self.rx.queue.next_used();
        let mut wire = Wire::There;
        limiter.begin();
        while self.readable {
            if budget.is_spent() {
                self.rx.rearm();
                break;
            }
            if !limiter.admits() {
                break;
            }
            budget.chains -= 1;
            match self.receiver.receive(&self.tap, memory, &mut self.rx)? {
                // Nothing as yet, when it is held.
                Received::Packet(0) => {}
                Received::Packet(n) => {
                    budget.charge(n as u64);
                    limiter.count(n as u64 - HEADER as u64);
                }
                Received::Empty => self.readable = false,
                Received::Starved if self.rx.allow_notifications(memory)? => {}
                Received::Starved => break,
                Received::Lost => {
                    self.readable = false;
                    wire = Wire::Lost;
                }
            }
        }
        self.rx.signal_since(memory, &**interrupt, before)?;
        Ok(wire)
    }

    /// Takes the guest's packets to the TAP, as long as there are some and it takes them.
    pub fn transmit(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &Arc<dyn Interrupt>,
        limiter: &mut Limiter,
    ) -> Result<(), HandlerError> {
        self.tx.clear_notification();
        if self.busy {
            return Ok(());
        }
        self.tx.suppress_notifications(memory)?;
        limiter.begin();
        let mut budget = Budget::new(PACKETS_PER_WAKE, BYTES_PER_WAKE);
        let before = self.tx.queue.next_used();
        loop {
            if budget.is_spent() {
                self.tx.rearm();
                break;
            }
            // Asked for no notification, the guest leaves it to the timer.
            if !limiter.admits() {
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
            limiter.count(self.transmitter.last_len());
            self.tx.push_used_together(memory, [(head, 0)].into_iter())?;
        }
        self.tx.signal_since(memory, &**interrupt, before)
    }
}
