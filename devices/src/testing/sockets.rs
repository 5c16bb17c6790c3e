//! Unix sockets of the host for a socket device, without files: they are bound to names that the kernel chooses.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

fn socket(kind: i32) -> OwnedFd {
    // SAFETY: takes no pointers; the descriptor is new and ours.
    unsafe {
        let fd = libc::socket(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0);
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(fd)
    }
}

/// A listening socket of `kind`.
pub fn listener(kind: i32) -> OwnedFd {
    let s = socket(kind);
    let family = libc::AF_UNIX as libc::sa_family_t;
    let len = size_of::<libc::sa_family_t>() as libc::socklen_t;
    // SAFETY: the address is as long as is said: a family and no path, which asks for a name.
    let bound = unsafe { libc::bind(s.as_raw_fd(), std::ptr::from_ref(&family).cast(), len) };
    // SAFETY: takes no pointers.
    assert!(bound == 0 && unsafe { libc::listen(s.as_raw_fd(), 128) } == 0);
    s
}

/// Connects to a listener of `kind`.
pub fn connect(listener: &impl AsRawFd, kind: i32) -> UnixStream {
    let s = socket(kind);
    // SAFETY: zeroes are a valid address.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    let p = std::ptr::from_mut(&mut address);
    // SAFETY: the address has room for `len` bytes, and as many as the kernel said are given back to it.
    let done = unsafe {
        libc::getsockname(listener.as_raw_fd(), p.cast(), &mut len) == 0
            && libc::connect(s.as_raw_fd(), p.cast(), len) == 0
    };
    assert!(done, "{}", std::io::Error::last_os_error());
    UnixStream::from(s)
}
