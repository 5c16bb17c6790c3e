//! Mounts and namespaces.

use super::{Attempt, Facts, Outcome, Stops, call, refused, text};

const fn forbidden(name: &'static str, what: &'static str, run: fn(&Facts) -> Outcome) -> Attempt {
    let errors = &[libc::EPERM];
    Attempt {
        name,
        what,
        layer: "capabilities",
        stops: Stops::Twice,
        errors,
        needs: &[],
        run,
    }
}

const fn unsharing(name: &'static str, what: &'static str, run: fn(&Facts) -> Outcome) -> Attempt {
    let errors = &[libc::EPERM];
    Attempt {
        name,
        what,
        layer: "closed root",
        stops: Stops::Twice,
        errors,
        needs: &[],
        run,
    }
}

fn unshare(what: i32) -> Outcome {
    refused(call(libc::SYS_unshare, &[what as usize]))
}

/// The attempts.
pub const ATTEMPTS: &[Attempt] = &[
    Attempt {
        errors: &[libc::EPERM, libc::EACCES],
        ..forbidden("mount", "mount a tmpfs over /", |_| {
            let (kind, place) = (text(c"tmpfs"), text(c"/"));
            refused(call(libc::SYS_mount, &[kind, place, kind, 0, 0]))
        })
    },
    Attempt {
        errors: &[libc::EPERM, libc::EACCES],
        ..forbidden("remount", "remount / writable", |_| {
            let flags = (libc::MS_REMOUNT | libc::MS_BIND) as usize;
            refused(call(libc::SYS_mount, &[0, text(c"/"), 0, flags, 0]))
        })
    },
    Attempt {
        errors: &[libc::EPERM, libc::EACCES],
        ..forbidden("umount", "uncover what lies below /", |_| {
            refused(call(libc::SYS_umount2, &[text(c"/"), libc::MNT_DETACH as usize]))
        })
    },
    Attempt {
        errors: &[libc::EPERM, libc::EACCES],
        ..forbidden("pivot-root", "exchange the root", |_| {
            refused(call(libc::SYS_pivot_root, &[text(c"."), text(c".")]))
        })
    },
    forbidden(
        "new-mount-api",
        "make a proc by the new mount calls (fsopen)",
        |_| refused(call(libc::SYS_fsopen, &[text(c"proc"), 0])),
    ),
    Attempt {
        errors: &[libc::EPERM, libc::EACCES],
        ..forbidden("open-tree", "copy the mount tree (open_tree)", |_| {
            const CLONE: usize = 1;
            refused(call(
                libc::SYS_open_tree,
                &[libc::AT_FDCWD as usize, text(c"/"), CLONE],
            ))
        })
    },
    unsharing(
        "unshare-user",
        "become root in a new user namespace (unshare)",
        |_| unshare(libc::CLONE_NEWUSER),
    ),
    unsharing(
        "clone-user",
        "become root in a new user namespace (clone)",
        |_| {
            let flags = libc::CLONE_NEWUSER | libc::SIGCHLD;
            match call(libc::SYS_clone, &[flags as usize, 0, 0, 0, 0]) {
                Ok(0) => std::process::exit(0),
                other => refused(other),
            }
        },
    ),
    forbidden("unshare-mount", "make a mount namespace", |_| {
        unshare(libc::CLONE_NEWNS)
    }),
    forbidden("unshare-net", "make a network namespace", |_| {
        unshare(libc::CLONE_NEWNET)
    }),
    forbidden("unshare-pid", "make a pid namespace", |_| {
        unshare(libc::CLONE_NEWPID)
    }),
    forbidden(
        "setns-self",
        "enter namespaces by a pidfd (setns)",
        |_| match call(libc::SYS_pidfd_open, &[1, 0]) {
            Ok(pidfd) => refused(call(libc::SYS_setns, &[pidfd, libc::CLONE_NEWNET as usize])),
            Err(errno) => Outcome::Refused(errno),
        },
    ),
    forbidden("sethostname", "change the host name", |_| {
        refused(call(libc::SYS_sethostname, &[text(c"mine"), 4]))
    }),
    Attempt {
        name: "hostname",
        what: "learn the host's name",
        layer: "UTS namespace",
        stops: Stops::Twice,
        errors: &[],
        needs: &[],
        run: |facts| {
            // SAFETY: plain data for which zeroes are valid, filled by the call.
            let mut name: libc::utsname = unsafe { std::mem::zeroed() };
            if let Err(errno) = call(libc::SYS_uname, &[&raw mut name as usize]) {
                return Outcome::Refused(errno);
            }
            let name: String = name
                .nodename
                .iter()
                .take_while(|c| **c != 0)
                .map(|c| *c as u8 as char)
                .collect();
            if name == facts.text("hostname") || name != "jail" {
                return Outcome::Escaped(format!("it is {name}"));
            }
            Outcome::Nothing("the name is the jail's")
        },
    },
    Attempt {
        name: "shared-memory",
        what: "attach the daemon's shared memory",
        layer: "IPC namespace",
        stops: Stops::Twice,
        errors: &[libc::ENOENT],
        needs: &["shm"],
        run: |facts| refused(call(libc::SYS_shmget, &[facts.number("shm"), 0, 0])),
    },
    Attempt {
        name: "message-queue",
        what: "open the daemon's message queue",
        layer: "IPC namespace",
        stops: Stops::Twice,
        errors: &[libc::ENOENT, libc::EACCES],
        needs: &["queue"],
        run: |facts| {
            let name = std::ffi::CString::new(facts.text("queue")).unwrap_or_default();
            refused(call(
                libc::SYS_mq_open,
                &[text(&name), libc::O_RDWR as usize, 0, 0],
            ))
        },
    },
];
