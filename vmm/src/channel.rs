//! One end of the control connection: messages in packets, descriptors beside them.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::protocol::{MAX_FDS, MAX_MESSAGE, Message, Request, VERSION};

/// The control connection failed or the peer broke the protocol.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The peer has closed the connection.
    #[error("the peer closed the control connection")]
    Closed,
    /// Nothing to receive, or no room to send, on a non-blocking socket.
    #[error("the control connection is not ready")]
    WouldBlock,
    /// The socket failed.
    #[error("{what} on the control connection failed")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A message is too long.
    #[error("a control message of {0} bytes exceeds the limit of {MAX_MESSAGE}")]
    TooLong(usize),
    /// More descriptors than fit.
    #[error("a control message with {0} descriptors exceeds the limit of {MAX_FDS}")]
    TooManyFds(usize),
    /// The peer speaks another version.
    #[error("the peer speaks version {0} of the control protocol, this program version {VERSION}")]
    Version(u16),
    /// The body is no valid message.
    #[error("a control message could not be decoded or encoded")]
    Codec(#[source] postcard::Error),
}

/// One end: sends `S`, receives `R`.
#[derive(Debug)]
pub struct Channel<S, R> {
    fd: OwnedFd,
    _types: PhantomData<fn(S) -> R>,
}

/// The host's end.
pub type HostChannel = Channel<Request, Message>;
/// The VMM's end.
pub type VmmChannel = Channel<Message, Request>;

impl<S, R> From<OwnedFd> for Channel<S, R> {
    fn from(fd: OwnedFd) -> Self {
        Self {
            fd,
            _types: PhantomData,
        }
    }
}

impl<S, R> AsFd for Channel<S, R> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl<S, R> AsRawFd for Channel<S, R> {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Room for the control message that carries [`MAX_FDS`] descriptors, aligned as `cmsghdr` must be.
#[repr(C, align(8))]
struct Ancillary([u8; 16 + MAX_FDS * 4]);

impl<S: Serialize, R: DeserializeOwned> Channel<S, R> {
    /// Sends one message with descriptors.
    pub fn send(&self, message: &S, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let bytes =
            postcard::to_extend(message, VERSION.to_le_bytes().to_vec()).map_err(ChannelError::Codec)?;
        if bytes.len() > MAX_MESSAGE {
            return Err(ChannelError::TooLong(bytes.len()));
        }
        if fds.len() > MAX_FDS {
            return Err(ChannelError::TooManyFds(fds.len()));
        }
        let mut iov = libc::iovec {
            iov_base: bytes.as_ptr() as *mut _,
            iov_len: bytes.len(),
        };
        let mut ancillary = Ancillary([0; 16 + MAX_FDS * 4]);
        let header = header(&mut iov, (!fds.is_empty()).then_some((&mut ancillary, fds)));
        // SAFETY: `header` points to the iovec and the ancillary buffer, which live until the call returns; the
        // kernel only reads them.
        let sent = unsafe { libc::sendmsg(self.as_raw_fd(), &header, libc::MSG_NOSIGNAL) };
        if sent < 0 {
            Err(io_error("sendmsg"))
        } else {
            Ok(())
        }
    }

    /// Receives one message and its descriptors. Waits if the socket is blocking.
    pub fn recv(&self) -> Result<(R, Vec<OwnedFd>), ChannelError> {
        // Not zeroed: a message takes a page or less of what it may take, and the rest is never touched.
        let mut bytes = Vec::<u8>::with_capacity(MAX_MESSAGE);
        let mut ancillary = Ancillary([0; 16 + MAX_FDS * 4]);
        let mut iov = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: MAX_MESSAGE,
        };
        let mut header = header(&mut iov, None);
        header.msg_control = ancillary.0.as_mut_ptr().cast();
        header.msg_controllen = size_of::<Ancillary>();
        // SAFETY: the kernel writes at most `iov_len` bytes into `bytes` and `msg_controllen` into `ancillary`.
        let n = unsafe { libc::recvmsg(self.as_raw_fd(), &mut header, libc::MSG_CMSG_CLOEXEC) };
        if n < 0 {
            return Err(io_error("recvmsg"));
        }
        // Taken first: whatever is wrong with the message, its descriptors must be closed.
        let fds = take_fds(&header);
        if n == 0 {
            return Err(ChannelError::Closed);
        }
        if header.msg_flags & libc::MSG_TRUNC != 0 {
            return Err(ChannelError::TooLong(MAX_MESSAGE + 1));
        }
        if header.msg_flags & libc::MSG_CTRUNC != 0 {
            return Err(ChannelError::TooManyFds(MAX_FDS + 1));
        }
        // SAFETY: recvmsg has written `n` bytes, at most `iov_len` without MSG_TRUNC, which is the capacity or less.
        unsafe { bytes.set_len(n as usize) };
        Ok((decode(&bytes)?, fds))
    }
}

/// Decodes one packet.
pub fn decode<R: DeserializeOwned>(bytes: &[u8]) -> Result<R, ChannelError> {
    let (version, body) = bytes.split_first_chunk::<2>().ok_or(ChannelError::Version(0))?;
    match u16::from_le_bytes(*version) {
        VERSION => postcard::from_bytes(body).map_err(ChannelError::Codec),
        other => Err(ChannelError::Version(other)),
    }
}

fn header(iov: &mut libc::iovec, fds: Option<(&mut Ancillary, &[BorrowedFd<'_>])>) -> libc::msghdr {
    // SAFETY: all-zero is a valid msghdr: null pointers with zero lengths.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = iov;
    header.msg_iovlen = 1;
    if let Some((ancillary, fds)) = fds {
        let payload = size_of_val(fds) as u32;
        header.msg_control = ancillary.0.as_mut_ptr().cast();
        // SAFETY: CMSG_SPACE is arithmetic; the caller has checked that MAX_FDS is not exceeded.
        header.msg_controllen = unsafe { libc::CMSG_SPACE(payload) } as usize;
        // SAFETY: msg_control has room for one cmsghdr and `payload` bytes, so CMSG_FIRSTHDR is not null and
        // CMSG_DATA points to that room. BorrowedFd is a transparent i32.
        unsafe {
            let cmsg = libc::CMSG_FIRSTHDR(&header);
            (*cmsg).cmsg_level = libc::SOL_SOCKET;
            (*cmsg).cmsg_type = libc::SCM_RIGHTS;
            (*cmsg).cmsg_len = libc::CMSG_LEN(payload) as usize;
            std::ptr::copy_nonoverlapping(fds.as_ptr().cast::<u8>(), libc::CMSG_DATA(cmsg), payload as usize);
        }
    }
    header
}

fn take_fds(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the kernel has filled the control buffer that `header` describes; the CMSG macros stay inside of it.
    // Every descriptor in an SCM_RIGHTS message is new and owned by this process.
    unsafe {
        let mut cmsg = libc::CMSG_FIRSTHDR(header);
        while !cmsg.is_null() {
            if (*cmsg).cmsg_level == libc::SOL_SOCKET && (*cmsg).cmsg_type == libc::SCM_RIGHTS {
                let data = libc::CMSG_DATA(cmsg).cast::<RawFd>();
                let count = ((*cmsg).cmsg_len - libc::CMSG_LEN(0) as usize) / size_of::<RawFd>();
                for i in 0..count {
                    fds.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                }
            }
            cmsg = libc::CMSG_NXTHDR(header, cmsg);
        }
    }
    fds
}

fn io_error(what: &'static str) -> ChannelError {
    let source = io::Error::last_os_error();
    match source.kind() {
        io::ErrorKind::WouldBlock => ChannelError::WouldBlock,
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => ChannelError::Closed,
        _ => ChannelError::Io { what, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;

    fn pair() -> (HostChannel, VmmChannel) {
        let mut fds = [0; 2];
        // SAFETY: socketpair writes two descriptors into the array.
        let r = unsafe {
            libc::socketpair(
                libc::AF_UNIX,
                libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC,
                0,
                fds.as_mut_ptr(),
            )
        };
        assert_eq!(r, 0);
        // SAFETY: both descriptors are new and owned here.
        unsafe {
            (
                OwnedFd::from_raw_fd(fds[0]).into(),
                OwnedFd::from_raw_fd(fds[1]).into(),
            )
        }
    }

    #[test]
    fn carries_messages_and_descriptors() {
        let (host, vmm) = pair();
        let (a, b) = UnixDatagram::pair().unwrap();
        host.send(&Request::ConsoleInput(vec![1, 2]), &[a.as_fd(), b.as_fd()])
            .unwrap();
        let (request, fds) = vmm.recv().unwrap();
        assert_eq!(request, Request::ConsoleInput(vec![1, 2]));
        assert_eq!(fds.len(), 2);
        drop((a, b));
        let c = UnixDatagram::from(fds.into_iter().next().unwrap());
        assert!(
            c.send(b"x").is_err(),
            "the other end is closed with its last copy"
        );
    }

    #[test]
    fn refuses_what_breaks_the_protocol() {
        let (host, vmm) = pair();
        assert!(matches!(
            host.send(&Request::ConsoleInput(vec![0; MAX_MESSAGE]), &[]),
            Err(ChannelError::TooLong(_))
        ));
        for (bytes, what) in [
            (vec![1_u8], "short"),
            (vec![9, 9, 0], "version"),
            (vec![VERSION as u8, 0, 77], "body"),
        ] {
            // SAFETY: the buffer is valid for its length.
            let n = unsafe { libc::send(host.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
            assert_eq!(n, bytes.len() as isize);
            assert!(
                matches!(vmm.recv(), Err(ChannelError::Version(_) | ChannelError::Codec(_))),
                "{what} must be refused"
            );
        }
        drop(host);
        assert!(matches!(vmm.recv(), Err(ChannelError::Closed)));
    }
}
