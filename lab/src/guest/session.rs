//! Runs the command in a session of its own, carries its streams, and ends everything with it.

use super::{Attempt, GuestError, ports};
use crate::job::{Job, Message, Stdin, port};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};

/// Exit codes of a shell for a program that cannot be started.
const NOT_FOUND: u8 = 127;
const NOT_RUNNABLE: u8 = 126;

/// Runs the job's command to its end. `up` is called just before it starts, with the machine's uptime in ns.
pub fn run(job: &Job, up: impl FnOnce(u64) -> Result<(), GuestError>) -> Result<Message, GuestError> {
    let stdout = ports::open_for_writing(port::STDOUT)?;
    let mut stderr = ports::open_for_writing(port::STDERR)?;
    let (program, arguments) = job.command.split_first().ok_or_else(|| GuestError {
        what: "run the command".into(),
        source: io::Error::new(io::ErrorKind::InvalidInput, "it is empty"),
    })?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(job.env.iter().cloned())
        .current_dir(start_directory(job));
    let (out, err) = connect(&mut command, job.stdin)?;
    up(uptime_ns())?;
    let child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            let text = format!("shoal-lab: cannot run {program}: {error}\n");
            stderr
                .write_all(text.as_bytes())
                .attempt(|| "write to the port of standard error".into())?;
            let code = if error.kind() == io::ErrorKind::NotFound {
                NOT_FOUND
            } else {
                NOT_RUNNABLE
            };
            return Ok(Message::Exit {
                code,
                stdout: 0,
                stderr: text.len() as u64,
            });
        }
    };
    // Our copies of the command's ends go with it, so that the readers see the end.
    drop(command);
    let out = carry(out, stdout);
    let err = err.map(|err| carry(err, stderr));
    let status = wait_for(child.id() as libc::pid_t).attempt(|| "wait for the command".into())?;
    end_everything();
    let total = |thread: JoinHandle<io::Result<u64>>| {
        let result = thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")));
        result.attempt(|| "carry the command's output".into())
    };
    Ok(Message::Exit {
        code: exit_code(status),
        stdout: total(out)?,
        stderr: err.map(total).transpose()?.unwrap_or(0),
    })
}

/// Gives the command its streams and a session of its own. Returns what to read its output and, unless that is on the
/// same terminal, its errors from.
fn connect(command: &mut Command, stdin: Stdin) -> Result<(OwnedFd, Option<OwnedFd>), GuestError> {
    let pipe = || io::pipe().attempt(|| "make a pipe".into());
    match stdin {
        Stdin::Null => drop(command.stdin(Stdio::null())),
        Stdin::Pipe => {
            let (read, write) = pipe()?;
            feed(File::from(OwnedFd::from(write)))?;
            command.stdin(read);
        }
        Stdin::Terminal { rows, columns } => {
            let what = || "make a terminal".to_owned();
            let (ours, theirs) = terminal(rows, columns).attempt(what)?;
            feed(ours.try_clone().attempt(what)?.into())?;
            command.stdin(theirs.try_clone().attempt(what)?);
            command.stdout(theirs.try_clone().attempt(what)?).stderr(theirs);
            own_session(command, true);
            return Ok((ours, None));
        }
    }
    own_session(command, false);
    let ((out_read, out_write), (err_read, err_write)) = (pipe()?, pipe()?);
    command.stdout(out_write).stderr(err_write);
    Ok((out_read.into(), Some(err_read.into())))
}

fn own_session(command: &mut Command, with_terminal: bool) {
    let check = |result| {
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    };
    // SAFETY: setsid and ioctl are async-signal-safe, the ioctl has no pointer argument, and the closure allocates nothing.
    unsafe {
        command.pre_exec(move || {
            check(libc::setsid())?;
            if with_terminal {
                check(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
            }
            Ok(())
        });
    }
}

/// A pseudo terminal: our end and the command's.
fn terminal(rows: u16, columns: u16) -> io::Result<(OwnedFd, OwnedFd)> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let (mut ours, mut theirs) = (-1, -1);
    // SAFETY: the two numbers and the size are valid for the call; no name and no settings are asked for or given.
    let result = unsafe {
        libc::openpty(
            &raw mut ours,
            &raw mut theirs,
            std::ptr::null_mut(),
            std::ptr::null(),
            &raw const size,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // openpty knows nothing of close-on-exec. A command that held our end of its own terminal would never see it hang up.
    // SAFETY: openpty returned these two new descriptors, which nothing else owns.
    unsafe {
        libc::fcntl(ours, libc::F_SETFD, libc::FD_CLOEXEC);
        libc::fcntl(theirs, libc::F_SETFD, libc::FD_CLOEXEC);
        Ok((OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)))
    }
}

/// Starts a thread that writes the host's input to `sink`, until its end.
fn feed(mut sink: File) -> Result<(), GuestError> {
    let mut source = ports::open_for_reading(port::STDIN)?;
    thread::spawn(move || -> io::Result<()> {
        loop {
            let mut length = [0; 4];
            source.read_exact(&mut length)?;
            match u32::from_le_bytes(length) {
                0 => return Ok(()),
                // A command that does not read its input is none of our business.
                length => drop(io::copy(&mut source.by_ref().take(length.into()), &mut sink)?),
            }
        }
    });
    Ok(())
}

/// The host's current directory when it is in this machine too, else root's home.
fn start_directory(job: &Job) -> &str {
    if std::path::Path::new(&job.cwd).is_dir() {
        &job.cwd
    } else {
        "/root"
    }
}

/// Copies until the end of file and counts the bytes.
fn carry(from: OwnedFd, mut to: File) -> JoinHandle<io::Result<u64>> {
    thread::spawn(move || {
        let mut from = File::from(from);
        let mut buffer = vec![0; 32 << 10];
        let mut total = 0;
        loop {
            let count = match from.read(&mut buffer) {
                // A terminal whose other end is closed.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => 0,
                other => other?,
            };
            if count == 0 {
                return Ok(total);
            }
            to.write_all(&buffer[..count])?;
            total += count as u64;
        }
    })
}

/// Waits for `pid`, and buries every other process that ends meanwhile: they are all ours, as process 1.
fn wait_for(pid: libc::pid_t) -> io::Result<ExitStatus> {
    loop {
        let mut status = 0;
        // SAFETY: the status is valid for the call.
        let ended = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        if ended == pid {
            return Ok(ExitStatus::from_raw(status));
        }
        if ended < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

/// Kills all other processes, which closes their ends of our pipes, and writes out what files hold.
fn end_everything() {
    // SAFETY: neither call touches memory of ours; -1 means every process but this one.
    unsafe {
        libc::kill(-1, libc::SIGKILL);
        libc::sync();
    }
}

fn exit_code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(255);
    u8::try_from(code).unwrap_or(255)
}

fn uptime_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the timespec is valid for the call, and CLOCK_MONOTONIC always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_a_shells() {
        assert_eq!(exit_code(ExitStatus::from_raw(0)), 0);
        assert_eq!(exit_code(ExitStatus::from_raw(7 << 8)), 7);
        assert_eq!(exit_code(ExitStatus::from_raw(255 << 8)), 255);
        assert_eq!(exit_code(ExitStatus::from_raw(libc::SIGKILL)), 137);
    }
}
