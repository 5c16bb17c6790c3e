//! Descriptors in tokio's event loop.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers a descriptor with the event loop.
#[expect(
    deprecated,
    reason = "its successor is unsafe for types whose descriptor may change or close while it is registered; AsFd \
              promises that it does not"
)]
pub(crate) fn register<T: AsRawFd + AsFd>(fd: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    AsyncFd::with_interest(fd, interest)
}
