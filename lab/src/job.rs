//! What the host side tells the lab's machine to do, and what that machine says back.
//!
//! The job travels as a file in the initramfs; everything else goes over virtio-serial ports with fixed numbers.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Where the job lies in the initramfs.
pub const JOB_PATH: &str = "/lab/job.json";

/// Numbers of the virtio-serial ports (`/dev/vport0p<N>` in the machine).
pub mod port {
    /// Machine to host: lines of [`super::Message`].
    pub const CONTROL: u32 = 1;
    /// Machine to host: the command's standard output.
    pub const STDOUT: u32 = 2;
    /// Machine to host: the command's standard error.
    pub const STDERR: u32 = 3;
    /// Host to machine: the command's standard input, in chunks of a little-endian u32 length and as many bytes; a
    /// length of zero is the end of file.
    pub const STDIN: u32 = 4;
    /// Host to machine: a byte in each second, where time is not counted in instructions. QEMU's emulation of SVM loses an
    /// interrupt of the timer now and then; with nothing else to wake it the machine then sleeps for ever.
    pub const HEARTBEAT: u32 = 5;
    /// The first share's FUSE requests and replies; the second has the number after it, and so on.
    pub const FIRST_SHARE: u32 = 6;
    /// The device has 31 ports, 0 among them, which is kept for consoles.
    pub const MAX_SHARES: usize = 25;
}

/// What to run, and in what surroundings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Program and arguments; the program is looked up in the machine's `PATH`.
    pub command: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub cwd: String,
    /// Kernel modules to load, by path in the initramfs, dependencies first.
    pub modules: Vec<String>,
    /// Directories of the host, in the order of their ports.
    pub shares: Vec<Share>,
    /// What the command's standard input is.
    pub stdin: Stdin,
    /// Whether the host sends on [`port::HEARTBEAT`].
    pub heartbeat: bool,
}

/// One directory of the host in the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Where it is mounted.
    pub guest_dir: String,
    /// Whether the machine may write.
    pub writable: bool,
}

/// What the command's standard input is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stdin {
    /// `/dev/null`.
    Null,
    /// A pipe fed from [`port::STDIN`].
    Pipe,
    /// A terminal of this size, with all three streams on it.
    Terminal {
        /// Lines.
        rows: u16,
        /// Characters per line.
        columns: u16,
    },
}

/// A line on the control port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The machine is ready and starts the command now, this many nanoseconds after its kernel began.
    Up {
        /// CLOCK_MONOTONIC in the machine, ns.
        uptime_ns: u64,
    },
    /// The command ended.
    Exit {
        /// Exit code, or 128 + signal.
        code: u8,
        /// Bytes that were written to [`port::STDOUT`] in all.
        stdout: u64,
        /// Bytes that were written to [`port::STDERR`] in all.
        stderr: u64,
    },
    /// The machine could not do the job; no command ran.
    Failed(String),
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Up { uptime_ns } => write!(f, "up {uptime_ns}"),
            Self::Exit { code, stdout, stderr } => write!(f, "exit {code} {stdout} {stderr}"),
            Self::Failed(text) => write!(f, "failed {}", text.replace('\n', " ")),
        }
    }
}

impl Message {
    /// Reads what [`fmt::Display`] wrote; `None` for anything else.
    pub fn parse(line: &str) -> Option<Self> {
        let (word, rest) = line.split_once(' ')?;
        match word {
            "up" => Some(Self::Up {
                uptime_ns: rest.parse().ok()?,
            }),
            "failed" => Some(Self::Failed(rest.to_owned())),
            "exit" => {
                let mut numbers = rest.split(' ');
                let code = numbers.next()?.parse().ok()?;
                let stdout = numbers.next()?.parse().ok()?;
                let stderr = numbers.next()?.parse().ok()?;
                numbers
                    .next()
                    .is_none()
                    .then_some(Self::Exit { code, stdout, stderr })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_port() {
        for message in [
            Message::Up {
                uptime_ns: 1_500_000_000,
            },
            Message::Exit {
                code: 255,
                stdout: u64::MAX,
                stderr: 0,
            },
            Message::Failed("cannot mount x: y".into()),
        ] {
            assert_eq!(Message::parse(&message.to_string()), Some(message));
        }
    }

    #[test]
    fn other_lines_are_refused() {
        for line in [
            "",
            "exit",
            "exit 256 0 0",
            "exit 1 2",
            "exit 1 2 3 4",
            "exit -1 0 0",
            "up x",
            "down 1",
        ] {
            assert_eq!(Message::parse(line), None, "{line}");
        }
    }

    #[test]
    fn failure_stays_one_line() {
        assert_eq!(Message::Failed("a\nb".into()).to_string(), "failed a b");
    }
}
