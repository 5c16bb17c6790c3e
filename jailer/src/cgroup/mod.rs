//! A cgroup (version 2) per guest: what it may use of memory, processor, disks and processes.
//!
//! The attacks that it stops: a guest, or a VMM that a guest has taken over, that uses up the memory of the host
//! (memory.max, no swap), its processors (cpu.max, cpu.weight), its disks (io.max) or its process table
//! (pids.max: a fork bomb ends at the number of threads the VMM needs). The child is cloned into its leaf
//! (CLONE_INTO_CGROUP), so nothing it does happens outside of it.

mod leaf;
mod limits;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

pub use leaf::Leaf;
pub use limits::{CpuMax, IoMax, Limits};

use crate::error::{Degradation, JailError};
use crate::id::JailId;
use crate::path::open_plain;
use crate::sys;

/// What leaves are called: this, then the id. A leaf of this prefix is ours; nothing else is ever removed.
const PREFIX: &str = "shoal-";
/// The controllers that a leaf wants.
const CONTROLLERS: [&str; 4] = ["memory", "cpu", "io", "pids"];
/// f_type of cgroup v2 (linux/magic.h).
const CGROUP2_MAGIC: libc::c_long = 0x6367_7270;
/// f_type of cgroup v1 (linux/magic.h).
const CGROUP1_MAGIC: libc::c_long = 0x0027_e0eb;

/// Why a cgroup cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The parent is a cgroup of version 1.
    #[error(
        "{path} is a cgroup of version 1: give one of version 2 (a path below the mount of type cgroup2; boot with systemd.unified_cgroup_hierarchy=1)"
    )]
    Version1 {
        /// The parent.
        path: PathBuf,
    },
    /// The parent is no cgroup.
    #[error("{path} is no cgroup: give a path below the mount of type cgroup2, usually /sys/fs/cgroup")]
    NotCgroup {
        /// The parent.
        path: PathBuf,
    },
    /// The parent may not be changed by this user.
    #[error(
        "{attempt} in the cgroup {path} was refused ({source}): it is not delegated to this user; with systemd, run under a unit with Delegate=yes, or `systemd-run --user --scope -p Delegate=yes`"
    )]
    NotDelegated {
        /// What was tried.
        attempt: &'static str,
        /// The parent.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A limit was asked for that needs a controller which the parent does not hand down.
    #[error(
        "the limit {limit} cannot be set for {leaf}: {because}; make the controller available in the parent's cgroup.subtree_control, or go without the limit"
    )]
    NoController {
        /// The file of the limit.
        limit: &'static str,
        /// The leaf.
        leaf: String,
        /// Why the controller is missing.
        because: String,
    },
    /// A jail of this id has live processes.
    #[error("a jail {id} runs already in this cgroup: stop it first, or use another id")]
    Busy {
        /// Whose jail.
        id: JailId,
    },
    /// Another call failed.
    #[error("{attempt} for the cgroup {leaf} failed ({source}): see cgroup.events and cgroup.type there")]
    System {
        /// What was tried.
        attempt: &'static str,
        /// The leaf or parent.
        leaf: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// What to do about limits whose controller is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// Refuse to start the guest.
    Refuse,
    /// Start it without them, and report each as a [`Degradation`].
    Report,
}

/// The cgroup below which each guest gets a leaf.
#[derive(Debug)]
pub struct Parent {
    path: PathBuf,
    dir: OwnedFd,
    /// Wanted controllers that leaves do not get, and why.
    missing: Vec<(&'static str, String)>,
}

impl Parent {
    /// Opens a cgroup by its absolute path, checks that it is of version 2 and ours to change, and hands its
    /// controllers down to the leaves.
    ///
    /// # Errors
    /// [`JailError`] when the path cannot be opened or is a link, and [`CgroupError`] when it is no cgroup of version
    /// 2 or not delegated. Missing controllers are no error here; see [`Parent::degradations`].
    pub fn open(path: &Path) -> Result<Parent, JailError> {
        let dir = open_plain(path, libc::O_RDONLY | libc::O_DIRECTORY, "opening the cgroup")?;
        let kind = sys::file_system_type(dir.as_fd()).map_err(|source| system("statfs", path, source))?;
        match kind {
            CGROUP2_MAGIC => {}
            CGROUP1_MAGIC => {
                return Err(CgroupError::Version1 {
                    path: path.to_owned(),
                }
                .into());
            }
            _ => {
                return Err(CgroupError::NotCgroup {
                    path: path.to_owned(),
                }
                .into());
            }
        }
        // SAFETY: an open descriptor and a C string.
        if unsafe { libc::faccessat(dir.as_raw_fd(), c".".as_ptr(), libc::W_OK, libc::AT_EACCESS) } < 0 {
            let source = io::Error::last_os_error();
            let attempt = "making a cgroup";
            return Err(CgroupError::NotDelegated {
                attempt,
                path: path.to_owned(),
                source,
            }
            .into());
        }
        let missing = hand_down(dir.as_fd(), path)?;
        Ok(Parent {
            path: path.to_owned(),
            dir,
            missing,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Controllers that the leaves do not get.
    pub fn degradations(&self) -> Vec<Degradation> {
        self.missing
            .iter()
            .map(|(controller, _)| self.degradation(controller))
            .collect()
    }

    /// What the lack of one controller means.
    fn degradation(&self, controller: &str) -> Degradation {
        let (what, consequence) = match controller {
            "memory" => (
                "cgroup memory limit",
                "a VMM that was taken over can use up the host's memory",
            ),
            "cpu" => (
                "cgroup cpu limit",
                "a guest can take more processor time than its share",
            ),
            "io" => ("cgroup io limit", "a guest can take the disks' whole bandwidth"),
            _ => (
                "cgroup pids limit",
                "only RLIMIT_NPROC bounds the number of threads of a guest",
            ),
        };
        Degradation {
            what,
            because: self.reason(controller),
            consequence,
            remedy: "hand the controller down to this cgroup (cgroup.subtree_control of every parent; systemd: Delegate=yes)",
        }
    }

    /// The leaf of a guest that exists already (adoption).
    ///
    /// # Errors
    /// [`CgroupError::System`] for all but its absence.
    pub fn existing(&self, id: &JailId) -> Result<Option<Leaf>, CgroupError> {
        Leaf::open(self, id)
    }

    /// Makes the leaf of a guest and sets its limits. What a crashed jail of the same id has left is removed first.
    ///
    /// # Errors
    /// [`CgroupError::Busy`] when live processes are in it; the others as they say. No leaf is left then.
    pub fn create(
        &self,
        id: &JailId,
        limits: &Limits,
        missing: Missing,
    ) -> Result<(Leaf, Vec<Degradation>), CgroupError> {
        let mut leaf = Leaf::create(self, id)?;
        match limits.apply(&leaf, self, missing) {
            Ok(degradations) => Ok((leaf, degradations)),
            Err(error) => {
                // The error of the limit is the one to tell; the leaf is new and empty, so nothing holds it.
                let _ = leaf.remove();
                Err(error)
            }
        }
    }

    /// The ids of all leaves below, and whether each has live processes. For taking stock after a crash.
    ///
    /// # Errors
    /// [`CgroupError::System`] when the directory cannot be read.
    pub fn leaves(&self) -> Result<Vec<(JailId, bool)>, CgroupError> {
        // Through the descriptor, so that it is this cgroup whatever stands at the path now.
        let listing = format!("/proc/self/fd/{}", self.dir.as_raw_fd());
        let fail = |source| system("listing", &self.path, source);
        let mut found = Vec::new();
        for entry in std::fs::read_dir(listing).map_err(fail)? {
            let name = entry.map_err(fail)?.file_name();
            let id = name
                .to_str()
                .and_then(|name| name.strip_prefix(PREFIX))
                .map(str::parse::<JailId>);
            if let Some(Ok(id)) = id
                && let Some(leaf) = self.existing(&id)?
            {
                let populated = leaf.populated()?;
                found.push((id, populated));
            }
        }
        Ok(found)
    }

    /// Why leaves lack a controller.
    fn reason(&self, controller: &str) -> String {
        let reason = self.missing.iter().find(|(name, _)| *name == controller);
        reason.map_or_else(
            || format!("the kernel offers no such file of {controller}"),
            |(_, why)| why.clone(),
        )
    }
}

/// Writes the wanted controllers to cgroup.subtree_control; gives those that leaves still lack, with the reasons.
fn hand_down(dir: BorrowedFd<'_>, path: &Path) -> Result<Vec<(&'static str, String)>, CgroupError> {
    let read = |file| read_file(dir, file).map_err(|source| system("reading its controllers", path, source));
    let has = |list: &str, name: &str| list.split_whitespace().any(|word| word == name);
    let available = read(c"cgroup.controllers")?;
    let active = read(c"cgroup.subtree_control")?;
    let mut missing = Vec::new();
    for controller in CONTROLLERS {
        if has(&active, controller) {
            continue;
        }
        if !has(&available, controller) {
            let because = format!("{} does not offer the controller {controller}", path.display());
            missing.push((controller, because));
        } else if let Err(error) = write_file(dir, c"cgroup.subtree_control", &format!("+{controller}")) {
            let because = match error.raw_os_error() {
                Some(libc::EBUSY) => format!(
                    "{} has processes of its own, so its controllers cannot be handed down: move them to a child",
                    path.display()
                ),
                _ => format!("enabling {controller} below {} failed: {error}", path.display()),
            };
            missing.push((controller, because));
        }
    }
    Ok(missing)
}

fn system(attempt: &'static str, path: &Path, source: io::Error) -> CgroupError {
    CgroupError::System {
        attempt,
        leaf: path.display().to_string(),
        source,
    }
}

/// Reads a (small) control file.
fn read_file(dir: BorrowedFd<'_>, name: &std::ffi::CStr) -> io::Result<String> {
    let file = File::from(sys::open_beneath(dir, name, libc::O_RDONLY, 0)?);
    let mut text = String::new();
    file.take(64 << 10).read_to_string(&mut text)?;
    Ok(text)
}

/// Writes a control file with one write.
fn write_file(dir: BorrowedFd<'_>, name: &std::ffi::CStr, text: &str) -> io::Result<()> {
    File::from(sys::open_beneath(dir, name, libc::O_WRONLY, 0)?).write_all(text.as_bytes())
}
