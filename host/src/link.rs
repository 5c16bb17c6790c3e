//! The host's end of a VMM's control connection.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use shoal_vmm::channel::{ChannelError, HostChannel};
use shoal_vmm::protocol::{Message, Reply, Request};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::async_fd;

/// A control connection.
#[derive(Debug)]
pub(crate) struct Link(AsyncFd<HostChannel>);

fn seqpacket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}

/// Binds a listening seqpacket socket.
pub(crate) fn listen_at(path: &Path) -> std::io::Result<OwnedFd> {
    let socket = seqpacket()?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, 4)?;
    Ok(socket)
}

/// Connects to a listening seqpacket socket.
pub(crate) fn connect_to(path: &Path) -> std::io::Result<OwnedFd> {
    let socket = seqpacket()?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

impl Link {
    /// Takes a connected, non-blocking seqpacket socket.
    pub fn new(socket: OwnedFd) -> std::io::Result<Self> {
        Ok(Self(async_fd::register(
            HostChannel::from(socket),
            Interest::READABLE,
        )?))
    }

    /// Sends a request. A VMM that lets its socket fill up is treated as broken.
    pub fn send(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        self.0.get_ref().send(request, fds)
    }

    /// The next message. Nothing is lost when the future is dropped.
    pub async fn recv(&self) -> Result<Message, ChannelError> {
        loop {
            let mut guard = self
                .0
                .readable()
                .await
                .map_err(|source| ChannelError::Io { what: "poll", source })?;
            match self.try_recv() {
                Err(ChannelError::WouldBlock) => guard.clear_ready(),
                result => return result,
            }
        }
    }

    /// The next message if there is one.
    pub fn try_recv(&self) -> Result<Message, ChannelError> {
        // Descriptors that a VMM sends are closed here: the protocol has none in this direction.
        self.0.get_ref().recv().map(|(message, _)| message)
    }

    /// Asks for the status of a VMM that this daemon did not start.
    pub async fn status(&self, within: Duration) -> Result<Reply, ChannelError> {
        let answer = async {
            self.send(&Request::Status, &[])?;
            loop {
                match self.recv().await? {
                    Message::Reply(Ok(reply)) => return Ok(reply),
                    Message::Reply(Err(_)) => return Err(ChannelError::Closed),
                    Message::Event(_) => {}
                }
            }
        };
        tokio::time::timeout(within, answer)
            .await
            .unwrap_or(Err(ChannelError::WouldBlock))
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

/// Ends whatever VMM listens at `path`, and waits (at most `within`) until it is gone. For VMMs that belong to no
/// guest any more. True when nothing listens there in the end.
pub(crate) async fn put_down(path: &Path, within: Duration) -> bool {
    let Ok(socket) = connect_to(path) else { return true };
    let Ok(link) = Link::new(socket) else { return false };
    let gone = async {
        if link.send(&Request::Kill, &[]).is_err() {
            return;
        }
        while link.recv().await.is_ok() {}
    };
    tokio::time::timeout(within, gone).await.is_ok()
}
