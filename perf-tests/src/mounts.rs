//! A mount namespace of this program's own, with many mounts in it.

use std::ffi::CString;
use std::io::Error;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result};

/// From here on this thread, and what it starts, has a mount namespace of its own, in which `count` file systems more are
/// mounted below `folder`. Needs root.
pub fn make(folder: &Path, count: u32) -> Result<()> {
    // SAFETY: takes a number.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) }).context("making a mount namespace (as root?)")?;
    mount(None, Path::new("/"), libc::MS_REC | libc::MS_PRIVATE).context("making the mounts private")?;
    mount(Some(c"tmpfs"), folder, 0).with_context(|| format!("mounting on {}", folder.display()))?;
    for n in 0..count {
        let place = folder.join(n.to_string());
        std::fs::create_dir(&place).with_context(|| format!("making {}", place.display()))?;
        mount(Some(c"tmpfs"), &place, 0).with_context(|| format!("mounting on {}", place.display()))?;
    }
    Ok(())
}

/// Takes them away again.
pub fn take_away(folder: &Path) -> Result<()> {
    let path = CString::new(folder.as_os_str().as_bytes())?;
    // SAFETY: the path is a C string that lives until the call returns.
    check(unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) })
        .with_context(|| format!("unmounting {}", folder.display()))
}

fn mount(kind: Option<&std::ffi::CStr>, on: &Path, flags: libc::c_ulong) -> Result<()> {
    let on = CString::new(on.as_os_str().as_bytes())?;
    let kind = kind.map_or(std::ptr::null(), |k| k.as_ptr());
    // SAFETY: all strings are C strings that live until the call returns, or null where mount(2) takes none.
    let done = unsafe { libc::mount(kind, on.as_ptr(), kind, flags, std::ptr::null()) };
    Ok(check(done)?)
}

fn check(returned: libc::c_int) -> std::io::Result<()> {
    match returned {
        0 => Ok(()),
        _ => Err(Error::last_os_error()),
    }
}
