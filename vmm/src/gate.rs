//! Where a machine's threads wait for each other: nobody enters the guest before all have their filters.
//!
//! ```text
//!   each thread: filter ──▶ arrive ──all are here──▶ open: serve the guest ──▶ leave
//!                              └─────one failed────▶ shut: leave at once
//! ```

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use shoal_seccomp::InstallError;

/// The meeting point.
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Threads that have not arrived.
    missing: usize,
    /// Threads that have arrived and not left.
    inside: usize,
    /// Nobody may go on.
    shut: bool,
    failure: Option<InstallError>,
}

impl Gate {
    /// A gate that `threads` threads will arrive at.
    pub fn new(threads: usize) -> Self {
        Self {
            state: Mutex::new(State {
                missing: threads,
                inside: 0,
                shut: false,
                failure: None,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic ends the process, so nobody sees a lock that it poisoned.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Arrives with the outcome of its filter, and waits for the others. The last one to arrive calls `opening` before
    /// anybody goes on. False when somebody failed: then nobody may serve the guest.
    pub fn arrive(&self, confined: Result<(), InstallError>, opening: impl FnOnce()) -> bool {
        let mut state = self.lock();
        state.missing -= 1;
        state.inside += 1;
        if let Err(error) = confined {
            state.failure.get_or_insert(error);
            state.shut = true;
        }
        if state.missing == 0 && !state.shut {
            opening();
        }
        self.changed.notify_all();
        while state.missing > 0 && !state.shut {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        !state.shut
    }

    /// Not all threads will come: those that have go no further.
    pub fn shut(&self) {
        self.lock().shut = true;
        self.changed.notify_all();
    }

    /// The first failure that a thread arrived with. Whoever takes it answers for it.
    pub fn take_failure(&self) -> Option<InstallError> {
        self.lock().failure.take()
    }

    /// Will not serve the guest any more.
    pub fn leave(&self) {
        self.lock().inside -= 1;
        self.changed.notify_all();
    }

    /// Waits until no thread is inside.
    pub fn wait_empty(&self) {
        let mut state = self.lock();
        while state.inside > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn opens_once_when_all_are_there() {
        let gate = Gate::new(3);
        let opened = AtomicU32::new(0);
        let arrive = || {
            let passed = gate.arrive(Ok(()), || {
                opened.fetch_add(1, Ordering::SeqCst);
            });
            assert!(passed && opened.load(Ordering::SeqCst) == 1);
            gate.leave();
        };
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(arrive);
            }
        });
        gate.wait_empty();
        assert!(gate.take_failure().is_none());
    }

    #[test]
    fn lets_nobody_through_when_one_is_missing() {
        let gate = Gate::new(3);
        std::thread::scope(|scope| {
            let waiting: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        let passed = gate.arrive(Ok(()), || panic!("it must not open"));
                        gate.leave();
                        passed
                    })
                })
                .collect();
            gate.shut();
            for thread in waiting {
                assert!(!thread.join().unwrap());
            }
        });
        gate.wait_empty();
    }
}
