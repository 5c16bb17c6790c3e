//! The leaf of one guest.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use super::{CgroupError, PREFIX, Parent, read_file, write_file};
use crate::id::JailId;
use crate::sys;

/// How long [`Leaf::remove`] waits for the kernel to take the last dead process out of a leaf.
const REMOVAL_PATIENCE: Duration = Duration::from_secs(2);

/// The cgroup of one guest. Dropping it leaves the cgroup where it is, because guests outlive the daemon;
/// [`Leaf::remove`] removes it.
#[derive(Debug)]
pub struct Leaf {
    parent: OwnedFd,
    dir: OwnedFd,
    name: CString,
}

impl Leaf {
    /// Makes the leaf, over the remains of a crashed one if need be.
    pub(super) fn create(parent: &Parent, id: &JailId) -> Result<Leaf, CgroupError> {
        let name = leaf_name(id);
        match make_directory(parent.dir.as_fd(), &name) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                if let Some(mut remains) = Leaf::open(parent, id)? {
                    if remains.populated()? {
                        return Err(CgroupError::Busy { id: id.clone() });
                    }
                    remains.remove()?;
                }
                make_directory(parent.dir.as_fd(), &name)
                    .map_err(|source| fail("making it again after removing old remains", &name, source))?;
            }
            Err(source)
                if matches!(
                    source.raw_os_error(),
                    Some(libc::EACCES | libc::EPERM | libc::EROFS)
                ) =>
            {
                let attempt = "making a cgroup";
                return Err(CgroupError::NotDelegated {
                    attempt,
                    path: parent.path.clone(),
                    source,
                });
            }
            Err(source) => return Err(fail("making it", &name, source)),
        }
        match Leaf::open(parent, id)? {
            Some(leaf) => Ok(leaf),
            None => Err(fail(
                "opening it",
                &name,
                io::Error::from_raw_os_error(libc::ENOENT),
            )),
        }
    }

    /// Opens the leaf if it exists.
    pub(super) fn open(parent: &Parent, id: &JailId) -> Result<Option<Leaf>, CgroupError> {
        let name = leaf_name(id);
        let dir = match sys::open_beneath(parent.dir.as_fd(), &name, libc::O_RDONLY | libc::O_DIRECTORY, 0) {
            Ok(dir) => dir,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            Err(source) => return Err(fail("opening it", &name, source)),
        };
        let parent = parent
            .dir
            .try_clone()
            .map_err(|source| fail("copying its parent's descriptor", &name, source))?;
        Ok(Some(Leaf { parent, dir, name }))
    }

    /// The directory, for CLONE_INTO_CGROUP and for reading statistics.
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Its name, for messages.
    pub fn name(&self) -> String {
        self.name.to_string_lossy().into_owned()
    }

    /// Whether live processes are in it.
    ///
    /// # Errors
    /// [`CgroupError::System`] when the kernel does not say.
    pub fn populated(&self) -> Result<bool, CgroupError> {
        match read_file(self.dir.as_fd(), c"cgroup.events") {
            Ok(events) => Ok(events.lines().any(|line| line == "populated 1")),
            // Removed by somebody else: then nothing lives in it.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(false),
            Err(source) => Err(fail("reading cgroup.events", &self.name, source)),
        }
    }

    /// Kills every process in it with one write (cgroup.kill, Linux 5.14). Processes that fork meanwhile do not get
    /// away.
    ///
    /// # Errors
    /// [`CgroupError::System`] when the kernel refuses.
    pub fn kill(&self) -> Result<(), CgroupError> {
        write_file(self.dir.as_fd(), c"cgroup.kill", "1")
            .map_err(|source| fail("killing", &self.name, source))
    }

    /// Sets one control file.
    pub(super) fn write(&self, file: &std::ffi::CStr, text: &str) -> io::Result<()> {
        write_file(self.dir.as_fd(), file, text)
    }

    /// Removes the leaf, whose processes must have ended. An absent leaf is a removed one.
    ///
    /// # Errors
    /// [`CgroupError::System`] when processes are still in it after two seconds.
    pub fn remove(&mut self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + REMOVAL_PATIENCE;
        loop {
            // Opened before the attempt, so that a change between the attempt and the wait is not missed.
            let events = sys::open_beneath(self.dir.as_fd(), c"cgroup.events", libc::O_RDONLY, 0);
            // SAFETY: an open descriptor and a C string.
            let removed =
                unsafe { libc::unlinkat(self.parent.as_raw_fd(), self.name.as_ptr(), libc::AT_REMOVEDIR) };
            if removed == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            match (error.raw_os_error(), events) {
                (Some(libc::ENOENT), _) => return Ok(()),
                (Some(libc::EBUSY), Ok(events)) if Instant::now() < deadline => {
                    wait_change(&events, deadline)
                }
                _ => return Err(fail("removing it", &self.name, error)),
            }
        }
    }
}

/// Waits until the kernel announces a change of cgroup.events, or the deadline.
fn wait_change(events: &OwnedFd, deadline: Instant) {
    let mut waited = libc::pollfd {
        fd: events.as_raw_fd(),
        events: libc::POLLPRI,
        revents: 0,
    };
    // At most 50 ms at once: the removal of a child cgroup is announced in another file than this.
    let left = deadline
        .saturating_duration_since(Instant::now())
        .min(Duration::from_millis(50));
    // SAFETY: one pollfd, alive during the call. A failure (EINTR) only ends the wait early.
    unsafe { libc::poll(&mut waited, 1, left.as_millis() as libc::c_int) };
}

fn leaf_name(id: &JailId) -> CString {
    // An id holds letters, digits and hyphens: no zero byte.
    CString::new(format!("{PREFIX}{id}")).unwrap_or_default()
}

fn make_directory(parent: BorrowedFd<'_>, name: &CString) -> io::Result<()> {
    // SAFETY: an open descriptor and a C string.
    if unsafe { libc::mkdirat(parent.as_raw_fd(), name.as_ptr(), 0o755) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn fail(attempt: &'static str, name: &CString, source: io::Error) -> CgroupError {
    CgroupError::System {
        attempt,
        leaf: name.to_string_lossy().into_owned(),
        source,
    }
}
