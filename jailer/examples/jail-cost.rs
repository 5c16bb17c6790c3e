//! What jailing costs: the time from the call to the exec, in a jail and without, taken in turns in one run, beside no and
//! many other jails and with no and many mounts on the host.
//!
//! `jail-cost PROGRAM ROUNDS [JAILS [MOUNTS [MIB]]]`: PROGRAM is shoal-escape; JAILS (500) other jails, MOUNTS (2000, as root
//! only) mounts in a namespace of this process's own, MIB (0) resident in this process. `CGROUP=PATH` gives each jail a leaf.
//! Prints rows of the table in docs/security.md.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use shoal_jailer::{
    Executable, HandOver, IdAllocator, IdRange, Jail, JailSpec, Jailer, JailerConfig, Mode, Rlimits, cgroup,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Starts jails of one kind.
struct Starter<'a> {
    jailer: Jailer,
    ids: IdAllocator,
    program: &'a Executable,
    /// The program ends when the other end of this pipe is closed.
    held: BorrowedFd<'a>,
}

impl<'a> Starter<'a> {
    fn new(mode: Mode, program: &'a Executable, held: BorrowedFd<'a>) -> Result<Starter<'a>> {
        let range = IdRange::new(200_000, 10_000)?;
        let jailer = Jailer::new(&JailerConfig {
            mode,
            uids: range,
            gids: range,
            cgroup_parent: std::env::var_os("CGROUP").map(Into::into),
            missing_controllers: cgroup::Missing::Report,
        })?;
        let ids = IdAllocator::new(range);
        Ok(Starter {
            jailer,
            ids,
            program,
            held,
        })
    }

    fn start(&mut self, name: &str, argv: &[&str]) -> Result<Jail> {
        let argv: std::result::Result<Vec<_>, _> = argv.iter().map(|a| CString::new(*a)).collect();
        let ids = self.ids.allocate()?;
        let jail = self.jailer.spawn(
            self.program,
            &JailSpec {
                id: &name.parse()?,
                ids,
                argv: &argv?,
                fds: &[HandOver {
                    fd: self.held,
                    target: 3,
                }],
                limits: &cgroup::Limits {
                    memory_max: Some(64 << 20),
                    pids_max: Some(8),
                    ..Default::default()
                },
                rlimits: Rlimits::default(),
                oom_score_adj: Some(500),
                core_scheduling: false,
                die_with_parent: true,
            },
        )?;
        self.ids.release(ids);
        Ok(jail)
    }

    /// Time from the call to the exec.
    fn timed(&mut self) -> Result<Duration> {
        let begin = Instant::now();
        let mut jail = self.start("cost", &["escape", "exit", "0"])?;
        let taken = begin.elapsed();
        jail.wait()?;
        if let Some(leaf) = &mut jail.leaf {
            leaf.remove()?;
        }
        Ok(taken)
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |i: usize, default| {
        arguments
            .get(i)
            .map_or(Ok(default), |text: &String| text.parse::<usize>())
    };
    let program = Executable::from_path(&std::path::absolute(&arguments[1])?)?;
    let (rounds, jails, mounts, mib) = (number(2, 200)?, number(3, 500)?, number(4, 2000)?, number(5, 0)?);
    let ballast = vec![1_u8; mib << 20];
    // SAFETY: it cannot fail and touches no memory.
    let root = unsafe { libc::geteuid() } == 0;
    println!("| other jails | mounts | without jail | with | added |\n|---|---|---|---|---|");
    for mounted in [0, mounts] {
        if mounted > 0 && root {
            mount(mounted)?;
        }
        for others in [0, jails] {
            row(&program, rounds, others)?;
        }
        if !root {
            break;
        }
    }
    drop(ballast);
    Ok(())
}

/// Measures beside `others` jails.
fn row(program: &Executable, rounds: usize, others: usize) -> Result<()> {
    let (read, write) = std::io::pipe()?;
    let mut plain = Starter::new(Mode::Off, program, read.as_fd())?;
    let mut jailed = Starter::new(Mode::detect(), program, read.as_fd())?;
    let neighbours: Result<Vec<Jail>> = (0..others)
        .map(|i| jailed.start(&format!("held-{i}"), &["escape", "hold", "3"]))
        .collect();
    let neighbours = neighbours?;
    let (mut without, mut with, mut added) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        let (plain, jailed) = (plain.timed()?, jailed.timed()?);
        without.push(plain.as_secs_f64());
        with.push(jailed.as_secs_f64());
        added.push(jailed.as_secs_f64() - plain.as_secs_f64());
    }
    drop(write);
    for jail in neighbours {
        jail.wait()?;
        jail.destroy()?;
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?.lines().count();
    println!(
        "| {others} | {mounts} | {} | {} | {} |",
        median(&mut without),
        median(&mut with),
        median(&mut added)
    );
    Ok(())
}

/// The median, and what 95 % lie below.
fn median(seconds: &mut [f64]) -> String {
    seconds.sort_by(f64::total_cmp);
    let at = |percent: usize| seconds[(seconds.len() - 1) * percent / 100] * 1e3;
    format!("{:.2} ms (95 %: {:.2})", at(50), at(95))
}

/// Mounts so many file systems where only this process and its children see them.
fn mount(count: usize) -> Result<()> {
    let check = |done: i32| match done {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    };
    // SAFETY: numbers only.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
    let (none, place, kind) = (std::ptr::null(), c"/mnt", c"tmpfs");
    let private = libc::MS_REC | libc::MS_PRIVATE;
    // SAFETY: C strings, flags and null pointers, which the call allows.
    check(unsafe { libc::mount(none, c"/".as_ptr(), none, private, none.cast()) })?;
    for _ in 0..count {
        // SAFETY: as above.
        check(unsafe { libc::mount(kind.as_ptr(), place.as_ptr(), kind.as_ptr(), 0, none.cast()) })?;
    }
    Ok(())
}
