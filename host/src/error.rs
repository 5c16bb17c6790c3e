//! Why the host refused or failed.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

use shoal_vmm::channel::ChannelError;
use shoal_vmm::protocol::Failure;

use crate::store::StoreError;

/// A call on the host was refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// Something in the guest's description cannot be used.
    #[error("{field}: {why}")]
    Invalid {
        /// Which field (`disks[0].path`).
        field: String,
        /// What is wrong, and what would be right.
        why: String,
    },
    /// There is no such guest.
    #[error("there is no guest {0:?}")]
    NotFound(String),
    /// The name is taken.
    #[error("a guest with the name {name:?} exists already: {id}")]
    NameTaken {
        /// The name.
        name: String,
        /// Who has it.
        id: String,
    },
    /// The call does not fit the guest's state.
    #[error("cannot {action} guest {id}: it is {state}")]
    WrongState {
        /// The guest.
        id: String,
        /// What was asked.
        action: &'static str,
        /// The state it is in.
        state: &'static str,
    },
    /// Something the guest needs is used by another.
    #[error("{field}: {what} is in use by {by}")]
    InUse {
        /// Which field.
        field: String,
        /// What is in use.
        what: String,
        /// By whom.
        by: String,
    },
    /// The VMM could not be started in its jail.
    #[error("{0}")]
    Jail(shoal_jailer::JailError),
    /// The VMM refused the configuration or could not build the machine.
    #[error("the VMM could not start the guest: {0}")]
    Refused(Failure),
    /// The VMM ended or fell silent while the guest was being started.
    #[error("the VMM {how} while the guest was being started; its last words: {log:?}")]
    StartFailed {
        /// What became of it.
        how: String,
        /// The end of its log.
        log: String,
    },
    /// Talking to the VMM failed.
    #[error("talking to the VMM failed")]
    Link(#[from] ChannelError),
    /// The VMM did not do what it was asked for.
    #[error("the guest's VMM did not {action}: {failure}")]
    NotDone {
        /// What it was asked for.
        action: &'static str,
        /// What it said.
        failure: Failure,
    },
    /// A system call failed.
    #[error("{what} {path:?} failed")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// This machine's KVM cannot be used.
    #[error("/dev/kvm cannot be opened; `shoal doctor` tells why and what to do")]
    Kvm {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The state could not be recorded.
    #[error("recording the guest's state failed")]
    Store(#[from] StoreError),
    /// The host is closing.
    #[error("the host is shutting down")]
    Closing,
}

impl HostError {
    pub(crate) fn invalid(field: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Invalid {
            field: field.into(),
            why: why.into(),
        }
    }

    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            what,
            path: path.to_owned(),
            source,
        }
    }

    /// The field that is to blame, if one is.
    pub fn field(&self) -> Option<&str> {
        match self {
            Self::Invalid { field, .. } | Self::InUse { field, .. } => Some(field),
            Self::NameTaken { .. } => Some("name"),
            Self::Refused(failure) | Self::NotDone { failure, .. } => failure.field.as_deref(),
            _ => None,
        }
    }
}

/// A host could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another daemon serves the directory.
    #[error(
        "the state directory {0:?} is in use by another daemon; stop that one or choose another directory"
    )]
    Locked(PathBuf),
    /// Socket paths below the directory would not fit into a socket address.
    #[error(
        "the state directory {path:?} has too long a path: sockets below it would need {needed} bytes, a socket \
         address holds 107; choose a shorter path"
    )]
    PathTooLong {
        /// The directory.
        path: PathBuf,
        /// Length of the longest socket path below it (bytes).
        needed: usize,
    },
    /// VMMs cannot be started.
    #[error(transparent)]
    Launcher(#[from] crate::launcher::LauncherError),
    /// A system call failed.
    #[error("{what} {path:?} failed")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The store cannot be used.
    #[error("the store cannot be used")]
    Store(#[from] StoreError),
}

impl OpenError {
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            what,
            path: path.to_owned(),
            source,
        }
    }
}

/// An error and its causes in one line, as people want it in a log or an answer.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
