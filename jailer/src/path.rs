//! Opening paths that somebody else may be changing: no symbolic link is followed, anywhere in them.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use crate::error::JailError;
use crate::sys;

/// Opens an absolute path from the root down with openat2 and RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH: what is opened
/// is what stands at the path by its plain names, whoever exchanges directories for links meanwhile.
///
/// # Errors
/// [`JailError::File`], with advice for links, relative paths and missing files.
pub fn open_plain(path: &Path, flags: libc::c_int, attempt: &'static str) -> Result<OwnedFd, JailError> {
    let fail = |source: io::Error| {
        let advice = match source.raw_os_error() {
            Some(libc::ELOOP) => {
                "a part of it is a symbolic link, which the jailer does not follow: give the real path (realpath prints it)"
            }
            Some(libc::EXDEV) => "it leads out of itself; give a path without '..'",
            Some(libc::ENOENT) => "check the spelling; it does not exist",
            Some(libc::EACCES) => "this user may not open it: check its permissions",
            Some(libc::EINVAL) => "give an absolute path without '..' or '.'",
            _ => "check the path",
        };
        JailError::File {
            attempt,
            path: path.to_owned(),
            source,
            advice,
        }
    };
    let plain = path.is_absolute()
        && path
            .components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !plain {
        return Err(fail(io::Error::from_raw_os_error(libc::EINVAL)));
    }
    let root = std::fs::File::open("/").map_err(fail)?;
    let below = path.strip_prefix("/").unwrap_or(path);
    let below = if below.as_os_str().is_empty() {
        Path::new(".")
    } else {
        below
    };
    let name = CString::new(below.as_os_str().as_bytes())
        .map_err(|_| fail(io::Error::from_raw_os_error(libc::EINVAL)))?;
    sys::open_beneath(root.as_fd(), &name, flags, 0).map_err(fail)
}
