//! virtio-serial ports: how they are found, and how to read from them.
//!
//! A port's device node appears after its module is loaded, in the kernel's own time, and the port learns still later
//! that the host's side is connected; until then a read gives 0 and poll(2) says POLLHUP. Both are waited for as
//! events, not by trying again.

use super::{Attempt, GuestError};
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens a port for writing, which waits until the host is there.
pub fn open_for_writing(number: u32) -> Result<File, GuestError> {
    open(number, OpenOptions::new().write(true))
}

/// Opens a port for both. A read gives 0 as long as the host is not there, so write first: that waits.
pub fn open_for_both(number: u32) -> Result<File, GuestError> {
    open(number, OpenOptions::new().read(true).write(true))
}

/// Opens a port for reading only.
pub fn open_for_reading(number: u32) -> Result<PortReader, GuestError> {
    let file = open(
        number,
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK),
    )?;
    PortReader::new(file).attempt(|| format!("wait for port {number}"))
}

fn open(number: u32, options: &OpenOptions) -> Result<File, GuestError> {
    let path = format!("/dev/vport0p{number}");
    wait_for(Path::new(&path)).attempt(|| format!("wait for {path}"))?;
    options.open(&path).attempt(|| format!("open {path}"))
}

/// Waits until the file is there. Its directory must be.
fn wait_for(path: &Path) -> io::Result<()> {
    // SAFETY: inotify_init1 has no pointer arguments.
    let fd = check(unsafe { libc::inotify_init1(libc::IN_CLOEXEC) })?;
    // SAFETY: the call above returned this new descriptor, which nothing else owns.
    let mut events = unsafe { File::from_raw_fd(fd) };
    // SAFETY: the path is a NUL-terminated string that outlives the call.
    check(unsafe { libc::inotify_add_watch(events.as_raw_fd(), c"/dev".as_ptr(), libc::IN_CREATE) })?;
    let mut buffer = [0; 4096];
    while !path.exists() {
        // What happened does not matter: look again.
        let _ = events.read(&mut buffer)?;
    }
    Ok(())
}

/// Reads from a port as from a pipe whose writer never goes away.
#[derive(Debug)]
pub struct PortReader {
    file: File,
    epoll: OwnedFd,
}

impl PortReader {
    fn new(file: File) -> io::Result<Self> {
        // SAFETY: epoll_create1 has no pointer arguments.
        let fd = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: the call above returned this new descriptor, which nothing else owns.
        let epoll = unsafe { OwnedFd::from_raw_fd(fd) };
        // Edge-triggered: the state "host not connected" is reported once, and then only its end.
        let mut event = libc::epoll_event {
            events: (libc::EPOLLIN | libc::EPOLLET) as u32,
            u64: 0,
        };
        // SAFETY: both descriptors are open and the event is valid for the call.
        check(unsafe {
            libc::epoll_ctl(
                epoll.as_raw_fd(),
                libc::EPOLL_CTL_ADD,
                file.as_raw_fd(),
                &raw mut event,
            )
        })?;
        Ok(Self { file, epoll })
    }

    fn wait(&self) -> io::Result<()> {
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: the epoll descriptor is open and there is room for the one event that is asked for.
        match check(unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), &raw mut event, 1, -1) }) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            other => other.map(|_| ()),
        }
    }
}

impl Read for PortReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.file.read(buffer) {
                Ok(0) => self.wait()?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait()?,
                other => return other,
            }
        }
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
