//! A running jail.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use crate::cgroup::Leaf;
use crate::error::{Degradation, JailError};
use crate::sys::{self, Exit};

/// A running jail. Dropping it changes nothing: guests outlive the daemon.
#[derive(Debug)]
pub struct Jail {
    /// Process number on the host.
    pub pid: i32,
    /// The process itself, whatever becomes of its number.
    pub pidfd: OwnedFd,
    /// Its cgroup.
    pub leaf: Option<Leaf>,
    /// What this jail lacks beyond what [`Jailer::degradations`] tells.
    pub degradations: Vec<Degradation>,
    /// When its process began (CLOCK_MONOTONIC, ns).
    pub begun_ns: u64,
    /// When the jail was complete: the program is executed next (CLOCK_MONOTONIC, ns).
    pub jailed_ns: u64,
}

impl Jail {
    /// Ends the program at once (SIGKILL).
    ///
    /// # Errors
    /// `ESRCH` when it has ended and been waited for.
    pub fn kill(&self) -> io::Result<()> {
        sys::pidfd_send_signal(self.pidfd.as_fd(), libc::SIGKILL)
    }

    /// Sends a signal. As number 1 of its pid namespace the program ignores what it has no handler for, but SIGKILL.
    ///
    /// # Errors
    /// `ESRCH` when it has ended and been waited for, `EINVAL` for what is no signal.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        sys::pidfd_send_signal(self.pidfd.as_fd(), signal)
    }

    /// Waits for its end. The pidfd becomes readable then, for those who poll.
    ///
    /// # Errors
    /// `ECHILD` when it is not this process's child, or was waited for.
    pub fn wait(&self) -> io::Result<Exit> {
        sys::wait_pidfd(self.pidfd.as_fd(), true)?.ok_or_else(|| io::Error::from_raw_os_error(libc::ECHILD))
    }

    /// How it ended; `None` when it still runs.
    ///
    /// # Errors
    /// As [`Jail::wait`].
    pub fn try_wait(&self) -> io::Result<Option<Exit>> {
        sys::wait_pidfd(self.pidfd.as_fd(), false)
    }

    /// Kills, waits, and removes the cgroup.
    ///
    /// # Errors
    /// When the cgroup cannot be removed. A program that has ended already is no error.
    pub fn destroy(mut self) -> Result<Option<Exit>, JailError> {
        // ESRCH: it ended before.
        let _ = self.kill();
        let exit = self.wait().ok();
        if let Some(leaf) = &mut self.leaf {
            leaf.remove()?;
        }
        Ok(exit)
    }
}
