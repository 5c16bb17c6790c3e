//! Mounts, modules and the loopback device: what a Linux machine needs before anything can run on it.

use super::{Attempt, GuestError};
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;

const ORDINARY: libc::c_ulong = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;

/// `/proc`, `/sys` and `/dev`, without which nothing can be loaded or found.
pub fn mount_kernel_file_systems() -> Result<(), GuestError> {
    mount("proc", "/proc", "proc", ORDINARY, "")?;
    mount("sysfs", "/sys", "sysfs", ORDINARY, "")?;
    mount("devtmpfs", "/dev", "devtmpfs", libc::MS_NOSUID, "mode=0755")
}

/// The first root file system cannot be the old root of pivot_root(2), and a jailer does that. So the same files are
/// mounted once more, over it, and become the root; the mounts made so far come along.
pub fn make_root_a_mount() -> Result<(), GuestError> {
    mount("/", "/mnt", "", libc::MS_BIND | libc::MS_REC, "")?;
    std::env::set_current_dir("/mnt").attempt(|| "enter /mnt".into())?;
    mount(".", "/", "", libc::MS_MOVE, "")?;
    std::os::unix::fs::chroot(".").attempt(|| "make the new root the root".into())?;
    std::env::set_current_dir("/").attempt(|| "enter /".into())
}

/// Loads kernel modules, in this order.
pub fn load_modules(paths: &[String]) -> Result<(), GuestError> {
    for path in paths {
        if path.ends_with("/kvm.ko") {
            wait_for_tsc();
        }
        let file = fs::File::open(path).attempt(|| format!("open {path}"))?;
        // SAFETY: the descriptor is open, the parameter string is NUL-terminated and outlives the call.
        let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
        if result != 0 {
            return Err(io::Error::last_os_error()).attempt(|| format!("load the kernel module {path}"));
        }
    }
    Ok(())
}

/// KVM takes the TSC's frequency when it is loaded. Loaded before the kernel has refined what it measured early in its
/// boot (about a second later, when the TSC becomes the clock source), KVM computes guests' timers with two different
/// frequencies, and some never fire. The kernel tells nobody when it has done so, so its file is read again and again;
/// after five seconds without a TSC the machine goes on with what it has.
fn wait_for_tsc() {
    const STEP: std::time::Duration = std::time::Duration::from_millis(10);
    const CURRENT: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    for _ in 0..500 {
        if fs::read_to_string(CURRENT).is_ok_and(|name| name.trim() == "tsc") {
            return;
        }
        std::thread::sleep(STEP);
    }
    eprintln!("shoal-lab: the TSC did not become the clock source; timers of guests may be unreliable");
}

/// Everything else that programs expect of a machine.
pub fn prepare() -> Result<(), GuestError> {
    for directory in ["/dev/pts", "/dev/shm", "/dev/hugepages"] {
        fs::create_dir_all(directory).attempt(|| format!("make {directory}"))?;
    }
    mount(
        "devpts",
        "/dev/pts",
        "devpts",
        libc::MS_NOSUID | libc::MS_NOEXEC,
        "mode=0620,ptmxmode=0666",
    )?;
    mount(
        "tmpfs",
        "/dev/shm",
        "tmpfs",
        libc::MS_NOSUID | libc::MS_NODEV,
        "mode=1777",
    )?;
    mount(
        "hugetlbfs",
        "/dev/hugepages",
        "hugetlbfs",
        libc::MS_NOSUID | libc::MS_NODEV,
        "",
    )?;
    mount(
        "tracefs",
        "/sys/kernel/tracing",
        "tracefs",
        libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
        "mode=0700",
    )?;
    // /tmp and /run stay on the root, which is in memory anyway: files may have been copied there.
    fs::set_permissions("/tmp", fs::Permissions::from_mode(0o1777))
        .attempt(|| "open /tmp to everybody".into())?;
    for (link, target) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
        let (link, target) = (format!("/dev/{link}"), format!("/proc/self/fd{target}"));
        match std::os::unix::fs::symlink(&target, &link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).attempt(|| format!("link {link} to {target}"));
            }
            _ => {}
        }
    }
    prepare_cgroups()?;
    write("/proc/sys/kernel/hostname", "shoal-lab")?;
    loopback_up()
}

/// The unified hierarchy with every controller handed down to the children of the root.
fn prepare_cgroups() -> Result<(), GuestError> {
    const ROOT: &str = "/sys/fs/cgroup";
    mount("cgroup2", ROOT, "cgroup2", ORDINARY, "")?;
    let list = format!("{ROOT}/cgroup.controllers");
    let controllers = fs::read_to_string(&list).attempt(|| format!("read {list}"))?;
    let wanted: Vec<String> = controllers
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    write(&format!("{ROOT}/cgroup.subtree_control"), &wanted.join(" "))
}

fn loopback_up() -> Result<(), GuestError> {
    let what = || "bring up the loopback device".to_owned();
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").attempt(what)?;
    // SAFETY: ifreq is plain data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the descriptor is a socket and the request is an ifreq with a NUL-terminated name, as SIOCSIFFLAGS wants.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } != 0 {
        return Err(io::Error::last_os_error()).attempt(what);
    }
    Ok(())
}

fn write(path: &str, value: &str) -> Result<(), GuestError> {
    fs::write(path, value).attempt(|| format!("write '{value}' to {path}"))
}

/// mount(2), with the error that names both ends.
pub fn mount(
    source: &str,
    target: &str,
    kind: &str,
    flags: libc::c_ulong,
    data: &str,
) -> Result<(), GuestError> {
    let what = || format!("mount {source} ({kind}) on {target}");
    let c = |text: &str| CString::new(text).map_err(io::Error::from).attempt(what);
    let (source_c, target_c, kind_c, data_c) = (c(source)?, c(target)?, c(kind)?, c(data)?);
    // SAFETY: all four are NUL-terminated strings that outlive the call.
    let result = unsafe {
        libc::mount(
            source_c.as_ptr(),
            target_c.as_ptr(),
            kind_c.as_ptr(),
            flags,
            data_c.as_ptr().cast(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error()).attempt(what);
    }
    Ok(())
}
