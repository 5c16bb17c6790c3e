//! Starts shoal-escape in jails, once per attempt without seccomp and once with it, and judges what it met.

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use shoal_jailer::{
    Executable, Exit, HandOver, IdRange, Ids, Jail, JailSpec, Jailer, JailerConfig, KillLog, Mode, Rlimits,
    cgroup,
};

use crate::attempts::{self, Attempt, Stops};
use crate::victims::Victims;

/// Ids that the guests of this test run as.
const FIRST_ID: u32 = 3_210_000;
/// Threads that a jail may have.
const THREADS: u32 = 24;
/// Bytes of memory that a jail may use.
const MEMORY: u64 = 48 << 20;
/// How long an attempt may take. Most take a millisecond; this is for slow emulated machines.
const PATIENCE: Duration = Duration::from_secs(60);

/// Counts of verdicts.
#[derive(Default)]
struct Tally {
    passed: u32,
    failed: u32,
    skipped: u32,
}

impl Tally {
    fn pass(&mut self, line: &str) {
        self.passed += 1;
        println!("{line}");
    }

    fn fail(&mut self, line: &str) {
        self.failed += 1;
        println!("FAILED {line}");
    }

    fn skip(&mut self, line: &str) {
        self.skipped += 1;
        println!("skipped {line}");
    }
}

/// What became of an attempt.
struct Ended {
    exit: Exit,
    /// What it wrote.
    report: String,
    /// The kernel killed it for its memory.
    out_of_memory: bool,
    /// The system call that a filter killed it for.
    forbidden: Option<&'static str>,
}

/// The driver's tools.
struct Driver {
    jailer: Jailer,
    program: Executable,
    victims: Victims,
    kills: Option<KillLog>,
    facts: Vec<String>,
}

/// Makes all attempts. Gives whether all were refused.
pub fn drive(arguments: &[String]) -> Result<bool> {
    let mut driver = Driver::new(arguments.first().map(PathBuf::from))?;
    let mode = driver.jailer.mode();
    println!("attempts from a jail made by {mode:?}");
    let mut tally = Tally::default();
    for lack in driver.jailer.degradations() {
        println!("lacking {lack}");
    }
    for lack in &driver.victims.missing {
        println!("lacking {lack}");
    }
    let (hold, neighbour) = driver.neighbour()?;
    for attempt in attempts::all() {
        if let Some(fact) = attempt.needs.iter().find(|fact| !driver.knows(fact)) {
            tally.skip(&format!("{}: this machine has no {fact} to attack", attempt.what));
            continue;
        }
        if attempt.stops != Stops::SeccompOnly {
            let ended = driver.run(attempt, "off")?;
            judge(attempt, &ended, false, &mut tally);
        }
        let ended = driver.run(attempt, "kill")?;
        judge(attempt, &ended, true, &mut tally);
    }
    driver.terminal(&mut tally);
    drop(hold);
    neighbour.wait()?;
    neighbour.destroy()?;
    driver.nothing_left(&mut tally)?;
    let Tally {
        passed,
        failed,
        skipped,
    } = tally;
    let skipped = if skipped > 0 {
        format!(", {skipped} skipped")
    } else {
        String::new()
    };
    println!("{passed} passed, {failed} failed{skipped}");
    Ok(failed == 0)
}

impl Driver {
    fn new(cgroup_parent: Option<PathBuf>) -> Result<Driver> {
        let victims = Victims::new()?;
        let program = Executable::from_file(&mut File::open("/proc/self/exe")?, Path::new("/proc/self/exe"))?;
        let jailer = Jailer::new(&JailerConfig {
            mode: Mode::detect(),
            uids: IdRange::new(FIRST_ID, 16)?,
            gids: IdRange::new(FIRST_ID, 16)?,
            cgroup_parent,
            missing_controllers: cgroup::Missing::Report,
        })?;
        let mut facts = victims.facts.clone();
        // Standard streams and the report.
        facts.push("handed=4".to_owned());
        facts.push(format!("other-uid={}", FIRST_ID + 1));
        let lacks = |what: &str| {
            jailer
                .degradations()
                .iter()
                .any(|lack| lack.what == what || lack.what == "cgroup")
        };
        if !lacks("cgroup memory limit") {
            facts.push(format!("memory={MEMORY}"));
        }
        // Without the cgroup's limit, that of the guest's own user holds.
        if jailer.mode() == Mode::Root || !lacks("cgroup pids limit") {
            facts.push(format!("threads={THREADS}"));
        }
        let kills = KillLog::open();
        if let Err(lack) = &kills {
            println!("lacking {lack}");
        }
        Ok(Driver {
            jailer,
            program,
            victims,
            kills: kills.ok(),
            facts,
        })
    }

    fn knows(&self, fact: &str) -> bool {
        self.facts
            .iter()
            .any(|known| known.strip_prefix(fact).is_some_and(|rest| rest.starts_with('=')))
    }

    fn spawn(&self, id: &str, uid: u32, argv: &[&str], fds: &[HandOver<'_>]) -> Result<Jail> {
        let argv: Vec<CString> = argv
            .iter()
            .map(|word| CString::new(*word))
            .collect::<Result<_, _>>()?;
        let limits = cgroup::Limits {
            memory_max: Some(MEMORY),
            pids_max: Some(THREADS),
            ..cgroup::Limits::default()
        };
        let spec = JailSpec {
            id: &id.parse()?,
            ids: Ids::new(uid, uid)?,
            argv: &argv,
            fds,
            limits: &limits,
            rlimits: Rlimits {
                threads: u64::from(THREADS),
                ..Rlimits::default()
            },
            oom_score_adj: Some(500),
            core_scheduling: false,
            die_with_parent: true,
        };
        self.jailer
            .spawn(&self.program, &spec)
            .with_context(|| format!("jailing {argv:?}"))
    }

    /// Another guest's VMM. It lives until the pipe is dropped.
    fn neighbour(&mut self) -> Result<(std::io::PipeWriter, Jail)> {
        let (held, hold) = std::io::pipe()?;
        let (mut answer, answered) = std::io::pipe()?;
        let name = format!("shoal-neighbour-{}", std::process::id());
        let fds = [
            HandOver {
                fd: answered.as_fd(),
                target: 1,
            },
            HandOver {
                fd: held.as_fd(),
                target: 3,
            },
        ];
        let jail = self.spawn(
            "neighbour",
            FIRST_ID + 1,
            &["shoal-escape", "listen", &name, "3"],
            &fds,
        )?;
        drop(answered);
        let mut listens = [0];
        answer
            .read_exact(&mut listens)
            .context("waiting for the neighbour")?;
        ensure!(
            listens == *b"y",
            "the neighbour cannot listen on an abstract socket"
        );
        self.facts.push(format!("neighbour={}", jail.pid));
        self.facts.push(format!("neighbour-abstract={name}"));
        Ok((hold, jail))
    }

    /// Makes one attempt in a jail of its own.
    fn run(&mut self, attempt: &Attempt, seccomp: &str) -> Result<Ended> {
        let (mut report, reported) = std::io::pipe()?;
        let fds = [HandOver {
            fd: reported.as_fd(),
            target: 3,
        }];
        let mut argv = vec!["shoal-escape", "attempt", attempt.name, seccomp];
        let leaf = self
            .jailer
            .cgroup()
            .map(|parent| format!("leaf={}/shoal-attempt", parent.path().display()));
        argv.extend(self.facts.iter().map(String::as_str));
        argv.extend(leaf.as_deref());
        let jail = self.spawn("attempt", FIRST_ID, &argv, &fds)?;
        drop(reported);
        let ended = wait(&jail, PATIENCE);
        let out_of_memory = out_of_memory(&jail);
        let pid = jail.pid;
        let exit = jail.destroy()?;
        ended.with_context(|| format!("{} did not end", attempt.name))?;
        let exit = exit.context("the end of an attempt was not seen")?;
        let mut text = String::new();
        report.read_to_string(&mut text)?;
        let mut forbidden = None;
        if exit == Exit::Signal(libc::SIGSYS)
            && let Some(kills) = &mut self.kills
        {
            forbidden = kills.find(pid, Duration::from_secs(2)).map(|kill| kill.name());
        }
        Ok(Ended {
            exit,
            report: text,
            out_of_memory,
            forbidden,
        })
    }

    /// Tries to hand a terminal over to a jail.
    fn terminal(&self, tally: &mut Tally) {
        let what = "hand a terminal over to the jail";
        let Some(terminal) = &self.victims.terminal else {
            return tally.skip(&format!("{what}: this machine has no /dev/ptmx"));
        };
        let fds = [HandOver {
            fd: terminal.as_fd(),
            target: 3,
        }];
        match self.spawn("terminal", FIRST_ID, &["shoal-escape", "exit", "0"], &fds) {
            Ok(jail) => {
                let ended = jail.destroy();
                tally.fail(&format!("{what}: the jail was made, {ended:?}"));
            }
            Err(_) => tally.pass(&format!("{what}: refused by descriptors")),
        }
    }

    /// Checks that no cgroup and no process of a jail is left.
    fn nothing_left(&self, tally: &mut Tally) -> Result<()> {
        let leaves = self
            .jailer
            .cgroup()
            .map(cgroup::Parent::leaves)
            .transpose()?
            .unwrap_or_default();
        // SAFETY: no child is waited for; a null status is allowed.
        let child = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
        if leaves.is_empty() && child == -1 {
            tally.pass("no cgroup and no process of a jail is left");
        } else {
            tally.fail(&format!(
                "left are the cgroups {leaves:?}, and waitpid gives {child}"
            ));
        }
        Ok(())
    }
}

/// Waits for the end of an attempt.
fn wait(jail: &Jail, patience: Duration) -> Result<()> {
    let mut waited = libc::pollfd {
        fd: jail.pidfd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd, alive during the call.
    if unsafe { libc::poll(&mut waited, 1, patience.as_millis() as i32) } != 1 {
        bail!("it was still running after {patience:?}");
    }
    Ok(())
}

/// Whether the kernel killed in this jail's cgroup for want of memory.
fn out_of_memory(jail: &Jail) -> bool {
    let Some(leaf) = &jail.leaf else { return false };
    let path = format!("/proc/self/fd/{}/memory.events", leaf.dir().as_raw_fd());
    let events = std::fs::read_to_string(path).unwrap_or_default();
    events
        .lines()
        .any(|line| line.strip_prefix("oom_kill ").is_some_and(|count| count != "0"))
}

/// Compares what an attempt met with what its layer does.
fn judge(attempt: &Attempt, ended: &Ended, seccomp: bool, tally: &mut Tally) {
    let what = attempt.what;
    let with = if seccomp {
        "with seccomp"
    } else {
        "without seccomp"
    };
    let line = |layer: &str| format!("{what} ({with}): refused by {layer}");
    if seccomp && attempt.stops != Stops::Layer && ended.exit == Exit::Signal(libc::SIGSYS) {
        return tally.pass(&line(&format!(
            "seccomp ({})",
            ended.forbidden.unwrap_or("system call not known")
        )));
    }
    if attempt.name == "old-entry" && ended.exit == Exit::Signal(libc::SIGSEGV) {
        return tally.pass(&line("a kernel without that entry"));
    }
    if attempt.name == "eat-memory" && ended.out_of_memory {
        return tally.pass(&line(attempt.layer));
    }
    if attempt.stops == Stops::SeccompOnly || ended.exit != Exit::Code(0) {
        return tally.fail(&format!("{what} ({with}): {:?}, {}", ended.exit, ended.report));
    }
    let errno = ended
        .report
        .strip_prefix("refused ")
        .and_then(|number| number.parse::<i32>().ok());
    match errno {
        Some(libc::ENOSYS) => tally.pass(&line("a kernel without that call")),
        Some(errno) if attempt.errors.contains(&errno) => tally.pass(&line(attempt.layer)),
        None if attempt.errors.is_empty() && ended.report.starts_with("nothing ") => {
            tally.pass(&line(attempt.layer))
        }
        _ => tally.fail(&format!(
            "{what} ({with}): {}, where {} was to refuse it",
            ended.report, attempt.layer
        )),
    }
}
