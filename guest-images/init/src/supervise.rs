//! Waits for the workload's end, for requests to stop, and for orphans.

use crate::button;
use crate::cmdline::Config;
use crate::console::say;
use crate::host::Host;
use crate::sys::{self, Reaped};
use crate::workload::Workload;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// Signals that init reads. All but the first ask it to stop; busybox's `halt`, `poweroff` and `reboot` send USR1, USR2, TERM.
pub const SIGNALS: [libc::c_int; 6] = [
    libc::SIGCHLD,
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGPWR,
    libc::SIGUSR1,
    libc::SIGUSR2,
];
/// How long what the workload left behind may take to end.
const STRAGGLERS: Duration = Duration::from_secs(2);

/// How far the end of the workload has come.
///
/// ```text
///  Running ──STOP, button, signal──▶ Stopping(deadline) ──deadline──▶ Killed
/// ```
enum Phase {
    Running,
    Stopping(Instant),
    Killed,
}

/// Runs until the workload has ended; its exit code.
pub fn until_exit(
    workload: &Workload,
    config: &Config,
    signals: &OwnedFd,
    host: &mut Host,
    mut buttons: Vec<File>,
    ready_at: u64,
) -> i32 {
    let mut phase = Phase::Running;
    loop {
        let mut fds = vec![poll_entry(signals.as_raw_fd(), libc::POLLIN)];
        fds.extend(buttons.iter().map(|b| poll_entry(b.as_raw_fd(), libc::POLLIN)));
        let host_at = host.interest().map(|(fd, events)| {
            fds.push(poll_entry(fd, events));
            fds.len() - 1
        });
        if let Err(e) = sys::poll(&mut fds, timeout(&phase, host.due())) {
            say(&format!("cannot wait for events: {e}; stopping"));
            return 126;
        }
        let mut stop = false;
        while let Some(signal) = sys::read_signal(signals) {
            stop |= signal != libc::SIGCHLD;
        }
        if let Some(code) = reap_until(workload.pid) {
            return code;
        }
        for (entry, button) in fds[1..].iter().zip(&mut buttons) {
            stop |= entry.revents & libc::POLLIN != 0 && button::pressed(button);
        }
        // A device that hung up is not listened to any more.
        let mut i = 0;
        buttons.retain(|_| {
            i += 1;
            fds[i].revents & (libc::POLLHUP | libc::POLLERR) == 0
        });
        if host_at.is_some_and(|at| fds[at].revents != 0) {
            stop |= host.serve(ready_at);
        }
        host.call_again();
        phase = advance(phase, stop, workload, config.grace);
    }
}

fn poll_entry(fd: i32, events: i16) -> libc::pollfd {
    libc::pollfd {
        fd,
        events,
        revents: 0,
    }
}

/// Until the first of what is to be done at a time.
fn timeout(phase: &Phase, call: Option<Instant>) -> libc::c_int {
    let deadline = match phase {
        Phase::Stopping(deadline) => Some(*deadline),
        Phase::Running | Phase::Killed => None,
    };
    let first = deadline.into_iter().chain(call).min();
    first.map_or(-1, |at| {
        milliseconds(at.saturating_duration_since(Instant::now()))
    })
}

/// Rounded up, so that a poll does not return before the deadline.
fn milliseconds(duration: Duration) -> libc::c_int {
    libc::c_int::try_from(duration.as_micros().div_ceil(1000)).unwrap_or(libc::c_int::MAX)
}

fn advance(phase: Phase, stop: bool, workload: &Workload, grace: Duration) -> Phase {
    match phase {
        Phase::Running if stop => {
            say("asked to stop");
            sys::kill(
                workload.pid,
                if workload.shell {
                    libc::SIGHUP
                } else {
                    libc::SIGTERM
                },
            );
            Phase::Stopping(Instant::now() + grace)
        }
        Phase::Stopping(deadline) if Instant::now() >= deadline => {
            say(&format!(
                "the workload did not stop within {} s; killing it",
                grace.as_secs()
            ));
            sys::kill(-workload.pid, libc::SIGKILL);
            Phase::Killed
        }
        other => other,
    }
}

/// Reaps all that have ended; the exit code when `pid` is among them.
fn reap_until(pid: i32) -> Option<i32> {
    let mut found = None;
    while let Reaped::Ended { pid: ended, code } = sys::reap() {
        if ended == pid {
            found = Some(code);
        }
    }
    found
}

/// Ends all processes that are left: asked first, then killed.
pub fn end_stragglers(signals: &OwnedFd) {
    let deadline = Instant::now() + STRAGGLERS;
    let mut killed = false;
    if no_children() {
        return;
    }
    sys::kill(-1, libc::SIGTERM);
    sys::kill(-1, libc::SIGCONT);
    while !no_children() {
        let now = Instant::now();
        if now >= deadline {
            if killed {
                return; // what SIGKILL does not end hangs in the kernel
            }
            sys::kill(-1, libc::SIGKILL);
            killed = true;
        }
        let wait = if killed { STRAGGLERS } else { deadline - now };
        let _ = sys::poll(
            &mut [poll_entry(signals.as_raw_fd(), libc::POLLIN)],
            milliseconds(wait),
        );
        while sys::read_signal(signals).is_some() {}
    }
}

fn no_children() -> bool {
    loop {
        match sys::reap() {
            Reaped::Ended { .. } => {}
            Reaped::NoneYet => return false,
            Reaped::NoChildren => return true,
        }
    }
}
