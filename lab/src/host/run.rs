//! One start of the lab, from options to the command's exit code.

use super::relay::{self, Event, Tail};
use super::share_fs::ShareFs;
use super::{BuildDir, LabError, LogTail, Sources, fuse, initramfs, qemu};
use crate::job::{Job, Message, Share, Stdin, port};
use std::env;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// The machine takes about two seconds; this is for a host that is busy with other things.
const UP_LIMIT: Duration = Duration::from_secs(120);
/// QEMU closes its sockets just before it ends.
const REAP_LIMIT: Duration = Duration::from_secs(5);
/// How often the machine is woken.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Lines of the kernel's log that an error shows.
const TAIL_LINES: usize = 25;

/// A directory of the host to be seen in the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShareDir {
    /// The directory.
    pub host: PathBuf,
    /// Where it is in the machine.
    pub guest: PathBuf,
    /// Whether the machine may write.
    pub writable: bool,
}

impl std::str::FromStr for ShareDir {
    type Err = String;

    /// `HOSTDIR[:GUESTDIR][:rw]`; without GUESTDIR the path is the same in the machine.
    fn from_str(text: &str) -> Result<Self, String> {
        let (paths, writable) = match text.strip_suffix(":rw") {
            Some(paths) => (paths, true),
            None => (text.strip_suffix(":ro").unwrap_or(text), false),
        };
        let (host, guest) = paths
            .split_once(':')
            .map_or((paths, None), |(host, guest)| (host, Some(guest)));
        let host = std::fs::canonicalize(host).map_err(|error| format!("{host}: {error}"))?;
        if !host.is_dir() {
            return Err(format!("{} is not a directory", host.display()));
        }
        let guest = guest.map_or_else(|| host.clone(), PathBuf::from);
        if !guest.is_absolute()
            || guest == Path::new("/")
            || guest.components().any(|part| part.as_os_str() == "..")
        {
            return Err(format!(
                "{} must be an absolute path below /, without ..",
                guest.display()
            ));
        }
        Ok(Self {
            host,
            guest,
            writable,
        })
    }
}

/// What to run, and how.
#[derive(Debug)]
pub struct Options {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Time counted in instructions, 1 ns each: repeatable figures.
    pub icount: bool,
    /// Memory of the machine, MiB.
    pub memory: u32,
    /// Limit for the whole run.
    pub timeout: Duration,
    /// Directories to share beside the build directory.
    pub shares: Vec<ShareDir>,
    /// Additions to the environment.
    pub env: Vec<(String, String)>,
    /// Files and directories to copy into the machine's memory before the command starts.
    pub copies: Vec<PathBuf>,
    /// Print the machine's kernel log on standard error.
    pub kernel_log: bool,
    /// What the command's standard input is.
    pub stdin: Stdin,
    /// The workspace's build directory.
    pub build: Option<BuildDir>,
    /// The kernel tree, else `scripts/cloud-kernel.sh` is asked.
    pub kernel_tree: Option<PathBuf>,
}

/// When things happened, from the call of [`run`].
#[derive(Debug, Clone, Copy, Default)]
pub struct Timings {
    /// QEMU was started.
    pub started: Duration,
    /// The command was started.
    pub up: Duration,
    /// CLOCK_MONOTONIC in the machine at that moment.
    pub uptime: Duration,
    /// The command had ended and all its output was passed on.
    pub ended: Duration,
}

/// A run whose command ended by itself.
#[derive(Debug)]
pub struct Outcome {
    /// The command's exit code, or 128 + the signal that killed it.
    pub code: u8,
    /// When things happened.
    pub timings: Timings,
}

/// Runs `options.command` in a fresh machine, its output going to `stdout` and `stderr`.
///
/// # Errors
/// Whatever keeps the command's exit code from us: see [`LabError`].
pub fn run(
    options: &Options,
    stdout: impl io::Write + Send + 'static,
    stderr: impl io::Write + Send + 'static,
) -> Result<Outcome, LabError> {
    let begin = Instant::now();
    let sources = Sources::find(options.kernel_tree.as_deref(), options.build.as_ref())?;
    let mut plan = Plan::new(options)?;
    let archive = initramfs::build(&sources, &mut plan.job, &plan.copies)?;
    let copied = (archive.len() as u64) >> 20;
    if copied * 3 > u64::from(options.memory) {
        return Err(LabError::TooMuch {
            copied,
            memory: options.memory,
        });
    }
    let running = qemu::start(&qemu::Machine {
        qemu: &sources.qemu,
        kernel: &sources.kernel.vmlinuz,
        initramfs: &archive,
        memory: options.memory,
        icount: options.icount,
        verbose_kernel: options.kernel_log,
        shares: plan.shares.len(),
    })?;
    drop(archive);
    if let Some(port) = &running.heartbeat {
        beat(copy(port)?);
    }
    for (share, port) in plan.shares.iter().zip(&running.shares) {
        let files = ShareFs::open_root(&share.host, share.writable).map_err(LabError::system(format!(
            "open the shared directory {}",
            share.host.display()
        )))?;
        fuse::serve(copy(port)?, files);
    }
    let mut session = Session::begin(running, options, begin, stdout, stderr)?;
    session.timings.started = begin.elapsed();
    session.wait()
}

/// Sends on [`port::HEARTBEAT`] until the machine is gone.
fn beat(mut port: UnixStream) {
    std::thread::spawn(move || {
        while port.write_all(b".").is_ok() {
            std::thread::sleep(HEARTBEAT);
        }
    });
}

/// What the options come to.
struct Plan {
    job: Job,
    copies: Vec<PathBuf>,
    /// In the order of the job's.
    shares: Vec<ShareDir>,
}

impl Plan {
    fn new(options: &Options) -> Result<Self, LabError> {
        let mut copies = options.copies.clone();
        let mut shares = options.shares.clone();
        match &options.build {
            // What is measured must not wait for the host.
            Some(BuildDir(build)) if options.icount => {
                copies.push(build.join("bin"));
                copies.extend(options.command.iter().filter_map(|word| named_file(word, build)));
            }
            Some(BuildDir(build)) if shares.iter().all(|share| share.guest != *build) => {
                shares.push(ShareDir {
                    host: build.clone(),
                    guest: build.clone(),
                    writable: false,
                });
            }
            _ => {}
        }
        if let Some(share) = shares.get(port::MAX_SHARES) {
            let why = format!("a machine has at most {} shares", port::MAX_SHARES);
            return Err(LabError::Share {
                path: share.host.clone(),
                why,
            });
        }
        let mut copied = Vec::new();
        for path in &copies {
            let path =
                std::path::absolute(path).map_err(LabError::system(format!("find {}", path.display())))?;
            // What is shared at its own path is there, and would cover the copy.
            if !shares
                .iter()
                .any(|share| share.host == share.guest && path.starts_with(&share.host))
            {
                copied.push(path);
            }
        }
        Ok(Self {
            job: job(options, &shares)?,
            copies: copied,
            shares,
        })
    }
}

fn job(options: &Options, shares: &[ShareDir]) -> Result<Job, LabError> {
    let here = env::current_dir().map_err(LabError::system("tell the current directory"))?;
    let share = |share: &ShareDir| {
        Ok(Share {
            guest_dir: text(&share.guest)?,
            writable: share.writable,
        })
    };
    Ok(Job {
        command: options.command.clone(),
        env: environment(options),
        cwd: text(&here)?,
        modules: Vec::new(),
        shares: shares.iter().map(share).collect::<Result<_, LabError>>()?,
        stdin: options.stdin,
        heartbeat: !options.icount,
    })
}

/// The file that an argument of the command names, when it is in the build directory.
fn named_file(word: &str, build: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(word).ok()?;
    (path.starts_with(build) && path.is_file()).then_some(path)
}

fn environment(options: &Options) -> Vec<(String, String)> {
    let mut path = "/bin".to_owned();
    if let Some(BuildDir(build)) = &options.build {
        path = format!("{}:{path}", build.join("bin").display());
    }
    let mut all = vec![
        ("PATH".to_owned(), path),
        ("HOME".to_owned(), "/root".to_owned()),
        (
            "SHOAL_LAB".to_owned(),
            if options.icount { "icount" } else { "1" }.to_owned(),
        ),
    ];
    if let Ok(term) = env::var("TERM") {
        all.push(("TERM".to_owned(), term));
    }
    all.extend(options.env.iter().cloned());
    all
}

fn text(path: &Path) -> Result<String, LabError> {
    let why = || LabError::Share {
        path: path.to_owned(),
        why: "its name is not UTF-8".into(),
    };
    path.to_str().map(str::to_owned).ok_or_else(why)
}

fn copy(stream: &UnixStream) -> Result<UnixStream, LabError> {
    stream
        .try_clone()
        .map_err(LabError::system("copy a socket's descriptor"))
}

/// A machine that runs, with the threads around it.
struct Session {
    running: qemu::Running,
    events: Receiver<Event>,
    logs: Vec<std::thread::JoinHandle<()>>,
    tail: Tail,
    begin: Instant,
    timeout: Duration,
    timings: Timings,
    /// Bytes of standard output and standard error that were passed on.
    passed: (u64, u64),
}

impl Session {
    fn begin(
        mut running: qemu::Running,
        options: &Options,
        begin: Instant,
        stdout: impl io::Write + Send + 'static,
        stderr: impl io::Write + Send + 'static,
    ) -> Result<Self, LabError> {
        let (sender, events) = channel();
        relay::output(copy(&running.stdout)?, stdout, sender.clone(), Event::Stdout);
        relay::output(copy(&running.stderr)?, stderr, sender.clone(), Event::Stderr);
        relay::control(copy(&running.control)?, sender);
        if options.stdin != Stdin::Null {
            relay::input(copy(&running.stdin)?);
        }
        let tail = Tail::default();
        let prefix = options.kernel_log.then_some("kernel| ");
        let mut logs = vec![relay::log(copy(&running.kernel_log)?, tail.clone(), prefix)];
        if let Some(complaints) = running.child.stderr.take() {
            logs.push(relay::log(complaints, tail.clone(), None));
        }
        let timings = Timings::default();
        Ok(Self {
            running,
            events,
            logs,
            tail,
            begin,
            timeout: options.timeout,
            timings,
            passed: (0, 0),
        })
    }

    /// Waits until the command has ended and all that it wrote was passed on, then ends the machine.
    fn wait(mut self) -> Result<Outcome, LabError> {
        let mut exit = None;
        loop {
            match self.next_event()? {
                Event::Control(Some(Message::Up { uptime_ns })) => {
                    self.timings.up = self.begin.elapsed();
                    self.timings.uptime = Duration::from_nanos(uptime_ns);
                }
                Event::Control(Some(Message::Exit { code, stdout, stderr })) => {
                    exit = Some((code, (stdout, stderr)))
                }
                Event::Control(Some(Message::Failed(why))) => return Err(LabError::Refused(why)),
                Event::Control(None) => {}
                Event::Stdout(total) => self.passed.0 = total,
                Event::Stderr(total) => self.passed.1 = total,
                Event::OutputFailed(error) => return Err(LabError::Output(error)),
                Event::Closed if exit.is_none() => return Err(self.died()),
                Event::Closed => {}
            }
            if let Some((code, written)) = exit
                && self.passed == written
            {
                self.timings.ended = self.begin.elapsed();
                return Ok(Outcome {
                    code,
                    timings: self.timings,
                });
            }
        }
    }

    fn next_event(&mut self) -> Result<Event, LabError> {
        let up = self.timings.up != Duration::ZERO;
        let limit = if up {
            self.timeout
        } else {
            self.timeout.min(UP_LIMIT)
        };
        match self
            .events
            .recv_timeout(limit.saturating_sub(self.begin.elapsed()))
        {
            Ok(event) => Ok(event),
            Err(RecvTimeoutError::Timeout) if up || self.timeout <= UP_LIMIT => Err(LabError::TimedOut {
                seconds: self.timeout.as_secs(),
            }),
            Err(RecvTimeoutError::Timeout) => Err(LabError::NotUp {
                seconds: UP_LIMIT.as_secs(),
                log: LogTail(self.tail.text(TAIL_LINES)),
            }),
            Err(RecvTimeoutError::Disconnected) => Err(self.died()),
        }
    }

    fn died(&mut self) -> LabError {
        // The sockets are closed, so QEMU has ended or is about to; its last words come before their end of file.
        let how = match self.running.reap(REAP_LIMIT) {
            Ok(status) => format!("QEMU: {status}"),
            Err(error) => format!("QEMU's end is unknown: {error}"),
        };
        for log in self.logs.drain(..) {
            let _ = log.join();
        }
        LabError::Died {
            how,
            log: LogTail(self.tail.text(TAIL_LINES)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_read() {
        let share = |text: &str| text.parse::<ShareDir>();
        let (host, guest) = (PathBuf::from("/"), PathBuf::from("/mnt/x"));
        assert_eq!(
            share("/:/mnt/x:rw"),
            Ok(ShareDir {
                host: host.clone(),
                guest: guest.clone(),
                writable: true
            })
        );
        assert_eq!(
            share("/:/mnt/x"),
            Ok(ShareDir {
                host: host.clone(),
                guest: guest.clone(),
                writable: false
            })
        );
        assert_eq!(
            share("/:/mnt/x:ro"),
            Ok(ShareDir {
                host,
                guest,
                writable: false
            })
        );
        assert!(share("/").is_err(), "the machine's own root cannot be covered");
        assert!(share("/:relative").is_err());
        assert!(share("/:/a/../b").is_err());
        assert!(share("/nonexistent-directory").is_err());
        assert!(share("/proc/self/status:/x").is_err(), "a file is no directory");
    }
}
