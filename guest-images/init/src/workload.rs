//! The program that the guest is for.

use crate::cmdline::Config;
use crate::sys;
use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::process::Command;

/// Run when the command line names none.
const DEFAULT: &str = "/etc/shoal/workload";
const SHELL: &str = "/bin/sh";
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A workload that runs.
pub struct Workload {
    /// Its process, the leader of its own session and process group.
    pub pid: i32,
    /// Whether it is the interactive shell, which ends at a hang-up and not at SIGTERM.
    pub shell: bool,
}

/// Starts it. The error names the program.
pub fn start(config: &Config) -> Result<Workload, (String, io::Error)> {
    let (program, shell) = match &config.program {
        Some(program) => (program.as_str(), false),
        None if Path::new(DEFAULT).exists() => (DEFAULT, false),
        None => (SHELL, true),
    };
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", "/root")
        .env("TERM", "linux");
    command
        .envs(config.environment.iter().map(|(name, value)| (name, value)))
        .args(&config.arguments);
    if shell {
        use_terminal(&mut command);
    }
    sys::own_session(&mut command, shell);
    let child = command.spawn().map_err(|e| (program.to_owned(), e))?;
    Ok(Workload {
        pid: child.id() as i32,
        shell,
    })
}

/// `/dev/console` cannot be a controlling terminal, but the terminal behind it can.
fn use_terminal(command: &mut Command) {
    let Ok(active) = std::fs::read_to_string("/sys/class/tty/console/active") else {
        return;
    };
    let Some(name) = active.split_whitespace().last() else {
        return;
    };
    let Ok(tty) = OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/dev/{name}"))
    else {
        return;
    };
    if let (Ok(second), Ok(third)) = (tty.try_clone(), tty.try_clone()) {
        command.stdin(tty).stdout(second).stderr(third);
    }
}
