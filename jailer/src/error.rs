//! What can go wrong, and what a jail lacks where the machine does not give all of it.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// One step of the way into the jail, in the order in which the child takes them. The documentation of
/// [`crate::child`] says which attack each stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Step {
    /// clone3: the process, its pid, IPC and UTS namespaces, inside its cgroup.
    Clone = 0,
    /// The child has its own life and dies with a parent that dies during the start.
    Lifeline,
    /// All descriptors are closed but those handed over.
    Descriptors,
    /// The process is made the first to go when memory runs out.
    OomScore,
    /// The user namespace of the jails.
    UserNamespace,
    /// The mount namespace that holds nothing but an empty root.
    MountNamespace,
    /// The network namespace without a network.
    NetNamespace,
    /// The root directory nobody can enter.
    Root,
    /// pid, IPC, UTS and cgroup namespaces (those that clone3 did not make).
    Namespaces,
    /// A second clone, into the pid namespace (rootless only).
    Fork,
    /// The host name is replaced.
    HostName,
    /// A session without a terminal.
    Session,
    /// An empty session keyring.
    Keyring,
    /// Resource limits.
    Limits,
    /// Core scheduling.
    CoreScheduling,
    /// Capabilities out of the bounding set, and uid 0 without a meaning.
    BoundingSet,
    /// Supplementary groups, gid and uid.
    Ids,
    /// All capabilities dropped.
    Capabilities,
    /// no_new_privs.
    NoNewPrivs,
    /// The landlock rule set that allows nothing.
    Landlock,
    /// execveat.
    Exec,
    /// The program runs. Not a step that fails.
    Done,
}

impl Step {
    /// All steps, by number.
    const ALL: [Step; 22] = [
        Step::Clone,
        Step::Lifeline,
        Step::Descriptors,
        Step::OomScore,
        Step::UserNamespace,
        Step::MountNamespace,
        Step::NetNamespace,
        Step::Root,
        Step::Namespaces,
        Step::Fork,
        Step::HostName,
        Step::Session,
        Step::Keyring,
        Step::Limits,
        Step::CoreScheduling,
        Step::BoundingSet,
        Step::Ids,
        Step::Capabilities,
        Step::NoNewPrivs,
        Step::Landlock,
        Step::Exec,
        Step::Done,
    ];

    /// The step of a number that the child stored.
    pub(crate) fn from_number(number: u32) -> Option<Step> {
        Step::ALL.get(number as usize).copied()
    }

    /// What the step tries, as a phrase.
    fn attempt(self) -> &'static str {
        match self {
            Step::Clone => "making the process with its namespaces and cgroup (clone3)",
            Step::Lifeline => "tying the starting process to its parent (prctl PR_SET_PDEATHSIG)",
            Step::Descriptors => "handing over the descriptors and closing all others (dup3, close_range)",
            Step::OomScore => "writing /proc/self/oom_score_adj",
            Step::UserNamespace => "entering the jails' user namespace (setns)",
            Step::MountNamespace => "entering the empty mount namespace (setns)",
            Step::NetNamespace => "entering the empty network namespace (setns)",
            Step::Root => "entering the closed root directory (chroot)",
            Step::Namespaces => "making pid, IPC, UTS or cgroup namespaces (unshare)",
            Step::Fork => "making the process inside its pid namespace (clone3)",
            Step::HostName => "replacing the host name (sethostname)",
            Step::Session => "starting a session without terminal (setsid)",
            Step::Keyring => "emptying the session keyring (keyctl)",
            Step::Limits => "setting resource limits (prlimit)",
            Step::CoreScheduling => "asking for core scheduling (prctl PR_SCHED_CORE)",
            Step::BoundingSet => "emptying the capability bounding set (prctl)",
            Step::Ids => "switching to the guest's group and user (setgroups, setresgid, setresuid)",
            Step::Capabilities => "dropping all capabilities (capset)",
            Step::NoNewPrivs => "setting no_new_privs (prctl)",
            Step::Landlock => "closing the file system by landlock (landlock_restrict_self)",
            Step::Exec => "executing the program (execveat)",
            Step::Done => "running",
        }
    }

    /// What to do about a failure with this error number.
    fn advice(self, errno: i32) -> &'static str {
        match (self, errno) {
            (Step::Clone, libc::ENOSPC) => {
                "raise the limits in /proc/sys/user/max_*_namespaces or pids.max of the parent cgroup"
            }
            (Step::Clone | Step::Fork, libc::EAGAIN) => {
                "the limit of processes is reached: raise pids.max or RLIMIT_NPROC, or stop guests"
            }
            (Step::Clone, libc::EPERM) => "run as root with CAP_SYS_ADMIN, or rootless from an ordinary user",
            (Step::Clone, libc::EACCES) => {
                "the cgroup is not delegated to this user: delegate it (systemd: Delegate=yes) with its parent's cgroup.procs"
            }
            (Step::Clone, libc::EBUSY) => {
                "the cgroup has children or controllers enabled; name one that is a leaf"
            }
            (Step::Clone, libc::ENOSYS) => "Linux 5.15 or newer is needed",
            (Step::Clone | Step::Fork, libc::ENOMEM) => {
                "free memory, or raise memory.max of the parent cgroup"
            }
            (Step::Descriptors, libc::EMFILE) => {
                "raise the limit of open files (RLIMIT_NOFILE) of this process"
            }
            (Step::Ids, libc::EAGAIN) => {
                "this user runs too many processes already; give each guest its own uid"
            }
            (Step::Ids, libc::EINVAL) => "the uid or gid is outside the range that the jailer was made with",
            (Step::CoreScheduling, errno) => crate::core_scheduling::advice(Some(errno)),
            (Step::Exec, libc::EACCES) => "the file must be an executable of this machine",
            (Step::Exec, libc::ENOEXEC) => "the file must be a static ELF program for this machine",
            (Step::Exec, libc::ENOENT) => {
                "the program names an interpreter, which an empty root does not have: build it static"
            }
            (_, libc::ENOSPC) => "raise the limits in /proc/sys/user/max_*_namespaces",
            (_, libc::EPERM) => "run as root with CAP_SYS_ADMIN, or rootless from an ordinary user",
            _ => "run `shoal doctor`, which checks what the jail needs of this machine",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.attempt())
    }
}

/// Why there is no jail. Whatever earlier steps had made is gone when a function of this crate returns one.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The id is outside the grammar.
    #[error("jail id {id:?} is refused: {why}; use 1 to 64 letters, digits and hyphens")]
    Id {
        /// The beginning of what was given.
        id: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// An id that no guest may run as.
    #[error(
        "uid {uid}, gid {gid} refused for a jail: 0 is root, 65534 is nobody's and shared, 4294967295 is no id; give the guest ids of its own"
    )]
    UnsafeIds {
        /// The user id.
        uid: u32,
        /// The group id.
        gid: u32,
    },
    /// A range that holds unsafe ids or none.
    #[error(
        "the id range {first}, {count} ids, is refused: it must hold at least one id, end below 4294967295, and hold neither 0 nor 65534"
    )]
    IdRange {
        /// First id.
        first: u32,
        /// How many.
        count: u32,
    },
    /// All ids are in use.
    #[error("all {count} ids from {first} on are in use by guests: stop guests, or configure a larger range")]
    IdsExhausted {
        /// First id.
        first: u32,
        /// How many.
        count: u32,
    },
    /// Two guests would share an id.
    #[error(
        "id {id} is taken by another guest, or outside the configured range: the record that names it is wrong"
    )]
    IdTaken {
        /// The id.
        id: u32,
    },
    /// The ids of a spec do not fit the jailer.
    #[error("uid {uid}, gid {gid} refused: this jailer may only use {allowed}")]
    IdsOutside {
        /// The user id.
        uid: u32,
        /// The group id.
        gid: u32,
        /// What it may use.
        allowed: String,
    },
    /// The descriptors to hand over cannot be placed.
    #[error("the descriptors to hand over are refused: {why}")]
    HandOver {
        /// What is wrong.
        why: String,
    },
    /// An argument holds a zero byte.
    #[error("argument {index} of the program is refused: {why}")]
    Argument {
        /// Which, from 0.
        index: usize,
        /// What is wrong.
        why: &'static str,
    },
    /// A file could not be opened or used.
    #[error("{attempt} {path} failed ({source}): {advice}")]
    File {
        /// What was tried.
        attempt: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
        /// What to do.
        advice: &'static str,
    },
    /// The cgroup cannot be used.
    #[error(transparent)]
    Cgroup(#[from] crate::cgroup::CgroupError),
    /// A call of the parent failed.
    #[error("{attempt} failed ({source}): {advice}")]
    System {
        /// What was tried.
        attempt: &'static str,
        /// Why it failed.
        source: io::Error,
        /// What to do.
        advice: &'static str,
    },
    /// A step in the child failed.
    #[error("jailing {id} stopped at this step: {step}: {}: {}", io::Error::from_raw_os_error(*.errno), .step.advice(*.errno))]
    Step {
        /// Whose jail.
        id: String,
        /// Which step.
        step: Step,
        /// The kernel's answer.
        errno: i32,
    },
    /// The child ended during a step, killed by somebody.
    #[error(
        "jailing {id} was cut off at this step: {step}: the process was ended by {exit:?}; see the kernel log for the cause"
    )]
    Cut {
        /// Whose jail.
        id: String,
        /// The last step begun.
        step: Step,
        /// How it ended, if it could be learned.
        exit: Option<crate::sys::Exit>,
    },
}

/// Something that this machine, user or configuration does not give to a jail: what, why, what it means, and what
/// would change it. The jail is made without it; `shoal doctor` prints it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Degradation {
    /// What is missing, in a few words.
    pub what: &'static str,
    /// Why.
    pub because: String,
    /// What an attacker gains.
    pub consequence: &'static str,
    /// What would bring it.
    pub remedy: &'static str,
}

impl fmt::Display for Degradation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} ({}); to have it: {}",
            self.what, self.consequence, self.because, self.remedy
        )
    }
}
