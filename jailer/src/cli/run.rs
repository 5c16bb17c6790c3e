//! Running one program in a jail, as its parent.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use shoal_jailer::{
    CoreScheduling, Executable, Exit, HandOver, IdRange, Ids, Jail, JailId, JailSpec, Jailer, JailerConfig,
    KillLog, Mode, Rlimits, cgroup,
};

use super::sweep::Sweeper;

/// What to run, and in what jail.
#[derive(Args)]
pub struct RunArguments {
    /// Name of the jail: 1 to 64 letters, digits and hyphens
    #[arg(long)]
    id: JailId,
    /// User to run as (root only, and needed then); give each guest one of its own
    #[arg(long)]
    uid: Option<u32>,
    /// Group to run as (root only, and needed then)
    #[arg(long)]
    gid: Option<u32>,
    /// Cgroup (version 2) below which the jail gets one of its own, an absolute path
    #[arg(long, value_name = "PATH")]
    cgroup_parent: Option<PathBuf>,
    /// Most memory of guest and VMM together, in bytes or with K, M, G
    #[arg(long, value_name = "SIZE", value_parser = parse_size, requires = "cgroup_parent")]
    memory_max: Option<u64>,
    /// Most processor time, in percent of one processor
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..=100_000), requires = "cgroup_parent")]
    cpu_max: Option<u32>,
    /// Share of processor time beside others
    #[arg(long, value_name = "1-10000", value_parser = clap::value_parser!(u32).range(1..=10_000), requires = "cgroup_parent")]
    cpu_weight: Option<u32>,
    /// Share of disk time beside others
    #[arg(long, value_name = "1-10000", value_parser = clap::value_parser!(u32).range(1..=10_000), requires = "cgroup_parent")]
    io_weight: Option<u32>,
    /// Most threads
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), requires = "cgroup_parent")]
    pids_max: Option<u32>,
    /// Hand over this open descriptor of the jailer's, at the same number or at another
    #[arg(long = "fd", value_name = "FD[=NUMBER]", value_parser = parse_fd)]
    fds: Vec<(RawFd, RawFd)>,
    /// Most open descriptors
    #[arg(long, value_name = "N", default_value_t = 1024)]
    open_files: u64,
    /// How soon to be killed when the host is out of memory
    #[arg(long, value_name = "0-1000", default_value_t = 500, value_parser = clap::value_parser!(u16).range(0..=1000))]
    oom_score_adj: u16,
    /// No other process on the other half of a core: where processors share cores (auto), always (on), never (off)
    #[arg(long, value_name = "auto|on|off", default_value_t)]
    core_scheduling: CoreScheduling,
    /// Make no jail: for debugging only
    #[arg(long)]
    no_jail: bool,
    /// The static program, an absolute path without symbolic links, and its arguments
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "give a number of bytes, or one with K, M or G".to_owned())?;
    number
        .checked_mul(1 << shift)
        .filter(|size| *size > 0)
        .ok_or_else(|| "it must lie above 0 and below 2^64".to_owned())
}

fn parse_fd(text: &str) -> Result<(RawFd, RawFd), String> {
    let number = |text: &str| {
        text.parse::<u16>()
            .map(RawFd::from)
            .map_err(|_| format!("{text:?} is no descriptor"))
    };
    let (source, target) = text.split_once('=').unwrap_or((text, text));
    let (source, target) = (number(source)?, number(target)?);
    // SAFETY: it only asks whether the descriptor is open.
    if unsafe { libc::fcntl(source, libc::F_GETFD) } < 0 {
        return Err(format!("{source} is not open in the jailer"));
    }
    Ok((source, target))
}

/// Runs the program to its end.
pub fn run(arguments: &RunArguments) -> Result<ExitCode> {
    let mode = if arguments.no_jail {
        Mode::Off
    } else {
        Mode::detect()
    };
    let ids = ids(arguments, mode)?;
    let (core_scheduling, shared_cores) = match mode {
        Mode::Off => (false, None),
        Mode::Root | Mode::Rootless => arguments.core_scheduling.decide()?,
    };
    // Before anything that may end this process, so that it can be undone.
    let signals = Signals::new()?;
    let jailer = Jailer::new(&JailerConfig {
        mode,
        uids: IdRange::new(ids.uid(), 1)?,
        gids: IdRange::new(ids.gid(), 1)?,
        cgroup_parent: arguments.cgroup_parent.clone(),
        missing_controllers: cgroup::Missing::Refuse,
    })?;
    let kills = KillLog::open();
    let lacks = jailer.degradations().iter();
    for lack in lacks.chain(kills.as_ref().err()).chain(&shared_cores) {
        eprintln!("shoal-jailer: warning: {lack}");
    }
    let sweeper = arguments
        .cgroup_parent
        .as_deref()
        .map(|parent| Sweeper::start(parent, &arguments.id))
        .transpose()?;
    let (output, written) = io::pipe().context("making a pipe")?;
    let (errors, written_errors) = io::pipe().context("making a pipe")?;
    let outputs = [written.as_fd(), written_errors.as_fd()];
    let jail = start(arguments, &jailer, ids, core_scheduling, outputs)?;
    drop((written, written_errors));
    for lack in &jail.degradations {
        eprintln!("shoal-jailer: warning: {lack}");
    }
    let exit = accompany(&jail, &signals, output, errors);
    let pid = jail.pid;
    let seen = jail.destroy()?;
    drop(sweeper);
    exit?;
    Ok(tell(
        seen.context("the end of the program was not seen")?,
        pid,
        kills.ok(),
    ))
}

fn ids(arguments: &RunArguments, mode: Mode) -> Result<Ids> {
    match (mode, arguments.uid, arguments.gid) {
        (_, Some(uid), Some(gid)) => Ok(Ids::new(uid, gid)?),
        (Mode::Root, ..) => bail!("as root, give the jail a user and a group of its own: --uid and --gid"),
        // Not used: the program runs as this user.
        (Mode::Rootless | Mode::Off, ..) => Ok(Ids::new(1, 1)?),
    }
}

fn start(
    arguments: &RunArguments,
    jailer: &Jailer,
    ids: Ids,
    core_scheduling: bool,
    [output, errors]: [BorrowedFd<'_>; 2],
) -> Result<Jail> {
    let program = PathBuf::from(&arguments.program[0]);
    let program = Executable::from_path(&program)?;
    let argv: Vec<CString> = arguments
        .program
        .iter()
        .map(|word| CString::new(word.as_bytes()).context("an argument holds a zero byte"))
        .collect::<Result<_>>()?;
    let mut fds = vec![
        HandOver {
            fd: output,
            target: 1,
        },
        HandOver {
            fd: errors,
            target: 2,
        },
    ];
    for (source, target) in &arguments.fds {
        // SAFETY: it was open when the arguments were parsed, and nothing here closes descriptors it does not own.
        let fd = unsafe { BorrowedFd::borrow_raw(*source) };
        fds.push(HandOver { fd, target: *target });
    }
    let limits = cgroup::Limits {
        memory_max: arguments.memory_max,
        cpu_max: arguments.cpu_max.map(|percent| cgroup::CpuMax {
            quota_us: u64::from(percent) * 1000,
            period_us: 100_000,
        }),
        cpu_weight: arguments.cpu_weight,
        io_weight: arguments.io_weight,
        io_max: Vec::new(),
        pids_max: arguments.pids_max,
    };
    let spec = JailSpec {
        id: &arguments.id,
        ids,
        argv: &argv,
        fds: &fds,
        limits: &limits,
        rlimits: Rlimits {
            open_files: arguments.open_files,
            ..Rlimits::default()
        },
        oom_score_adj: Some(arguments.oom_score_adj),
        core_scheduling,
        die_with_parent: true,
    };
    Ok(jailer.spawn(&program, &spec)?)
}

/// Passes outputs and signals on until the program ends.
fn accompany(jail: &Jail, signals: &Signals, output: PipeReader, errors: PipeReader) -> Result<()> {
    let (mut output, mut errors) = (Some(output), Some(errors));
    let mut asked_to_end = false;
    loop {
        let fd = |pipe: &Option<PipeReader>| pipe.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let waited = [
            jail.pidfd.as_raw_fd(),
            signals.fd.as_raw_fd(),
            fd(&output),
            fd(&errors),
        ];
        let mut waited = waited.map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        });
        // SAFETY: four pollfds, alive during the call.
        if unsafe { libc::poll(waited.as_mut_ptr(), 4, -1) } < 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error).context("waiting for the program");
        }
        let ready = waited.map(|fd| fd.revents != 0);
        pass_on(&mut output, ready[2], &mut io::stdout());
        pass_on(&mut errors, ready[3], &mut io::stderr());
        if ready[1] {
            let signal = signals.next()?;
            let end = signal == libc::SIGTERM || signal == libc::SIGINT;
            let signal = if end && asked_to_end {
                libc::SIGKILL
            } else {
                signal
            };
            asked_to_end |= end;
            // ESRCH: it has just ended.
            let _ = jail.signal(signal);
        }
        // What it has written last is read before its end is taken notice of.
        if ready[0] && !ready[2] && !ready[3] {
            return Ok(());
        }
    }
}

/// Copies what a pipe holds; at its end it is dropped. An output that nobody reads any more is no reason to end.
fn pass_on(pipe: &mut Option<PipeReader>, ready: bool, to: &mut dyn Write) {
    let mut buffer = [0; 16 << 10];
    if let (true, Some(open)) = (ready, pipe.as_mut()) {
        match open.read(&mut buffer) {
            Ok(length @ 1..) => drop(to.write_all(&buffer[..length]).and_then(|()| to.flush())),
            _ => *pipe = None,
        }
    }
}

/// Tells how the program ended, and gives the exit code.
fn tell(exit: Exit, pid: i32, kills: Option<KillLog>) -> ExitCode {
    match exit {
        Exit::Code(code) => ExitCode::from(code as u8),
        Exit::Signal(signal) => {
            if signal == libc::SIGSYS {
                let kill = kills.and_then(|mut log| log.find(pid, Duration::from_secs(1)));
                let name = kill.map_or("not known; see the warnings above", |kill| kill.name());
                eprintln!(
                    "shoal-jailer: the seccomp filter ended the program; forbidden system call: {name}"
                );
            } else {
                eprintln!("shoal-jailer: signal {signal} ended the program");
            }
            ExitCode::from(128 | signal as u8)
        }
    }
}

/// Signals that are forwarded, as a descriptor. They stay blocked.
struct Signals {
    fd: File,
}

impl Signals {
    fn new() -> Result<Signals> {
        let forwarded = [
            libc::SIGTERM,
            libc::SIGINT,
            libc::SIGHUP,
            libc::SIGQUIT,
            libc::SIGUSR1,
            libc::SIGUSR2,
        ];
        // SAFETY: a set that the calls fill and read; signalfd makes a descriptor for us alone.
        let fd = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            for signal in forwarded {
                libc::sigaddset(&mut set, signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            libc::signalfd(-1, &set, libc::SFD_CLOEXEC)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error()).context("making a signalfd");
        }
        // SAFETY: made above for us alone.
        let fd = unsafe { File::from_raw_fd(fd) };
        Ok(Signals { fd })
    }

    fn next(&self) -> Result<i32> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        (&self.fd).read_exact(&mut info).context("reading a signal")?;
        // The signal's number is the first field.
        Ok(u32::from_ne_bytes([info[0], info[1], info[2], info[3]]) as i32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("5"), Ok(5));
        assert_eq!(parse_size("64M"), Ok(64 << 20));
        for bad in [
            "",
            "0",
            "M",
            "1T",
            "-1",
            "99999999999999999999",
            "18446744073709551615K",
        ] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn descriptors() {
        assert_eq!(parse_fd("0=5"), Ok((0, 5)));
        for bad in ["", "x", "-1", "0=", "0=-1", "60000", "70000"] {
            assert!(parse_fd(bad).is_err(), "{bad}");
        }
    }
}
