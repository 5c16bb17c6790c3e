//! Kills a process of a chain at its Nth system call, for tests that enumerate every step of a start and of an end.
//!
//! The command and all that comes from it are traced (PTRACE_SEIZE), so that at the end there is proof that no process is
//! left: the kernel says that nobody is traced any more. Nobody waits for a moment that might come too early or too late.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use shoal_jailer::seccomp::policy::number_of;

/// How long the processes that remain may do nothing before they count as left.
const PATIENCE: Duration = Duration::from_secs(20);

/// What to do, and to whom.
struct Order {
    /// The process to kill, in the order of their making; 0 is the command itself.
    victim: usize,
    /// At which of its system calls, from 1.
    call: u64,
    /// The victim's calls count once one of this number has returned.
    after: Option<i64>,
    /// Let the others go when the victim is dead, instead of waiting for their ends.
    leave: bool,
    /// The command runs as this user and group.
    user: Option<u32>,
    command: Vec<String>,
}

/// `kill-at VICTIM CALL [--after SYSCALL] [--leave] [--user UID] -- COMMAND…`: prints `killed CALL` with the system call's
/// name, or `passed` when the victim made fewer, how many processes there were, and the exit status of the command. Gives
/// whether it was killed.
pub fn run(arguments: &[String]) -> Result<bool> {
    let order = parse(arguments)?;
    let mut chain = Chain::start(&order)?;
    let name = chain.follow()?;
    let killed = match name {
        Some(name) => format!("killed {name}"),
        None => "passed".to_owned(),
    };
    let (processes, status) = (chain.processes.len(), chain.status.unwrap_or(-1));
    println!("{killed}, processes {processes}, status {status}");
    Ok(name.is_some())
}

fn parse(arguments: &[String]) -> Result<Order> {
    let split = arguments
        .iter()
        .position(|word| word == "--")
        .context("-- is missing")?;
    let (options, command) = (&arguments[..split], arguments[split + 1..].to_vec());
    let mut words = options.iter().map(String::as_str);
    let mut number = |what| -> Result<u64> { words.next().unwrap_or_default().parse().context(what) };
    let (victim, call) = (number("VICTIM")? as usize, number("CALL")?);
    let mut order = Order {
        victim,
        call,
        after: None,
        leave: false,
        user: None,
        command,
    };
    while let Some(word) = words.next() {
        match word {
            "--after" => {
                order.after = Some(words.next().and_then(number_of).context("--after SYSCALL")?);
            }
            "--user" => order.user = Some(words.next().unwrap_or_default().parse().context("--user UID")?),
            "--leave" => order.leave = true,
            other => bail!("{other:?} is no option"),
        }
    }
    Ok(order)
}

/// The traced processes.
struct Chain<'a> {
    order: &'a Order,
    main: libc::pid_t,
    /// Threads that are traced, with their processes.
    threads: BTreeMap<libc::pid_t, libc::pid_t>,
    /// Processes in the order of their making.
    processes: Vec<libc::pid_t>,
    /// Whether the victim's calls count already, and how many there were.
    counting: bool,
    calls: u64,
    killed: Option<&'static str>,
    /// Exit code of the command, or 128 and its signal.
    status: Option<i32>,
}

impl<'a> Chain<'a> {
    fn start(order: &'a Order) -> Result<Chain<'a>> {
        // It stops itself, so that it is traced from its exec on.
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", "kill -STOP $$; exec \"$0\" \"$@\""])
            .args(&order.command);
        if let Some(user) = order.user {
            command.uid(user).gid(user);
        }
        let main = command.spawn().context("starting the command")?.id() as libc::pid_t;
        let mut status = 0;
        // SAFETY: a child of ours, and an int for the status.
        let stopped = unsafe { libc::waitpid(main, &raw mut status, libc::WUNTRACED) } == main;
        if !stopped || !libc::WIFSTOPPED(status) {
            bail!("the command ended before it began");
        }
        let options = libc::PTRACE_O_TRACESYSGOOD
            | libc::PTRACE_O_TRACEFORK
            | libc::PTRACE_O_TRACEVFORK
            | libc::PTRACE_O_TRACECLONE
            | libc::PTRACE_O_TRACEEXEC
            | if order.leave { 0 } else { libc::PTRACE_O_EXITKILL };
        ptrace(libc::PTRACE_SEIZE, main, 0, options as usize).context("tracing the command")?;
        // SAFETY: a child of ours that has not been waited for.
        unsafe { libc::kill(main, libc::SIGCONT) };
        Ok(Chain {
            order,
            main,
            threads: BTreeMap::from([(main, main)]),
            processes: vec![main],
            counting: false,
            calls: 0,
            killed: None,
            status: None,
        })
    }

    /// Lets them run until none is left, or with `--leave` until the victim is dead. Gives the call that it died at.
    fn follow(&mut self) -> Result<Option<&'static str>> {
        let mut last = Instant::now();
        loop {
            let mut status = 0;
            let flags = libc::__WALL | libc::__WNOTHREAD | libc::WNOHANG;
            // SAFETY: an int for the status.
            match unsafe { libc::waitpid(-1, &raw mut status, flags) } {
                0 if last.elapsed() > PATIENCE => bail!("left are {}", self.names()),
                0 => {
                    std::thread::yield_now();
                    continue;
                }
                pid @ 1.. => self.event(pid, status)?,
                _ if io::Error::last_os_error().raw_os_error() == Some(libc::ECHILD) => {
                    return Ok(self.killed);
                }
                _ => return Err(io::Error::last_os_error()).context("waiting for a traced process"),
            }
            if self.order.leave && self.killed.is_some() && !self.is_traced(self.victim()) {
                self.let_go()?;
                return Ok(self.killed);
            }
            last = Instant::now();
        }
    }

    fn victim(&self) -> libc::pid_t {
        self.processes.get(self.order.victim).copied().unwrap_or(-1)
    }

    fn is_traced(&self, process: libc::pid_t) -> bool {
        self.threads.values().any(|of| *of == process)
    }

    fn event(&mut self, pid: libc::pid_t, status: i32) -> Result<()> {
        if !libc::WIFSTOPPED(status) {
            self.threads.remove(&pid);
            if pid == self.main {
                self.status = Some(match libc::WIFEXITED(status) {
                    true => libc::WEXITSTATUS(status),
                    false => 128 + libc::WTERMSIG(status),
                });
            }
            return Ok(());
        }
        self.know(pid);
        let (signal, event) = (libc::WSTOPSIG(status), status >> 16);
        match event {
            libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK | libc::PTRACE_EVENT_CLONE => {
                let mut made: libc::c_ulong = 0;
                // It fails when the maker was killed meanwhile; the made one reports itself.
                if ptrace(libc::PTRACE_GETEVENTMSG, pid, 0, &raw mut made as usize).is_ok() {
                    self.know(made as libc::pid_t);
                }
            }
            libc::PTRACE_EVENT_EXEC if pid == self.main && self.order.after.is_none() => self.counting = true,
            libc::PTRACE_EVENT_EXEC if self.order.victim > 0 => self.counting = true,
            _ => {}
        }
        let of_victim = self.threads.get(&pid) == Some(&self.victim());
        if of_victim && signal == libc::SIGTRAP | 0x80 {
            self.system_call(pid);
        }
        // Stops of ptrace's own are no signals to deliver.
        let own = event != 0 || signal == libc::SIGTRAP | 0x80;
        let how = match of_victim && self.killed.is_none() {
            true => libc::PTRACE_SYSCALL,
            false => libc::PTRACE_CONT,
        };
        // It fails when the process was killed meanwhile: its end is reported next.
        let _ = ptrace(how, pid, 0, if own { 0 } else { signal as usize });
        Ok(())
    }

    /// Takes a thread in, and its process when it is new.
    fn know(&mut self, thread: libc::pid_t) {
        if self.threads.contains_key(&thread) {
            return;
        }
        let text = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
        let group = text
            .lines()
            .find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok());
        // Gone already: a process of its own, for all that matters.
        let process = group.unwrap_or(thread);
        self.threads.insert(thread, process);
        if !self.processes.contains(&process) {
            self.processes.push(process);
        }
    }

    /// The victim is about to make a system call, or has made one.
    fn system_call(&mut self, pid: libc::pid_t) {
        const ENTRY: u8 = 1;
        const EXIT: u8 = 2;
        // SAFETY: plain data for which zeroes are valid.
        let mut info: libc::ptrace_syscall_info = unsafe { std::mem::zeroed() };
        let (size, place) = (size_of_val(&info), &raw mut info as usize);
        if ptrace(libc::PTRACE_GET_SYSCALL_INFO, pid, size, place).is_err() {
            return;
        }
        // SAFETY: plain data for which zeroes are valid.
        let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        if ptrace(libc::PTRACE_GETREGS, pid, 0, &raw mut registers as usize).is_err() {
            return;
        }
        let number = registers.orig_rax as i64;
        match info.op {
            EXIT if self.order.after == Some(number) => self.counting = true,
            ENTRY if self.counting => {
                self.calls += 1;
                if self.calls == self.order.call && self.killed.is_none() {
                    // SAFETY: a traced process, stopped: the number is its own.
                    unsafe { libc::kill(self.victim(), libc::SIGKILL) };
                    self.killed = Some(shoal_jailer::seccomp::syscall_name(number).unwrap_or("unknown"));
                }
            }
            _ => {}
        }
    }

    /// Stops tracing those that are left, wherever they are.
    fn let_go(&mut self) -> Result<()> {
        for thread in self.threads.keys() {
            // It fails for those that have just ended.
            let _ = ptrace(libc::PTRACE_INTERRUPT, *thread, 0, 0);
        }
        let begun = Instant::now();
        while !self.threads.is_empty() {
            let mut status = 0;
            let flags = libc::__WALL | libc::__WNOTHREAD | libc::WNOHANG;
            // SAFETY: an int for the status.
            match unsafe { libc::waitpid(-1, &raw mut status, flags) } {
                pid @ 1.. => {
                    self.know(pid);
                    self.threads.remove(&pid);
                    let own = status >> 16 != 0 || libc::WSTOPSIG(status) == libc::SIGTRAP | 0x80;
                    let signal = if own { 0 } else { libc::WSTOPSIG(status) };
                    if libc::WIFSTOPPED(status) {
                        // As above.
                        let _ = ptrace(libc::PTRACE_DETACH, pid, 0, signal as usize);
                    }
                }
                0 if begun.elapsed() > PATIENCE => bail!("{} do not stop", self.names()),
                0 => std::thread::yield_now(),
                _ => break,
            }
        }
        Ok(())
    }

    fn names(&self) -> String {
        let name = |process: &libc::pid_t| {
            let name = std::fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
            format!("{} ({process})", name.trim())
        };
        let left = self.processes.iter().filter(|process| self.is_traced(**process));
        left.map(name).collect::<Vec<_>>().join(", ")
    }
}

/// One request on a thread.
fn ptrace(request: libc::c_uint, thread: libc::pid_t, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: the callers pass numbers, or addresses of live objects of the type that the request writes.
    match unsafe { libc::ptrace(request, thread, address, data) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
