//! What a jail shall be, checked and laid out for the kernel.

use std::ffi::{CString, c_char};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr;

use crate::cgroup;
use crate::child::Placed;
use crate::error::JailError;
use crate::id::{Ids, JailId};
use crate::rlimits::Rlimits;

/// The highest number that a descriptor may be handed over at.
pub const MAX_TARGET_FD: RawFd = 255;

/// A descriptor to hand over, and the number that it gets.
#[derive(Debug, Clone, Copy)]
pub struct HandOver<'a> {
    /// The descriptor.
    pub fd: BorrowedFd<'a>,
    /// Its number in the VMM, 0 to [`MAX_TARGET_FD`].
    pub target: RawFd,
}

/// One jail.
#[derive(Debug)]
pub struct JailSpec<'a> {
    /// Its name; the leaf of the cgroup is called after it.
    pub id: &'a JailId,
    /// User and group of the guest's own. Ignored when rootless (all guests run as the user).
    pub ids: Ids,
    /// Arguments of the program, with its name first.
    pub argv: &'a [CString],
    /// What it gets. Numbers 0, 1 and 2 are /dev/null where nothing else is given for them.
    pub fds: &'a [HandOver<'a>],
    /// Limits of its cgroup.
    pub limits: &'a cgroup::Limits,
    /// Limits of the process.
    pub rlimits: Rlimits,
    /// 0 to 1000; higher is killed sooner when the host is out of memory. `None` leaves it.
    pub oom_score_adj: Option<u16>,
    /// No other process's thread on the other half of a core (PR_SCHED_CORE). The start fails where the kernel refuses;
    /// [`crate::CoreScheduling::decide`] tells whether to ask.
    pub core_scheduling: bool,
    /// End the program when the thread that calls [`crate::Jailer::spawn`] ends. Not for guests that outlive their daemon.
    pub die_with_parent: bool,
}

/// Arguments as the kernel takes them.
pub(crate) struct Argv {
    pointers: Vec<*const c_char>,
    _strings: Vec<CString>,
}

impl Argv {
    pub(crate) fn new(arguments: &[CString]) -> Result<Argv, JailError> {
        if arguments.is_empty() {
            return Err(JailError::Argument {
                index: 0,
                why: "the name of the program is missing",
            });
        }
        let strings = arguments.to_vec();
        let mut pointers: Vec<_> = strings.iter().map(|text| text.as_ptr()).collect();
        pointers.push(ptr::null());
        Ok(Argv {
            pointers,
            _strings: strings,
        })
    }

    pub(crate) fn as_ptr(&self) -> *const *const c_char {
        self.pointers.as_ptr()
    }
}

/// Checks and sorts the descriptors, and fills 0 to 2 with /dev/null.
pub(crate) fn place(fds: &[HandOver<'_>], null: BorrowedFd<'_>) -> Result<Vec<Placed>, JailError> {
    let mut placed: Vec<Placed> = fds
        .iter()
        .map(|hand| Placed {
            source: hand.fd.as_raw_fd(),
            target: hand.target,
        })
        .collect();
    for target in 0..3 {
        if !placed.iter().any(|p| p.target == target) {
            placed.push(Placed {
                source: null.as_raw_fd(),
                target,
            });
        }
    }
    placed.sort_by_key(|p| p.target);
    if let Some(p) = placed.iter().find(|p| !(0..=MAX_TARGET_FD).contains(&p.target)) {
        let why = format!("number {} lies outside 0 to {MAX_TARGET_FD}", p.target);
        return Err(JailError::HandOver { why });
    }
    if let Some(pair) = placed.windows(2).find(|pair| pair[0].target == pair[1].target) {
        return Err(JailError::HandOver {
            why: format!("number {} is asked for twice", pair[0].target),
        });
    }
    Ok(placed)
}

/// A program that leads a session can make any terminal that it holds its own, and then type into it for the shell on
/// the other side (TIOCSTI). So none is handed over.
pub(crate) fn refuse_terminals(fds: &[HandOver<'_>]) -> Result<(), JailError> {
    let is_terminal = |hand: &&HandOver<'_>| {
        // SAFETY: an open descriptor.
        unsafe { libc::isatty(hand.fd.as_raw_fd()) == 1 }
    };
    match fds.iter().find(is_terminal) {
        None => Ok(()),
        Some(hand) => {
            let why = format!(
                "number {} is a terminal, which a jail does not get: hand over a pipe or a file",
                hand.target
            );
            Err(JailError::HandOver { why })
        }
    }
}
