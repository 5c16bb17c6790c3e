//! What the VMM gives up: as a process before anything else, and each of its threads by its seccomp filter before the
//! guest's first instruction. The jail around the process is the host's work (`shoal-jailer`).

use std::io::Write;

use shoal_seccomp::{InstallError, Mode, ThreadKind};

/// Hardens the process. Must be called first, from its only thread.
///
/// - Memory that could be written can never be executed (PR_SET_MDWE, since Linux 6.3; older kernels refuse and seccomp
///   alone holds it).
/// - The allocator keeps to one heap that grows by `brk`, so that the filters need neither `mmap` nor `mprotect`.
/// - A fault ends the process by its own signal: the program starts without Rust's handlers, which would need system calls
///   that no filter allows, and the end would be taken for an escape attempt.
/// - A reader that has gone away is an error to be handled, no signal.
/// - A panic names its place and nothing of what it was about, which may be the guest's data.
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
        trap();
    }));
}

/// Ends the process without a system call (SIGILL): `abort` needs some that no filter allows.
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
