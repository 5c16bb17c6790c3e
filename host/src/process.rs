//! A VMM's process: who it is beyond its number, and when it ends.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use crate::async_fd;
use crate::launcher::{JailRecord, Lease};

/// A process for good: process numbers are used again, after a restart of the machine from the start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// When it started (clock ticks since the machine's start; field 22 of /proc/PID/stat).
    pub start_ticks: u64,
    /// Which start of the machine (/proc/sys/kernel/random/boot_id).
    pub boot_id: String,
}

impl ProcessId {
    /// The full identity of a live (or not yet reaped) process.
    pub fn of(pid: u32) -> io::Result<Self> {
        Ok(Self {
            pid,
            start_ticks: start_ticks(pid)?,
            boot_id: boot_id()?,
        })
    }

    /// Whether the number still means this process, and it has not ended.
    fn is_current(&self) -> bool {
        Self::of(self.pid).is_ok_and(|now| now == *self) && !is_zombie(self.pid)
    }
}

fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// The fields of /proc/PID/stat from the third (state) on; the second may hold spaces and parentheses.
fn stat_fields(pid: u32) -> io::Result<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let tail = stat.rsplit_once(')').map_or("", |(_, tail)| tail);
    Ok(tail.split_whitespace().map(str::to_owned).collect())
}

fn start_ticks(pid: u32) -> io::Result<u64> {
    let fields = stat_fields(pid)?;
    fields
        .get(19)
        .and_then(|f| f.parse().ok())
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn is_zombie(pid: u32) -> bool {
    stat_fields(pid).is_ok_and(|f| f.first().is_some_and(|s| s == "Z"))
}

/// How a process ended, as far as its parent can know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It exited with this code.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
    /// Its seccomp filter ended it for a system call, which the kernel may have named.
    Filter(Option<&'static str>),
    /// It was another daemon's child: nobody can tell any more.
    Unknown,
}

/// A VMM's process, watched by a pidfd, with what its jail has of the host.
#[derive(Debug)]
pub(crate) struct Process {
    id: ProcessId,
    pidfd: AsyncFd<OwnedFd>,
    jail: JailRecord,
    /// Until it has ended.
    lease: Option<Lease>,
    /// Only for a process that this daemon started. It must be reaped.
    is_child: bool,
    /// Gives the lease back, and says how it ended.
    settling: Option<JoinHandle<Ended>>,
    ended: Ended,
}

impl Process {
    /// Watches a child.
    pub fn of_child(pid: i32, pidfd: OwnedFd, lease: Lease) -> io::Result<Self> {
        let kill = pidfd.try_clone();
        let watch = || -> io::Result<_> {
            // No race: the number cannot be used again before the child is reaped, below.
            let id = ProcessId::of(pid.unsigned_abs())?;
            Ok((async_fd::register(pidfd, Interest::READABLE)?, id))
        };
        match (watch(), kill) {
            (Ok((pidfd, id)), _) => Ok(Self::new(id, pidfd, lease, true)),
            (Err(e), kill) => {
                // Neither fails for a child that was not reaped; and the error above is the one to tell.
                if let Ok(child) = kill {
                    let _ = pidfd_send_signal(&child, Signal::KILL);
                    reap(child.as_fd());
                }
                lease.end();
                Err(e)
            }
        }
    }

    fn new(id: ProcessId, pidfd: AsyncFd<OwnedFd>, lease: Lease, is_child: bool) -> Self {
        Self {
            id,
            pidfd,
            jail: lease.record().clone(),
            lease: Some(lease),
            is_child,
            settling: None,
            ended: Ended::Unknown,
        }
    }

    /// Watches a process that an earlier daemon started; `None` when it is gone. The lease is taken once it is found.
    pub fn adopt(id: &ProcessId, lease: impl FnOnce() -> Lease) -> io::Result<Option<Self>> {
        let Ok(pidfd) = open_pidfd(id.pid) else {
            return Ok(None);
        };
        // The number was turned into a descriptor first: if it still means the same process now, it did then.
        if !id.is_current() {
            return Ok(None);
        }
        let pidfd = async_fd::register(pidfd, Interest::READABLE)?;
        Ok(Some(Self::new(id.clone(), pidfd, lease(), false)))
    }

    /// What its jail is made of.
    pub fn jail(&self) -> &JailRecord {
        &self.jail
    }

    /// Who it is.
    pub fn id(&self) -> &ProcessId {
        &self.id
    }

    /// Waits until it ends, reaps it, and gives back what its jail had. May be cancelled and called again.
    pub async fn ended(&mut self) -> Ended {
        // An error here means that the runtime is going away; the task is cancelled with it.
        if self.pidfd.readable().await.is_err() {
            std::future::pending::<()>().await;
        }
        if let Some(lease) = self.lease.take() {
            let seen = match self.is_child {
                true => reap(self.pidfd.get_ref().as_fd()),
                false => Ended::Unknown,
            };
            let pid = self.id.pid;
            self.ended = seen.clone();
            self.settling = Some(tokio::task::spawn_blocking(move || settle(pid, seen, lease)));
        }
        if let Some(settling) = &mut self.settling {
            if let Ok(ended) = settling.await {
                self.ended = ended;
            }
            self.settling = None;
        }
        self.ended.clone()
    }

    /// Sends SIGKILL. A process that has ended already is no error.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL);
    }
}

/// Waits for a child that has ended or is about to.
fn reap(child: BorrowedFd<'_>) -> Ended {
    match waitid(WaitId::PidFd(child), WaitIdOptions::EXITED) {
        Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Ended::Code(code),
            (None, Some(signal)) => Ended::Signal(signal),
            (None, None) => Ended::Unknown,
        },
        Ok(None) | Err(_) => Ended::Unknown,
    }
}

/// Looks whether a filter ended the process, and gives back what its jail had.
fn settle(pid: u32, seen: Ended, lease: Lease) -> Ended {
    let ended = match seen {
        Ended::Signal(signal) if signal == Signal::SYS.as_raw() => {
            Ended::Filter(lease.forbidden_call(pid, true))
        }
        // Another daemon's child: a record of its kill, if there is one, is there already.
        Ended::Unknown => match lease.forbidden_call(pid, false) {
            None => Ended::Unknown,
            call => Ended::Filter(call),
        },
        other => other,
    };
    lease.end();
    ended
}

fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Confinement;
    use crate::launcher::Launcher;
    use std::path::Path;
    use std::process::{Child, Command, Stdio};

    /// A lease on nothing, of a launcher that makes no jails.
    fn lease() -> Lease {
        let confinement = Confinement {
            jail: false,
            ..Confinement::default()
        };
        let launcher = Launcher::new(&std::env::current_exe().unwrap(), Path::new("/"), &confinement);
        launcher.unwrap().adopt("test", None)
    }

    fn watch(child: &Child) -> Process {
        let pid = child.id();
        Process::of_child(pid as i32, open_pidfd(pid).unwrap(), lease()).unwrap()
    }

    #[tokio::test]
    #[allow(clippy::zombie_processes, reason = "Process::ended reaps them")]
    async fn tells_how_a_child_ended() {
        let spawn = |script: &str| {
            let mut command = Command::new("/bin/sh");
            command
                .args(["-c", script])
                .stdin(Stdio::piped())
                .spawn()
                .unwrap()
        };
        assert_eq!(watch(&spawn("exit 7")).ended().await, Ended::Code(7));
        let waits = spawn("read x; exit 1");
        let mut p = watch(&waits);
        p.kill();
        assert_eq!(p.ended().await, Ended::Signal(9));
        assert_eq!(p.ended().await, Ended::Signal(9), "asked again");
        // Nobody sent it for a filter, so no call has a name.
        assert_eq!(watch(&spawn("kill -SYS $$")).ended().await, Ended::Filter(None));
    }

    #[tokio::test]
    async fn knows_a_process_by_more_than_its_number() {
        let mut child = Command::new("/bin/cat").stdin(Stdio::piped()).spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap();
        let mut adopted = Process::adopt(&id, lease).unwrap().expect("it lives");
        let other = ProcessId {
            start_ticks: id.start_ticks + 1,
            ..id.clone()
        };
        assert!(Process::adopt(&other, lease).unwrap().is_none());
        let other = ProcessId {
            boot_id: "x".into(),
            ..id.clone()
        };
        assert!(Process::adopt(&other, lease).unwrap().is_none());
        drop(child.stdin.take());
        assert_eq!(adopted.ended().await, Ended::Unknown);
        assert!(
            Process::adopt(&id, lease).unwrap().is_none(),
            "a zombie has ended"
        );
        child.wait().unwrap();
        assert!(Process::adopt(&id, lease).unwrap().is_none());
    }
}
