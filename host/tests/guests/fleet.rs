//! A host for one test, its guests, and what they say.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use shoal_devices::virtio::net::open::MadeTap;
use shoal_host::doctor::{Verdict, examine};
use shoal_host::{Disk, GuestSpec, GuestView, Host, HostConfig, State, StopReason, Vsock, now_ns};
use tokio::runtime::Runtime;

/// How long a test waits before it gives up. Guests of guests of an emulated machine are slow.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Whether Linux guests can run here; says so when not.
pub fn linux_runs(test: &str) -> bool {
    static WHY_NOT: OnceLock<Option<String>> = OnceLock::new();
    let why_not = WHY_NOT.get_or_init(|| {
        if std::env::var_os("SHOAL_LAB").is_some() {
            return None;
        }
        let vmm = match program("shoal-vmm") {
            Ok(vmm) => vmm,
            Err(why) => return Some(why),
        };
        let runtime = Runtime::new().expect("a runtime");
        let report = runtime.block_on(examine(&vmm));
        (report.verdict != Verdict::Linux).then_some(report.reason)
    });
    if let Some(why) = why_not {
        println!("SKIP: {test}: Linux guests do not run here: {why}");
    }
    why_not.is_none()
}

/// Whether any guest can run here; says so when not.
pub fn kvm_opens(test: &str) -> bool {
    let opened = std::fs::File::options().read(true).write(true).open("/dev/kvm");
    let ready = opened.map(drop).map_err(|e| format!("/dev/kvm: {e}"));
    let ready = ready.and_then(|()| program("shoal-vmm").map(drop));
    if let Err(why) = &ready {
        println!("SKIP: {test}: {why}");
    }
    ready.is_ok()
}

/// A file of the build directory's `folder`, or why there is none.
fn built(variable: &str, folder: &str, name: &str) -> Result<PathBuf, String> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../build");
    let mine = std::env::current_exe().expect("a program has a path");
    let beside = mine
        .parent()
        .and_then(Path::parent)
        .map(|build| build.join(folder));
    let candidates: Vec<PathBuf> = match std::env::var_os(variable) {
        Some(dir) => vec![PathBuf::from(dir)],
        None => beside.into_iter().chain([workspace.join(folder)]).collect(),
    };
    let found = candidates
        .iter()
        .map(|dir| dir.join(name))
        .find(|path| path.exists());
    // The daemon wants absolute paths.
    let found = found.and_then(|path| path.canonicalize().ok());
    found.ok_or_else(|| format!("{name} is in none of {candidates:?}; make it with: make build images"))
}

/// A program of Shoal's, or why there is none.
pub fn program(name: &str) -> Result<PathBuf, String> {
    built("SHOAL_BIN_DIR", "bin", name)
}

/// An image, by its path below the folder of images.
#[track_caller]
pub fn image(name: &str) -> PathBuf {
    built("SHOAL_IMAGES", "images", name).unwrap_or_else(|why| panic!("{why} && scripts/test-images.sh"))
}

/// A host with a state directory of its own. It and its guests go away with the test.
pub struct Fleet {
    runtime: Runtime,
    pub host: Host,
    config: HostConfig,
    dir: tempfile::TempDir,
}

impl Fleet {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let vmm = program("shoal-vmm").expect("shoal-vmm is built");
        // Several threads: guests are served while a test waits for something else.
        let runtime = Runtime::new().expect("a runtime");
        let mut config = HostConfig::new(dir.path().join("state"), vmm);
        // scripts/policy-check.sh counts the system calls of these guests' VMMs.
        if let Ok(mode) = std::env::var("SHOAL_SECCOMP") {
            config.confinement.seccomp = mode.parse().expect("a mode of --seccomp");
        }
        let host = runtime
            .block_on(Host::open(config.clone()))
            .expect("opening the host");
        Self {
            runtime,
            host,
            config,
            dir,
        }
    }

    /// Does what a daemon does that is stopped and started again. The guests run on.
    pub fn reopen(&mut self) {
        let open = |fleet: &Self, config| {
            let opened = fleet.wait("opening", Host::open(config));
            opened.expect("opening a host")
        };
        // The state directory is locked as long as the old one is anywhere: something else takes its place.
        let mut elsewhere = self.config.clone();
        elsewhere.state_dir = self.path("between");
        let between = open(self, elsewhere);
        let old = std::mem::replace(&mut self.host, between);
        self.wait("closing", old.close(None));
        self.host = open(self, self.config.clone());
    }

    /// A guest that was started before.
    pub fn guest(&self, id: &str) -> Guest<'_> {
        Guest {
            fleet: self,
            id: id.to_owned(),
        }
    }

    /// Waits, but not for ever. `what` is said when it was too long.
    pub fn wait<T>(&self, what: &str, future: impl Future<Output = T>) -> T {
        let bounded = async { tokio::time::timeout(PATIENCE, future).await };
        let done = self.runtime.block_on(bounded);
        done.unwrap_or_else(|_| panic!("{what}: nothing within {PATIENCE:?}"))
    }

    /// A path in the test's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes a file of zeros for a disk.
    pub fn disk_file(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path(name);
        let file = std::fs::File::create(&path).expect("making a disk");
        file.set_len(bytes).expect("making a disk");
        path
    }

    /// The probe guest's kernel.
    pub fn probe(&self) -> PathBuf {
        let path = self.path("probe.elf");
        std::fs::write(&path, shoal_probe::PROBE).expect("writing the probe");
        path
    }

    /// Creates and starts a guest.
    #[track_caller]
    pub fn start(&self, spec: GuestSpec) -> Guest<'_> {
        let created = self.wait("creating", self.host.create(spec));
        let guest = Guest {
            fleet: self,
            id: created.expect("the guest is created").id,
        };
        guest.start();
        guest
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        // Guests outlive their host; these must not outlive their test.
        for guest in self.host.list() {
            let deleted = async { tokio::time::timeout(PATIENCE, self.host.delete(&guest.id, true)).await };
            match self.runtime.block_on(deleted) {
                Ok(Ok(())) => {}
                Ok(Err(e)) => println!("guest {} is left: {}", guest.id, shoal_host::chain(&e)),
                Err(_) => println!("guest {} is left: its VMM does not end", guest.id),
            }
        }
    }
}

/// How a guest ended.
#[derive(Debug)]
pub struct End {
    pub console: String,
    pub reason: StopReason,
    /// What its init told over vsock.
    pub exit_code: Option<i32>,
}

impl End {
    /// Fails with the console otherwise.
    #[track_caller]
    pub fn assert_is(&self, reason: StopReason, exit_code: Option<i32>) {
        assert_eq!(
            (&self.reason, self.exit_code),
            (&reason, exit_code),
            "{}",
            self.console
        );
    }
}

/// A guest that was started.
pub struct Guest<'f> {
    fleet: &'f Fleet,
    pub id: String,
}

impl Guest<'_> {
    /// Starts it, for the first time or again.
    #[track_caller]
    pub fn start(&self) {
        let host = &self.fleet.host;
        let started = self.fleet.wait("starting", host.start(&self.id, now_ns()));
        started.unwrap_or_else(|e| panic!("{}", shoal_host::chain(&e)));
    }

    pub fn view(&self) -> std::sync::Arc<GuestView> {
        self.fleet.host.show(&self.id).expect("it exists")
    }

    /// The process of its VMM.
    #[track_caller]
    pub fn pid(&self) -> u32 {
        self.view().pid.expect("it runs")
    }

    /// Follows its console from the beginning until `text` was printed.
    #[track_caller]
    pub fn await_output(&self, text: &str) -> String {
        let (console, found) = self.follow(Some(text));
        assert!(found, "the guest ended without {text:?}:\n{console}");
        console
    }

    /// Waits for its end.
    #[track_caller]
    pub fn end(&self) -> End {
        let (console, _) = self.follow(None);
        let view = self.view();
        let State::Stopped { reason } = &view.state else {
            panic!("it has ended, but is {:?}", view.state)
        };
        End {
            console,
            reason: reason.clone(),
            exit_code: view.exit_code,
        }
    }

    /// Asks it to stop, and ends it at the deadline.
    #[track_caller]
    pub fn stop(&self, deadline: Duration) -> End {
        let stopped = self
            .fleet
            .wait("stopping", self.fleet.host.stop(&self.id, deadline));
        stopped.expect("it can be stopped");
        self.end()
    }

    fn follow(&self, until: Option<&str>) -> (String, bool) {
        let mut seen = Vec::new();
        let follow = async {
            let mut reader = self.fleet.host.console_stream(&self.id, 0).expect("a console");
            while let Some(chunk) = reader.next().await.expect("reading the console") {
                seen.extend(chunk.bytes);
                if until.is_some_and(|text| String::from_utf8_lossy(&seen).contains(text)) {
                    return true;
                }
            }
            false
        };
        let found = self
            .fleet
            .runtime
            .block_on(async { tokio::time::timeout(PATIENCE, follow).await });
        let console = String::from_utf8_lossy(&seen).into_owned();
        match found {
            Ok(found) => (console, found),
            Err(_) => panic!("no {:?} within {PATIENCE:?}:\n{console}", until.unwrap_or("end")),
        }
    }
}

/// The project's own guest: its kernel, the tests' root file system, and a shell script for a workload. Words for the
/// kernel and for init may come before the script.
pub fn jeos(words: &str, script: &[&str]) -> GuestSpec {
    let script = script.join("; ");
    assert!(
        !script.contains('"'),
        "the command line knows no quotes in quotes"
    );
    let root = Disk {
        id: "root".into(),
        path: image("test/rootfs.erofs"),
        read_only: true,
        ..Disk::default()
    };
    GuestSpec {
        cmdline: format!(
            "console=ttyS0 root=/dev/vda rootfstype=erofs ro panic=-1 quiet {words} -- sh -c \"{script}\""
        ),
        disks: vec![root],
        vsock: Some(Vsock::default()),
        ..GuestSpec::new(image("vmlinux"), 1, 128)
    }
}

/// A TAP with the address [`Tap::ADDRESS`] on this machine, for as long as this lives.
pub struct Tap {
    name: String,
    /// To be removed.
    made: bool,
    /// It has several queues, and goes with this.
    _queues: Option<MadeTap>,
    /// Two with one address would take each other's packets.
    _only_one: MutexGuard<'static, ()>,
}

static ONLY_ONE: Mutex<()> = Mutex::new(());

impl Tap {
    /// The host's end of the network (RFC 5737).
    pub const ADDRESS: &str = "198.51.100.1/24";

    /// Takes the one that `SHOAL_TAP` names, which root has made for the user of this process, or else makes one.
    ///
    /// # Errors
    /// Why this machine lets us have none.
    pub fn new() -> Result<Self, String> {
        let given = std::env::var("SHOAL_TAP").ok();
        let mut tap = Self {
            name: given
                .clone()
                .unwrap_or_else(|| format!("shoalt{}", std::process::id())),
            made: false,
            _queues: None,
            // A test that failed meanwhile has dropped its TAP.
            _only_one: ONLY_ONE.lock().unwrap_or_else(PoisonError::into_inner),
        };
        if given.is_none() {
            tap.make()?;
        }
        Ok(tap)
    }

    /// Makes one for several queues.
    ///
    /// # Errors
    /// Why this machine lets us have none.
    pub fn with_queues() -> Result<Self, String> {
        let name = format!("shoalq{}", std::process::id());
        let made = MadeTap::new(&name).map_err(|e| shoal_host::chain(&e))?;
        let tap = Self {
            name,
            made: false,
            _queues: Some(made),
            _only_one: ONLY_ONE.lock().unwrap_or_else(PoisonError::into_inner),
        };
        tap.set_up()?;
        Ok(tap)
    }

    fn make(&mut self) -> Result<(), String> {
        // iproute2's ip, else busybox's own tool.
        run("ip", &["tuntap", "add", "dev", &self.name, "mode", "tap"]).or_else(|first| {
            run("tunctl", &["-t", &self.name]).map_err(|second| format!("{first}; {second}"))
        })?;
        self.made = true;
        self.set_up()
    }

    fn set_up(&self) -> Result<(), String> {
        run("ip", &["addr", "add", Self::ADDRESS, "dev", &self.name])?;
        run("ip", &["link", "set", &self.name, "up"])
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// One of its counters.
    pub fn counter(&self, name: &str) -> u64 {
        let path = format!("/sys/class/net/{}/statistics/{name}", self.name);
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        text.trim().parse().unwrap_or_else(|e| panic!("{path}: {e}"))
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if self.made
            && let Err(first) = run("ip", &["link", "del", &self.name])
            && let Err(second) = run("tunctl", &["-d", &self.name])
        {
            println!("the interface {} is left: {first}; {second}", self.name);
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let said = |why: String| format!("{program} {}: {}", arguments.join(" "), why.trim());
    let output = std::process::Command::new(program).args(arguments).output();
    let output = output.map_err(|e| said(e.to_string()))?;
    if output.status.success() {
        Ok(())
    } else {
        let errors = String::from_utf8_lossy(&output.stderr);
        // Busybox's tools follow with how they are used.
        Err(said(errors.lines().next().unwrap_or_default().to_owned()))
    }
}

/// The value of a line `name=value` of a console.
#[track_caller]
pub fn value<'c>(console: &'c str, name: &str) -> &'c str {
    let value = console
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    value
        .unwrap_or_else(|| panic!("no {name}= in:\n{console}"))
        .trim()
}
