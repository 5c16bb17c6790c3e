//! The few system calls that take raw addresses, each behind a safe function.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// A piece of guest memory, by address. Holds no pointer, so it can outlive the memory and be kept in a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub addr: GuestAddress,
    /// Length in bytes.
    pub len: u32,
}

/// A reusable list of `iovec`s over guest memory. It is filled while one system call runs, or, after [`IoVecs::fill`],
/// until it is filled again.
#[derive(Default)]
pub struct IoVecs {
    vecs: Vec<libc::iovec>,
}

// SAFETY: nothing here follows the pointers. They are given to the kernel, either within one call, which borrows the
// memory that they point to, or by a caller of `fill`, who argues for it.
unsafe impl Send for IoVecs {}

/// Guest memory ended before a buffer did.
#[derive(Debug, thiserror::Error)]
#[error("a buffer at {0:#x} lies outside of guest memory")]
pub struct OutsideMemory(pub u64);

impl From<OutsideMemory> for io::Error {
    fn from(e: OutsideMemory) -> Self {
        io::Error::new(io::ErrorKind::InvalidInput, e)
    }
}

impl IoVecs {
    /// A list with room for `capacity` pieces, so that filling it does not allocate.
    pub fn with_capacity(capacity: usize) -> Self {
        Self {
            vecs: Vec::with_capacity(capacity),
        }
    }

    /// Resolves the bytes `[skip, skip + len)` of `segments` and calls `f` with them.
    fn with<R>(
        &mut self,
        memory: &GuestMemoryMmap,
        segments: &[Segment],
        skip: u64,
        len: u64,
        f: impl FnOnce(&[libc::iovec]) -> io::Result<R>,
    ) -> io::Result<R> {
        self.vecs.clear();
        let result = self.resolve(memory, segments, skip, len).map_err(io::Error::from);
        let result = result.and_then(|()| f(&self.vecs));
        self.vecs.clear();
        result
    }

    /// Resolves the bytes `[skip, skip + len)` of `segments`, for a system call that outlives this one.
    pub fn fill(
        &mut self,
        memory: &GuestMemoryMmap,
        segments: &[Segment],
        (skip, len): (u64, u64),
    ) -> Result<&[libc::iovec], OutsideMemory> {
        self.vecs.clear();
        self.resolve(memory, segments, skip, len)?;
        Ok(&self.vecs)
    }

    fn resolve(
        &mut self,
        memory: &GuestMemoryMmap,
        segments: &[Segment],
        mut skip: u64,
        mut len: u64,
    ) -> Result<(), OutsideMemory> {
        for s in segments {
            if skip >= u64::from(s.len) {
                skip -= u64::from(s.len);
                continue;
            }
            let outside = OutsideMemory(s.addr.0);
            let start = GuestAddress(s.addr.0.checked_add(skip).ok_or(OutsideMemory(s.addr.0))?);
            let take = (u64::from(s.len) - skip).min(len);
            skip = 0;
            for slice in memory.get_slices(start, take as usize) {
                let Ok(slice) = slice else { return Err(outside) };
                let guard = slice.ptr_guard_mut();
                self.vecs.push(libc::iovec {
                    iov_base: guard.as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
            len -= take;
            if len == 0 {
                break;
            }
        }
        Ok(())
    }

    /// preadv(2) of up to `len` bytes into `segments`, from `skip` bytes into them on.
    pub fn preadv(
        &mut self,
        fd: impl AsFd,
        memory: &GuestMemoryMmap,
        segments: &[Segment],
        (skip, len): (u64, u64),
        offset: u64,
    ) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        self.with(memory, segments, skip, len, |v| {
            // SAFETY: the iovecs lie in `memory`, which is borrowed and writable; the kernel copies to them as a
            // volatile access would. The descriptor is borrowed.
            check(unsafe { libc::preadv(fd, v.as_ptr(), count(v), offset as libc::off_t) })
        })
    }

    /// pwritev(2) of up to `len` bytes of `segments`, from `skip` bytes into them on.
    pub fn pwritev(
        &mut self,
        fd: impl AsFd,
        memory: &GuestMemoryMmap,
        segments: &[Segment],
        (skip, len): (u64, u64),
        offset: u64,
    ) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        self.with(memory, segments, skip, len, |v| {
            // SAFETY: the iovecs lie in `memory`, which is borrowed; the kernel only reads them.
            check(unsafe { libc::pwritev(fd, v.as_ptr(), count(v), offset as libc::off_t) })
        })
    }

    /// readv(2) of up to `len` bytes into `segments`, from `skip` bytes into them on.
    pub fn readv(
        &mut self,
        fd: impl AsFd,
        memory: &GuestMemoryMmap,
        segments: &[Segment],
        (skip, len): (u64, u64),
    ) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        self.with(memory, segments, skip, len, |v| {
            // SAFETY: as for `preadv`.
            check(unsafe { libc::readv(fd, v.as_ptr(), count(v)) })
        })
    }

    /// readv(2) into all of `segments`, and what does not fit there into `rest`.
    pub fn readv_and(
        &mut self,
        fd: impl AsFd,
        memory: &GuestMemoryMmap,
        segments: &[Segment],
        rest: &mut [u8],
    ) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        let tail = libc::iovec {
            iov_base: rest.as_mut_ptr().cast(),
            iov_len: rest.len(),
        };
        self.vecs.clear();
        let result = self
            .resolve(memory, segments, 0, u64::MAX)
            .map_err(io::Error::from)
            .and_then(|()| {
                self.vecs.push(tail);
                // SAFETY: as for `preadv`; the last piece is borrowed mutably.
                check(unsafe { libc::readv(fd, self.vecs.as_ptr(), count(&self.vecs)) })
            });
        self.vecs.clear();
        result
    }

    /// writev(2) of up to `len` bytes of `segments`, from `skip` bytes into them on.
    pub fn writev(
        &mut self,
        fd: impl AsFd,
        memory: &GuestMemoryMmap,
        segments: &[Segment],
        (skip, len): (u64, u64),
    ) -> io::Result<usize> {
        self.writev_after(fd, &[], memory, segments, (skip, len))
    }

    /// writev(2) of `head` and then as [`IoVecs::writev`].
    pub fn writev_after(
        &mut self,
        fd: impl AsFd,
        head: &[u8],
        memory: &GuestMemoryMmap,
        segments: &[Segment],
        (skip, len): (u64, u64),
    ) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        self.vecs.clear();
        if !head.is_empty() {
            // The kernel only reads it.
            self.vecs.push(libc::iovec {
                iov_base: head.as_ptr().cast_mut().cast(),
                iov_len: head.len(),
            });
        }
        let result = self
            .resolve(memory, segments, skip, len)
            .map_err(io::Error::from)
            .and_then(|()| {
                // SAFETY: as for `pwritev`; the first piece is borrowed.
                check(unsafe { libc::writev(fd, self.vecs.as_ptr(), count(&self.vecs)) })
            });
        self.vecs.clear();
        result
    }
}

fn count(v: &[libc::iovec]) -> libc::c_int {
    // Callers limit segments far below IOV_MAX; the kernel refuses more.
    v.len() as libc::c_int
}

fn check(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// fallocate(2) with mode bits.
pub fn fallocate(fd: impl AsFd, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: takes no pointers; the descriptor is borrowed.
    let r = unsafe {
        libc::fallocate(
            fd.as_fd().as_raw_fd(),
            mode,
            offset as libc::off_t,
            len as libc::off_t,
        )
    };
    if r == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// getrandom(2): fills as much of `buf` as the kernel gives at once, and says how much.
pub fn getrandom(buf: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the pointer and length are of one slice.
    check(unsafe { libc::getrandom(buf.as_mut_ptr().cast(), buf.len(), libc::GRND_NONBLOCK) })
}

/// The access mode and status flags of an open descriptor (fcntl F_GETFL).
pub fn open_flags(fd: impl AsFd) -> io::Result<i32> {
    // SAFETY: F_GETFL takes no argument.
    let r = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_GETFL) };
    if r >= 0 {
        Ok(r)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sets O_NONBLOCK.
pub fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = open_flags(&fd)? | libc::O_NONBLOCK;
    set_flags(fd, flags)
}

/// Clears O_NONBLOCK.
pub fn set_blocking(fd: impl AsFd) -> io::Result<()> {
    let flags = open_flags(&fd)? & !libc::O_NONBLOCK;
    set_flags(fd, flags)
}

fn set_flags(fd: impl AsFd, flags: i32) -> io::Result<()> {
    // SAFETY: F_SETFL takes an integer.
    let r = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_SETFL, flags) };
    if r >= 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Reads what waits in a socket without taking it (recv(2) with MSG_PEEK); does not block.
pub fn peek(socket: impl AsFd, buf: &mut [u8]) -> io::Result<usize> {
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the pointer and length are of one slice.
    check(unsafe {
        libc::recv(
            socket.as_fd().as_raw_fd(),
            buf.as_mut_ptr().cast(),
            buf.len(),
            flags,
        )
    })
}

/// An integer option of a socket at level SOL_SOCKET (getsockopt(2)).
pub fn socket_option(socket: impl AsFd, name: i32) -> io::Result<i32> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `value`.
    let r = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            std::ptr::from_mut(&mut value).cast(),
            &mut len,
        )
    };
    if r == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A one-shot timer for the event loop: readable when it has fired.
pub struct Timer(OwnedFd);

impl Timer {
    /// A timer that is not set.
    pub fn new() -> io::Result<Self> {
        // SAFETY: takes no pointers.
        let fd =
            unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK | libc::TFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and ours.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Has it fire once after `delay`, instead of when it was set to.
    pub fn set(&self, delay: Duration) -> io::Result<()> {
        // Zero would switch it off.
        let delay = delay.max(Duration::from_nanos(1));
        let never = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let value = libc::itimerspec {
            it_interval: never,
            it_value: libc::timespec {
                tv_sec: libc::time_t::try_from(delay.as_secs()).unwrap_or(libc::time_t::MAX),
                tv_nsec: delay.subsec_nanos().into(),
            },
        };
        // SAFETY: the kernel reads one itimerspec; the old value is not asked for.
        let r = unsafe { libc::timerfd_settime(self.0.as_raw_fd(), 0, &value, std::ptr::null_mut()) };
        if r == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Whether it has fired since it was asked last; does not block.
    pub fn take(&self) -> bool {
        let mut times = 0_u64;
        // SAFETY: the kernel writes eight bytes to `times`.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut times).cast(), size_of::<u64>()) > 0 }
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
