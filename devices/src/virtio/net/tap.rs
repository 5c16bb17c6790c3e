//! The back end of a network device: a TAP that the host made and opened.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use super::HEADER;
use super::open::set_attached;
use crate::sys::set_nonblocking;

/// A TAP, or a socket in its place in tests.
pub struct Tap {
    file: File,
    is_tap: bool,
    /// It takes part in the interface's traffic.
    attached: bool,
}

/// Why a descriptor cannot be the back end.
#[derive(Debug)]
pub enum TapError {
    /// A system call failed.
    Io(&'static str, io::Error),
    /// It is no TAP, or one that was opened otherwise.
    Kind(String),
}

impl Tap {
    /// Takes a TAP that was opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR.
    /// `several`: it is one of several queues of an interface that was made for that.
    pub fn new(fd: OwnedFd, several: bool) -> Result<Self, TapError> {
        let flags = interface_flags(&fd)
            .map_err(|e| TapError::Kind(format!("the descriptor is no TAP with an interface ({e})")))?;
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if i32::from(flags) & wanted != wanted {
            return Err(TapError::Kind(format!(
                "the TAP has flags {flags:#x}, it must be opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
            )));
        }
        if several && i32::from(flags) & libc::IFF_MULTI_QUEUE == 0 {
            return Err(TapError::Kind(format!(
                "the TAP has flags {flags:#x}, for several queues it must be opened with IFF_MULTI_QUEUE"
            )));
        }
        set_nonblocking(&fd).map_err(|e| TapError::Io("making the TAP non-blocking", e))?;
        Ok(Self {
            file: File::from(fd),
            is_tap: true,
            attached: true,
        })
    }

    /// Takes a packet socket in the place of a TAP.
    #[cfg(any(test, fuzzing))]
    pub fn stand_in(fd: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&fd)?;
        Ok(Self {
            file: File::from(fd),
            is_tap: false,
            attached: true,
        })
    }

    /// Whether the kernel can leave UDP packets whole.
    pub fn has_ufo(&self) -> bool {
        let probe = libc::TUN_F_CSUM | libc::TUN_F_UFO;
        // Nothing is to be left unfinished before a driver says so.
        self.set_offload(probe).is_ok() && self.set_offload(0).is_ok()
    }

    /// Sets what the TAP may hand over unfinished, and the length of the header that packets begin with.
    pub fn set_up(&self, offloads: u32) -> io::Result<()> {
        if !self.is_tap {
            return Ok(());
        }
        let len: libc::c_int = HEADER as libc::c_int;
        // SAFETY: the kernel reads one integer.
        let r = unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                libc::TUNSETVNETHDRSZ,
                std::ptr::from_ref(&len),
            )
        };
        if r < 0 {
            return Err(io::Error::last_os_error());
        }
        self.set_offload(offloads)
    }

    /// Lets this queue of the interface have a part in its traffic, or none.
    pub fn set_attached(&mut self, attached: bool) -> io::Result<()> {
        if attached == self.attached {
            return Ok(());
        }
        if self.is_tap {
            set_attached(&self.file, attached)?;
        }
        self.attached = attached;
        Ok(())
    }

    fn set_offload(&self, offloads: u32) -> io::Result<()> {
        // SAFETY: takes an integer.
        let r = unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(offloads),
            )
        };
        if r < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

/// The flags of the interface behind a TAP.
fn interface_flags(fd: &OwnedFd) -> io::Result<i16> {
    // SAFETY: zeroes are a valid request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one request.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, std::ptr::from_mut(&mut request)) };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: TUNGETIFF fills in the flags.
    Ok(unsafe { request.ifr_ifru.ifru_flags })
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}
