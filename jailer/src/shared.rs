//! The namespaces that all jails of one host enter: made once, empty, and kept as descriptors.
//!
//! A new mount namespace copies every mount of the host: with 2,000 mounts, 2.7 ms at the start of each guest and 1 ms
//! at its end (measured), and a new network namespace takes 0.5 ms and some 100 KB of kernel memory. So a helper
//! process makes one of each when the [`crate::Jailer`] is made, empties them, and ends; the jails join by setns,
//! for 0.01 ms. What jails share thereby is nothing that can be written to: a read-only, empty file system, and
//! a network without an interface. Abstract sockets are the one thing that a shared network would join: making
//! a socket is refused by seccomp, and connecting to one by landlock's scopes. On a kernel whose landlock has no
//! scopes (before 6.12), or none at all, each jail therefore gets a network namespace of its own.
//!
//! Attacks that this stops: opening, replacing or executing any file of the host, device nodes, `/proc` and `/sys`,
//! set-uid programs (there is no file, and nosuid, nodev, noexec, read-only besides); reaching any network, the
//! host's abstract sockets and netlink; and a bug in the kernel that hands out capabilities gives them over an empty
//! user namespace only.

use std::ffi::{CStr, c_void};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;

use crate::clone::{ChildStack, CloneArgs, clone3};
use crate::error::{Degradation, JailError};
use crate::id::IdRange;
use crate::sys::{self, Errno};

/// Name of the directory inside the empty file system that jails are chrooted into.
pub(crate) const ROOT: &CStr = c"void";

/// Descriptors of the shared namespaces.
#[derive(Debug)]
pub(crate) struct Shared {
    /// Mount namespace with nothing but an empty root.
    pub mount: OwnedFd,
    /// Network namespace without an interface that is up.
    pub net: OwnedFd,
    /// User namespace without power over anything.
    pub user: Option<OwnedFd>,
}

/// Makes the namespaces as root: mount and network belong to the host's user namespace, and the jails' user
/// namespace maps the guests' ids only, so that inside it there is neither root nor any other user.
pub(crate) fn as_root(uids: IdRange, gids: IdRange) -> Result<(Shared, Vec<Degradation>), JailError> {
    let mut lacks = Vec::new();
    let empty = Helper::start((libc::CLONE_NEWNS | libc::CLONE_NEWNET) as u64)
        .map_err(|source| fail("making the jails' mount and network namespace", source))?;
    if empty
        .proceed()
        .map_err(|source| fail("emptying the jails' mount namespace", source))?
    {
        lacks.push(hidden_root());
    }
    let user = Helper::start(libc::CLONE_NEWUSER as u64).and_then(|helper| {
        helper.write("uid_map", &map_line(uids.first(), uids.count()))?;
        helper.write("gid_map", &map_line(gids.first(), gids.count()))?;
        helper.namespace("user")
    });
    let user = user.map_err(|error| {
        lacks.push(Degradation {
            what: "user namespace",
            because: format!("the kernel refuses one: {error}"),
            consequence: "a kernel bug that hands out capabilities would hand out those of the host",
            remedy: "raise /proc/sys/user/max_user_namespaces",
        });
    });
    let open = |name| {
        empty
            .namespace(name)
            .map_err(|source| fail("opening the jails' namespaces in /proc", source))
    };
    Ok((
        Shared {
            mount: open("mnt")?,
            net: open("net")?,
            user: user.ok(),
        },
        lacks,
    ))
}

/// Makes the namespaces as an ordinary user, inside a user namespace that maps that user alone.
pub(crate) fn rootless(uid: u32, gid: u32) -> Result<(Shared, Vec<Degradation>), JailError> {
    let flags = (libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::CLONE_NEWNET) as u64;
    let refused = |source| JailError::System {
        attempt: "making a user namespace for the jails",
        source,
        advice: "allow user namespaces to this user: sysctl kernel.unprivileged_userns_clone=1 (Debian), kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu), user.max_user_namespaces above 0",
    };
    let helper = Helper::start(flags).map_err(refused)?;
    helper.write("setgroups", "deny").map_err(refused)?;
    helper.write("uid_map", &map_line(uid, 1)).map_err(refused)?;
    helper.write("gid_map", &map_line(gid, 1)).map_err(refused)?;
    let mut lacks = Vec::new();
    if helper
        .proceed()
        .map_err(|source| fail("emptying the jails' mount namespace", source))?
    {
        lacks.push(hidden_root());
    }
    let open = |name| {
        helper
            .namespace(name)
            .map_err(|source| fail("opening the jails' namespaces in /proc", source))
    };
    Ok((
        Shared {
            mount: open("mnt")?,
            net: open("net")?,
            user: Some(open("user")?),
        },
        lacks,
    ))
}

/// Ids are the same inside and outside.
fn map_line(first: u32, count: u32) -> String {
    format!("{first} {first} {count}")
}

fn hidden_root() -> Degradation {
    Degradation {
        what: "pivot_root",
        because: "the host's root is its initial ramfs, which cannot be exchanged".to_owned(),
        consequence: "the host's root is covered by the empty one instead of gone; uncovering it takes CAP_SYS_ADMIN",
        remedy: "switch_root to another file system in the host's init",
    }
}

fn fail(attempt: &'static str, source: io::Error) -> JailError {
    let advice = "CAP_SYS_ADMIN (or rootless: user namespaces) and a mounted /proc are needed; see /proc/sys/user/max_*_namespaces";
    JailError::System {
        attempt,
        source,
        advice,
    }
}

/// A process that holds new namespaces until their descriptors are open. It is a plain fork (its memory is a copy, so
/// it may run beside us), it ends when the `go` pipe is closed, and with it when this process dies.
struct Helper {
    pid: libc::pid_t,
    go: Option<File>,
    report: File,
    _stack: ChildStack,
}

/// What the helper process gets to know.
struct HelperPlan {
    /// Ends of the pipes that are the helper's, and those that are not.
    go: RawFd,
    report: RawFd,
    close: [RawFd; 2],
    /// Whether there is a mount namespace to empty.
    empty_mounts: bool,
}

impl Helper {
    fn start(flags: u64) -> io::Result<Helper> {
        let stack = ChildStack::new()?;
        let (go_read, go_write) = sys::pipe()?;
        let (report_read, report_write) = sys::pipe()?;
        let mut plan = HelperPlan {
            go: go_read.as_raw_fd(),
            report: report_write.as_raw_fd(),
            close: [go_write.as_raw_fd(), report_read.as_raw_fd()],
            empty_mounts: flags & libc::CLONE_NEWNS as u64 != 0,
        };
        let args = CloneArgs {
            flags,
            exit_signal: libc::SIGCHLD as u64,
            stack: stack.bottom(),
            stack_size: ChildStack::SIZE as u64,
            ..CloneArgs::default()
        };
        // SAFETY: without CLONE_VM the child has copies of the plan and the stack; `helper_main` makes system calls
        // only, and never returns.
        let pid = unsafe { clone3(&args, helper_main, (&raw mut plan).cast()) }
            .map_err(io::Error::from_raw_os_error)?;
        Ok(Helper {
            pid,
            go: Some(go_write.into()),
            report: report_read.into(),
            _stack: stack,
        })
    }

    /// Writes one of the files of user_namespaces(7) of the helper.
    fn write(&self, file: &str, text: &str) -> io::Result<()> {
        let mut file = File::options()
            .write(true)
            .open(format!("/proc/{}/{file}", self.pid))?;
        file.write_all(text.as_bytes())
    }

    /// Lets the helper empty its mount namespace. Gives whether the host's root had to be covered instead.
    fn proceed(&self) -> io::Result<bool> {
        if let Some(mut go) = self.go.as_ref() {
            go.write_all(b"g")?;
        }
        let mut answer = [0; 4];
        (&self.report).read_exact(&mut answer)?;
        match i32::from_ne_bytes(answer) {
            0 => Ok(false),
            COVERED => Ok(true),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// Opens one of the helper's namespaces.
    fn namespace(&self, name: &str) -> io::Result<OwnedFd> {
        let path = format!("/proc/{}/ns/{name}", self.pid);
        Ok(File::open(Path::new(&path))?.into())
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // Its sign to end; if it were stuck it would be ended the hard way, since it is our child still.
        drop(self.go.take());
        // SAFETY: the helper has not been waited for, so the number is its own.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
        // It was there and is ours: waiting cannot fail in a way that matters.
        let _ = sys::wait_pid(self.pid);
    }
}

/// The answer of a helper that could not pivot_root. No error number is negative.
const COVERED: i32 = -1;

/// The helper process. Memory is a copy of a process that may have had other threads: system calls only.
unsafe extern "C" fn helper_main(plan: *mut c_void) -> ! {
    // SAFETY: `start` passes a HelperPlan, of which this process has its copy.
    let plan = unsafe { &*plan.cast::<HelperPlan>() };
    for fd in plan.close {
        // SAFETY: closing descriptors of this process, which nothing here uses.
        unsafe { libc::close(fd) };
    }
    if wait_byte(plan.go) && plan.empty_mounts {
        let answer = match empty_mount_namespace() {
            Ok(answer) => answer,
            Err(errno) => errno,
        };
        let bytes = answer.to_ne_bytes();
        // SAFETY: a buffer of the length given. If the parent is gone nobody misses the answer.
        unsafe { libc::write(plan.report, bytes.as_ptr().cast(), bytes.len()) };
        wait_byte(plan.go);
    }
    // SAFETY: ends this process without running anything of its parent's.
    unsafe { libc::_exit(0) }
}

/// Waits for a byte; false at the end of the pipe.
fn wait_byte(pipe: RawFd) -> bool {
    let mut byte = 0_u8;
    loop {
        // SAFETY: a buffer of one byte.
        let got = unsafe { libc::read(pipe, (&raw mut byte).cast(), 1) };
        // SAFETY: the address of errno is always valid.
        if got >= 0 || unsafe { *libc::__errno_location() } != libc::EINTR {
            return got == 1;
        }
    }
}

/// Makes an empty read-only file system the only one of this mount namespace.
fn empty_mount_namespace() -> Result<i32, Errno> {
    const SAFE: libc::c_ulong = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC | libc::MS_NOATIME;
    // Nothing done here reaches the host, and nothing mounted there later arrives here.
    mount(None, c"/", None, libc::MS_REC | libc::MS_PRIVATE, None)?;
    // /proc is a directory that is there wherever the jailer works.
    mount(
        Some(c"tmpfs"),
        c"/proc",
        Some(c"tmpfs"),
        SAFE,
        Some(c"size=4k,nr_inodes=4,mode=0"),
    )?;
    call(libc::SYS_chdir, c"/proc", 0)?;
    call(libc::SYS_mkdir, ROOT, 0)?;
    mount(None, c".", None, libc::MS_REMOUNT | libc::MS_RDONLY | SAFE, None)?;
    // SAFETY: two C strings.
    let pivoted = unsafe {
        sys::raw(
            libc::SYS_pivot_root,
            [c".".as_ptr() as usize, c".".as_ptr() as usize, 0, 0, 0, 0],
        )
    };
    match pivoted {
        Ok(_) => {
            // The old root lies on top of the new one now, at the same place; it goes with all that is below it.
            call(libc::SYS_umount2, c".", libc::MNT_DETACH as usize)?;
            Ok(0)
        }
        // The initial ramfs cannot be pivoted away from (pivot_root(2)); cover it.
        Err(libc::EINVAL) => {
            mount(Some(c"."), c"/", None, libc::MS_MOVE, None)?;
            call(libc::SYS_chroot, c".", 0)?;
            Ok(COVERED)
        }
        Err(errno) => Err(errno),
    }
}

fn mount(
    source: Option<&CStr>,
    target: &CStr,
    kind: Option<&CStr>,
    flags: libc::c_ulong,
    data: Option<&CStr>,
) -> Result<(), Errno> {
    let address = |text: Option<&CStr>| text.map_or(0, |text| text.as_ptr() as usize);
    let args = [
        address(source),
        target.as_ptr() as usize,
        address(kind),
        flags as usize,
        address(data),
        0,
    ];
    // SAFETY: C strings or null, and flags.
    unsafe { sys::raw(libc::SYS_mount, args) }.map(|_| ())
}

/// A system call on a path and a number.
fn call(number: libc::c_long, path: &CStr, argument: usize) -> Result<(), Errno> {
    // SAFETY: a C string and a number, which all callers' system calls take.
    unsafe { sys::raw(number, [path.as_ptr() as usize, argument, 0, 0, 0, 0]) }.map(|_| ())
}
