//! How the device gets host sockets for connections that the guest makes. The VMM can open nothing, so it asks the host
//! over a seqpacket socket, one message per question and answer:
//!
//! ```text
//! device → host   BrokerRequest  cookie u32, port u32                      (8 bytes, little-endian)
//! host → device   BrokerReply    cookie u32, status u32 (0 or an errno)    (8 bytes), with the connected stream
//!                                                                          socket by SCM_RIGHTS when the status is 0
//! ```
//!
//! The device listens, the host connects; a new connection of the host takes the place of the one before. Replies may
//! come in any order; an answer that comes too late is dropped with its socket.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Length of both messages (bytes).
pub const MESSAGE: usize = 8;

/// The guest connects to `port` of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BrokerRequest {
    /// Names the question in its answer.
    pub cookie: u32,
    /// The port.
    pub port: u32,
}

/// The host's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BrokerReply {
    /// Of the question.
    pub cookie: u32,
    /// Zero, and a socket comes with it; or why not (errno).
    pub status: u32,
}

fn encode(a: u32, b: u32) -> [u8; MESSAGE] {
    (u64::from(b) << 32 | u64::from(a)).to_le_bytes()
}

fn decode(bytes: &[u8]) -> Option<(u32, u32)> {
    let n = u64::from_le_bytes(bytes.try_into().ok()?);
    Some((n as u32, (n >> 32) as u32))
}

impl BrokerRequest {
    /// The message.
    pub fn encode(self) -> [u8; MESSAGE] {
        encode(self.cookie, self.port)
    }

    /// Reads a message; `None` when it has another length.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        decode(bytes).map(|(cookie, port)| Self { cookie, port })
    }
}

impl BrokerReply {
    /// The message.
    pub fn encode(self) -> [u8; MESSAGE] {
        encode(self.cookie, self.status)
    }

    /// Reads a message; `None` when it has another length.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        decode(bytes).map(|(cookie, status)| Self { cookie, status })
    }
}

/// A borrowed socket, for [`ScmSocket`].
struct Socket<'a>(BorrowedFd<'a>);

impl ScmSocket for Socket<'_> {
    fn socket_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

/// The host's half: answers a request with a connected stream socket, or with the reason why there is none.
pub fn send_reply(
    socket: impl AsFd,
    cookie: u32,
    answer: Result<BorrowedFd<'_>, io::Error>,
) -> io::Result<()> {
    let socket = Socket(socket.as_fd());
    let sent = match answer {
        Ok(fd) => {
            let message = BrokerReply { cookie, status: 0 }.encode();
            socket.send_with_fd(&message[..], fd.as_raw_fd())
        }
        Err(e) => {
            let errno = e.raw_os_error().filter(|&n| n > 0).unwrap_or(libc::ECONNREFUSED);
            let message = BrokerReply {
                cookie,
                status: errno as u32,
            }
            .encode();
            socket.send_with_fds(&[&message[..]], &[])
        }
    };
    sent.map(|_| ())
        .map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

/// The device's half: takes an answer and what came with it. `None`: the other side has hung up. A message of another
/// form gives an error of the kind `InvalidData`, its socket is closed.
pub fn receive_reply(socket: impl AsFd) -> io::Result<Option<(BrokerReply, Option<OwnedFd>)>> {
    let mut bytes = [0; MESSAGE + 1];
    let (n, file) = Socket(socket.as_fd())
        .recv_with_fd(&mut bytes)
        .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    match BrokerReply::decode(&bytes[..n]) {
        Some(reply) => Ok(Some((reply, file.map(OwnedFd::from)))),
        None if n == 0 => Ok(None),
        None => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a message of another length",
        )),
    }
}
