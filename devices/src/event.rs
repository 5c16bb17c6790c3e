//! One event loop for a whole VMM: an epoll set whose sources belong to *slots*.
//!
//! Slot 0 is the loop's owner (in the VMM: the control socket, vCPU exits, timers); every activated device's
//! [`QueueHandler`] has a slot of its own. Other threads reach the loop through a [`LoopHandle`]: a vCPU that sees
//! DRIVER_OK attaches a handler, one that sees a device reset detaches it and waits until it has drained.
//!
//! A handler is only ever called from the loop's thread, so handlers need no locks. Lock order: a thread that waits for
//! the loop may hold its device's lock; the loop never takes a device's lock while it serves handlers.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::virtio::{HandlerError, Interrupt, QueueHandler, Stopped};

/// Names one event source within one handler. The handler chooses the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u32);

impl Token {
    /// Comes from no source: the device's limits were changed, see [`crate::limit`].
    pub const LIMITS: Token = Token(u32::MAX);
}

/// What a source is watched for, or has become ready for.
pub type Readiness = EventSet;

/// Adds, changes and removes the event sources of one slot.
pub struct Registrar<'a> {
    epoll: &'a Epoll,
    slot: u32,
}

impl<'a> Registrar<'a> {
    /// A registrar for tests and for owners of an [`Epoll`] of their own.
    pub fn new(epoll: &'a Epoll, slot: u32) -> Self {
        Self { epoll, slot }
    }

    /// Watches `fd` for `interest` (level-triggered unless `EDGE_TRIGGERED` is in it).
    pub fn add(&mut self, fd: &impl AsRawFd, token: Token, interest: Readiness) -> io::Result<()> {
        self.ctl(ControlOperation::Add, fd, token, interest)
    }

    /// Changes what `fd` is watched for. An empty set keeps only errors and hang-up.
    pub fn modify(&mut self, fd: &impl AsRawFd, token: Token, interest: Readiness) -> io::Result<()> {
        self.ctl(ControlOperation::Modify, fd, token, interest)
    }

    /// Stops watching `fd`. An event that was already collected may still be delivered once.
    pub fn remove(&mut self, fd: &impl AsRawFd) -> io::Result<()> {
        self.epoll
            .ctl(ControlOperation::Delete, fd.as_raw_fd(), EpollEvent::default())
    }

    fn ctl(
        &mut self,
        op: ControlOperation,
        fd: &impl AsRawFd,
        token: Token,
        interest: Readiness,
    ) -> io::Result<()> {
        let data = u64::from(self.slot) << 32 | u64::from(token.0);
        self.epoll
            .ctl(op, fd.as_raw_fd(), EpollEvent::new(interest, data))
    }
}

/// Names an attached handler. Never reused within one loop, so a late event of a detached handler reaches nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(u32);

enum Command {
    Attach {
        handler: Box<dyn QueueHandler>,
        interrupt: Arc<dyn Interrupt>,
        done: SyncSender<io::Result<Slot>>,
    },
    Detach {
        slot: Slot,
        done: SyncSender<Option<Stopped>>,
    },
}

/// The loop could not be reached or could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// The loop's thread has ended.
    #[error("the VMM's event loop has ended")]
    Ended,
    /// A handler's event sources could not be registered.
    #[error("registering a device's event sources with epoll failed")]
    Register(#[source] io::Error),
}

/// Reaches a running [`EventLoop`] from other threads.
#[derive(Clone)]
pub struct LoopHandle {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
}

impl LoopHandle {
    /// Hands `handler` to the loop and waits until its sources are registered. A handler that later fails signals
    /// DEVICE_NEEDS_RESET through `interrupt`. Must not be called from the loop's own thread.
    pub fn attach(
        &self,
        handler: Box<dyn QueueHandler>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<Slot, LoopError> {
        self.ask(|done| Command::Attach {
            handler,
            interrupt,
            done,
        })?
        .map_err(LoopError::Register)
    }

    /// Stops the handler in `slot` (it drains what is in flight) and returns what it gave back; `None` when the slot
    /// is empty. Must not be called from the loop's own thread.
    pub fn detach(&self, slot: Slot) -> Result<Option<Stopped>, LoopError> {
        self.ask(|done| Command::Detach { slot, done })
    }

    /// Wakes the loop without a command, so that its owner's state is looked at.
    pub fn wake(&self) {
        // The counter of an eventfd can only be full when the loop has a wake-up pending already.
        let _ = self.wake.write(1);
    }

    fn ask<T>(&self, command: impl FnOnce(SyncSender<T>) -> Command) -> Result<T, LoopError> {
        let (done, answer) = sync_channel(1);
        self.commands.send(command(done)).map_err(|_| LoopError::Ended)?;
        self.wake();
        answer.recv().map_err(|_| LoopError::Ended)
    }
}

struct Attached {
    slot: u32,
    handler: Box<dyn QueueHandler>,
    interrupt: Arc<dyn Interrupt>,
    /// A handler that failed is not called again until the guest resets its device.
    broken: bool,
}

impl Attached {
    /// The descriptors outlive the handler, so their registrations have to end with it.
    fn stop(mut self, epoll: &Epoll) -> Stopped {
        if !self.broken {
            self.handler.unregister(&mut Registrar::new(epoll, self.slot));
        }
        self.handler.stop()
    }
}

const OWNER: u32 = 0;
const WAKE: u32 = u32::MAX;
const BATCH: usize = 32;

/// The loop itself. Owned and run by one thread.
pub struct EventLoop {
    epoll: Epoll,
    attached: Vec<Attached>,
    next_slot: u32,
    commands: Receiver<Command>,
    handle: LoopHandle,
}

impl EventLoop {
    /// An empty loop.
    pub fn new() -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let (sender, commands) = channel();
        Registrar::new(&epoll, WAKE).add(&*wake, Token(0), EventSet::IN)?;
        let handle = LoopHandle {
            commands: sender,
            wake,
        };
        Ok(Self {
            epoll,
            attached: Vec::new(),
            next_slot: 1,
            commands,
            handle,
        })
    }

    /// A handle for other threads.
    pub fn handle(&self) -> LoopHandle {
        self.handle.clone()
    }

    /// Registers sources of the loop's owner; their events reach the closure given to [`EventLoop::run_once`].
    pub fn owner(&self) -> Registrar<'_> {
        Registrar::new(&self.epoll, OWNER)
    }

    /// Waits for events (at most `timeout_ms`; -1 waits for ever) and serves them. Events of the owner are collected
    /// into `own`, which is cleared first.
    pub fn run_once(&mut self, timeout_ms: i32, own: &mut Vec<(Token, Readiness)>) -> io::Result<()> {
        own.clear();
        let mut events = [EpollEvent::default(); BATCH];
        let n = match self.epoll.wait(timeout_ms, &mut events) {
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            Err(e) => return Err(e),
        };
        for event in &events[..n] {
            let (slot, token) = ((event.data() >> 32) as u32, Token(event.data() as u32));
            match slot {
                WAKE => self.serve_commands(),
                OWNER => own.push((token, event.event_set())),
                slot => self.serve_handler(slot, token, event.event_set()),
            }
        }
        Ok(())
    }

    /// Stops every handler and gives back what they held, in the order of attachment.
    pub fn stop_all(&mut self) -> Vec<(Slot, Stopped)> {
        let epoll = &self.epoll;
        self.attached
            .drain(..)
            .map(|a| (Slot(a.slot), a.stop(epoll)))
            .collect()
    }

    /// Attaches from the loop's own thread (restore, tests).
    pub fn attach(
        &mut self,
        mut handler: Box<dyn QueueHandler>,
        interrupt: Arc<dyn Interrupt>,
    ) -> io::Result<Slot> {
        let slot = self.next_slot;
        self.next_slot += 1;
        let mut registrar = Registrar::new(&self.epoll, slot);
        if let Err(e) = handler.register(&mut registrar) {
            handler.unregister(&mut registrar);
            return Err(e);
        }
        self.attached.push(Attached {
            slot,
            handler,
            interrupt,
            broken: false,
        });
        Ok(Slot(slot))
    }

    /// Has every handler handle `token`, which is none of its sources'.
    pub fn tell(&mut self, token: Token) {
        let slots: Vec<u32> = self.attached.iter().map(|a| a.slot).collect();
        for slot in slots {
            self.serve_handler(slot, token, EventSet::empty());
        }
    }

    /// Detaches from the loop's own thread.
    pub fn detach(&mut self, slot: Slot) -> Option<Stopped> {
        let at = self.attached.iter().position(|a| a.slot == slot.0)?;
        Some(self.attached.remove(at).stop(&self.epoll))
    }

    fn serve_commands(&mut self) {
        let _ = self.handle.wake.read();
        while let Ok(command) = self.commands.try_recv() {
            // An asker that no longer waits has ended with its thread; what it gets is dropped with it.
            match command {
                Command::Attach {
                    handler,
                    interrupt,
                    done,
                } => {
                    let _ = done.send(self.attach(handler, interrupt));
                }
                Command::Detach { slot, done } => {
                    let _ = done.send(self.detach(slot));
                }
            }
        }
    }

    fn serve_handler(&mut self, slot: u32, token: Token, ready: Readiness) {
        let epoll = &self.epoll;
        let Some(a) = self.attached.iter_mut().find(|a| a.slot == slot && !a.broken) else {
            return;
        };
        if let Err(HandlerError { what, .. }) =
            a.handler.handle(token, ready, &mut Registrar::new(epoll, slot))
        {
            a.broken = true;
            // Level-triggered sources of a handler that is not called again would spin the loop.
            a.handler.unregister(&mut Registrar::new(epoll, slot));
            a.interrupt.signal_needs_reset(&what);
        }
    }
}

impl AsRawFd for EventLoop {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

#[cfg(test)]
#[path = "event_tests.rs"]
mod tests;
