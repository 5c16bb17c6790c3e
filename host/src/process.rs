//! A VMM's process: who it is beyond its number, and when it ends.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::Child;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::async_fd;

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It exited with this code.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
    /// It was another daemon's child: nobody can tell any more.
    Unknown,
}

/// A VMM's process, watched by a pidfd.
#[derive(Debug)]
pub(crate) struct Process {
    id: ProcessId,
    pidfd: AsyncFd<OwnedFd>,
    /// Only for a process that this daemon started. It must be reaped.
    child: Option<Child>,
}

impl Process {
    /// Watches a child.
    pub fn of_child(mut child: Child) -> io::Result<Self> {
        let watch = || -> io::Result<_> {
            let id = ProcessId::of(child.id())?;
            // No race: the number cannot be used again before the child is reaped, below.
            Ok((async_fd::register(open_pidfd(id.pid)?, Interest::READABLE)?, id))
        };
        match watch() {
            Ok((pidfd, id)) => Ok(Self {
                id,
                pidfd,
                child: Some(child),
            }),
            Err(e) => {
                // Neither can fail for a child that was not reaped; and the error above is the one to tell.
                let _ = child.kill().and_then(|()| child.wait());
                Err(e)
            }
        }
    }

    /// Watches a process that an earlier daemon started; `None` when it is gone.
    pub fn adopt(id: &ProcessId) -> io::Result<Option<Self>> {
        let Ok(pidfd) = open_pidfd(id.pid) else {
            return Ok(None);
        };
        // The number was turned into a descriptor first: if it still means the same process now, it did then.
        if !id.is_current() {
            return Ok(None);
        }
        let pidfd = async_fd::register(pidfd, Interest::READABLE)?;
        Ok(Some(Self {
            id: id.clone(),
            pidfd,
            child: None,
        }))
    }

    /// Who it is.
    pub fn id(&self) -> &ProcessId {
        &self.id
    }

    /// Waits until it ends, and reaps it. May be cancelled and called again.
    pub async fn ended(&mut self) -> Ended {
        // An error here means that the runtime is going away; the task is cancelled with it.
        if self.pidfd.readable().await.is_err() {
            std::future::pending::<()>().await;
        }
        let Some(child) = &mut self.child else {
            return Ended::Unknown;
        };
        match child.wait() {
            Ok(status) => match (status.code(), status.signal()) {
                (Some(code), _) => Ended::Code(code),
                (None, Some(signal)) => Ended::Signal(signal),
                (None, None) => Ended::Unknown,
            },
            Err(_) => Ended::Unknown,
        }
    }

    /// Sends SIGKILL. A process that has ended already is no error.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL);
    }
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
    use std::process::{Command, Stdio};

    #[tokio::test]
    async fn tells_how_a_child_ended() {
        let spawn = |script: &str| {
            let mut command = Command::new("/bin/sh");
            Process::of_child(
                command
                    .args(["-c", script])
                    .stdin(Stdio::piped())
                    .spawn()
                    .unwrap(),
            )
            .unwrap()
        };
        assert_eq!(spawn("exit 7").ended().await, Ended::Code(7));
        let mut p = spawn("read x; exit 1");
        p.kill();
        assert_eq!(p.ended().await, Ended::Signal(9));
    }

    #[tokio::test]
    async fn knows_a_process_by_more_than_its_number() {
        let mut child = Command::new("/bin/cat").stdin(Stdio::piped()).spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap();
        let mut adopted = Process::adopt(&id).unwrap().expect("it lives");
        let other = ProcessId {
            start_ticks: id.start_ticks + 1,
            ..id.clone()
        };
        assert!(Process::adopt(&other).unwrap().is_none());
        let other = ProcessId {
            boot_id: "x".into(),
            ..id.clone()
        };
        assert!(Process::adopt(&other).unwrap().is_none());
        drop(child.stdin.take());
        assert_eq!(adopted.ended().await, Ended::Unknown);
        assert!(Process::adopt(&id).unwrap().is_none(), "a zombie has ended");
        child.wait().unwrap();
        assert!(Process::adopt(&id).unwrap().is_none());
    }
}
