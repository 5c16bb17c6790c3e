//! The parent's side: making what jails share, and starting them.

use std::ffi::c_char;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::ptr;
use std::sync::atomic::Ordering::SeqCst;

use crate::cgroup::{self, Leaf};
use crate::child::{Mode, Placed, Plan, Report, Tools, child_main};
use crate::clone::{CLONE_CLEAR_SIGHAND, CLONE_INTO_CGROUP, ChildStack, CloneArgs, clone3};
use crate::error::{Degradation, JailError, Step};
use crate::exec::Executable;
use crate::id::{IdRange, Ids, JailId};
use crate::jail::Jail;
use crate::lacks::{no_cgroup, no_jail, one_user, skipped};
use crate::landlock;
use crate::shared::{self, Shared};
use crate::spec::{Argv, JailSpec, place, refuse_terminals};
use crate::sys::{self, Exit};

/// How the jails of one host are made.
#[derive(Debug, Clone)]
pub struct JailerConfig {
    /// [`Mode::Root`], [`Mode::Rootless`] or [`Mode::Off`]; [`Mode::detect`] chooses.
    pub mode: Mode,
    /// The users that guests may run as (root only).
    pub uids: IdRange,
    /// The groups that guests may run as (root only).
    pub gids: IdRange,
    /// The cgroup (v2) below which each guest gets a leaf, an absolute path; `None` goes without.
    pub cgroup_parent: Option<PathBuf>,
    /// What to do about limits that the cgroup cannot set.
    pub missing_controllers: cgroup::Missing,
}

/// Makes jails. Holds what they share; make one per daemon. Its methods may be called from several threads; each call
/// of [`Jailer::spawn`] suspends its thread for the 0.3 ms that a start takes.
#[derive(Debug)]
pub struct Jailer {
    mode: Mode,
    uids: IdRange,
    gids: IdRange,
    shared: Option<Shared>,
    landlock: Option<OwnedFd>,
    /// Each jail gets a network namespace of its own.
    own_net: bool,
    cgroup: Option<cgroup::Parent>,
    missing: cgroup::Missing,
    null: OwnedFd,
    last_capability: u32,
    degradations: Vec<Degradation>,
}

impl Mode {
    /// Root when this is root, rootless otherwise.
    pub fn detect() -> Mode {
        if sys::effective_ids().0 == 0 {
            Mode::Root
        } else {
            Mode::Rootless
        }
    }
}

impl Jailer {
    /// Makes what all jails share: their empty namespaces, the landlock rule set, the cgroup they are in.
    ///
    /// As root this also makes the calling process non-dumpable: the jails' processes share its memory for an instant
    /// while they run under the guest's ids already.
    ///
    /// # Errors
    /// [`JailError`] with what is missing; nothing is left behind.
    pub fn new(config: &JailerConfig) -> Result<Jailer, JailError> {
        let cgroup = config
            .cgroup_parent
            .as_deref()
            .map(cgroup::Parent::open)
            .transpose()?;
        let mut degradations = cgroup
            .as_ref()
            .map(cgroup::Parent::degradations)
            .unwrap_or_default();
        if cgroup.is_none() && config.mode != Mode::Off {
            degradations.push(no_cgroup());
        }
        let (uid, gid) = sys::effective_ids();
        let made = match config.mode {
            Mode::Off => None,
            Mode::Root => {
                sys::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0).map_err(dumpable)?;
                Some(shared::as_root(config.uids, config.gids)?)
            }
            Mode::Rootless => Some(shared::rootless(uid, gid)?),
        };
        let shared = made.map(|(shared, lacks)| {
            degradations.extend(lacks);
            shared
        });
        let mut landlock = None;
        let mut own_net = true;
        match config.mode {
            Mode::Off => degradations.push(no_jail()),
            Mode::Root | Mode::Rootless => match landlock::deny_all() {
                Ok((ruleset, version)) => {
                    landlock = Some(ruleset);
                    own_net = version < landlock::SCOPES;
                }
                Err(lack) => degradations.push(lack),
            },
        }
        if config.mode == Mode::Rootless {
            degradations.push(one_user(uid));
        }
        let null = File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .map_err(|source| JailError::File {
                attempt: "opening",
                path: "/dev/null".into(),
                source,
                advice: "mount a /dev",
            })?;
        Ok(Jailer {
            mode: config.mode,
            uids: config.uids,
            gids: config.gids,
            shared,
            landlock,
            own_net,
            cgroup,
            missing: config.missing_controllers,
            null: null.into(),
            last_capability: last_capability(),
            degradations,
        })
    }

    /// What every jail of this host lacks, for `shoal doctor` and for the log at the start.
    pub fn degradations(&self) -> &[Degradation] {
        &self.degradations
    }

    /// How much of a jail is made.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The cgroup of all jails.
    pub fn cgroup(&self) -> Option<&cgroup::Parent> {
        self.cgroup.as_ref()
    }

    /// Starts `program` in a jail. On return it has been executed: the kernel has accepted it and its first
    /// instruction is next.
    ///
    /// # Errors
    /// [`JailError::Step`] names the step that failed; there is no process, no cgroup and no mount of this jail then.
    pub fn spawn(&self, program: &Executable, spec: &JailSpec<'_>) -> Result<Jail, JailError> {
        self.check_ids(spec.ids)?;
        let mut handed = place(spec.fds, self.null.as_fd())?;
        if self.mode != Mode::Off {
            refuse_terminals(spec.fds)?;
        }
        let argv = Argv::new(spec.argv)?;
        let mut degradations = Vec::new();
        let mut leaf = None;
        if let Some(parent) = &self.cgroup {
            let (made, lacks) = parent.create(spec.id, spec.limits, self.missing)?;
            degradations.extend(lacks);
            leaf = Some(RemovedOnFailure(Some(made)));
        }
        let started = self.start(
            program,
            spec,
            &mut handed,
            &argv,
            leaf.as_ref().and_then(RemovedOnFailure::get),
        );
        let mut jail = started?;
        degradations.append(&mut jail.degradations);
        Ok(Jail {
            leaf: leaf.and_then(RemovedOnFailure::keep),
            degradations,
            ..jail
        })
    }

    fn check_ids(&self, ids: Ids) -> Result<(), JailError> {
        let (uid, gid) = (ids.uid(), ids.gid());
        if self.mode == Mode::Root && !(self.uids.contains(uid) && self.gids.contains(gid)) {
            let allowed = format!("users {} and groups {}", self.uids, self.gids);
            return Err(JailError::IdsOutside { uid, gid, allowed });
        }
        Ok(())
    }

    /// Clones, and reads the report. The jail does not own its leaf yet.
    fn start(
        &self,
        program: &Executable,
        spec: &JailSpec<'_>,
        handed: &mut [Placed],
        argv: &Argv,
        leaf: Option<&Leaf>,
    ) -> Result<Jail, JailError> {
        let system = |attempt| {
            move |source| JailError::System {
                attempt,
                source,
                advice: "free memory or descriptors (see RLIMIT_NOFILE)",
            }
        };
        let stack = ChildStack::new().map_err(system("mapping a stack"))?;
        let inner_stack = ChildStack::new().map_err(system("mapping a stack"))?;
        // The parent keeps `_alive`; while it is open the child knows that the parent lives.
        let (_alive, lifeline) = sys::pipe().map_err(system("making a pipe"))?;
        let raw = |fd: Option<BorrowedFd<'_>>| fd.map_or(-1, |fd| fd.as_raw_fd());
        let shared = self.shared.as_ref();
        let report = Report::default();
        let rlimits = spec.rlimits.settings(self.mode == Mode::Root);
        let oom_score_adj = spec.oom_score_adj.map(|score| score.min(1000).to_string());
        let envp: [*const c_char; 1] = [ptr::null()];
        let mut inner = clone_args(
            &inner_stack,
            (libc::CLONE_PARENT | libc::CLONE_PARENT_SETTID) as u64,
        );
        inner.parent_tid = report.inner_pid.as_ptr() as u64;
        let mut plan = Plan {
            report: &report,
            mode: self.mode,
            handed,
            tools: Tools {
                program: program.fd().as_raw_fd(),
                mount: raw(shared.map(|s| s.mount.as_fd())),
                net: raw(shared.filter(|_| !self.own_net).map(|s| s.net.as_fd())),
                user: raw(shared.and_then(|s| s.user.as_ref()).map(AsFd::as_fd)),
                landlock: raw(self.landlock.as_ref().map(AsFd::as_fd)),
                lifeline: lifeline.as_raw_fd(),
            },
            uid: spec.ids.uid(),
            gid: spec.ids.gid(),
            rlimits: &rlimits,
            oom_score_adj: oom_score_adj.as_ref().map(String::as_bytes),
            last_capability: self.last_capability,
            core_scheduling: spec.core_scheduling,
            die_with_parent: spec.die_with_parent,
            argv: argv.as_ptr(),
            envp: envp.as_ptr(),
            inner,
        };
        let mut args = clone_args(&stack, CLONE_CLEAR_SIGHAND);
        args.exit_signal = libc::SIGCHLD as u64;
        if self.mode == Mode::Root {
            args.flags |= (libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS) as u64;
        }
        if let Some(leaf) = leaf {
            args.flags |= CLONE_INTO_CGROUP;
            args.cgroup = leaf.dir().as_raw_fd() as u64;
        }
        // Rootless, the jail's process is made by the child, and its pidfd is opened afterwards.
        let mut pidfd: libc::c_int = -1;
        if self.mode != Mode::Rootless {
            args.flags |= libc::CLONE_PIDFD as u64;
            args.pidfd = &raw mut pidfd as u64;
        }
        let cloned = {
            let _quiet = SignalsBlocked::new();
            // SAFETY: CLONE_VM | CLONE_VFORK with a stack of the child's own: this thread is suspended until the child
            // has exec'd or ended; what the plan points to lives until the end of this function, which does not
            // return before both processes that might use it have done so (`outcome` sees to the inner one).
            unsafe { clone3(&args, child_main, (&raw mut plan).cast()) }
        };
        let pid = cloned.map_err(|errno| step_error(spec.id, Step::Clone, errno))?;
        // SAFETY: clone3 made this descriptor for us alone.
        let pidfd = (pidfd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(pidfd) });
        let (pid, pidfd) = self.outcome(spec.id, pid, pidfd, &report)?;
        Ok(Jail {
            pid,
            pidfd,
            leaf: None,
            degradations: skipped(report.skipped.load(SeqCst)),
            begun_ns: report.begun_ns.load(SeqCst),
            jailed_ns: report.jailed_ns.load(SeqCst),
        })
    }

    /// Learns from the report what became of the child, and waits for processes that are not the jail's.
    fn outcome(
        &self,
        id: &JailId,
        outer: i32,
        pidfd: Option<OwnedFd>,
        report: &Report,
    ) -> Result<(i32, OwnedFd), JailError> {
        let mut jailed = outer;
        if self.mode == Mode::Rootless {
            // The first process has ended, or will at once; the second is our child.
            let exit = sys::wait_pid(outer);
            jailed = report.inner_pid.load(SeqCst);
            if jailed == 0 {
                return Err(not_started(id, report, exit.ok().flatten()));
            }
            if report.inner_done.load(SeqCst) == 0 {
                // Somebody killed the first one, and the second still uses the memory of this call.
                // SAFETY: a child of ours that has not been waited for.
                unsafe { libc::kill(jailed, libc::SIGKILL) };
                let exit = sys::wait_pid(jailed);
                return Err(not_started(id, report, exit.ok().flatten()));
            }
        }
        let exec_begun = report.step.load(SeqCst) == Step::Exec as u32;
        if !exec_begun || report.errno.load(SeqCst) != 0 {
            let exit = sys::wait_pid(jailed);
            return Err(not_started(id, report, exit.ok().flatten()));
        }
        match pidfd.map_or_else(|| sys::pidfd_open(jailed), Ok) {
            Ok(pidfd) => Ok((jailed, pidfd)),
            Err(source) => {
                // SAFETY: a child of ours that has not been waited for.
                unsafe { libc::kill(jailed, libc::SIGKILL) };
                // It is ours and was killed: the wait ends.
                let _ = sys::wait_pid(jailed);
                let advice = "free descriptors (see RLIMIT_NOFILE)";
                Err(JailError::System {
                    attempt: "opening a pidfd",
                    source,
                    advice,
                })
            }
        }
    }
}

/// Flags and stack of a clone in the manner of vfork.
fn clone_args(stack: &ChildStack, flags: u64) -> CloneArgs {
    CloneArgs {
        flags: flags | (libc::CLONE_VM | libc::CLONE_VFORK) as u64,
        stack: stack.bottom(),
        stack_size: ChildStack::SIZE as u64,
        ..CloneArgs::default()
    }
}

fn step_error(id: &JailId, step: Step, errno: i32) -> JailError {
    JailError::Step {
        id: id.to_string(),
        step,
        errno,
    }
}

fn not_started(id: &JailId, report: &Report, exit: Option<Exit>) -> JailError {
    let step = Step::from_number(report.step.load(SeqCst)).unwrap_or(Step::Clone);
    match report.errno.load(SeqCst) {
        0 => JailError::Cut {
            id: id.to_string(),
            step,
            exit,
        },
        errno => step_error(id, step, errno),
    }
}

/// The leaf of a jail that is being made: removed unless the jail comes to be.
struct RemovedOnFailure(Option<Leaf>);

impl RemovedOnFailure {
    fn get(&self) -> Option<&Leaf> {
        self.0.as_ref()
    }

    fn keep(mut self) -> Option<Leaf> {
        self.0.take()
    }
}

impl Drop for RemovedOnFailure {
    fn drop(&mut self) {
        if let Some(leaf) = &mut self.0 {
            // Its process was waited for, so it is empty; the error that led here is the one to tell.
            let _ = leaf.remove();
        }
    }
}

/// Blocks all signals of this thread, so that none of this process's handlers runs in the child on its way.
struct SignalsBlocked(libc::sigset_t);

impl SignalsBlocked {
    fn new() -> SignalsBlocked {
        // SAFETY: plain data for which zeroes are valid; both sets live on this stack.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
            SignalsBlocked(before)
        }
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: the set was filled by pthread_sigmask.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, ptr::null_mut()) };
    }
}

/// The number of the last capability that the kernel knows; 63 when it does not say, which is as many as there can be.
fn last_capability() -> u32 {
    let text = std::fs::read_to_string("/proc/sys/kernel/cap_last_cap").unwrap_or_default();
    text.trim().parse().unwrap_or(63).min(63)
}

fn dumpable(errno: i32) -> JailError {
    let source = io::Error::from_raw_os_error(errno);
    JailError::System {
        attempt: "making this process non-dumpable (prctl)",
        source,
        advice: "see prctl(2)",
    }
}
