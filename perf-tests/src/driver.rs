//! Starts one `shoal-vmm` the way a host does, with nothing else of a host around it, and one floor program.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use shoal_devices::spec::FdSlot;
use shoal_jailer::{
    Executable, HandOver, IdAllocator, IdRange, Ids, Jail, JailSpec, Jailer, JailerConfig, Mode, Rlimits,
    cgroup,
};
use shoal_vmm::channel::HostChannel;
use shoal_vmm::kernel::{LoadedInitrd, LoadedKernel};
use shoal_vmm::protocol::{
    ConsoleConfig, Event, InitrdConfig, KernelConfig, MemoryConfig, Message, Pages, Reply, Request, Timeline,
    VmConfig,
};

use crate::boot::PROBE_MEMORY_MIB;

/// A program of Shoal's, beside this one or in SHOAL_BIN_DIR.
pub fn sibling(name: &str) -> Result<PathBuf> {
    let folder = match std::env::var_os("SHOAL_BIN_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => std::env::current_exe()?
            .parent()
            .context("this program lies in no folder")?
            .to_owned(),
    };
    let path = folder.join(name);
    if !path.is_file() {
        bail!(
            "{} is missing: run `make build`, or name its folder in SHOAL_BIN_DIR",
            path.display()
        );
    }
    Ok(path)
}

/// The folder of the images that `make images` builds, beside that of the programs.
pub fn images() -> Result<PathBuf> {
    let beside = sibling("shoal-vmm")?.with_file_name("..");
    let beside = beside
        .canonicalize()
        .with_context(|| format!("finding the folder above {}", beside.display()))?;
    Ok(beside.join("images"))
}

/// A program in a folder of PATH.
pub fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(program))
        .find(|p| p.is_file())
}

/// What is booted.
pub struct Guest {
    /// Made once, mapped by every start.
    pub kernel: LoadedKernel,
    /// Likewise.
    pub initrd: Option<LoadedInitrd>,
    /// Kernel command line.
    pub cmdline: String,
    /// Memory (MiB).
    pub memory_mib: u64,
    /// The pages behind it.
    pub pages: Pages,
}

impl Guest {
    /// A bare-metal guest whose kernel is `image`, ready to be mapped.
    ///
    /// # Errors
    /// When it cannot be loaded.
    pub fn bare_metal(image: &[u8], pages: Pages) -> Result<Self> {
        let mut file = tempfile::tempfile().context("making a temporary file")?;
        file.write_all(image)?;
        Ok(Self {
            kernel: shoal_vmm::kernel::load(&file).context("loading the probe guest")?,
            initrd: None,
            cmdline: String::new(),
            memory_mib: PROBE_MEMORY_MIB,
            pages,
        })
    }
}

/// A child that is killed and reaped when it is dropped, also on the way out of an error.
pub struct Reaped(pub Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        // It has ended already, or ends now; there is nobody to tell if neither works.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How a VMM's process is made.
pub enum Way<'a> {
    /// By the standard library, as any program.
    Plain(&'a Path),
    /// By the jailer.
    Jailer(&'a Jails),
}

/// A jailer with what it starts.
pub struct Jails {
    jailer: Jailer,
    vmm: Executable,
    ids: Rc<RefCell<IdAllocator>>,
    started: Cell<u64>,
    seccomp: &'static str,
}

impl Jails {
    /// With everything that this user can have.
    pub fn full(vmm: &Path, cgroup: Option<&Path>) -> Result<Self> {
        Self::new(vmm, Mode::detect(), cgroup, "kill")
    }

    /// The same way to start a process, with neither a jail nor filters.
    pub fn off(vmm: &Path) -> Result<Self> {
        Self::new(vmm, Mode::Off, None, "off")
    }

    fn new(vmm: &Path, mode: Mode, cgroup: Option<&Path>, seccomp: &'static str) -> Result<Self> {
        // Beside the blocks of users that daemons choose from.
        let users = IdRange::new(1_899_000_000, 4096)?;
        let jailer = Jailer::new(&JailerConfig {
            mode,
            uids: users,
            gids: users,
            cgroup_parent: cgroup.map(Path::to_owned),
            missing_controllers: cgroup::Missing::Report,
        })?;
        Ok(Self {
            jailer,
            vmm: Executable::from_path(&vmm.canonicalize()?)?,
            ids: Rc::new(IdAllocator::new(users).into()),
            started: 0.into(),
            seccomp,
        })
    }

    /// What its jails lack.
    pub fn lacks(&self) -> impl Iterator<Item = &'static str> {
        self.jailer.degradations().iter().map(|lack| lack.what)
    }

    fn spawn(&self, control: &OwnedFd) -> Result<Jailed> {
        let ids = self.ids.borrow_mut().allocate()?;
        self.started.set(self.started.get() + 1);
        let arguments = [
            "shoal-vmm",
            "--guest-id",
            "perf",
            "--control-fd",
            "3",
            "--seccomp",
            self.seccomp,
        ];
        let argv: Vec<_> = arguments
            .into_iter()
            .map(std::ffi::CString::new)
            .collect::<Result<_, _>>()?;
        let control = HandOver {
            fd: control.as_fd(),
            target: 3,
        };
        let jail = self.jailer.spawn(
            &self.vmm,
            &JailSpec {
                id: &format!("perf-{}-{}", std::process::id(), self.started.get()).parse()?,
                ids,
                argv: &argv,
                fds: &[control],
                limits: &cgroup::Limits {
                    memory_max: Some(512 << 20),
                    pids_max: Some(16),
                    ..cgroup::Limits::default()
                },
                rlimits: Rlimits::default(),
                oom_score_adj: Some(500),
                core_scheduling: false,
                die_with_parent: true,
            },
        );
        let jail = jail.inspect_err(|_| self.ids.borrow_mut().release(ids))?;
        Ok(Jailed {
            jail: Some(jail),
            ids: self.ids.clone(),
            taken: ids,
        })
    }
}

/// A jail that ends when it is dropped, also on the way out of an error.
struct Jailed {
    jail: Option<Jail>,
    ids: Rc<RefCell<IdAllocator>>,
    taken: Ids,
}

impl Drop for Jailed {
    fn drop(&mut self) {
        // As for `Reaped`.
        drop(self.jail.take().map(Jail::destroy));
        self.ids.borrow_mut().release(self.taken);
    }
}

/// One measured start.
pub struct Started {
    /// From before the process was made to the moment the marker was read.
    pub elapsed: Duration,
    /// CLOCK_MONOTONIC before the process was made (ns).
    pub begin_ns: u64,
    /// The VMM's own stamps.
    pub timeline: Timeline,
    /// What the guest wrote up to the marker.
    pub output: String,
}

/// A guest that runs. It ends when this is dropped.
pub struct Running {
    host: HostChannel,
    // Read no more, but open: a VMM whose console has nobody at its end would see errors.
    _console: std::io::PipeReader,
    child: Box<dyn Ends>,
    /// From before the process was made to the moment the marker was read.
    pub elapsed: Duration,
    /// The VMM's own stamps up to its answer to the start request.
    pub timeline: Timeline,
    output: String,
    begin_ns: u64,
}

impl Running {
    /// The VMM's process.
    pub fn pid(&self) -> u32 {
        self.child.pid()
    }
}

/// Starts a guest and waits until `marker` stands in its console output.
pub fn launch(way: &Way<'_>, guest: &Guest, marker: &[u8]) -> Result<Running> {
    let (host, control) = control_pair()?;
    let (mut console, console_end) = std::io::pipe()?;
    let config = config(guest);
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("opening /dev/kvm")?;
    let mut fds = vec![kvm.as_fd(), guest.kernel.memfd.as_fd(), console_end.as_fd()];
    fds.extend(guest.initrd.iter().map(|i| i.memfd.as_fd()));

    let (begin, begin_ns) = (Instant::now(), shoal_vmm::sys::monotonic_ns());
    let child: Box<dyn Ends> = match way {
        Way::Plain(vmm) => Box::new(spawn_plain(vmm, &control)?),
        Way::Jailer(jails) => Box::new(jails.spawn(&control)?),
    };
    host.send(&Request::Start(Box::new(config)), &fds)?;
    drop(console_end);
    drop(control);
    let seen = read_until(&mut console, marker)?;
    let elapsed = begin.elapsed();

    let timeline = answer(&host);
    match seen {
        Seen::Marker(output) => Ok(Running {
            host,
            _console: console,
            child,
            elapsed,
            timeline: timeline?,
            output,
            begin_ns,
        }),
        Seen::End(output) => {
            let why = timeline
                .err()
                .map_or_else(|| "the guest ended".to_owned(), |e| format!("{e:#}"));
            bail!(
                "the marker {:?} was not seen ({why}); the console said: {output}",
                String::from_utf8_lossy(marker)
            )
        }
    }
}

/// Starts a guest, waits until `marker` stands in its console output, and ends it.
pub fn start_vmm(way: &Way<'_>, guest: &Guest, marker: &[u8]) -> Result<Started> {
    let mut running = launch(way, guest, marker)?;
    running.host.send(&Request::Kill, &[]).ok();
    while let Ok((message, _)) = running.host.recv() {
        if let Message::Event(Event::Stamped(stamp)) = message {
            running.timeline.push(stamp);
        }
    }
    Ok(Started {
        elapsed: running.elapsed,
        begin_ns: running.begin_ns,
        timeline: running.timeline,
        output: running.output,
    })
}

/// What ends when it is dropped.
trait Ends {
    fn pid(&self) -> u32;
}

impl Ends for Reaped {
    fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Ends for Jailed {
    fn pid(&self) -> u32 {
        self.jail.as_ref().map_or(0, |jail| jail.pid.unsigned_abs())
    }
}

/// Starts `vmm` as any program, with the control socket `control`.
pub fn spawn_plain(vmm: &Path, control: &OwnedFd) -> Result<Reaped> {
    let mut command = Command::new(vmm);
    command
        .args(["--guest-id", "perf", "--control-fd"])
        .arg(control.as_raw_fd().to_string());
    // Ctrl-C in a terminal is for shoal-perf alone, which then ends its guests.
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .process_group(0);
    let child = command.spawn();
    Ok(Reaped(
        child.with_context(|| format!("starting {}", vmm.display()))?,
    ))
}

/// Starts the floor program and waits for its byte.
pub fn start_floor(floor: &Path) -> Result<Duration> {
    let (mut out, out_end) = std::io::pipe()?;
    let mut command = Command::new(floor);
    command.stdin(Stdio::null()).stdout(out_end);
    let begin = Instant::now();
    let child = Reaped(
        command
            .spawn()
            .with_context(|| format!("starting {}", floor.display()))?,
    );
    drop(command);
    let seen = read_until(&mut out, b"R")?;
    let elapsed = begin.elapsed();
    drop(child);
    match seen {
        Seen::Marker(_) => Ok(elapsed),
        Seen::End(_) => bail!(
            "{} ended without output: does /dev/kvm work? Try `shoal doctor`",
            floor.display()
        ),
    }
}

/// What came of waiting for a marker.
pub enum Seen {
    /// All output up to it.
    Marker(String),
    /// The output ended before; this is the end of it.
    End(String),
}

/// Reads until `marker` has come.
pub fn read_until(from: &mut impl Read, marker: &[u8]) -> std::io::Result<Seen> {
    let mut all = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let n = from.read(&mut piece)?;
        if n == 0 {
            let tail = &all[all.len().saturating_sub(2000)..];
            return Ok(Seen::End(String::from_utf8_lossy(tail).into_owned()));
        }
        let from = all.len().saturating_sub(marker.len());
        all.extend_from_slice(&piece[..n]);
        if all[from..].windows(marker.len()).any(|w| w == marker) {
            return Ok(Seen::Marker(String::from_utf8_lossy(&all).into_owned()));
        }
    }
}

/// Takes the VMM's answer to the start request.
pub fn answer(host: &HostChannel) -> Result<Timeline> {
    let (message, _) = host.recv().context("the VMM's answer to the start request")?;
    let Message::Reply(reply) = message else {
        bail!("the VMM told an event before its answer")
    };
    match reply.map_err(|e| anyhow::anyhow!("the VMM refused: {e}"))? {
        Reply::Started { timeline } => Ok(timeline),
        _ => bail!("the VMM answered something else"),
    }
}

/// A machine without devices: descriptor 0 is /dev/kvm, 1 the kernel, 2 the console, 3 the initial RAM disk.
pub fn config(guest: &Guest) -> VmConfig {
    VmConfig {
        guest_id: "perf".into(),
        kvm: FdSlot(0),
        vcpus: 1,
        memory: MemoryConfig {
            bytes: guest.memory_mib << 20,
            pages: guest.pages,
        },
        kernel: KernelConfig {
            fd: FdSlot(1),
            layout: guest.kernel.layout.clone(),
        },
        initrd: guest.initrd.as_ref().map(|i| InitrdConfig {
            fd: FdSlot(3),
            len: i.len,
        }),
        cmdline: guest.cmdline.clone(),
        console: ConsoleConfig::Stream(FdSlot(2)),
        devices: vec![],
        exit_record: None,
    }
}

/// A seqpacket pair; the second end stays open across exec.
#[allow(unsafe_code)]
pub fn control_pair() -> Result<(HostChannel, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: socketpair writes two descriptors into the array.
    let r = unsafe {
        libc::socketpair(
            libc::AF_UNIX,
            libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC,
            0,
            fds.as_mut_ptr(),
        )
    };
    if r < 0 {
        return Err(std::io::Error::last_os_error()).context("making the control socket");
    }
    // SAFETY: both are new and owned by nobody else; fcntl on them touches no memory.
    unsafe {
        let (host, control) = (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]));
        libc::fcntl(control.as_raw_fd(), libc::F_SETFD, 0);
        Ok((host.into(), control))
    }
}
