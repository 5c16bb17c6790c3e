use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::testing::{CountingInterrupt, LoopThread, is_readable};

/// Counts its events; fails, or refuses to be registered, when told to.
struct Counter {
    source: Arc<EventFd>,
    seen: Arc<AtomicUsize>,
    fails: bool,
    refuses: bool,
}

impl Counter {
    fn new() -> Self {
        let source = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        Self {
            source,
            seen: Arc::default(),
            fails: false,
            refuses: false,
        }
    }
}

impl QueueHandler for Counter {
    fn register(&mut self, events: &mut Registrar<'_>) -> io::Result<()> {
        events.add(&*self.source, Token(7), Readiness::IN)?;
        if self.refuses {
            Err(io::Error::other("refused"))
        } else {
            Ok(())
        }
    }
    fn unregister(&mut self, events: &mut Registrar<'_>) {
        let _ = events.remove(&*self.source);
    }
    fn handle(&mut self, token: Token, _: Readiness, _: &mut Registrar<'_>) -> Result<(), HandlerError> {
        assert_eq!(token, Token(7));
        self.seen.fetch_add(1, Ordering::SeqCst);
        if self.fails {
            return Err(HandlerError::new("broken"));
        }
        let _ = self.source.read();
        Ok(())
    }
    fn stop(self: Box<Self>) -> Stopped {
        Stopped {
            queues: Vec::new(),
            backend: Box::new(self.seen.load(Ordering::SeqCst)),
        }
    }
}

fn interrupt() -> Arc<CountingInterrupt> {
    Arc::default()
}

#[test]
fn handlers_get_their_events_and_owners_theirs() {
    let mut l = EventLoop::new().unwrap();
    let (counter, mine) = (Counter::new(), EventFd::new(EFD_NONBLOCK).unwrap());
    let (source, seen) = (counter.source.clone(), counter.seen.clone());
    l.owner().add(&mine, Token(3), Readiness::IN).unwrap();
    l.attach(Box::new(counter), interrupt()).unwrap();
    source.write(1).unwrap();
    mine.write(1).unwrap();
    let mut own = Vec::new();
    l.run_once(0, &mut own).unwrap();
    assert_eq!(seen.load(Ordering::SeqCst), 1);
    assert_eq!(own, [(Token(3), Readiness::IN)]);
}

#[test]
fn a_detached_handler_leaves_nothing_that_wakes_the_loop() {
    let mut l = EventLoop::new().unwrap();
    for turn in 0..3 {
        let counter = Counter::new();
        let source = counter.source.clone();
        let slot = l.attach(Box::new(counter), interrupt()).unwrap();
        source.write(1).unwrap();
        l.run_once(0, &mut Vec::new()).unwrap();
        let stopped = l.detach(slot).unwrap();
        assert_eq!(*stopped.backend.downcast::<usize>().unwrap(), 1, "turn {turn}");
        assert!(l.detach(slot).is_none());
        source.write(1).unwrap();
        assert!(!is_readable(&l, 0));
    }
}

#[test]
fn a_handler_that_fails_is_parked_and_signals() {
    let mut l = EventLoop::new().unwrap();
    let counter = Counter {
        fails: true,
        ..Counter::new()
    };
    let (source, seen, irq) = (counter.source.clone(), counter.seen.clone(), interrupt());
    let slot = l.attach(Box::new(counter), irq.clone()).unwrap();
    source.write(1).unwrap();
    l.run_once(0, &mut Vec::new()).unwrap();
    assert!(irq.needs_reset.load(Ordering::SeqCst));
    assert!(!is_readable(&l, 0), "its source does not keep the loop awake");
    assert_eq!(seen.load(Ordering::SeqCst), 1);
    assert!(l.detach(slot).is_some(), "it still gives back what it holds");
}

#[test]
fn a_handler_that_cannot_be_registered_leaves_nothing() {
    let mut l = EventLoop::new().unwrap();
    let counter = Counter {
        refuses: true,
        ..Counter::new()
    };
    let source = counter.source.clone();
    assert!(l.attach(Box::new(counter), interrupt()).is_err());
    source.write(1).unwrap();
    assert!(!is_readable(&l, 0));
}

#[test]
fn other_threads_attach_and_detach() {
    let l = LoopThread::new();
    let slot = l.handle.attach(Box::new(Counter::new()), interrupt()).unwrap();
    assert!(l.handle.detach(slot).unwrap().is_some());
    assert!(l.handle.detach(slot).unwrap().is_none());
    let handle = l.handle.clone();
    drop(l);
    assert!(matches!(handle.detach(slot), Err(LoopError::Ended)));
}
