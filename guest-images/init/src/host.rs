//! The line to the host over vsock: `READY`, `EXIT` out, `STOP` in. A guest without a vsock device does without.

use crate::sys;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// The port on the host that init calls.
pub const PORT: u32 = 1024;
/// Longest line that the host may send; a longer one ends the connection.
const MAX_LINE: usize = 256;
/// How long init waits for the host to close after `EXIT`, so that the line is not lost with the machine, in ms.
const FAREWELL_MS: i32 = 250;
/// When a line that ended is called again first; each call that fails doubles it, up to the second figure.
const AGAIN: Duration = Duration::from_millis(250);
const AGAIN_AT_MOST: Duration = Duration::from_secs(8);

/// The connection.
///
/// ```text
///  None ◀─no device─ call ─▶ Connecting ──writable──▶ Open ──end, error, rubbish──▶ Lost
///                              ▲   └───refused────▶ Lost                             │
///                              └────────────────────┴──────────time is up────────────┘
/// ```
///
/// A daemon that is started again takes its guests over: the line to it is called anew.
pub enum Host {
    /// There is no device.
    None,
    /// The connect is under way; how long to wait should it fail.
    Connecting(OwnedFd, Duration),
    /// `READY` was sent.
    Open(OwnedFd, Vec<u8>),
    /// Nobody listened, or the connection has ended: when to call again, and how long to wait after that.
    Lost(Instant, Duration),
}

impl Host {
    /// Calls the host; never waits.
    pub fn call() -> Host {
        sys::vsock_connect(PORT).map_or(Host::None, |fd| Host::Connecting(fd, AGAIN))
    }

    fn lost(wait: Duration) -> Host {
        Host::Lost(Instant::now() + wait, (wait * 2).min(AGAIN_AT_MOST))
    }

    /// When [`Host::call_again`] is due, if nothing happens before.
    pub fn due(&self) -> Option<Instant> {
        match self {
            Host::Lost(at, _) => Some(*at),
            _ => None,
        }
    }

    /// Calls the host again when that is due; never waits.
    pub fn call_again(&mut self) {
        if let Host::Lost(at, wait) = *self
            && Instant::now() >= at
        {
            *self =
                sys::vsock_connect(PORT).map_or_else(|_| Host::lost(wait), |fd| Host::Connecting(fd, wait));
        }
    }

    /// What to poll, and for which events.
    pub fn interest(&self) -> Option<(RawFd, i16)> {
        match self {
            Host::None | Host::Lost(..) => None,
            Host::Connecting(fd, _) => Some((fd.as_raw_fd(), libc::POLLOUT)),
            Host::Open(fd, _) => Some((fd.as_raw_fd(), libc::POLLIN)),
        }
    }

    /// Serves an event. True when the host asked the guest to stop.
    pub fn serve(&mut self, ready_at: u64) -> bool {
        let mut stop = false;
        *self = match std::mem::replace(self, Host::None) {
            Host::Connecting(fd, wait) => {
                let ready = format!("READY {ready_at}\n");
                let sent =
                    sys::connect_result(&fd).and_then(|()| sys::send_now(fd.as_raw_fd(), ready.as_bytes()));
                match sent {
                    Ok(_) => Host::Open(fd, Vec::new()),
                    Err(_) => Host::lost(wait),
                }
            }
            Host::Open(fd, mut line) => {
                let mut buffer = [0; MAX_LINE];
                match sys::read_now(fd.as_raw_fd(), &mut buffer) {
                    Ok(n) if n > 0 => {
                        stop = take_lines(&mut line, &buffer[..n]);
                        if line.len() > MAX_LINE {
                            Host::lost(AGAIN)
                        } else {
                            Host::Open(fd, line)
                        }
                    }
                    Err(e) if e.kind() == ErrorKind::WouldBlock => Host::Open(fd, line),
                    _ => Host::lost(AGAIN),
                }
            }
            silent => silent,
        };
        stop
    }

    /// Tells the workload's exit code and waits shortly for the host to have read it.
    pub fn farewell(self, code: i32) {
        let connecting = match self {
            Host::Lost(..) => sys::vsock_connect(PORT).map_or(Host::None, |fd| Host::Connecting(fd, AGAIN)),
            other => other,
        };
        let fd = match connecting {
            Host::None | Host::Lost(..) => return,
            Host::Open(fd, _) => fd,
            // The workload was faster than the host's answer: that is waited for now.
            Host::Connecting(fd, _) => {
                let mut wait = [libc::pollfd {
                    fd: fd.as_raw_fd(),
                    events: libc::POLLOUT,
                    revents: 0,
                }];
                let _ = sys::poll(&mut wait, FAREWELL_MS);
                if sys::connect_result(&fd).is_err() {
                    return;
                }
                fd
            }
        };
        if sys::send_now(fd.as_raw_fd(), format!("EXIT {code}\n").as_bytes()).is_ok() {
            sys::shutdown_write(&fd);
            let mut wait = [libc::pollfd {
                fd: fd.as_raw_fd(),
                events: libc::POLLRDHUP,
                revents: 0,
            }];
            let _ = sys::poll(&mut wait, FAREWELL_MS);
        }
    }
}

/// Adds what came to the line begun before. True when one of the lines now complete is `STOP`.
fn take_lines(line: &mut Vec<u8>, data: &[u8]) -> bool {
    let mut stop = false;
    for byte in data {
        if *byte == b'\n' {
            stop |= line == b"STOP";
            line.clear();
        } else {
            line.push(*byte);
        }
    }
    stop
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_may_come_in_pieces_and_among_others() {
        let mut line = Vec::new();
        assert!(!take_lines(&mut line, b"HELLO\nST"));
        assert!(!take_lines(&mut line, b"O"));
        assert!(take_lines(&mut line, b"P\nX"));
        assert_eq!(line, b"X");
        assert!(!take_lines(&mut Vec::new(), b"STOPS\nstop\n\n"));
    }
}
