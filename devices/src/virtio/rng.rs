//! Entropy device (virtio 1.2 §5.4): gives the host's random bytes to the guest.

use std::io;

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestMemoryMmap};

use super::core::RING_FEATURES;
use super::ring::{Budget, Chain, MAX_SEGMENTS, Serve};
use super::{
    ActivateError, Activation, ActiveQueue, DeviceKind, HandlerError, QueueHandler, Stopped, VirtioDevice,
};
use crate::event::{Readiness, Registrar, Token};
use crate::limit::{DeviceLimits, Limiter, Limits, Path};
use crate::spec::{BuildEnv, BuildError, DeviceSpec, SaveError, Section, Versioned};
use crate::sys::getrandom;

/// The most that one request gets (bytes). A driver asks again for more.
pub const MAX_REQUEST: u32 = 64 * 1024;
const QUEUE_SIZE: u16 = 64;
const CHAINS_PER_WAKE: u32 = 16;
const PIECE: usize = 256;
const QUEUE: Token = Token(0);
const TIMER: Token = Token(1);

/// An entropy device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngSpec {
    /// How much it gives.
    pub limits: Limits,
}

/// The device's saved state: it has none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {}

impl Versioned for RngState {
    const NAME: &'static str = "virtio-rng";
    const VERSION: u32 = 1;
}

impl DeviceSpec for RngSpec {
    type State = RngState;

    fn build(
        &self,
        env: &mut BuildEnv,
        _saved: Option<RngState>,
    ) -> Result<Box<dyn VirtioDevice>, BuildError> {
        let cell = env.limit("entropy device", DeviceLimits::All(self.limits))?;
        Ok(Box::new(Rng {
            limiter: Some(Limiter::new(cell, Path::First)),
        }))
    }
}

struct Rng {
    /// With the handler while the device is active.
    limiter: Option<Limiter>,
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, mut a: Activation) -> Result<Box<dyn QueueHandler>, ActivateError> {
        let queue = a
            .queues
            .pop()
            .ok_or(ActivateError::MissingQueue { needed: 1, got: 0 })?;
        let limiter = self.limiter.take().ok_or(ActivateError::BackendGone)?;
        Ok(Box::new(RngHandler {
            queue,
            activation: a,
            filler: Filler { limiter },
        }))
    }

    fn deactivate(&mut self, stopped: Stopped) {
        if let Ok(limiter) = stopped.backend.downcast::<Limiter>() {
            self.limiter = Some(*limiter);
        }
    }

    fn save(&self) -> Result<Section, SaveError> {
        Section::encode(&RngState {})
    }
}

struct RngHandler {
    queue: ActiveQueue,
    /// Without its queue.
    activation: Activation,
    filler: Filler,
}

impl QueueHandler for RngHandler {
    fn register(&mut self, events: &mut Registrar<'_>) -> io::Result<()> {
        events.add(&*self.queue.notify, QUEUE, Readiness::IN)?;
        self.filler.limiter.register(events, TIMER)
    }

    fn unregister(&mut self, events: &mut Registrar<'_>) {
        // Fails only when it was not registered.
        let _ = events.remove(&*self.queue.notify);
        self.filler.limiter.unregister(events);
    }

    fn handle(
        &mut self,
        token: Token,
        _ready: Readiness,
        events: &mut Registrar<'_>,
    ) -> Result<(), HandlerError> {
        let limiter = &mut self.filler.limiter;
        match token {
            QUEUE => self.queue.clear_notification(),
            TIMER => limiter.woken(),
            Token::LIMITS => limiter.register(events, TIMER).map_err(HandlerError::limits)?,
            _ => return Ok(()),
        }
        limiter.begin();
        let Activation {
            memory, interrupt, ..
        } = &self.activation;
        let mut budget = Budget::new(CHAINS_PER_WAKE, u64::MAX);
        self.queue
            .drain(memory, &**interrupt, &mut budget, &mut self.filler)
    }

    fn stop(self: Box<Self>) -> Stopped {
        Stopped {
            queues: vec![self.queue],
            backend: Box::new(self.filler.limiter),
        }
    }
}

/// Serves requests.
struct Filler {
    limiter: Limiter,
}

impl Serve for Filler {
    fn is_ready(&mut self) -> bool {
        self.limiter.admits()
    }

    fn serve(&mut self, memory: &GuestMemoryMmap, chain: Chain<'_>, _: &mut Budget) -> Option<u32> {
        let written = fill(memory, chain);
        self.limiter.count(u64::from(written));
        Some(written)
    }
}

/// Fills the writable buffers of a chain; returns how many bytes were written. A buffer outside of memory ends it.
fn fill(memory: &GuestMemoryMmap, chain: Chain<'_>) -> u32 {
    let mut written = 0;
    let mut piece = [0; PIECE];
    for d in chain.take(MAX_SEGMENTS).filter(|d| d.is_write_only()) {
        let (mut addr, mut left) = (d.addr().0, d.len().min(MAX_REQUEST - written));
        while left > 0 {
            let n = left.min(PIECE as u32);
            // Blocks only before the host's generator was seeded once; then the driver gets less and asks again.
            let Ok(n) = getrandom(&mut piece[..n as usize]) else {
                return written;
            };
            if n == 0
                || memory
                    .write_slice(&piece[..n], vm_memory::GuestAddress(addr))
                    .is_err()
            {
                return written;
            }
            let n = n as u32;
            // A buffer inside of memory does not wrap around.
            addr = addr.saturating_add(u64::from(n));
            left -= n;
            written += n;
        }
    }
    written
}

#[cfg(test)]
#[path = "rng_tests.rs"]
mod tests;
