//! A landlock rule set that allows nothing (Documentation/userspace-api/landlock.rst).
//!
//! It stands behind the empty root and the empty network: if a VMM got hold of a directory descriptor or of another
//! namespace, the file system, TCP, abstract sockets and signals to processes outside its jail stay closed to it.
//! Made once per host; each jail only enters it, with one system call.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use crate::error::Degradation;
use crate::sys;

/// `struct landlock_ruleset_attr`.
#[repr(C)]
#[derive(Debug, Default, PartialEq, Eq)]
struct Attributes {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

impl Attributes {
    /// Everything that the given version of landlock can refuse.
    fn all(version: u32) -> Attributes {
        // Version 1 has 13 rights on files; 2 added REFER, 3 TRUNCATE, 5 IOCTL_DEV.
        let rights = match version {
            0 | 1 => 13,
            2 => 14,
            3 | 4 => 15,
            _ => 16,
        };
        Attributes {
            handled_access_fs: (1 << rights) - 1,
            // Version 4: bind and connect of TCP.
            handled_access_net: if version >= 4 { 0b11 } else { 0 },
            // Version 6: abstract Unix sockets, and signals.
            scoped: if version >= SCOPES { 0b11 } else { 0 },
        }
    }

    /// The size that a kernel of this version knows.
    fn size(version: u32) -> usize {
        match version {
            0..=3 => 8,
            4 | 5 => 16,
            _ => 24,
        }
    }
}

/// Makes the rule set, or says what is missing. Its version goes with it.
pub(crate) fn deny_all() -> Result<(OwnedFd, u32), Degradation> {
    const VERSION: usize = 1;
    // SAFETY: this form of the call takes a null pointer, no size, and a flag.
    let version = unsafe { sys::raw(libc::SYS_landlock_create_ruleset, [0, 0, VERSION, 0, 0, 0]) };
    let made = version.and_then(|version| {
        let version = version as u32;
        let attributes = Attributes::all(version);
        // SAFETY: the structure is alive, and at least as long as the size given.
        let fd = unsafe {
            sys::raw(
                libc::SYS_landlock_create_ruleset,
                [
                    &raw const attributes as usize,
                    Attributes::size(version),
                    0,
                    0,
                    0,
                    0,
                ],
            )
        }?;
        // SAFETY: the call made this descriptor for us alone.
        Ok((unsafe { OwnedFd::from_raw_fd(fd as i32) }, version))
    });
    made.map_err(|errno| Degradation {
        what: "landlock",
        because: format!("the kernel refuses it: {}", io::Error::from_raw_os_error(errno)),
        consequence: "the empty root and network are not backed by a second layer",
        remedy: "a kernel with CONFIG_SECURITY_LANDLOCK, and landlock in the boot parameter lsm=",
    })
}

/// The version that refuses abstract sockets and signals across jails. With an older one each jail gets a network
/// namespace of its own, which costs 0.5 ms at each start.
pub(crate) const SCOPES: u32 = 6;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_version_gets_what_it_knows() {
        assert_eq!(Attributes::all(1).handled_access_fs, 0x1fff);
        assert_eq!(Attributes::all(2).handled_access_fs, 0x3fff);
        assert_eq!(Attributes::all(3).handled_access_fs, 0x7fff);
        assert_eq!(Attributes::all(3).handled_access_net, 0);
        assert_eq!(Attributes::all(5).handled_access_fs, 0xffff);
        assert_eq!(
            Attributes::all(7),
            Attributes {
                handled_access_fs: 0xffff,
                handled_access_net: 3,
                scoped: 3
            }
        );
    }
}
