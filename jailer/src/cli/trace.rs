//! Which lines of the policies do the VMMs below a command use?
//!
//! In [`shoal_jailer::seccomp::Mode::Trace`] a filter stops every system call for the tracer and tells it the kind of
//! thread (SECCOMP_RET_TRACE, PTRACE_EVENT_SECCOMP). The tracer reads number and arguments, and finds the line of the
//! policy that allows them. So what is counted begins where the filter of production begins, thread by thread, and
//! nothing else is slowed down.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::Args;
use shoal_jailer::seccomp::policy::{Rule, parse};
use shoal_jailer::seccomp::{ThreadKind, syscall_name, traced_kind};

/// Arguments of `trace`.
#[derive(Args)]
pub struct TraceArguments {
    /// File that the counts are appended to
    #[arg(long, short)]
    output: PathBuf,
    /// The command and its arguments
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// How often each line was used, or which call no line allows.
type Counts = BTreeMap<(&'static str, String), u64>;

/// The kind of a stop (status >> 16 of a stopped tracee; linux/ptrace.h).
const EVENT_SECCOMP: i32 = libc::PTRACE_EVENT_SECCOMP;

/// Runs the command to its end; its exit code is ours.
pub fn trace(arguments: &TraceArguments) -> Result<ExitCode> {
    let policies: Vec<(ThreadKind, Vec<Rule>)> = ThreadKind::ALL
        .into_iter()
        .map(|kind| parse(kind.policy()).map(|rules| (kind, rules)))
        .collect::<Result<_, _>>()?;
    let main = start(&arguments.command)?;
    let mut counts = Counts::new();
    let code = follow(main, &policies, &mut counts)?;
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&arguments.output)
        .context("opening the output")?;
    let mut text = String::new();
    for ((kind, what), count) in &counts {
        text.push_str(&format!("{kind}\t{what}\t{count}\n"));
    }
    file.write_all(text.as_bytes()).context("writing the output")?;
    Ok(ExitCode::from(code))
}

/// Starts the command, stopped at its exec, with all that come from it traced too.
fn start(command: &[OsString]) -> Result<libc::pid_t> {
    let mut child = Command::new(&command[0]);
    child.args(&command[1..]);
    // SAFETY: one system call in the child, without any pointer to memory.
    unsafe {
        child.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        });
    }
    let child = child
        .spawn()
        .with_context(|| format!("starting {}", command[0].display()))?;
    let pid = child.id() as libc::pid_t;
    let (stopped, _) = wait(pid)?.context("the command ended before it began")?;
    let options = libc::PTRACE_O_TRACESECCOMP
        | libc::PTRACE_O_TRACEFORK
        | libc::PTRACE_O_TRACEVFORK
        | libc::PTRACE_O_TRACECLONE
        | libc::PTRACE_O_TRACEEXEC
        | libc::PTRACE_O_EXITKILL;
    // SAFETY: a stopped tracee, and options, which are a number.
    if unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, stopped, 0, options) } < 0 {
        return Err(io::Error::last_os_error()).context("tracing the command");
    }
    resume(stopped, 0);
    Ok(pid)
}

/// Lets all tracees run until none is left; the exit code is that of `main`.
fn follow(main: libc::pid_t, policies: &[(ThreadKind, Vec<Rule>)], counts: &mut Counts) -> Result<u8> {
    let mut code = 125;
    while let Some((pid, status)) = wait(-1)? {
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            if pid == main {
                code = if libc::WIFEXITED(status) {
                    libc::WEXITSTATUS(status) as u8
                } else {
                    128 | libc::WTERMSIG(status) as u8
                };
            }
            continue;
        }
        let (signal, event) = (libc::WSTOPSIG(status), status >> 16);
        if event == EVENT_SECCOMP {
            count(pid, policies, counts);
        }
        // Stops of ptrace's own, and the first stop of a new tracee, are no signals to deliver.
        let own = event != 0 || signal == libc::SIGSTOP;
        resume(pid, if own { 0 } else { signal });
    }
    Ok(code)
}

/// Waits for a tracee; none when there is none any more.
fn wait(pid: libc::pid_t) -> Result<Option<(libc::pid_t, i32)>> {
    loop {
        let mut status = 0;
        // SAFETY: an int for the status.
        let got = unsafe { libc::waitpid(pid, &mut status, libc::__WALL) };
        if got > 0 {
            return Ok(Some((got, status)));
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::ECHILD) => return Ok(None),
            Some(libc::EINTR) => {}
            _ => return Err(error).context("waiting for a traced process"),
        }
    }
}

fn resume(pid: libc::pid_t, signal: i32) {
    // SAFETY: a tracee and a signal's number. It fails when the tracee was killed meanwhile: its end is reported next.
    unsafe { libc::ptrace(libc::PTRACE_CONT, pid, 0, signal) };
}

/// Finds the line that allows the call that a tracee is about to make.
fn count(pid: libc::pid_t, policies: &[(ThreadKind, Vec<Rule>)], counts: &mut Counts) {
    let mut data: libc::c_ulong = 0;
    // SAFETY: plain data for which zeroes are valid.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    // SAFETY: a stopped tracee, and room for what is asked.
    let known = unsafe {
        libc::ptrace(libc::PTRACE_GETEVENTMSG, pid, 0, &raw mut data) == 0
            && libc::ptrace(libc::PTRACE_GETREGS, pid, 0, &raw mut registers) == 0
    };
    let (true, Some(kind)) = (known, traced_kind(data)) else {
        return;
    };
    let r = &registers;
    let (number, arguments) = (r.orig_rax as i64, [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9]);
    let rules = policies
        .iter()
        .find(|(known, _)| *known == kind)
        .map_or(&[][..], |(_, rules)| rules);
    let name = syscall_name(number).unwrap_or("unknown");
    let what = match rules.iter().find(|rule| rule.allows(number, &arguments)) {
        Some(rule) => format!("{}", super::report::Key::of(rule)),
        None => {
            let [a, b, c, d, ..] = arguments;
            format!("! {name} {a:#x} {b:#x} {c:#x} {d:#x}")
        }
    };
    *counts.entry((kind.name(), what)).or_default() += 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_s_exit_code_is_given() {
        let output = std::env::temp_dir().join(format!("shoal-trace-{}", std::process::id()));
        let command = |text: &str| ["/bin/sh", "-c", text].map(OsString::from).to_vec();
        let run = |text| {
            let arguments = TraceArguments {
                output: output.clone(),
                command: command(text),
            };
            format!("{:?}", trace(&arguments).unwrap())
        };
        assert_eq!(run("(exit 3); exit 7"), format!("{:?}", ExitCode::from(7)));
        assert_eq!(run("kill -TERM $$"), format!("{:?}", ExitCode::from(143)));
        assert_eq!(std::fs::read_to_string(&output).unwrap(), "");
        std::fs::remove_file(&output).unwrap();
    }
}
