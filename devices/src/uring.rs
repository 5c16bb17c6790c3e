//! A ring of io_uring that can do nothing but move, flush and allocate the data of one file.
//!
//! It is made before the thread's seccomp filter is installed, and is switched on with restrictions that stay: the
//! file is the only one registered, every request must name it (IOSQE_FIXED_FILE), six operations are allowed and no
//! further registration is. So it is no way round the filter, whatever becomes of the process afterwards, and the only
//! system call that it needs is `io_uring_enter`.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};

/// The ring cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum UringError {
    /// The kernel has none.
    #[error("this host's kernel is built without io_uring (CONFIG_IO_URING)")]
    Missing,
    /// It is forbidden.
    #[error(
        "io_uring is not allowed to this process: see `sysctl kernel.io_uring_disabled` (0 allows it to all, 1 to the \
         group in kernel.io_uring_group), and the seccomp profile of the container around it, if there is one"
    )]
    Forbidden,
    /// The kernel's cannot be confined.
    #[error("this host's kernel is too old for a confined io_uring, which needs Linux 5.15")]
    TooOld,
    /// A system call failed.
    #[error("{what} failed: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> UringError {
    move |source| match source.raw_os_error() {
        Some(libc::ENOSYS) => UringError::Missing,
        Some(libc::EPERM | libc::EACCES) => UringError::Forbidden,
        Some(libc::EINVAL) => UringError::TooOld,
        _ => UringError::Io { what, source },
    }
}

/// One request, with the pointers that the kernel follows.
#[derive(Clone, Copy, Debug)]
pub enum Op<'v> {
    /// Read from the file into memory.
    Read {
        /// Where to.
        to: &'v [libc::iovec],
        /// Where in the file (bytes).
        offset: u64,
    },
    /// Write from memory to the file.
    Write {
        /// Where from.
        from: &'v [libc::iovec],
        /// Where in the file (bytes).
        offset: u64,
    },
    /// fdatasync(2).
    Sync,
    /// fallocate(2).
    Allocate {
        /// Its mode.
        mode: i32,
        /// Where in the file (bytes).
        offset: u64,
        /// How much of it (bytes).
        len: u64,
    },
}

/// The file's only place in the ring.
const FILE: types::Fixed = types::Fixed(0);
/// What the kernel may start, in this thread's name, for what it cannot do at once: workers for files, and for anything
/// else, of which there is nothing (it cannot be zero). They count as threads of the VMM's cgroup.
const WORKERS: [u32; 2] = [4, 1];

/// See the module.
pub struct Ring {
    /// Never unmapped: a device lives as long as its VMM, whose filters do not allow it.
    ring: ManuallyDrop<IoUring>,
}

impl Ring {
    /// A ring for `entries` requests at a time (a power of two) on `file`.
    ///
    /// # Errors
    /// See [`UringError`].
    pub fn new(file: impl AsFd, entries: u32) -> Result<Self, UringError> {
        let ring: IoUring = IoUring::builder()
            .setup_r_disabled()
            .build(entries)
            .map_err(failed("making a ring of io_uring"))?;
        let submitter = ring.submitter();
        submitter
            .register_files(&[file.as_fd().as_raw_fd()])
            .map_err(failed("registering the file with io_uring"))?;
        submitter
            .register_iowq_max_workers(&mut WORKERS.clone())
            .map_err(failed("limiting io_uring's workers"))?;
        submitter
            .register_restrictions(&mut restrictions())
            .map_err(failed("restricting io_uring"))?;
        submitter
            .register_enable_rings()
            .map_err(failed("switching io_uring on"))?;
        Ok(Self {
            ring: ManuallyDrop::new(ring),
        })
    }

    /// Number of requests that fit.
    pub fn entries(&self) -> usize {
        self.ring.params().sq_entries() as usize
    }

    /// Queues a request without telling the kernel; its completion bears `id`. False when the queue is full.
    ///
    /// # Safety
    /// What the request points to, the list of iovecs itself among it, has to stay until its completion was taken, and
    /// may be written by the kernel until then when it is a read.
    pub unsafe fn push(&mut self, op: Op<'_>, id: u64) -> bool {
        let entry = entry(op).user_data(id);
        // SAFETY: handed on to the caller.
        unsafe { self.ring.submission().push(&entry).is_ok() }
    }

    /// Number of requests queued that the kernel has not been told of.
    pub fn pending(&mut self) -> usize {
        self.ring.submission().len()
    }

    /// Tells the kernel of all queued requests with one system call, none when there are none. What it does not take
    /// stays queued.
    ///
    /// # Errors
    /// Whatever the kernel said; `EAGAIN`, `EBUSY` and `EINTR` pass.
    pub fn submit(&mut self) -> io::Result<()> {
        if self.pending() > 0 {
            self.ring.submit().map(drop)
        } else {
            Ok(())
        }
    }

    /// The same, and waits for a completion.
    ///
    /// # Errors
    /// As [`Ring::submit`].
    pub fn submit_and_wait(&mut self) -> io::Result<()> {
        self.ring.submit_and_wait(1).map(drop)
    }

    /// Takes the next completion: the request's id, and what its system call would have returned (a negative error
    /// number when it failed). No system call.
    pub fn completed(&mut self) -> Option<(u64, i32)> {
        let done = self.ring.completion().next()?;
        Some((done.user_data(), done.result()))
    }
}

impl AsRawFd for Ring {
    /// Readable when there is a completion.
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the descriptor is the ring's own, which is not dropped itself and not used after this.
        unsafe { libc::close(self.ring.as_raw_fd()) };
    }
}

/// An error number says that trying again may do.
pub fn passes(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::EBUSY | libc::EINTR)
    )
}

fn restrictions() -> [Restriction; 8] {
    let fixed = squeue::Flags::FIXED_FILE.bits();
    [
        Restriction::sqe_op(opcode::Read::CODE),
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Write::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
        Restriction::sqe_op(opcode::Fallocate::CODE),
        Restriction::sqe_flags_allowed(fixed),
        Restriction::sqe_flags_required(fixed),
    ]
}

fn entry(op: Op<'_>) -> squeue::Entry {
    match op {
        // One piece needs no list that the kernel copies.
        Op::Read { to: [one], offset } => opcode::Read::new(FILE, one.iov_base.cast(), one.iov_len as u32)
            .offset(offset)
            .build(),
        Op::Read { to, offset } => opcode::Readv::new(FILE, to.as_ptr(), to.len() as u32)
            .offset(offset)
            .build(),
        Op::Write { from: [one], offset } => {
            opcode::Write::new(FILE, one.iov_base.cast_const().cast(), one.iov_len as u32)
                .offset(offset)
                .build()
        }
        Op::Write { from, offset } => opcode::Writev::new(FILE, from.as_ptr(), from.len() as u32)
            .offset(offset)
            .build(),
        Op::Sync => opcode::Fsync::new(FILE)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        Op::Allocate { mode, offset, len } => opcode::Fallocate::new(FILE, len)
            .offset(offset)
            .mode(mode)
            .build(),
    }
}

#[cfg(test)]
#[path = "uring_tests.rs"]
mod tests;
