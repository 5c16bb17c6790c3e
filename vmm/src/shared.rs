//! What a VMM's threads share: the timeline, and why the guest ended.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use shoal_devices::event::LoopHandle;

use crate::protocol::{ExitReason, Stamp, Step, Timeline};
use crate::sys::monotonic_ns;

/// State that vCPU threads write and the event loop reads.
pub struct Shared {
    guest_id: String,
    timeline: Mutex<Timeline>,
    /// How many stamps the host has been told of already.
    told: Mutex<usize>,
    ending: AtomicBool,
    vcpus: AtomicUsize,
    reason: Mutex<Option<ExitReason>>,
    event_loop: LoopHandle,
}

/// A poisoned lock means a thread panicked, and a panic ends the whole VMM; the data behind it is plain values.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Shared {
    /// State of a machine about to be built; `timeline` holds what was stamped before it.
    pub fn new(guest_id: String, timeline: Timeline, event_loop: LoopHandle) -> Self {
        Self {
            guest_id,
            told: Mutex::new(0),
            timeline: Mutex::new(timeline),
            ending: AtomicBool::new(false),
            vcpus: AtomicUsize::new(0),
            reason: Mutex::new(None),
            event_loop,
        }
    }

    /// Stamps a step of the build.
    pub fn stamp(&self, step: Step) {
        lock(&self.timeline).push(Stamp {
            step,
            at_ns: monotonic_ns(),
        });
    }

    /// Stamps a step that comes to pass while the guest runs; the host is told.
    pub fn stamp_and_tell(&self, step: Step) {
        if lock(&self.timeline).push(Stamp {
            step,
            at_ns: monotonic_ns(),
        }) {
            self.event_loop.wake();
        }
    }

    /// The timeline so far. The host counts as told of all of it.
    pub fn timeline(&self) -> Timeline {
        let timeline = lock(&self.timeline).clone();
        *lock(&self.told) = timeline.stamps.len();
        timeline
    }

    /// Stamps that the host has not been told of.
    pub fn untold(&self) -> Vec<Stamp> {
        let timeline = lock(&self.timeline);
        let mut told = lock(&self.told);
        let new = timeline.stamps.get(*told..).unwrap_or_default().to_vec();
        *told = timeline.stamps.len();
        new
    }

    /// Ends the guest. The first reason stays.
    pub fn end(&self, reason: ExitReason) {
        lock(&self.reason).get_or_insert(reason);
        self.ending.store(true, Ordering::Release);
        self.event_loop.wake();
    }

    /// Whether the guest is ending: vCPU threads must not enter it again.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    /// A vCPU thread is about to be started.
    pub fn vcpu_starts(&self) {
        self.vcpus.fetch_add(1, Ordering::AcqRel);
    }

    /// A vCPU thread has left the guest for good, or could not be started.
    pub fn vcpu_ended(&self) {
        self.vcpus.fetch_sub(1, Ordering::AcqRel);
        self.event_loop.wake();
    }

    /// How many vCPU threads may still touch the machine.
    pub fn vcpus_running(&self) -> usize {
        self.vcpus.load(Ordering::Acquire)
    }

    /// Why the guest ended, if it has.
    pub fn reason(&self) -> Option<ExitReason> {
        lock(&self.reason).clone()
    }

    /// One line for the VMM's log (its standard error).
    pub fn log(&self, line: &str) {
        log(&self.guest_id, line);
    }
}

/// One line for the VMM's log, with the guest's id in it. A log that cannot be written is not worth ending a guest.
pub fn log(guest_id: &str, line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "guest={guest_id} {line}");
}
