//! Starts VMM processes, each in a jail of its own. The one place that does, so that every VMM is started the same way.

use std::collections::HashSet;
use std::ffi::CString;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use shoal_jailer::seccomp;
use shoal_jailer::{
    Degradation, Executable, HandOver, IdAllocator, IdRange, Ids, Jail, JailError, JailId, JailSpec, Jailer,
    JailerConfig, KillLog, Mode, Rlimits, cgroup,
};

use crate::cgroups;
use crate::config::Confinement;

/// Users of guests: a range that systemd's plan of user ids leaves unused, in blocks of which each state directory gets
/// one, so that the guests of two daemons do not run as the same user either.
const FIRST_USER: u32 = 1_900_000_000;
const USERS: u32 = 4096;
const BLOCKS: u64 = 50_000;

/// Memory of a VMM beside its guest's: its own, the kernel's page tables and vCPUs, pages of its files.
const VMM_MEMORY: u64 = 64 << 20;
/// Threads of a VMM beside its vCPUs: the event loop, those that KVM starts in its name, and some to spare.
const VMM_THREADS: u32 = 8;
/// How far the files may grow whose size is not given: the log, which the daemon empties long before, and the exit record.
const SMALL_FILES: u64 = 4 << 20;
/// How long the kernel may take to tell which system call a filter refused.
const KILL_RECORD_PATIENCE: Duration = Duration::from_millis(500);

/// VMMs cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum LauncherError {
    /// The program is missing or cannot be used.
    #[error("the VMM program {path:?} cannot be used; name it with --vmm or SHOAL_VMM")]
    Program {
        /// The program.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There can be no jails. The text says what to do.
    #[error("VMMs cannot be jailed (--no-jail goes without, for debugging): {0}")]
    Jail(JailError),
}

/// Starts VMM processes.
///
/// A VMM gets its control socket as standard input, its log as error output, and nothing else: no environment, no other
/// descriptor, no file system, no network, a user of its own, and limits where there is a cgroup. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Launcher(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    jailer: Jailer,
    program: Executable,
    seccomp: seccomp::Mode,
    ids: Mutex<IdAllocator>,
    kills: Option<Mutex<KillLog>>,
    core_scheduling: bool,
    degradations: Vec<Degradation>,
    /// What was said in the log already.
    told: Mutex<HashSet<&'static str>>,
}

/// What a VMM is started with.
#[derive(Debug)]
pub(crate) struct Launch {
    pub guest_id: String,
    /// A Unix seqpacket socket, listening or connected.
    pub control: OwnedFd,
    pub log: File,
    pub memory_bytes: u64,
    pub vcpus: u32,
    /// Bytes of the largest file that it gets.
    pub largest_file: u64,
}

/// A VMM that was started.
#[derive(Debug)]
pub(crate) struct Spawned {
    pub pid: i32,
    pub pidfd: OwnedFd,
    pub lease: Lease,
    /// When its process began, and when its jail was complete (CLOCK_MONOTONIC, ns).
    pub begun_ns: u64,
    pub jailed_ns: u64,
}

/// What a guest's jail is made of, kept with its record for the daemon that adopts it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JailRecord {
    /// The user that its VMM runs as, when it is its own.
    pub uid: Option<u32>,
    /// The cgroup that its leaf lies in.
    pub cgroup: Option<PathBuf>,
}

/// What a VMM has of the host as long as it lives. Dropping it gives nothing back, since guests outlive the daemon.
#[derive(Debug)]
pub(crate) struct Lease {
    launcher: Launcher,
    ids: Option<Ids>,
    leaf: Option<cgroup::Leaf>,
    record: JailRecord,
}

impl Launcher {
    /// Makes what all jails share, and starts VMMs from the program `vmm` as it is now: one that takes its place is used
    /// by the next launcher. `owner` chooses the block of users.
    ///
    /// # Errors
    /// When the program cannot be used, or jails cannot be made.
    pub fn new(vmm: &Path, owner: &Path, confinement: &Confinement) -> Result<Self, LauncherError> {
        let program = |source| LauncherError::Program {
            path: vmm.to_owned(),
            source,
        };
        rustix::fs::access(vmm, rustix::fs::Access::EXEC_OK).map_err(|e| program(e.into()))?;
        let path = vmm.canonicalize().map_err(program)?;
        let executable =
            Executable::from_path(&path).map_err(|e| program(io::Error::other(e.to_string())))?;
        let users = users(owner, confinement).map_err(LauncherError::Jail)?;
        let mode = if confinement.jail {
            Mode::detect()
        } else {
            Mode::Off
        };
        let (core_scheduling, shared_cores) = match mode {
            Mode::Off => (false, None),
            Mode::Root | Mode::Rootless => confinement
                .core_scheduling
                .decide()
                .map_err(LauncherError::Jail)?,
        };
        let (jailer, no_cgroup) = jailer(mode, users, confinement.cgroup.as_deref())?;
        let kills = KillLog::open();
        let mut degradations = jailer.degradations().to_vec();
        if let Some(because) = no_cgroup {
            let lack = degradations.iter_mut().find(|lack| lack.what == "cgroup");
            lack.into_iter().for_each(|lack| lack.because = because.clone());
        }
        degradations.extend(kills.as_ref().err().cloned());
        degradations.extend(shared_cores);
        if let Some(lack) = weak_filter(confinement.seccomp) {
            degradations.push(lack);
        }
        Ok(Self(Arc::new(Inner {
            jailer,
            program: executable,
            seccomp: confinement.seccomp,
            ids: Mutex::new(IdAllocator::new(users)),
            kills: kills.ok().map(Mutex::new),
            core_scheduling,
            degradations,
            told: Mutex::default(),
        })))
    }

    /// What the jails lack on this machine and with these settings.
    pub fn degradations(&self) -> &[Degradation] {
        &self.0.degradations
    }

    /// Says in the log, once, what the jails lack.
    pub(crate) fn warn(&self) {
        self.tell(&self.0.degradations);
    }

    fn tell(&self, lacks: &[Degradation]) {
        for lack in lacks {
            if lock(&self.0.told).insert(lack.what) {
                tracing::warn!("guests lack a layer of their jail: {lack}");
            }
        }
    }

    /// Starts a VMM. The calling thread waits until it has been executed.
    ///
    /// # Errors
    /// [`JailError`] with the step that failed; nothing of the jail is left then.
    pub(crate) fn spawn(&self, launch: Launch) -> Result<Spawned, JailError> {
        let inner = &*self.0;
        if inner.jailer.mode() == Mode::Off || weak_filter(inner.seccomp).is_some() {
            let (jail, seccomp) = (inner.jailer.mode() != Mode::Off, inner.seccomp);
            tracing::warn!(guest = %launch.guest_id, jail, %seccomp, "a guest is started without all of its confinement");
        }
        if let Some(kills) = &inner.kills {
            lock(kills).take_in();
        }
        let own_user = inner.jailer.mode() == Mode::Root;
        let ids = own_user.then(|| lock(&inner.ids).allocate()).transpose()?;
        let jail = self.jail(&launch, ids).inspect_err(|_| self.release(ids))?;
        let Jail {
            pid,
            pidfd,
            leaf,
            degradations,
            begun_ns,
            jailed_ns,
        } = jail;
        self.tell(&degradations);
        let parent = inner.jailer.cgroup().map(|parent| parent.path().to_owned());
        let record = JailRecord {
            uid: ids.map(Ids::uid),
            cgroup: leaf.as_ref().and(parent),
        };
        let lease = Lease {
            launcher: self.clone(),
            ids,
            leaf,
            record,
        };
        Ok(Spawned {
            pid,
            pidfd,
            lease,
            begun_ns,
            jailed_ns,
        })
    }

    fn jail(&self, launch: &Launch, ids: Option<Ids>) -> Result<Jail, JailError> {
        let inner = &*self.0;
        let seccomp = inner.seccomp.to_string();
        let arguments = [
            "shoal-vmm",
            "--control-fd",
            "0",
            "--guest-id",
            &launch.guest_id,
            "--seccomp",
            &seccomp,
        ];
        let argv: Result<Vec<CString>, _> = arguments.into_iter().map(CString::new).collect();
        let argv = argv.map_err(|e| JailError::Argument {
            index: e.nul_position(),
            why: "it holds a zero byte",
        })?;
        let fds = [(launch.control.as_fd(), 0), (launch.log.as_fd(), 2)];
        let ids = match ids {
            Some(ids) => ids,
            // Not used without root.
            None => Ids::new(FIRST_USER, FIRST_USER)?,
        };
        inner.jailer.spawn(
            &inner.program,
            &JailSpec {
                id: &launch.guest_id.parse()?,
                ids,
                argv: &argv,
                fds: &fds.map(|(fd, target)| HandOver { fd, target }),
                limits: &limits(launch),
                rlimits: Rlimits {
                    file_size: Some(launch.largest_file.max(SMALL_FILES)),
                    ..Rlimits::default()
                },
                oom_score_adj: Some(500),
                core_scheduling: inner.core_scheduling,
                die_with_parent: false,
            },
        )
    }

    fn release(&self, ids: Option<Ids>) {
        if let Some(ids) = ids {
            lock(&self.0.ids).release(ids);
        }
    }

    /// Takes over what an earlier daemon's VMM has.
    pub(crate) fn adopt(&self, guest_id: &str, record: Option<&JailRecord>) -> Lease {
        let record = record.cloned().unwrap_or_default();
        let ids = record.uid.and_then(|uid| {
            // Outside of the range when it was configured otherwise: then no guest of ours gets it either.
            lock(&self.0.ids).reserve(uid).ok()
        });
        let leaf = record.cgroup.as_deref().and_then(|parent| leaf(parent, guest_id));
        Lease {
            launcher: self.clone(),
            ids,
            leaf,
            record,
        }
    }

    /// Removes what is left of the jail of a VMM that is gone.
    pub(crate) fn clean_up(&self, guest_id: &str, record: Option<&JailRecord>) {
        let recorded = record.and_then(|record| record.cgroup.clone());
        // A daemon that ended in the middle of a start has not recorded the jail.
        let current = self.0.jailer.cgroup().map(|parent| parent.path().to_owned());
        for parent in [recorded, current].into_iter().flatten() {
            remove_leaf(leaf(&parent, guest_id));
        }
    }

    /// The name of the system call that a filter ended the process for, when the kernel tells it in time.
    fn forbidden_call(&self, pid: u32, patience: Duration) -> Option<&'static str> {
        let kills = self.0.kills.as_ref()?;
        let pid = i32::try_from(pid).ok()?;
        lock(kills).find(pid, patience).map(|kill| kill.name())
    }
}

impl Lease {
    /// What to remember of it.
    pub(crate) fn record(&self) -> &JailRecord {
        &self.record
    }

    /// Gives everything back, once the VMM `pid` has ended.
    pub(crate) fn end(self) {
        remove_leaf(self.leaf);
        self.launcher.release(self.ids);
    }

    /// Which system call the VMM `pid` was ended for: by SIGSYS, or so that nobody can tell.
    pub(crate) fn forbidden_call(&self, pid: u32, certain: bool) -> Option<&'static str> {
        let patience = if certain {
            KILL_RECORD_PATIENCE
        } else {
            Duration::ZERO
        };
        self.launcher.forbidden_call(pid, patience)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind these locks is whole between any two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn users(owner: &Path, confinement: &Confinement) -> Result<IdRange, JailError> {
    let first = confinement.first_user.unwrap_or_else(|| {
        let mut hasher = DefaultHasher::new();
        owner.hash(&mut hasher);
        FIRST_USER + (hasher.finish() % BLOCKS) as u32 * USERS
    });
    IdRange::new(first, USERS)
}

/// The jailer, and why it has no cgroup when none was asked for.
fn jailer(
    mode: Mode,
    users: IdRange,
    cgroup: Option<&Path>,
) -> Result<(Jailer, Option<String>), LauncherError> {
    let make = |cgroup_parent| {
        Jailer::new(&JailerConfig {
            mode,
            uids: users,
            gids: users,
            cgroup_parent,
            missing_controllers: cgroup::Missing::Report,
        })
    };
    let found = match (mode, cgroup) {
        (_, Some(path)) => return Ok((make(Some(path.to_owned())).map_err(LauncherError::Jail)?, None)),
        (Mode::Off, None) => Err("there is no jail".into()),
        (_, None) => cgroups::prepare(),
    };
    let (jailer, why) = match found {
        Ok(path) => match make(Some(path)) {
            Err(JailError::Cgroup(error)) => (make(None), Some(error.to_string())),
            made => (made, None),
        },
        Err(why) => (make(None), Some(why)),
    };
    Ok((jailer.map_err(LauncherError::Jail)?, why))
}

fn weak_filter(mode: seccomp::Mode) -> Option<Degradation> {
    if mode == seccomp::Mode::Kill {
        return None;
    }
    Some(Degradation {
        what: "seccomp",
        because: format!("it was asked for by --seccomp {mode}"),
        consequence: "a VMM that was taken over can use all system calls",
        remedy: "leave --seccomp away",
    })
}

fn limits(launch: &Launch) -> cgroup::Limits {
    const PERIOD_US: u64 = 100_000;
    cgroup::Limits {
        memory_max: Some(launch.memory_bytes + launch.memory_bytes / 64 + VMM_MEMORY),
        // One processor for the event loop.
        cpu_max: Some(cgroup::CpuMax {
            quota_us: (u64::from(launch.vcpus) + 1) * PERIOD_US,
            period_us: PERIOD_US,
        }),
        pids_max: Some(launch.vcpus + VMM_THREADS),
        ..cgroup::Limits::default()
    }
}

fn leaf(parent: &Path, guest_id: &str) -> Option<cgroup::Leaf> {
    let parent = cgroup::Parent::open(parent).ok()?;
    parent.existing(&guest_id.parse::<JailId>().ok()?).ok().flatten()
}

/// The size of the largest of these files (bytes). A block device has none, and no limit holds for it.
pub(crate) fn largest_file(files: &[impl AsFd]) -> u64 {
    let sizes = files.iter().filter_map(|file| rustix::fs::fstat(file).ok());
    sizes.map(|stat| stat.st_size.unsigned_abs()).max().unwrap_or(0)
}

fn remove_leaf(leaf: Option<cgroup::Leaf>) {
    if let Some(mut leaf) = leaf
        && let Err(error) = leaf.remove()
    {
        tracing::warn!(leaf = leaf.name(), %error, "a guest's cgroup cannot be removed");
    }
}
