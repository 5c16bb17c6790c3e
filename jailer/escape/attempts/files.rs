//! Files, directories and descriptors.

use std::ffi::CString;

use super::{Attempt, Facts, Outcome, Stops, call, refused, text};

const ROOT: &str = "closed root";
const DENIED: &[i32] = &[libc::EACCES];

fn open(path: &std::ffi::CStr, flags: i32) -> Outcome {
    refused(call(
        libc::SYS_openat,
        &[libc::AT_FDCWD as usize, text(path), flags as usize, 0o600],
    ))
}

const fn opening(name: &'static str, what: &'static str, run: fn(&Facts) -> Outcome) -> Attempt {
    Attempt {
        name,
        what,
        layer: ROOT,
        stops: Stops::Twice,
        errors: DENIED,
        needs: &[],
        run,
    }
}

/// The attempts.
pub const ATTEMPTS: &[Attempt] = &[
    opening("open-root", "open /", |_| open(c"/", libc::O_RDONLY)),
    opening("open-proc-1", "open /proc/1/environ", |_| {
        open(c"/proc/1/environ", libc::O_RDONLY)
    }),
    opening("open-proc-root", "open /proc/1/root/etc/shadow", |_| {
        open(c"/proc/1/root/etc/shadow", libc::O_RDONLY)
    }),
    opening("open-sys", "open /sys/kernel", |_| {
        open(c"/sys/kernel", libc::O_RDONLY)
    }),
    opening("open-dev-kvm", "open /dev/kvm", |_| {
        open(c"/dev/kvm", libc::O_RDWR)
    }),
    opening("open-dev-mem", "open /dev/mem", |_| {
        open(c"/dev/mem", libc::O_RDWR)
    }),
    opening("open-shadow", "open /etc/shadow", |_| {
        open(c"/etc/shadow", libc::O_RDONLY)
    }),
    opening("open-up", "open ../../../../etc/passwd", |_| {
        open(c"../../../../etc/passwd", libc::O_RDONLY)
    }),
    opening("create-file", "create a file", |_| {
        open(c"/file", libc::O_RDWR | libc::O_CREAT)
    }),
    Attempt {
        errors: &[libc::EACCES, libc::EROFS],
        ..opening("make-tmpfile", "make an unnamed file in /", |_| {
            open(c"/", libc::O_RDWR | libc::O_TMPFILE)
        })
    },
    opening("open-terminal", "open the operator's terminal (/dev/tty)", |_| {
        open(c"/dev/tty", libc::O_RDWR)
    }),
    opening("overwrite-exe", "open /proc/self/exe for writing", |_| {
        open(c"/proc/self/exe", libc::O_WRONLY)
    }),
    opening("reopen-fd", "open /proc/self/fd/3 again", |_| {
        open(c"/proc/self/fd/3", libc::O_RDWR)
    }),
    opening("write-cgroup", "write the own cgroup's memory.max", |facts| {
        let path = CString::new(format!("{}/memory.max", facts.text("leaf"))).unwrap_or_default();
        open(&path, libc::O_WRONLY)
    }),
    opening("make-node", "make a device node of the disk", |_| {
        let device = 8 << 8;
        refused(call(
            libc::SYS_mknodat,
            &[
                libc::AT_FDCWD as usize,
                text(c"/sda"),
                (libc::S_IFBLK | 0o600) as usize,
                device,
            ],
        ))
    }),
    opening("execute-path", "execute /bin/sh", |_| {
        let arguments = [text(c"sh"), 0];
        refused(call(
            libc::SYS_execve,
            &[text(c"/bin/sh"), arguments.as_ptr() as usize, 0],
        ))
    }),
    Attempt {
        name: "chroot-out",
        what: "chroot and walk up",
        layer: "capabilities",
        stops: Stops::Twice,
        errors: &[libc::EACCES, libc::EPERM],
        needs: &[],
        run: |_| refused(call(libc::SYS_chroot, &[text(c".")])),
    },
    Attempt {
        name: "open-by-handle",
        what: "open a file of the host by its handle (shocker)",
        layer: "capabilities",
        stops: Stops::Twice,
        errors: &[libc::EPERM],
        needs: &[],
        run: open_by_handle,
    },
    Attempt {
        name: "leaked-descriptors",
        what: "use descriptors that were not handed over",
        layer: "descriptors",
        stops: Stops::Twice,
        errors: &[],
        needs: &[],
        run: leaked_descriptors,
    },
    Attempt {
        name: "fd-to-directory",
        what: "walk from each inherited descriptor to ..",
        layer: "descriptors",
        stops: Stops::Twice,
        errors: &[libc::ENOTDIR],
        needs: &[],
        run: |_| {
            let walks = (0..5).map(|fd| {
                call(
                    libc::SYS_openat,
                    &[fd, text(c"../etc/passwd"), libc::O_RDONLY as usize],
                )
            });
            let mut last = Outcome::Nothing("no descriptor");
            for walk in walks {
                match walk {
                    Err(libc::EBADF) => {}
                    other => last = refused(other),
                }
                if matches!(last, Outcome::Escaped(_)) {
                    break;
                }
            }
            last
        },
    },
    Attempt {
        name: "many-descriptors",
        what: "fill the file table",
        layer: "limits",
        stops: Stops::Twice,
        errors: &[libc::EMFILE],
        needs: &[],
        run: |_| {
            for _ in 0..100_000 {
                if let Err(errno) = call(libc::SYS_dup, &[0]) {
                    return Outcome::Refused(errno);
                }
            }
            Outcome::Escaped("100,000 descriptors are open".to_owned())
        },
    },
    Attempt {
        name: "raise-limits",
        what: "raise the limit of open files",
        layer: "limits",
        stops: Stops::Twice,
        errors: &[libc::EPERM],
        needs: &[],
        run: |_| {
            let more = [1_u64 << 20, 1 << 20];
            let file = libc::RLIMIT_NOFILE as usize;
            refused(call(libc::SYS_prlimit64, &[0, file, more.as_ptr() as usize, 0]))
        },
    },
    Attempt {
        name: "environment",
        what: "read secrets in the environment",
        layer: "exec",
        stops: Stops::Layer,
        errors: &[],
        needs: &[],
        run: |_| match std::env::vars_os().next() {
            None => Outcome::Nothing("the environment is empty"),
            Some((name, _)) => Outcome::Escaped(format!("{} is set", name.display())),
        },
    },
];

fn open_by_handle(_: &Facts) -> Outcome {
    // A struct file_handle of 8 bytes, type FILEID_INO32_GEN: inode 2 is the root of most file systems.
    let handle: [u32; 4] = [8, 1, 2, 0];
    refused(call(
        libc::SYS_open_by_handle_at,
        &[0, handle.as_ptr() as usize, libc::O_RDONLY as usize],
    ))
}

fn leaked_descriptors(facts: &Facts) -> Outcome {
    let handed = facts.number("handed");
    let open: Vec<usize> = (0..4096)
        .filter(|fd| call(libc::SYS_fcntl, &[*fd, libc::F_GETFD as usize]).is_ok())
        .collect();
    if open.len() == handed && open.iter().all(|fd| *fd < handed) {
        Outcome::Nothing("only those handed over are open")
    } else {
        Outcome::Escaped(format!("open are {open:?}"))
    }
}
