//! Ctrl-C: a run ends between two starts, so that its guests are gone and what was measured is kept.

use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(signal: libc::c_int) {
    if ASKED.swap(true, Ordering::Relaxed) {
        // The second one means now. The guests end by themselves when their control sockets close.
        // SAFETY: _exit is safe in a signal handler and does not return.
        unsafe { libc::_exit(128 + signal) }
    }
}

/// From here on SIGINT and SIGTERM are remembered for [`interrupted`]; system calls begin again after them.
pub fn catch() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let handler = on_signal as extern "C" fn(libc::c_int);
        // SAFETY: the handler only touches an atomic and calls _exit. An all-zero sigaction is a valid value.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

/// The user wants the run to end.
pub fn interrupted() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// Asks the process `pid`, a child that was not waited for yet, to end.
pub fn terminate(pid: u32) {
    // SAFETY: a signal to a child of ours, whose number is not reused before it was waited for; touches no memory.
    unsafe { libc::kill(pid as libc::pid_t, libc::SIGTERM) };
}
