//! System calls that reach deep into the kernel.

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

const fn seccomp_only(name: &'static str, what: &'static str, run: fn(&Facts) -> Outcome) -> Attempt {
    Attempt {
        name,
        what,
        layer: "seccomp",
        stops: Stops::SeccompOnly,
        errors: &[],
        needs: &[],
        run,
    }
}

fn map(protection: i32) -> Result<usize, i32> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    call(
        libc::SYS_mmap,
        &[0, 4096, protection as usize, flags as usize, -1_isize as usize, 0],
    )
}

/// An ioctl on all descriptors there are.
fn each_descriptor(facts: &Facts, request: usize, argument: usize) -> Outcome {
    let mut last = Outcome::Nothing("no descriptor");
    for fd in 0..facts.number("handed") {
        last = refused(call(libc::SYS_ioctl, &[fd, request, argument]));
        if last != Outcome::Refused(libc::ENOTTY) {
            break;
        }
    }
    last
}

/// The attempts.
pub const ATTEMPTS: &[Attempt] = &[
    forbidden("bpf", "load a BPF program", |_| {
        // mov r0, 0; exit; as a program of type sched_cls.
        let instructions = [0xb7_u64, 0x95];
        let attributes: [u64; 16] = {
            let mut a = [0; 16];
            a[0] = 3 | 2 << 32;
            a[1] = instructions.as_ptr() as u64;
            a[2] = text(c"GPL") as u64;
            a
        };
        refused(call(libc::SYS_bpf, &[5, attributes.as_ptr() as usize, 128]))
    }),
    forbidden("load-module", "load a kernel module", |_| {
        refused(call(libc::SYS_init_module, &[text(c""), 0, text(c"")]))
    }),
    forbidden("load-module-fd", "load a kernel module by descriptor", |_| {
        refused(call(libc::SYS_finit_module, &[0, text(c""), 0]))
    }),
    forbidden("unload-module", "unload a kernel module", |_| {
        refused(call(libc::SYS_delete_module, &[text(c"kvm"), 0]))
    }),
    forbidden("kexec", "load another kernel", |_| {
        refused(call(libc::SYS_kexec_load, &[0, 0, 0, 0]))
    }),
    forbidden("reboot", "reboot the host", |_| {
        // With the second magic number wrong not even root would reboot; the capability is checked before it.
        refused(call(libc::SYS_reboot, &[0xfee1_dead, 1, 0x0123_4567]))
    }),
    forbidden("kernel-log", "read the kernel's log", |_| {
        let mut buffer = [0_u8; 64];
        refused(call(libc::SYS_syslog, &[2, buffer.as_mut_ptr() as usize, 64]))
    }),
    forbidden("clock", "set the host's clock", |_| {
        let time = [0_i64; 2];
        refused(call(
            libc::SYS_clock_settime,
            &[libc::CLOCK_REALTIME as usize, time.as_ptr() as usize],
        ))
    }),
    Attempt {
        errors: &[libc::EPERM, libc::EACCES],
        ..forbidden("swap", "swap to a file", |_| {
            refused(call(libc::SYS_swapon, &[text(c"/swap"), 0]))
        })
    },
    forbidden("io-ports", "reach the host's I/O ports (iopl)", |_| {
        refused(call(libc::SYS_iopl, &[3]))
    }),
    forbidden("io-ports-some", "reach the host's I/O ports (ioperm)", |_| {
        refused(call(libc::SYS_ioperm, &[0x60, 1, 1]))
    }),
    Attempt {
        layer: "descriptors",
        errors: &[libc::ENOTTY],
        ..forbidden(
            "type-terminal",
            "type into the operator's terminal (TIOCSTI)",
            |facts| each_descriptor(facts, libc::TIOCSTI as usize, b"x".as_ptr() as usize),
        )
    },
    Attempt {
        layer: "descriptors",
        errors: &[libc::ENOTTY],
        ..forbidden(
            "steal-terminal",
            "take the operator's terminal over (TIOCSCTTY)",
            |facts| each_descriptor(facts, libc::TIOCSCTTY as usize, 1),
        )
    },
    Attempt {
        layer: "keyring",
        errors: &[libc::ENOKEY, libc::EACCES, libc::EKEYREVOKED],
        needs: &["key"],
        ..forbidden("keyring", "find the daemon's key in the session keyring", |_| {
            const SEARCH: usize = 10;
            let session = -3_isize as usize;
            refused(call(
                libc::SYS_keyctl,
                &[SEARCH, session, text(c"user"), text(c"shoal-test-secret"), 0],
            ))
        })
    },
    Attempt {
        errors: &[libc::EPERM],
        ..forbidden(
            "userfaultfd",
            "stall the kernel by page faults (userfaultfd)",
            |_| refused(call(libc::SYS_userfaultfd, &[0])),
        )
    },
    seccomp_only(
        "userfaultfd-user",
        "handle page faults in user mode (userfaultfd)",
        |_| refused(call(libc::SYS_userfaultfd, &[1])),
    ),
    seccomp_only("io-uring", "go around seccomp by io_uring", |_| {
        let parameters = [0_u32; 32];
        refused(call(libc::SYS_io_uring_setup, &[8, parameters.as_ptr() as usize]))
    }),
    seccomp_only("perf", "watch the processor (perf_event_open)", |_| {
        let attributes = [0_u64; 16];
        refused(call(
            libc::SYS_perf_event_open,
            &[
                attributes.as_ptr() as usize,
                0,
                -1_isize as usize,
                -1_isize as usize,
                0,
            ],
        ))
    }),
    seccomp_only("executable-memory", "map executable memory", |_| {
        refused(map(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC))
    }),
    seccomp_only(
        "make-executable",
        "make written memory executable (mprotect)",
        |_| match map(libc::PROT_READ | libc::PROT_WRITE) {
            Ok(page) => {
                let protection = libc::PROT_READ | libc::PROT_EXEC;
                refused(call(libc::SYS_mprotect, &[page, 4096, protection as usize]))
            }
            Err(errno) => Outcome::Refused(errno),
        },
    ),
    seccomp_only(
        "program-in-memory",
        "make a program in memory and execute it (memfd_create)",
        |_| refused(call(libc::SYS_memfd_create, &[text(c"x"), 0])),
    ),
    seccomp_only("fork", "make another process", |_| {
        match call(libc::SYS_fork, &[]) {
            Ok(0) => std::process::exit(0),
            other => refused(other),
        }
    }),
    seccomp_only(
        "create-vm",
        "make another virtual machine (KVM_CREATE_VM)",
        |_| refused(call(libc::SYS_ioctl, &[3, 0xae01, 0])),
    ),
    seccomp_only("attach-tap", "attach the TAP elsewhere (TUNSETIFF)", |_| {
        refused(call(libc::SYS_ioctl, &[3, 0x4004_54ca, 0]))
    }),
    seccomp_only("lift-filter", "put a filter of one's own over the filter", |_| {
        refused(call(libc::SYS_seccomp, &[1, 0, 0]))
    }),
    seccomp_only(
        "old-entry",
        "use the 32-bit entry of the kernel (int 0x80)",
        |_| {
            let answer: u32;
            // SAFETY: getpid (20) of the 32-bit entry takes nothing; the registers that entry may change are declared.
            unsafe {
                std::arch::asm!("int 0x80", inlateout("eax") 20_u32 => answer,
                lateout("r8") _, lateout("r9") _, lateout("r10") _, lateout("r11") _);
            }
            Outcome::Escaped(format!("it answered {answer}"))
        },
    ),
    seccomp_only("x32-entry", "use the x32 numbers of system calls", |_| {
        const X32: libc::c_long = 0x4000_0000;
        refused(call(X32 | libc::SYS_getpid, &[]))
    }),
];
