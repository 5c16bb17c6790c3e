//! The host's side of a guest's socket device: where the guest's connections lead to.
//!
//! The VMM asks over the broker's connection for each connection that the guest makes. Port 1024 leads to the host itself
//! (the line of the guest's init, [`crate::agent`]); any other to whoever listens at `vsock.sock_PORT`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, socket_with,
};
use shoal_devices::virtio::vsock::broker::{BrokerRequest, MESSAGE, send_reply};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::agent::Agent;
pub(crate) use crate::agent::{PORT, Word};
use crate::async_fd;
use crate::link::{connect_to, listen_at};
use crate::paths::GuestDir;

/// Serves a guest's connections to the host until it is dropped.
#[derive(Debug)]
pub(crate) struct VsockService {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

/// The listening sockets that the VMM gets.
#[derive(Debug)]
pub(crate) struct VsockListeners {
    /// For programs of the host that connect to the guest.
    pub programs: OwnedFd,
    /// For the host.
    pub broker: OwnedFd,
}

/// Binds both sockets of a guest.
pub(crate) fn bind(dir: &GuestDir) -> io::Result<VsockListeners> {
    let programs = UnixListener::bind(dir.vsock())?;
    programs.set_nonblocking(true)?;
    Ok(VsockListeners {
        programs: programs.into(),
        broker: listen_at(&dir.broker())?,
    })
}

impl VsockService {
    /// Connects to the device and serves it.
    pub fn connect(dir: &GuestDir) -> io::Result<(Self, mpsc::Receiver<Word>)> {
        let broker = async_fd::register(connect_to(&dir.broker())?, Interest::READABLE)?;
        let (words, receiver) = mpsc::channel(16);
        let stop = watch::Sender::new(false);
        let agent = Agent::new(words, stop.subscribe());
        let task = tokio::spawn(serve(broker, dir.clone(), agent));
        Ok((Self { stop, task }, receiver))
    }

    /// Asks the guest to stop, now or as soon as its init connects.
    pub fn stop_guest(&self) {
        self.stop.send_replace(true);
    }
}

impl Drop for VsockService {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(broker: AsyncFd<OwnedFd>, dir: GuestDir, mut agent: Agent) {
    loop {
        let request = match next_request(&broker).await {
            Ok(Some(request)) => request,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(dir = ?dir.path(), %error, "a guest's socket device is served no more");
                return;
            }
        };
        let answer = match request.port {
            PORT => agent.connection(),
            port => connect_program(&dir, port),
        };
        let answer = match &answer {
            Ok(fd) => Ok(fd.as_fd()),
            Err(error) => Err(io::Error::from_raw_os_error(
                error.raw_os_error().unwrap_or_default(),
            )),
        };
        if let Err(error) = send_reply(broker.get_ref(), request.cookie, answer) {
            tracing::warn!(dir = ?dir.path(), %error, "a guest's connection could not be answered");
        }
    }
}

/// The next question; `None` when the VMM has hung up or says what is none.
async fn next_request(broker: &AsyncFd<OwnedFd>) -> io::Result<Option<BrokerRequest>> {
    loop {
        let mut guard = broker.readable().await?;
        let mut message = [0_u8; MESSAGE + 1];
        match recv(broker.get_ref(), &mut message, RecvFlags::empty()) {
            Ok((_, n)) => return Ok(message.get(..n).and_then(BrokerRequest::decode)),
            Err(rustix::io::Errno::WOULDBLOCK) => guard.clear_ready(),
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Connects to a program that serves a port. It does not wait: a program whose backlog is full is not there.
fn connect_program(dir: &GuestDir, port: u32) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(dir.vsock_port(port))?)?;
    Ok(socket)
}

impl Agent {
    /// A new line to the guest's init: one end is served, the other is the guest's.
    fn connection(&mut self) -> io::Result<OwnedFd> {
        let (guest, host) = UnixStream::pair()?;
        guest.set_nonblocking(true)?;
        host.set_nonblocking(true)?;
        self.connected(tokio::net::UnixStream::from_std(host)?);
        Ok(guest.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{SocketFlags, accept_with};
    use shoal_devices::virtio::vsock::broker::{BrokerReply, receive_reply};
    use std::io::{Read, Write};

    /// Plays the VMM: asks for one connection.
    async fn ask(broker: &AsyncFd<OwnedFd>, cookie: u32, port: u32) -> (BrokerReply, Option<UnixStream>) {
        let request = BrokerRequest { cookie, port }.encode();
        rustix::net::send(broker.get_ref(), &request, rustix::net::SendFlags::empty()).unwrap();
        loop {
            let mut guard = broker.readable().await.unwrap();
            match receive_reply(broker.get_ref()) {
                Ok(reply) => {
                    let (reply, fd) = reply.expect("the service lives");
                    return (reply, fd.map(UnixStream::from));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => guard.clear_ready(),
                Err(e) => panic!("{e}"),
            }
        }
    }

    #[tokio::test]
    async fn leads_to_programs_and_to_the_host() {
        let root = tempfile::tempdir().unwrap();
        let dir = crate::paths::StateDir::new(root.path().into()).guest("0123456789ab");
        std::fs::create_dir_all(dir.path()).unwrap();
        let listeners = bind(&dir).unwrap();
        let (service, mut words) = VsockService::connect(&dir).unwrap();
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let broker = accept_with(&listeners.broker, flags).unwrap();
        let broker = async_fd::register(broker, Interest::READABLE).unwrap();

        let (reply, fd) = ask(&broker, 7, 99).await;
        assert_eq!(
            (reply.cookie, reply.status),
            (7, rustix::io::Errno::NOENT.raw_os_error() as u32)
        );
        assert!(fd.is_none());

        let program = UnixListener::bind(dir.vsock_port(99)).unwrap();
        let (reply, fd) = ask(&broker, 8, 99).await;
        assert_eq!((reply.cookie, reply.status), (8, 0));
        fd.unwrap().write_all(b"hello").unwrap();
        let mut said = String::new();
        program.accept().unwrap().0.read_to_string(&mut said).unwrap();
        assert_eq!(said, "hello");

        let (reply, fd) = ask(&broker, 9, PORT).await;
        assert_eq!(reply.status, 0);
        let mut line = fd.unwrap();
        line.write_all(b"READY 1\n").unwrap();
        assert_eq!(words.recv().await, Some(Word::Ready));
        service.stop_guest();
        let line = tokio::net::UnixStream::from_std(line).unwrap();
        let mut stop = [0; 5];
        tokio::io::AsyncReadExt::read_exact(&mut { line }, &mut stop)
            .await
            .unwrap();
        assert_eq!(&stop, b"STOP\n");
    }
}
