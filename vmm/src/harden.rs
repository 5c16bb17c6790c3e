//! What the VMM gives up: as a process before anything else, and each of its threads by its seccomp filter before the
//! guest's first instruction. The jail around the process is the host's work (`shoal-jailer`).

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicI32, Ordering};

use shoal_seccomp::{InstallError, Mode, ThreadKind};

use crate::protocol::ExitReason;

/// The file that a panic is recorded in; -1 is none.
static RECORD: AtomicI32 = AtomicI32::new(-1);

/// Hardens the process. Must be called first, from its only thread.
///
/// - Memory that could be written can never be executed (PR_SET_MDWE, since Linux 6.3; older kernels refuse and seccomp
///   alone holds it).
/// - The allocator keeps to one heap that grows by `brk`, so that the filters need neither `mmap` nor `mprotect`.
/// - A fault ends the process by its own signal: the program starts without Rust's handlers, which would need system calls
///   that no filter allows, and the end would be taken for an escape attempt.
/// - A reader that has gone away is an error to be handled, no signal.
/// - A panic names its place, in the log and in the exit record, and nothing of what it was about, which may be the guest's
///   data. Then it ends the process by SIGILL: unwinding and `abort` need system calls that no filter allows, and the end
///   would be taken for an escape attempt.
pub fn process() {
    const PR_SET_MDWE: libc::c_int = 65;
    const PR_MDWE_REFUSE_EXEC_GAIN: libc::c_ulong = 1;
    // SAFETY: numbers only.
    unsafe { libc::prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0_u64, 0_u64, 0_u64) };
    // SAFETY: numbers only; there is no other thread yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_MAX, 0);
    }
    // SAFETY: ignoring a signal runs no code of ours.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    std::panic::set_hook(Box::new(|panic| {
        let place = panic
            .location()
            .map_or_else(|| "an unknown place".into(), ToString::to_string);
        // Nobody is left to tell when it cannot be written.
        let _ = writeln!(
            std::io::stderr(),
            "shoal-vmm: a bug at {place} ends the VMM; please report it"
        );
        write_record(ExitReason::Bug { place });
        trap();
    }));
}

/// Lets a panic from now on leave its reason in the exit record, which has to stay open as long as the process lives.
pub fn record_panics(record: &File) {
    RECORD.store(record.as_raw_fd(), Ordering::Release);
}

fn write_record(reason: ExitReason) {
    let (record, bytes) = (RECORD.load(Ordering::Acquire), reason.to_record());
    // SAFETY: a buffer of the length given. Without a record the descriptor is -1 and the call fails; nobody is left to tell.
    unsafe { libc::pwrite(record, bytes.as_ptr().cast(), bytes.len(), 0) };
}

/// Ends the process without a system call (SIGILL).
fn trap() -> ! {
    // SAFETY: an undefined instruction, whose signal has its default disposition, ends the process.
    unsafe { std::arch::asm!("ud2", options(noreturn, nomem, nostack)) }
}

/// Puts the calling thread under its filter, for good.
///
/// # Errors
/// When the kernel refuses the filter; the thread must not serve a guest then.
pub fn thread(kind: ThreadKind, mode: Mode) -> Result<(), InstallError> {
    shoal_seccomp::install(kind, mode)
}
