//! The host's side: from a command to a running machine, and its streams and exit code back.

pub(crate) mod fuse;
mod initramfs;
mod locate;
mod nodes;
mod qemu;
mod relay;
mod run;
mod share_fs;
pub mod terminal;

pub use locate::{BuildDir, Sources};
pub use run::{Options, Outcome, ShareDir, Timings, run};

use crate::cpio::TooLarge;
use crate::modules::TreeError;
use std::io;
use std::path::PathBuf;

/// Exit code when the machine did not do its work: QEMU or its kernel died, or it never came up.
pub const EXIT_MACHINE: u8 = 125;
/// Exit code when the time was up.
pub const EXIT_TIMEOUT: u8 = 124;

/// Why the lab did not give the command's exit code.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// QEMU is not installed.
    #[error(
        "qemu-system-x86_64 is not in PATH: the lab needs Debian's package qemu-system-x86; type: make deps"
    )]
    NoQemu,
    /// No static busybox.
    #[error("no static busybox ({tried}): the lab needs Debian's package busybox-static; type: make deps")]
    NoBusybox {
        /// What was looked at, and what was wrong with it.
        tried: String,
    },
    /// No kernel tree was named or found.
    #[error(
        "no kernel for the lab: {why}; `scripts/cloud-kernel.sh` fetches Debian's cloud kernel (type: make deps), or name an unpacked linux-image-*-cloud-amd64 package with --kernel-tree or SHOAL_LAB_KERNEL"
    )]
    NoKernelTree {
        /// What was tried.
        why: String,
    },
    /// The kernel tree is not usable.
    #[error(transparent)]
    Kernel(#[from] TreeError),
    /// A file does not fit into the initramfs.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// More files than the machine has memory for.
    #[error(
        "{copied} MiB of files are to be copied into a machine with {memory} MiB of memory, which takes at most a third; give it more by --memory or copy less"
    )]
    TooMuch {
        /// Size of the initramfs, MiB.
        copied: u64,
        /// Memory of the machine, MiB.
        memory: u32,
    },
    /// A directory to share cannot be shared.
    #[error("cannot share {}: {why}", path.display())]
    Share {
        /// The directory.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// A system call failed.
    #[error("cannot {what}")]
    System {
        /// What was tried, on what.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The machine said that it could not do the job.
    #[error("the lab's machine came up but could not run the command: {0}")]
    Refused(String),
    /// The time was up.
    #[error("the time is up: {seconds} s passed, the machine was ended (more by --timeout)")]
    TimedOut {
        /// The limit.
        seconds: u64,
    },
    /// The machine did not come up in time.
    #[error("the machine did not come up within {seconds} s, it was ended{log}")]
    NotUp {
        /// The limit.
        seconds: u64,
        /// The end of its kernel's log.
        log: LogTail,
    },
    /// QEMU ended before the command did.
    #[error("the machine ended before the command did ({how}){log}")]
    Died {
        /// How QEMU ended.
        how: String,
        /// The end of its kernel's log.
        log: LogTail,
    },
    /// Standard output or standard error of this process cannot be written.
    #[error("cannot write the command's output")]
    Output(#[source] io::Error),
}

impl LabError {
    /// The exit code that tells of this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::TimedOut { .. } => EXIT_TIMEOUT,
            _ => EXIT_MACHINE,
        }
    }

    fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::System { what, source }
    }
}

/// The last lines of the machine's kernel log and of what QEMU said.
#[derive(Debug)]
pub struct LogTail(pub String);

impl std::fmt::Display for LogTail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.trim().is_empty() {
            return write!(
                f,
                "; neither its kernel nor QEMU said anything (--kernel-log shows the whole log)"
            );
        }
        write!(f, "; the end of its log:")?;
        self.0.lines().try_for_each(|line| write!(f, "\n  | {line}"))
    }
}
