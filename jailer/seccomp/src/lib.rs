//! The seccomp filters of shoal-vmm: one per kind of thread, compiled from `jailer/policies/*.policy` when this crate
//! is built, so that at run time there is nothing to parse and nothing to get wrong.
//!
//! A filter stops a VMM that was taken over from using anything of the kernel but the few system calls, with the
//! few arguments, that an honest VMM makes while its guest runs. What is not allowed ends the whole process at once
//! ([`Mode::Kill`]): the attacker gets no second attempt.
//!
//! ```no_run
//! use shoal_seccomp::{Mode, ThreadKind, install};
//! install(ThreadKind::EventLoop, Mode::Kill)?;
//! # Ok::<(), shoal_seccomp::InstallError>(())
//! ```

mod constants;
pub mod policy;
mod syscalls;

mod programs {
    #![allow(missing_docs)]
    include!(concat!(env!("OUT_DIR"), "/programs.rs"));
}

use std::fmt;
use std::io;
use std::str::FromStr;

use libc::sock_filter;

/// The kinds of threads that a VMM has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ThreadKind {
    /// The event loop: control socket, all devices' queues, console.
    EventLoop,
    /// A vCPU.
    Vcpu,
    /// The event loop of a VMM with a disk on io_uring: its policy is the event loop's and one of its own.
    EventLoopUring,
}

impl ThreadKind {
    /// All kinds.
    pub const ALL: [ThreadKind; 3] = [
        ThreadKind::EventLoop,
        ThreadKind::Vcpu,
        ThreadKind::EventLoopUring,
    ];

    /// The name of its policy file, without `.policy`.
    pub fn name(self) -> &'static str {
        match self {
            ThreadKind::EventLoop => "event-loop",
            ThreadKind::Vcpu => "vcpu",
            ThreadKind::EventLoopUring => "event-loop-uring",
        }
    }

    /// The kind whose policy this kind's begins with.
    pub fn base(self) -> Option<ThreadKind> {
        match self {
            ThreadKind::EventLoopUring => Some(ThreadKind::EventLoop),
            ThreadKind::EventLoop | ThreadKind::Vcpu => None,
        }
    }

    /// Its policy, as it was compiled.
    pub fn policy(self) -> &'static str {
        match self {
            ThreadKind::EventLoop => programs::EVENT_LOOP_POLICY,
            ThreadKind::Vcpu => programs::VCPU_POLICY,
            ThreadKind::EventLoopUring => programs::EVENT_LOOP_URING_POLICY,
        }
    }

    fn from_data(data: u16) -> Option<ThreadKind> {
        ThreadKind::ALL.into_iter().find(|kind| *kind as u16 == data)
    }
}

/// What happens to a system call that the policy does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The process ends with SIGSYS. For production.
    Kill,
    /// It is written to the kernel's log and made. For debugging; print a warning at every start.
    Log,
    /// Every system call, allowed or not, stops at the tracer (`shoal-jailer trace`); without one, all fail with
    /// ENOSYS. For deriving the policies.
    Trace,
    /// No filter. For debugging; print a warning at every start.
    Off,
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Mode, String> {
        match text {
            "kill" => Ok(Mode::Kill),
            "log" => Ok(Mode::Log),
            "trace" => Ok(Mode::Trace),
            "off" => Ok(Mode::Off),
            _ => Err(format!(
                "{text:?} is no seccomp mode; use kill, log, trace or off"
            )),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mode::Kill => "kill",
            Mode::Log => "log",
            Mode::Trace => "trace",
            Mode::Off => "off",
        })
    }
}

/// The BPF program of a kind of thread; empty for [`Mode::Off`] and for [`Mode::Trace`] (whose program is a single
/// instruction that [`install`] makes).
pub fn program(kind: ThreadKind, mode: Mode) -> &'static [sock_filter] {
    match (kind, mode) {
        (ThreadKind::EventLoop, Mode::Kill) => &programs::EVENT_LOOP_KILL,
        (ThreadKind::EventLoop, Mode::Log) => &programs::EVENT_LOOP_LOG,
        (ThreadKind::Vcpu, Mode::Kill) => &programs::VCPU_KILL,
        (ThreadKind::Vcpu, Mode::Log) => &programs::VCPU_LOG,
        (ThreadKind::EventLoopUring, Mode::Kill) => &programs::EVENT_LOOP_URING_KILL,
        (ThreadKind::EventLoopUring, Mode::Log) => &programs::EVENT_LOOP_URING_LOG,
        (_, Mode::Trace | Mode::Off) => &[],
    }
}

/// The filter could not be installed.
#[derive(Debug)]
pub struct InstallError {
    kind: ThreadKind,
    source: io::Error,
}

impl fmt::Display for InstallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.kind.name();
        write!(
            f,
            "installing the seccomp filter of the {kind} thread failed: a kernel with CONFIG_SECCOMP_FILTER is needed"
        )
    }
}

impl std::error::Error for InstallError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// Marks a seccomp stop of [`Mode::Trace`] as ours: the upper bits of its data; the lower ones are the kind.
const TRACE_MARK: u16 = 0x5a00;

/// The kind of thread that a seccomp stop's data (PTRACE_GETEVENTMSG) names.
pub fn traced_kind(data: u64) -> Option<ThreadKind> {
    let data = u16::try_from(data).ok()?;
    (data & 0xff00 == TRACE_MARK).then(|| ThreadKind::from_data(data & 0xff))?
}

/// Puts the calling thread under its filter, for good. Sets no_new_privs, which an ordinary user needs for it.
///
/// # Errors
/// [`InstallError`] when the kernel refuses; the thread must then not go on to run a guest.
pub fn install(kind: ThreadKind, mode: Mode) -> Result<(), InstallError> {
    const BPF_RETURN: u16 = 0x06;
    const RET_TRACE: u32 = 0x7ff0_0000;
    let traced = [sock_filter {
        code: BPF_RETURN,
        jt: 0,
        jf: 0,
        k: RET_TRACE | u32::from(TRACE_MARK | kind as u16),
    }];
    let instructions = match mode {
        Mode::Off => return Ok(()),
        Mode::Trace => &traced,
        Mode::Kill | Mode::Log => program(kind, mode),
    };
    let program = libc::sock_fprog {
        len: instructions.len() as u16,
        filter: instructions.as_ptr().cast_mut(),
    };
    // SAFETY: numbers only.
    let privileges = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    let set = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: `program` describes the instructions, which the kernel copies and does not write.
    if privileges != 0 || unsafe { libc::syscall(libc::SYS_seccomp, set, 0, &raw const program) } != 0 {
        return Err(InstallError {
            kind,
            source: io::Error::last_os_error(),
        });
    }
    Ok(())
}

/// The name of a system call, for messages about a filter's kill.
pub fn syscall_name(number: i64) -> Option<&'static str> {
    syscalls::SYSCALLS
        .iter()
        .find(|(known, _)| *known == number)
        .map(|(_, name)| *name)
}

#[cfg(test)]
mod tests;
