//! Stands in for the VMM in a test of its confinement: says that the guest runs, puts itself under the event loop's
//! filter, and makes a system call that no policy allows.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use shoal_jailer::seccomp::{Mode, ThreadKind, install};
use shoal_vmm::channel::{ChannelError, VmmChannel};
use shoal_vmm::protocol::{Message, Reply, Timeline};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let connection = VmmChannel::from(accept()?);
    let (_start, _descriptors) = connection.recv()?;
    let timeline = Timeline::default();
    connection.send(&Message::Reply(Ok(Reply::Started { timeline })), &[])?;
    // When the host asks for something else, it has taken the answer and watches this guest.
    match connection.recv() {
        Ok(_) | Err(ChannelError::Closed) => {}
        Err(error) => return Err(error.into()),
    }
    install(ThreadKind::EventLoop, Mode::Kill)?;
    drop(std::os::unix::net::UnixDatagram::unbound());
    Err("the filter let it through".into())
}

/// The host's connection to the socket that was handed over as standard input.
fn accept() -> Result<OwnedFd, Box<dyn std::error::Error>> {
    let listener = std::io::stdin();
    // The socket does not block.
    poll(
        &mut [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)],
        None,
    )?;
    Ok(rustix::net::accept(listener.as_fd())?)
}
