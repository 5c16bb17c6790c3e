//! `shoal-vmm`: one process, one guest. Started by the host, which talks to it over an inherited socket.

// The usual start of a Rust program asks for the stack's bounds in /proc/self/maps and gives each thread a second stack
// for a handler of stack overflows, which this process does without: a quarter of its system calls before the guest runs.
#![cfg_attr(not(test), no_main)]

use std::os::fd::{FromRawFd, OwnedFd};

use shoal_seccomp::Mode;
use shoal_vmm::control::{Vmm, chain};

const HELP: &str = "\
shoal-vmm runs one guest. The host (shoald, or a program that embeds shoal-host) starts it and tells it over its
control socket what to run; it is not meant to be typed.

Usage: shoal-vmm --control-fd FD [--guest-id ID] [--seccomp MODE]

Options:
  --control-fd FD   An inherited Unix seqpacket socket: a listening one is accepted from whenever a host connects,
                    the end of a connected one ends the guest
  --guest-id ID     Stands in log lines until the configuration has come
  --seccomp MODE    What becomes of system calls that a VMM has no need of, from the guest's first instruction on:
                    kill (the default) ends the process; log writes them to the kernel's log and off allows them, both
                    for debugging only; trace stops at each call for `shoal-jailer trace`
  --version         Prints the version and the version of the control protocol
  --help            Prints this

Exit codes: 0 the guest powered off, 64 it reset, 65 triple fault, 66 KVM could not go on, 67 killed by the host,
1 the VMM itself failed, 2 wrong usage. SIGSYS ends it for a forbidden system call, SIGILL for a bug.
";

struct Arguments {
    control_fd: i32,
    guest_id: String,
    seccomp: Mode,
}

enum Parsed {
    Run(Arguments),
    Print(String),
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Parsed, String> {
    let (mut control_fd, mut guest_id, mut seccomp) = (None, String::from("-"), Mode::Kill);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--control-fd" => {
                let text = value()?;
                let fd: i32 = text
                    .parse()
                    .map_err(|_| format!("--control-fd: {text:?} is no number"))?;
                // 0 is fine: a parent that passes the socket as standard input needs no unsafe code for it.
                if fd < 0 || fd == 1 || fd == 2 {
                    return Err(format!(
                        "--control-fd: {fd} is an output stream, no inherited socket"
                    ));
                }
                control_fd = Some(fd);
            }
            "--guest-id" => guest_id = value()?,
            "--seccomp" => seccomp = value()?.parse().map_err(|e| format!("--seccomp: {e}"))?,
            "--help" | "-h" => return Ok(Parsed::Print(HELP.into())),
            "--version" | "-V" => {
                let (version, protocol) = (env!("CARGO_PKG_VERSION"), shoal_vmm::protocol::VERSION);
                return Ok(Parsed::Print(format!(
                    "shoal-vmm {version} (control protocol {protocol})\n"
                )));
            }
            other => return Err(format!("unknown argument {other:?}; --help lists them")),
        }
    }
    let control_fd = control_fd.ok_or("--control-fd is missing; --help explains it")?;
    Ok(Parsed::Run(Arguments {
        control_fd,
        guest_id,
        seccomp,
    }))
}

/// Whether the standard streams are open. Otherwise a descriptor that the host sends would become one of them, and a log
/// line be written into a guest's disk.
fn streams_are_open() -> bool {
    let mut streams = [0, 1, 2].map(|fd| libc::pollfd {
        fd,
        events: 0,
        revents: 0,
    });
    // SAFETY: the array is valid for its length; a timeout of 0 does not wait.
    let polled = unsafe { libc::poll(streams.as_mut_ptr(), streams.len() as libc::nfds_t, 0) };
    polled >= 0 && streams.iter().all(|s| s.revents & libc::POLLNVAL == 0)
}

/// The program, called by the C runtime; the standard library has the arguments from there, too.
// SAFETY: no other function of this program has the name, and the signature is the one that the C runtime calls.
#[cfg_attr(not(test), unsafe(no_mangle))]
#[cfg_attr(test, allow(dead_code, reason = "the test program has a main of its own"))]
extern "C" fn main(_count: libc::c_int, _arguments: *const *const libc::c_char) -> libc::c_int {
    shoal_vmm::harden::process();
    if !streams_are_open() {
        // Nowhere to say why.
        return 2;
    }
    let arguments = match parse(std::env::args().skip(1)) {
        Ok(Parsed::Run(arguments)) => arguments,
        Ok(Parsed::Print(text)) => {
            print!("{text}");
            return 0;
        }
        Err(message) => {
            eprintln!("shoal-vmm: {message}");
            return 2;
        }
    };
    // SAFETY: fcntl with an integer argument touches no memory; it tells whether the descriptor is open.
    if unsafe { libc::fcntl(arguments.control_fd, libc::F_GETFD) } < 0 {
        eprintln!(
            "shoal-vmm: --control-fd: descriptor {} is not open",
            arguments.control_fd
        );
        return 2;
    }
    // SAFETY: it is open, none of the output streams, and nothing else in this process knows it yet.
    let control = unsafe { OwnedFd::from_raw_fd(arguments.control_fd) };
    if matches!(arguments.seccomp, Mode::Log | Mode::Off) {
        eprintln!(
            "guest={} WARNING: --seccomp {}: nothing keeps this VMM, if its guest takes it over, from using all of the kernel",
            arguments.guest_id, arguments.seccomp
        );
    }
    let ended = Vmm::new(arguments.guest_id, control, arguments.seccomp).and_then(Vmm::serve);
    let code = match ended {
        Ok(reason) => reason.exit_code(),
        Err(e) => {
            eprintln!("shoal-vmm: {}", chain(&e));
            1
        }
    };
    // SAFETY: ends the process at once. Nothing is buffered, and exit handlers would need system calls that no filter
    // allows.
    unsafe { libc::_exit(code) }
}
