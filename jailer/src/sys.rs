//! The few system calls that the standard library does not offer, each in one safe or clearly unsafe wrapper.
//!
//! Two callers use this file: ordinary code in the parent, and [`crate::child`], which runs between `clone3` and
//! `execveat` in memory that it shares with the (suspended) parent. For the second, every wrapper here is a bare
//! system call: no allocation, no lock, and none of glibc's set*id functions, which would signal all threads of
//! the parent.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// A kernel error number.
pub type Errno = i32;

/// Makes one system call and splits its answer.
///
/// # Safety
/// The arguments must be what the system call `number` expects; pointers must be valid for it.
pub unsafe fn raw(number: libc::c_long, args: [usize; 6]) -> Result<usize, Errno> {
    let [a, b, c, d, e, f] = args;
    // SAFETY: the caller answers for the arguments.
    let answer = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if answer == -1 {
        // SAFETY: the address of errno of this thread is always valid.
        Err(unsafe { *libc::__errno_location() })
    } else {
        Ok(answer as usize)
    }
}

/// `prctl(2)` for the operations that take numbers only.
pub fn prctl(operation: libc::c_int, a: usize, b: usize, c: usize, d: usize) -> Result<usize, Errno> {
    // SAFETY: the callers use operations whose arguments are plain numbers; a wrong one is answered with EINVAL.
    unsafe { raw(libc::SYS_prctl, [operation as usize, a, b, c, d, 0]) }
}

/// `struct open_how` of `openat2(2)`.
#[repr(C)]
struct OpenHow {
    flags: u64,
    mode: u64,
    resolve: u64,
}

/// Opens `path` below `dir` without following any symbolic link, magic link or `..` out of `dir`.
///
/// # Errors
/// `ELOOP` for a symbolic link anywhere in the path, `EXDEV` when it leads out of `dir`, and what `open` gives.
pub fn open_beneath(dir: BorrowedFd<'_>, path: &CStr, flags: libc::c_int, mode: u32) -> io::Result<OwnedFd> {
    const NO_MAGICLINKS: u64 = 0x02;
    const NO_SYMLINKS: u64 = 0x04;
    const BENEATH: u64 = 0x08;
    let how = OpenHow {
        flags: (flags | libc::O_CLOEXEC) as u64,
        mode: u64::from(mode),
        resolve: NO_MAGICLINKS | NO_SYMLINKS | BENEATH,
    };
    // SAFETY: path is a C string and `how` the structure of the size given, both alive during the call.
    let answer = unsafe {
        raw(
            libc::SYS_openat2,
            [
                dir.as_raw_fd() as usize,
                path.as_ptr() as usize,
                &raw const how as usize,
                size_of::<OpenHow>(),
                0,
                0,
            ],
        )
    };
    match answer {
        // SAFETY: openat2 made this descriptor for us alone.
        Ok(fd) => Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) }),
        Err(errno) => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// A pipe, both ends close-on-exec: (read, write).
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: `ends` has room for two descriptors.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: pipe2 made both descriptors for us alone.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// `pidfd_open(2)` for a child that has not been waited for (so that its number cannot have been given away).
pub fn pidfd_open(pid: libc::pid_t) -> io::Result<OwnedFd> {
    // SAFETY: numbers only.
    match unsafe { raw(libc::SYS_pidfd_open, [pid as usize, 0, 0, 0, 0, 0]) } {
        // SAFETY: pidfd_open made this descriptor for us alone.
        Ok(fd) => Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) }),
        Err(errno) => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Sends a signal through a pidfd: it reaches that process or nobody.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: numbers and a null siginfo, which the call allows.
    let sent = unsafe {
        raw(
            libc::SYS_pidfd_send_signal,
            [pidfd.as_raw_fd() as usize, signal as usize, 0, 0, 0, 0],
        )
    };
    sent.map(|_| ()).map_err(io::Error::from_raw_os_error)
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It called exit with this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

/// Waits for a child by its pidfd; `None` when `block` is false and it still runs.
pub fn wait_pidfd(pidfd: BorrowedFd<'_>, block: bool) -> io::Result<Option<Exit>> {
    let flags = libc::WEXITED | libc::__WALL | if block { 0 } else { libc::WNOHANG };
    wait_id(libc::P_PIDFD, pidfd.as_raw_fd() as libc::id_t, flags)
}

/// Waits for a child by its number.
pub fn wait_pid(pid: libc::pid_t) -> io::Result<Option<Exit>> {
    wait_id(libc::P_PID, pid as libc::id_t, libc::WEXITED | libc::__WALL)
}

fn wait_id(kind: libc::idtype_t, id: libc::id_t, flags: libc::c_int) -> io::Result<Option<Exit>> {
    loop {
        // SAFETY: siginfo_t is plain data for which zeroes are valid.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: `info` is alive and of the right type.
        if unsafe { libc::waitid(kind, id, &mut info, flags) } == 0 {
            // SAFETY: waitid filled the SIGCHLD part of the union (or left it zero with WNOHANG).
            let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
            return Ok(match (pid, info.si_code) {
                (0, _) => None,
                (_, libc::CLD_EXITED) => Some(Exit::Code(status)),
                _ => Some(Exit::Signal(status)),
            });
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// The type of the file system that a descriptor lies on (`f_type` of `statfs(2)`).
pub fn file_system_type(fd: BorrowedFd<'_>) -> io::Result<libc::c_long> {
    // SAFETY: statfs is plain data for which zeroes are valid.
    let mut data: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `data` is alive and of the right type.
    if unsafe { libc::fstatfs(fd.as_raw_fd(), &mut data) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(data.f_type)
}

/// The effective user and group of this process.
pub fn effective_ids() -> (u32, u32) {
    // SAFETY: these calls cannot fail and touch no memory.
    unsafe { (libc::geteuid(), libc::getegid()) }
}
