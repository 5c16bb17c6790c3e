//! Which system call a seccomp filter killed a program for.
//!
//! The parent of a killed process learns SIGSYS and no more. What else could tell:
//!
//! - SECCOMP_RET_TRAP with a handler in the VMM that writes the number down: but then the process lives on after the
//!   forbidden call, under the control of whoever made it. Default action must be to kill.
//! - SECCOMP_RET_USER_NOTIF with the host as listener: when the host's daemon is gone (guests outlive it), forbidden
//!   calls return ENOSYS instead of killing.
//! - The kernel's own record of the kill: AUDIT_SECCOMP (1326), written for every kill, before the process ends, with
//!   pid, uid and number; nothing in the jail can forge or stop it. It goes to the multicast group of the audit
//!   netlink socket, and where no audit daemon runs, to the kernel's log too.
//!
//! So the third it is. Where neither can be read (no CONFIG_AUDIT; rootless with kernel.dmesg_restrict=1), the exit is
//! still known to be a filter's kill, without the name.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use crate::error::Degradation;

/// Type of the audit record of a seccomp action (linux/audit.h).
const AUDIT_SECCOMP: u16 = 1326;
/// Longer records are not of interest.
const RECORD: usize = 8192;
/// Records of other processes that are kept until somebody asks for them.
const KEPT: usize = 256;

/// A forbidden system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeccompKill {
    /// Its number.
    pub number: i64,
    /// It came by the 64-bit entry, whose numbers shoal-seccomp knows.
    pub native: bool,
}

impl SeccompKill {
    /// Its name, if it is a system call of this machine.
    pub fn name(&self) -> &'static str {
        match shoal_seccomp::syscall_name(self.number) {
            _ if !self.native => "a 32-bit system call",
            Some(name) => name,
            None => "unknown system call",
        }
    }
}

/// Reads the kernel's records of seccomp kills from the time on when it was opened. Keep one open as long as there are
/// jails.
#[derive(Debug)]
pub struct KillLog {
    source: Source,
    /// Read, but nobody has asked for it yet: the newest last.
    unasked: VecDeque<(i32, SeccompKill)>,
}

#[derive(Debug)]
enum Source {
    Audit(OwnedFd),
    Kernel(File),
}

impl KillLog {
    /// Subscribes to the audit records (CAP_AUDIT_READ), or else opens the kernel's log.
    ///
    /// # Errors
    /// A [`Degradation`] when neither is allowed.
    pub fn open() -> Result<KillLog, Degradation> {
        let audit = match audit_socket() {
            Ok(socket) => {
                return Ok(KillLog {
                    source: Source::Audit(socket),
                    unasked: VecDeque::new(),
                });
            }
            Err(error) => error,
        };
        let log = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg");
        let log = log.and_then(|mut file| file.seek(SeekFrom::End(0)).map(|_| file));
        match log {
            Ok(file) => Ok(KillLog {
                source: Source::Kernel(file),
                unasked: VecDeque::new(),
            }),
            Err(error) => Err(Degradation {
                what: "names of forbidden system calls",
                because: format!("neither audit records ({audit}) nor /dev/kmsg ({error}) can be read"),
                consequence: "when a filter ends a VMM its exit reason cannot name the system call",
                remedy: "run as root, or sysctl kernel.dmesg_restrict=0; a kernel with CONFIG_AUDIT",
            }),
        }
    }

    /// The record of the process `pid` (as the host's first pid namespace numbers it), which has just ended by SIGSYS.
    /// The kernel hands records out a moment after the kill: waits for `patience` at most.
    pub fn find(&mut self, pid: i32, patience: Duration) -> Option<SeccompKill> {
        let deadline = Instant::now() + patience;
        loop {
            self.take_in();
            // The newest: numbers of processes are used again.
            if let Some(at) = self.unasked.iter().rposition(|(killed, _)| *killed == pid) {
                return self.unasked.remove(at).map(|(_, kill)| kill);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            if left.is_zero() || !self.wait(left) {
                return None;
            }
        }
    }

    /// Reads the records there are. To be called now and then, lest the kernel have no room for new ones.
    pub fn take_in(&mut self) {
        while let Some(record) = self.next() {
            self.unasked.extend(parse(&record));
            if self.unasked.len() > KEPT {
                self.unasked.pop_front();
            }
        }
    }

    /// The next record there is.
    fn next(&mut self) -> Option<String> {
        let mut buffer = [0; RECORD];
        loop {
            let got = match &mut self.source {
                Source::Audit(socket) => receive(socket, &mut buffer),
                Source::Kernel(file) => file.read(&mut buffer),
            };
            match got {
                Ok(length) => return Some(String::from_utf8_lossy(&buffer[..length]).into_owned()),
                // Records were lost because they were not read in time (ENOBUFS; EPIPE from the kernel's log).
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::ENOBUFS | libc::EPIPE | libc::EINTR)
                    ) => {}
                Err(_) => return None,
            }
        }
    }

    /// Waits for a record; false when none came.
    fn wait(&self, patience: Duration) -> bool {
        let fd = match &self.source {
            Source::Audit(socket) => socket.as_raw_fd(),
            Source::Kernel(file) => file.as_raw_fd(),
        };
        let mut waited = libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let milliseconds = i32::try_from(patience.as_millis() + 1).unwrap_or(i32::MAX);
        // SAFETY: one pollfd, alive during the call.
        unsafe { libc::poll(&mut waited, 1, milliseconds) > 0 }
    }
}

/// A socket in the audit multicast group that lets nothing but seccomp records in.
fn audit_socket() -> io::Result<OwnedFd> {
    let check = |result: libc::c_int| {
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(result)
        }
    };
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: numbers only.
    let socket = check(unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_AUDIT) })?;
    // SAFETY: socket made it for us alone.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // Half word at offset 4 of the message: nlmsg_type, in the machine's order, which BPF reads as the network's.
    let wanted = u32::from(AUDIT_SECCOMP.swap_bytes());
    let mut filter = [
        libc::sock_filter {
            code: 0x28,
            jt: 0,
            jf: 0,
            k: 4,
        },
        libc::sock_filter {
            code: 0x15,
            jt: 0,
            jf: 1,
            k: wanted,
        },
        libc::sock_filter {
            code: 0x06,
            jt: 0,
            jf: 0,
            k: u32::MAX,
        },
        libc::sock_filter {
            code: 0x06,
            jt: 0,
            jf: 0,
            k: 0,
        },
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the program and its instructions are alive during the call.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    })?;
    // SAFETY: plain data for which zeroes are valid.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as u16;
    address.nl_groups = 1; // AUDIT_NLGRP_READLOG
    // SAFETY: the address is of the size given.
    check(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_nl>() as libc::socklen_t,
        )
    })?;
    Ok(socket)
}

fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: a buffer of the length given.
    let got = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// Process and system call of a record of a kill; none for other records.
fn parse(record: &str) -> Option<(i32, SeccompKill)> {
    const SIGSYS: i32 = 31;
    const X86_64: &str = "c000003e";
    let field = |name: &str| {
        // `comm` and `exe` are the process's own words; the kernel quotes them, so that no field can be in them.
        record
            .split_whitespace()
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    };
    (field("sig")?.parse::<i32>().ok()? == SIGSYS).then_some(())?;
    let kill = SeccompKill {
        number: field("syscall")?.parse().ok()?,
        native: field("arch")? == X86_64,
    };
    Some((field("pid")?.parse().ok()?, kill))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_kills_are_read() {
        let record = "audit(1.5:7): auid=4294967295 uid=200000 gid=200000 ses=4294967295 pid=4711 comm=\"vcpu0\" exe=\"/memfd:shoal-vmm\" sig=31 arch=c000003e syscall=41 compat=0 ip=0x7f code=0x80000000";
        let kill = SeccompKill {
            number: 41,
            native: true,
        };
        assert_eq!(parse(record), Some((4711, kill)));
        assert_eq!(parse(&record.replace("sig=31", "sig=0")), None);
        assert_eq!(parse("6,1,2,-;nothing"), None);
        assert_eq!(kill.name(), "socket");
        assert_eq!(
            SeccompKill {
                number: 99_999,
                native: true
            }
            .name(),
            "unknown system call"
        );
    }
}
