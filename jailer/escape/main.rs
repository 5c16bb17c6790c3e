//! A program that is executed in the place of a VMM, in exactly its jail, and tries to get out.
//!
//! - `attempt NAME SECCOMP key=value…` tries one way out and writes what it met to descriptor 3.
//! - `hold FD` waits until descriptor FD comes to its end. `listen NAME FD` listens on an abstract socket meanwhile.
//! - `list` prints all attempts by the layers that refuse them.
//! - `exit CODE`, `spin` end at once or never.
//! - `kill-at` kills one process of a chain at one of its system calls (see `killer`).
//! - `drive` and `suite` are the other side: they make the jails, and judge (see `driver` and `suite`).

use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use shoal_jailer::seccomp::{Mode, ThreadKind, install};

mod attempts;
mod driver;
mod killer;
mod suite;
mod victims;

/// Exit code for wrong usage.
const USAGE: i32 = 98;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let word = |index: usize| arguments.get(index).map(String::as_str).unwrap_or_default();
    match word(1) {
        "attempt" => attempt(
            word(2),
            word(3),
            &attempts::Facts::parse(arguments.iter().skip(4).cloned()),
        ),
        "exit" => std::process::exit(word(2).parse().unwrap_or(USAGE)),
        "hold" => wait_for_end(word(2)),
        "listen" => {
            let listener =
                SocketAddr::from_abstract_name(word(2)).and_then(|address| UnixListener::bind_addr(&address));
            // A byte on standard output tells whether it listens.
            print!("{}", if listener.is_ok() { 'y' } else { 'n' });
            let _ = std::io::stdout().flush();
            wait_for_end(word(3));
        }
        "spin" => loop {
            std::hint::spin_loop();
        },
        "kill-at" => finish(killer::run(&arguments[2..])),
        "list" => print!("{}", attempts::table()),
        "drive" => finish(driver::drive(&arguments[2..])),
        "suite" => finish(suite::run(&arguments[2..])),
        _ => {
            eprintln!("usage: shoal-escape suite [UID] | drive [CGROUP] | list");
            std::process::exit(USAGE);
        }
    }
}

fn finish(result: anyhow::Result<bool>) -> ! {
    std::process::exit(match result {
        Ok(true) => 0,
        Ok(false) => 1,
        Err(error) => {
            eprintln!("shoal-escape: {error:#}");
            2
        }
    })
}

/// Reads a descriptor to its end.
fn wait_for_end(number: &str) {
    let Ok(fd) = number.parse() else {
        std::process::exit(USAGE)
    };
    // SAFETY: the driver hands the descriptor over, and nothing else in this process uses it.
    let mut held = unsafe { std::fs::File::from_raw_fd(fd) };
    let mut all = Vec::new();
    let _ = held.read_to_end(&mut all);
}

fn attempt(name: &str, seccomp: &str, facts: &attempts::Facts) {
    let Some(attempt) = attempts::all().find(|attempt| attempt.name == name) else {
        std::process::exit(USAGE);
    };
    // SAFETY: the driver hands descriptor 3 over for the report, and nothing else in this process uses it.
    let mut report = unsafe { std::fs::File::from_raw_fd(3) };
    if let Ok(mode) = seccomp.parse::<Mode>()
        && install(ThreadKind::EventLoop, mode).is_err()
    {
        std::process::exit(USAGE);
    }
    let outcome = match (attempt.run)(facts) {
        attempts::Outcome::Refused(errno) => format!("refused {errno}"),
        attempts::Outcome::Nothing(why) => format!("nothing {why}"),
        attempts::Outcome::Escaped(how) => format!("escaped {how}"),
    };
    let written = report.write_all(outcome.as_bytes());
    // Nothing of the runtime's cleaning up, which the filter might not allow.
    // SAFETY: it ends the process.
    unsafe { libc::_exit(if written.is_ok() { 0 } else { USAGE }) };
}
