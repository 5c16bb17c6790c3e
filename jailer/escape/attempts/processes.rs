//! Other processes, ids and capabilities.

use super::{Attempt, Facts, Outcome, Stops, call, refused};

const fn hidden(name: &'static str, what: &'static str, run: fn(&Facts) -> Outcome) -> Attempt {
    let (errors, needs) = (&[libc::ESRCH], &["daemon", "neighbour"]);
    Attempt {
        name,
        what,
        layer: "pid namespace",
        stops: Stops::Twice,
        errors,
        needs,
        run,
    }
}

const fn forbidden(
    name: &'static str,
    what: &'static str,
    layer: &'static str,
    run: fn(&Facts) -> Outcome,
) -> Attempt {
    Attempt {
        name,
        what,
        layer,
        stops: Stops::Twice,
        errors: &[libc::EPERM],
        needs: &[],
        run,
    }
}

/// The attempts.
pub const ATTEMPTS: &[Attempt] = &[
    hidden("kill-daemon", "signal the daemon", |facts| {
        refused(call(
            libc::SYS_kill,
            &[facts.number("daemon"), libc::SIGKILL as usize],
        ))
    }),
    hidden("kill-neighbour", "signal another guest's VMM", |facts| {
        refused(call(
            libc::SYS_kill,
            &[facts.number("neighbour"), libc::SIGKILL as usize],
        ))
    }),
    hidden(
        "tgkill-neighbour",
        "signal a thread of another guest's VMM (tgkill, which the filters allow)",
        |facts| {
            let pid = facts.number("neighbour");
            refused(call(libc::SYS_tgkill, &[pid, pid, libc::SIGKILL as usize]))
        },
    ),
    hidden("kill-all", "signal everything there is (kill -1)", |_| {
        // Only the first process of a pid namespace can try without harm to this machine.
        if std::process::id() != 1 {
            return Outcome::Escaped("it has no pid namespace of its own".to_owned());
        }
        refused(call(libc::SYS_kill, &[-1_isize as usize, libc::SIGKILL as usize]))
    }),
    hidden("ptrace-daemon", "trace the daemon", |facts| {
        refused(call(
            libc::SYS_ptrace,
            &[libc::PTRACE_ATTACH as usize, facts.number("daemon"), 0, 0],
        ))
    }),
    hidden("ptrace-neighbour", "trace another guest's VMM", |facts| {
        refused(call(
            libc::SYS_ptrace,
            &[libc::PTRACE_SEIZE as usize, facts.number("neighbour"), 0, 0],
        ))
    }),
    hidden(
        "read-memory",
        "read another guest's memory (process_vm_readv)",
        |facts| {
            let mut byte = 0_u8;
            let (local, remote) = ([&raw mut byte as usize, 1], [0x1000_usize, 1]);
            let addresses = [
                facts.number("neighbour"),
                local.as_ptr() as usize,
                1,
                remote.as_ptr() as usize,
                1,
                0,
            ];
            refused(call(libc::SYS_process_vm_readv, &addresses))
        },
    ),
    hidden(
        "pidfd-daemon",
        "take the daemon's descriptors (pidfd_getfd)",
        |facts| match call(libc::SYS_pidfd_open, &[facts.number("daemon"), 0]) {
            Ok(pidfd) => refused(call(libc::SYS_pidfd_getfd, &[pidfd, 0, 0])),
            Err(errno) => Outcome::Refused(errno),
        },
    ),
    hidden(
        "signal-by-descriptor",
        "have the kernel signal the daemon (F_SETOWN)",
        |facts| {
            refused(call(
                libc::SYS_fcntl,
                &[3, libc::F_SETOWN as usize, facts.number("daemon")],
            ))
        },
    ),
    hidden(
        "limits-of-daemon",
        "change the daemon's limits (prlimit)",
        |facts| {
            let none = [0_u64; 2];
            let arguments = [
                facts.number("daemon"),
                libc::RLIMIT_NOFILE as usize,
                none.as_ptr() as usize,
                0,
            ];
            refused(call(libc::SYS_prlimit64, &arguments))
        },
    ),
    // EINVAL: the user namespace has no such user.
    Attempt {
        errors: &[libc::EPERM, libc::EINVAL],
        ..forbidden("setuid-root", "become root", "capabilities", |_| {
            refused(call(libc::SYS_setresuid, &[0, 0, 0]))
        })
    },
    Attempt {
        errors: &[libc::EPERM, libc::EINVAL],
        ..forbidden(
            "setuid-neighbour",
            "become another guest's user",
            "capabilities",
            |facts| {
                let uid = facts.number("other-uid");
                refused(call(libc::SYS_setresuid, &[uid, uid, uid]))
            },
        )
    },
    forbidden("setgroups", "join another group", "capabilities", |_| {
        let kvm = [1_u32];
        refused(call(libc::SYS_setgroups, &[1, kvm.as_ptr() as usize]))
    }),
    forbidden("capset", "take all capabilities", "bounding set", |_| {
        let header = [0x2008_0522_u32, 0];
        let all = [u32::MAX, u32::MAX, 0, 0x1ff, 0x1ff, 0];
        refused(call(
            libc::SYS_capset,
            &[header.as_ptr() as usize, all.as_ptr() as usize],
        ))
    }),
    forbidden("ambient", "raise an ambient capability", "bounding set", |_| {
        let raise = libc::PR_CAP_AMBIENT_RAISE as usize;
        refused(call(
            libc::SYS_prctl,
            &[libc::PR_CAP_AMBIENT as usize, raise, 21, 0, 0],
        ))
    }),
    Attempt {
        errors: &[],
        ..forbidden(
            "bounding-set",
            "find a capability in the bounding set",
            "bounding set",
            |_| {
                let left: Vec<usize> = (0..64)
                    .filter(|cap| call(libc::SYS_prctl, &[libc::PR_CAPBSET_READ as usize, *cap]) == Ok(1))
                    .collect();
                if left.is_empty() {
                    Outcome::Nothing("it is empty")
                } else {
                    Outcome::Escaped(format!("there are {left:?}"))
                }
            },
        )
    },
    Attempt {
        errors: &[],
        ..forbidden(
            "privileges",
            "have no_new_privs unset",
            "no_new_privs",
            |_| match call(libc::SYS_prctl, &[libc::PR_GET_NO_NEW_PRIVS as usize, 0, 0, 0, 0]) {
                Ok(1) => match call(libc::SYS_prctl, &[libc::PR_SET_NO_NEW_PRIVS as usize, 0, 0, 0, 0]) {
                    Err(_) => Outcome::Nothing("it is set for good"),
                    Ok(_) => Outcome::Escaped("it was unset".to_owned()),
                },
                other => Outcome::Escaped(format!("it is {other:?}")),
            },
        )
    },
    Attempt {
        errors: &[],
        ..forbidden(
            "dumpable",
            "be traced by the same user, dump core",
            "exec",
            |_| match call(libc::SYS_prctl, &[libc::PR_GET_DUMPABLE as usize]) {
                Ok(0) => Outcome::Nothing("it is not dumpable"),
                other => Outcome::Escaped(format!("dumpable is {other:?}")),
            },
        )
    },
    Attempt {
        errors: &[libc::EAGAIN],
        needs: &["threads"],
        ..forbidden("fork-bomb", "fork without end", "cgroup and limits", fork_bomb)
    },
    Attempt {
        errors: &[],
        needs: &["memory"],
        ..forbidden("eat-memory", "use more memory than allowed", "cgroup", eat_memory)
    },
    Attempt {
        errors: &[libc::EACCES, libc::EPERM],
        ..forbidden(
            "priority",
            "take priority over the host (nice -20)",
            "limits",
            |_| {
                refused(call(
                    libc::SYS_setpriority,
                    &[libc::PRIO_PROCESS as usize, 0, -20_isize as usize],
                ))
            },
        )
    },
    forbidden("real-time", "take real-time priority", "limits", |_| {
        let priority = [50_i32];
        refused(call(
            libc::SYS_sched_setscheduler,
            &[0, libc::SCHED_FIFO as usize, priority.as_ptr() as usize],
        ))
    }),
    Attempt {
        errors: &[libc::ENOMEM, libc::EPERM, libc::EAGAIN],
        ..forbidden("lock-memory", "lock memory", "limits", |_| {
            let length = 64 << 20;
            let (protection, flags) = (
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            );
            let mapped = call(
                libc::SYS_mmap,
                &[
                    0,
                    length,
                    protection as usize,
                    flags as usize,
                    -1_isize as usize,
                    0,
                ],
            );
            match mapped {
                Ok(address) => refused(call(libc::SYS_mlock, &[address, length])),
                Err(errno) => Outcome::Refused(errno),
            }
        })
    },
];

/// Children wait, so that they count; they go when this process, number 1 of its namespace, does.
fn fork_bomb(facts: &Facts) -> Outcome {
    let allowed = facts.number("threads");
    for _ in 0..allowed + 64 {
        match call(libc::SYS_fork, &[]) {
            Ok(0) => loop {
                let _ = call(libc::SYS_pause, &[]);
            },
            Ok(_) => {}
            Err(errno) => return Outcome::Refused(errno),
        }
    }
    Outcome::Escaped(format!("more than {allowed} processes run"))
}

/// Touches twice the memory that is allowed. The kernel kills on the way: the driver expects that.
fn eat_memory(facts: &Facts) -> Outcome {
    let length = facts.number("memory") * 2;
    let mut memory = vec![0_u8; length];
    for page in (0..length).step_by(4096) {
        memory[page] = 1;
    }
    std::hint::black_box(&memory);
    Outcome::Escaped(format!("{} MiB are in use", length >> 20))
}
