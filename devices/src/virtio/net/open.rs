//! The host's part of a network device: opens a TAP that exists.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// A TAP could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenTapError {
    /// No interface has the name.
    #[error("there is no interface {0:?}; make one with: ip tuntap add {0} mode tap && ip link set {0} up")]
    Missing(String),
    /// Another process has it open.
    #[error("the interface {0:?} is in use by another process")]
    Busy(String),
    /// The interface is none that can be opened so.
    #[error(
        "the interface {0:?} is no TAP with a single queue (made with `mode tap`, without `multi_queue`)"
    )]
    NotATap(String),
    /// The interface is none that can be opened several times.
    #[error(
        "the interface {0:?} is no TAP for several queues; make one with: ip tuntap add {0} mode tap multi_queue"
    )]
    OneQueue(String),
    /// A system call failed.
    #[error("{what} for the interface {name:?} failed")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The interface.
        name: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Opens `queues` queues of the TAP `name` of this process's network namespace, with IFF_NO_PI and IFF_VNET_HDR,
/// non-blocking. Never makes one. More than one needs a TAP that was made with IFF_MULTI_QUEUE, a single one a TAP that
/// was not. The kernel lets several processes open queues of one TAP.
///
/// # Errors
/// See [`OpenTapError`].
pub fn open_tap(name: &str, queues: u8) -> Result<Vec<OwnedFd>, OpenTapError> {
    let index = interface_index(name).ok_or_else(|| OpenTapError::Missing(name.to_owned()))?;
    let opened = (0..queues).map(|_| open_queue(name, queues > 1)).collect();
    // An interface that vanished in between would have been made anew by TUNSETIFF; it goes with the descriptors.
    if interface_index(name) != Some(index) {
        return Err(OpenTapError::Missing(name.to_owned()));
    }
    opened
}

fn open_queue(name: &str, several: bool) -> Result<OwnedFd, OpenTapError> {
    let failed = |what| {
        move |source| OpenTapError::Io {
            what,
            name: name.to_owned(),
            source,
        }
    };
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(failed("opening /dev/net/tun"))?;
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request
        .ifr_name
        .iter_mut()
        .zip(name.bytes().take(libc::IFNAMSIZ - 1))
    {
        *to = from as libc::c_char;
    }
    let kind = if several { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | kind;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the kernel reads and writes one ifreq, which lives until the call returns.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) } < 0 {
        let source = io::Error::last_os_error();
        return Err(match source.raw_os_error() {
            Some(libc::EBUSY) => OpenTapError::Busy(name.to_owned()),
            Some(libc::EINVAL) if several => OpenTapError::OneQueue(name.to_owned()),
            Some(libc::EINVAL) => OpenTapError::NotATap(name.to_owned()),
            _ => failed("TUNSETIFF")(source),
        });
    }
    Ok(file.into())
}

/// A TAP for several queues that goes with this guard, and with the last of those who have opened queues of it. It takes
/// no part in its traffic.
pub struct MadeTap {
    _queue: OwnedFd,
}

impl MadeTap {
    /// Makes the TAP `name` in this process's network namespace. It has no address and is down.
    ///
    /// # Errors
    /// [`OpenTapError::Busy`] when there is an interface of that name, [`OpenTapError::Io`] when the kernel refuses.
    pub fn new(name: &str) -> Result<Self, OpenTapError> {
        if interface_index(name).is_some() {
            return Err(OpenTapError::Busy(name.to_owned()));
        }
        let queue = open_queue(name, true)?;
        set_attached(&queue, false).map_err(|source| OpenTapError::Io {
            what: "TUNSETQUEUE",
            name: name.to_owned(),
            source,
        })?;
        Ok(Self { _queue: queue })
    }
}

/// Lets a queue of a TAP have a part in the interface's traffic, or none (TUNSETQUEUE).
pub(super) fn set_attached(queue: &impl AsRawFd, attached: bool) -> io::Result<()> {
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let flag = if attached {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    };
    request.ifr_ifru.ifru_flags = flag as libc::c_short;
    // SAFETY: the kernel reads one ifreq.
    let r = unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETQUEUE, std::ptr::from_ref(&request)) };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// The index of an interface of this process's network namespace.
pub fn interface_index(name: &str) -> Option<u32> {
    let name = CString::new(name)
        .ok()
        .filter(|n| (1..libc::IFNAMSIZ).contains(&n.count_bytes()))?;
    // SAFETY: the name is zero-terminated and lives until the call returns.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (index != 0).then_some(index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn opens_only_taps_that_exist() {
        for name in ["", "no-such-tap-000", "a\0b", "a-name-that-is-too-long"] {
            assert!(
                matches!(open_tap(name, 1), Err(OpenTapError::Missing(_))),
                "{name:?}"
            );
        }
        // Made in a namespace of this thread's own, so that nothing is left and nothing is in the way.
        let test = || {
            // SAFETY: takes no pointers; concerns this thread only.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
                return Err(io::Error::last_os_error());
            }
            let made = File::options().read(true).write(true).open("/dev/net/tun")?;
            // SAFETY: all-zero is a valid ifreq.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            request.ifr_name[..4].copy_from_slice(&b"tap7".map(|b| b as libc::c_char));
            request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
            // SAFETY: the kernel reads and writes one ifreq.
            if unsafe { libc::ioctl(made.as_raw_fd(), libc::TUNSETIFF, &mut request) } < 0 {
                return Err(io::Error::last_os_error());
            }
            let made_for_two = MadeTap::new("tap8").expect("TAPs can be made here");
            assert!(matches!(MadeTap::new("tap8"), Err(OpenTapError::Busy(_))));
            assert_eq!(open_tap("tap8", 2).expect("two queues").len(), 2);
            let one = open_tap("tap8", 1);
            assert!(matches!(one, Err(OpenTapError::NotATap(_))), "{one:?}");
            drop(made_for_two);
            assert!(interface_index("tap8").is_none(), "it goes with its guard");
            let (busy, lo) = (open_tap("tap7", 1), open_tap("lo", 1));
            let several = [open_tap("tap7", 2), open_tap("lo", 2)];
            // SAFETY: takes an integer: the interface outlives its descriptor.
            unsafe { libc::ioctl(made.as_raw_fd(), libc::TUNSETPERSIST, 1) };
            drop(made);
            // A child that another test's thread forks holds the descriptor, too, until its exec.
            let deadline = Instant::now() + Duration::from_secs(20);
            let free = loop {
                match open_tap("tap7", 1) {
                    Err(OpenTapError::Busy(_)) if Instant::now() < deadline => std::thread::yield_now(),
                    other => break other,
                }
            };
            Ok((busy, lo, several, free))
        };
        match std::thread::spawn(test)
            .join()
            .expect("the thread ends by itself")
        {
            Ok((busy, lo, several, free)) => {
                assert!(matches!(busy, Err(OpenTapError::Busy(_))), "{busy:?}");
                for opened in several {
                    assert!(matches!(opened, Err(OpenTapError::OneQueue(_))), "{opened:?}");
                }
                assert!(matches!(lo, Err(OpenTapError::NotATap(_))), "{lo:?}");
                assert_eq!(free.expect("it exists and is free").len(), 1);
            }
            Err(e) => eprintln!("SKIP: opens_only_taps_that_exist: a TAP cannot be made here: {e}"),
        }
    }
}
