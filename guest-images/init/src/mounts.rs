//! The file systems: those that programs expect, a writable root over a read-only one, and those asked for.

use crate::cmdline::{Config, Mount};
use crate::console::{report, say};
use crate::sys;
use std::fs::create_dir_all;
use std::io;

const SAFE: libc::c_ulong = libc::MS_NOSUID | libc::MS_NODEV;

/// Mounts `/proc` where it is found first, for the command line. Without it nothing of what was asked for is known.
pub fn proc() -> io::Result<()> {
    mount_at("proc", "/proc", "proc", SAFE | libc::MS_NOEXEC, "")
}

/// Lays a writable overlay (in memory) over a read-only root, then mounts the usual file systems.
pub fn system() {
    if sys::root_is_read_only() {
        match overlay() {
            Ok(()) => report("mount /proc", proc()),
            Err(e) => say(&format!(
                "could not make the root writable: {e}; it stays read-only"
            )),
        }
    }
    for (source, target, fstype, flags, data) in [
        ("devtmpfs", "/dev", "devtmpfs", libc::MS_NOSUID, "mode=755"),
        ("sysfs", "/sys", "sysfs", SAFE | libc::MS_NOEXEC, ""),
        (
            "devpts",
            "/dev/pts",
            "devpts",
            libc::MS_NOSUID | libc::MS_NOEXEC,
            "mode=620,ptmxmode=666",
        ),
        ("tmpfs", "/dev/shm", "tmpfs", SAFE, "mode=1777"),
        ("tmpfs", "/run", "tmpfs", SAFE, "mode=755"),
        ("tmpfs", "/tmp", "tmpfs", SAFE, "mode=1777"),
        ("cgroup2", "/sys/fs/cgroup", "cgroup2", SAFE | libc::MS_NOEXEC, ""),
    ] {
        match mount_at(source, target, fstype, flags, data) {
            // A kernel without it is fine: no workload needs all of these.
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => {}
            // The kernel may have mounted /dev itself.
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            other => report(&format!("mount {target}"), other),
        }
    }
}

fn mount_at(source: &str, target: &str, fstype: &str, flags: libc::c_ulong, data: &str) -> io::Result<()> {
    if !std::path::Path::new(target).is_dir() {
        create_dir_all(target)?;
    }
    sys::mount(source, target, fstype, flags, data)
}

fn overlay() -> io::Result<()> {
    sys::mount("tmpfs", "/run", "tmpfs", 0, "mode=755")?;
    for directory in ["/run/upper", "/run/work", "/run/root"] {
        std::fs::create_dir(directory)?;
    }
    sys::mount(
        "root",
        "/run/root",
        "overlay",
        0,
        "lowerdir=/,upperdir=/run/upper,workdir=/run/work",
    )?;
    sys::switch_root("/run/root")
}

/// Mounts what the command line names, in its order.
pub fn requested(config: &Config) {
    for mount in &config.mounts {
        let (flags, data) = options(&mount.options);
        let what = format!("mount {} ({}) at {}", mount.source, mount.fstype, mount.target);
        report(
            &what,
            mount_at(&mount.source, &mount.target, &mount.fstype, flags, &data),
        );
    }
}

/// Takes away what was asked for, last first, so that their file systems are clean, and makes the root read-only.
pub fn release(mounts: &[Mount]) {
    for mount in mounts.iter().rev() {
        report(
            &format!("unmount {}", mount.target),
            sys::unmount_detach(&mount.target),
        );
    }
    // It is an overlay in memory or an initramfs, where this is refused and not needed, or a disk, where it matters.
    let _ = sys::mount("", "/", "", libc::MS_REMOUNT | libc::MS_RDONLY, "");
    sys::sync();
}

/// Splits mount options into the kernel's flags and what the file system itself reads.
fn options(text: &str) -> (libc::c_ulong, String) {
    let mut flags = 0;
    let mut data: Vec<&str> = Vec::new();
    for option in text.split(',').filter(|o| !o.is_empty()) {
        match option {
            "ro" => flags |= libc::MS_RDONLY,
            "nosuid" => flags |= libc::MS_NOSUID,
            "nodev" => flags |= libc::MS_NODEV,
            "noexec" => flags |= libc::MS_NOEXEC,
            "noatime" => flags |= libc::MS_NOATIME,
            "relatime" => flags |= libc::MS_RELATIME,
            "sync" => flags |= libc::MS_SYNCHRONOUS,
            "bind" => flags |= libc::MS_BIND,
            "rw" | "defaults" => {}
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_flags_or_data() {
        assert_eq!(
            options("ro,noatime,data=ordered,size=1m"),
            (libc::MS_RDONLY | libc::MS_NOATIME, "data=ordered,size=1m".into())
        );
        assert_eq!(options(""), (0, String::new()));
        assert_eq!(options("defaults,rw"), (0, String::new()));
    }
}
