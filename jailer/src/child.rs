//! What the child does between clone3 and execveat, step by step, with the attack that each step stops.
//!
//! The child shares the memory of the parent, whose calling thread is suspended until the exec (CLONE_VM |
//! CLONE_VFORK). So everything it needs is prepared by the parent in a [`Plan`]; here are system calls only: no
//! allocation, no lock, no formatting, no panic. Whatever a step says of its failure goes into the [`Report`], in
//! the shared memory.
//!
//! | step | stops |
//! |---|---|
//! | clone3 into the cgroup, with its own pid, IPC and UTS namespace | a moment outside the limits; seeing, signalling or tracing any process of the host; its shared memory and message queues |
//! | lifeline | a half-made jail that lives on when the daemon dies during the start |
//! | descriptors | use of whatever the daemon has open: other guests' disks and sockets, its database |
//! | oom score | the host's own processes being killed for a guest's memory |
//! | empty mount namespace, closed root | files, device nodes, /proc, /sys, set-uid programs; from inside a chroot the kernel refuses new user namespaces too |
//! | empty network namespace | the network, netlink, the host's abstract sockets |
//! | cgroup namespace | learning the host's cgroup paths |
//! | user namespace | use of capabilities that a kernel bug hands out |
//! | host name | learning the host's name |
//! | session | typing into the operator's terminal (TIOCSTI), signals of its job control |
//! | keyring | reading or using keys of the daemon's session |
//! | limits | core dumps with guest memory, exhaustion of descriptors, threads, locked memory |
//! | core scheduling | side channels between hyperthreads |
//! | bounding set, securebits | getting a capability from any exec or from uid 0 ever again |
//! | ids | files and processes of root and of other guests |
//! | capabilities | everything that root may do |
//! | no_new_privs | gaining rights by exec of set-uid or file-capability programs |
//! | landlock | paths, TCP, abstract sockets and signals, should a layer above fail |
//! | exec by descriptor, empty environment, sealed copy | exchange of the program at its path, secrets in the environment, overwriting the program for other guests; no ptrace and no core dump from its first instruction (see [`crate::Executable`]) |

use std::ffi::{c_char, c_int, c_void};
use std::os::fd::RawFd;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering::SeqCst};

use crate::clone::{CloneArgs, clone3};
use crate::error::Step;
use crate::rlimits;
use crate::shared;
use crate::sys::{self, Errno, raw};

/// What parent and child tell each other.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// The step that is being taken.
    pub step: AtomicU32,
    /// Its failure; 0 is none.
    pub errno: AtomicI32,
    /// Steps that failed without ending the start, as bits by number of the step.
    pub skipped: AtomicU32,
    /// The process made by the second clone (rootless), as the host numbers it.
    pub inner_pid: AtomicI32,
    /// Set when the second process has exec'd or ended, so that nothing uses this memory any more.
    pub inner_done: AtomicU32,
    /// When the first process began (CLOCK_MONOTONIC, ns).
    pub begun_ns: AtomicU64,
    /// When the jail was complete, just before the exec (CLOCK_MONOTONIC, ns).
    pub jailed_ns: AtomicU64,
}

impl Report {
    fn begin(&self, step: Step) {
        self.step.store(step as u32, SeqCst);
    }

    fn skip(&self, step: Step) {
        self.skipped.fetch_or(1 << step as u32, SeqCst);
    }
}

/// How much of a jail is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// All of it, by root.
    Root,
    /// What an ordinary user can have, through user namespaces.
    Rootless,
    /// Nothing but the hand-over of descriptors: `--no-jail`, for debugging and for measuring.
    Off,
}

/// A descriptor to hand over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Placed {
    pub source: RawFd,
    pub target: RawFd,
}

/// Descriptors of the jailer that the child uses itself. -1 is none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tools {
    pub program: RawFd,
    pub mount: RawFd,
    pub net: RawFd,
    pub user: RawFd,
    pub landlock: RawFd,
    /// Write end of a pipe whose read end only the parent has.
    pub lifeline: RawFd,
}

impl Tools {
    fn each(&mut self) -> [&mut RawFd; 6] {
        let Tools {
            program,
            mount,
            net,
            user,
            landlock,
            lifeline,
        } = self;
        [program, mount, net, user, landlock, lifeline]
    }
}

/// Everything the child needs, made by the parent.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub report: &'a Report,
    pub mode: Mode,
    /// Sorted by target, no target twice.
    pub handed: &'a mut [Placed],
    pub tools: Tools,
    pub uid: u32,
    pub gid: u32,
    pub rlimits: &'a [rlimits::Setting],
    pub oom_score_adj: Option<&'a [u8]>,
    pub last_capability: u32,
    pub core_scheduling: bool,
    pub die_with_parent: bool,
    /// Null-terminated arrays of C strings.
    pub argv: *const *const c_char,
    pub envp: *const *const c_char,
    /// Arguments of the second clone (rootless).
    pub inner: CloneArgs,
}

/// The child's entry.
///
/// # Safety
/// `plan` must point to a [`Plan`] that nobody else uses until this process has exec'd or ended.
pub(crate) unsafe extern "C" fn child_main(plan: *mut c_void) -> ! {
    // SAFETY: the caller's promise; the parent is suspended.
    let plan = unsafe { &mut *plan.cast::<Plan<'_>>() };
    let outcome = outer(plan);
    end(plan, outcome)
}

/// The entry of the process that the second clone makes.
unsafe extern "C" fn inner_main(plan: *mut c_void) -> ! {
    // SAFETY: `outer` passes the plan, and is suspended by CLONE_VFORK.
    let plan = unsafe { &mut *plan.cast::<Plan<'_>>() };
    let outcome = inner(plan);
    end(plan, outcome)
}

/// Ends the process; the exec was not reached.
fn end(plan: &Plan<'_>, outcome: Result<(), Errno>) -> ! {
    if let Err(errno) = outcome {
        plan.report.errno.store(errno, SeqCst);
    }
    // SAFETY: ends this process and nothing else; exit handlers, which are the parent's, do not run.
    unsafe {
        raw(libc::SYS_exit_group, [1, 0, 0, 0, 0, 0]).ok();
        libc::_exit(1)
    }
}

fn outer(plan: &mut Plan<'_>) -> Result<(), Errno> {
    plan.report.begun_ns.store(monotonic_ns(), SeqCst);
    plan.report.begin(Step::Lifeline);
    die_with_parent(true)?;
    plan.report.begin(Step::Descriptors);
    arrange_descriptors(plan)?;
    oom_score(plan);
    if plan.mode == Mode::Rootless {
        plan.report.begin(Step::UserNamespace);
        set_namespace(plan.tools.user, libc::CLONE_NEWUSER)?;
    }
    if plan.mode != Mode::Off {
        leave_the_host(plan)?;
    }
    if plan.mode == Mode::Rootless {
        fork_inside(plan)
    } else {
        inner(plan)
    }
}

/// Leaves the file system, network and cgroup tree of the host.
fn leave_the_host(plan: &Plan<'_>) -> Result<(), Errno> {
    plan.report.begin(Step::MountNamespace);
    set_namespace(plan.tools.mount, libc::CLONE_NEWNS)?;
    let mut fresh = libc::CLONE_NEWCGROUP;
    if plan.tools.net >= 0 {
        plan.report.begin(Step::NetNamespace);
        set_namespace(plan.tools.net, libc::CLONE_NEWNET)?;
    } else {
        fresh |= libc::CLONE_NEWNET;
    }
    plan.report.begin(Step::Namespaces);
    if plan.mode == Mode::Rootless {
        fresh |= libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWPID;
    }
    numbers(libc::SYS_unshare, [fresh as usize, 0, 0])?;
    plan.report.begin(Step::HostName);
    // SAFETY: a buffer of the length given.
    unsafe { raw(libc::SYS_sethostname, [c"jail".as_ptr() as usize, 4, 0, 0, 0, 0]) }?;
    // SAFETY: as above.
    unsafe {
        raw(
            libc::SYS_setdomainname,
            [c"jail".as_ptr() as usize, 4, 0, 0, 0, 0],
        )
    }?;
    plan.report.begin(Step::Root);
    // SAFETY: a C string.
    unsafe { raw(libc::SYS_chroot, [shared::ROOT.as_ptr() as usize, 0, 0, 0, 0, 0]) }?;
    // SAFETY: a C string.
    unsafe { raw(libc::SYS_chdir, [c"/".as_ptr() as usize, 0, 0, 0, 0, 0]) }?;
    Ok(())
}

/// Makes the process that becomes number 1 of the new pid namespace, as a child of our parent.
fn fork_inside(plan: &mut Plan<'_>) -> Result<(), Errno> {
    plan.report.begin(Step::Fork);
    let args = plan.inner;
    let report = plan.report;
    // SAFETY: the stack of `args` is used by this child alone; CLONE_VM | CLONE_VFORK suspend us until it has exec'd
    // or ended; `inner_main` fulfils what clone3 asks.
    unsafe { clone3(&args, inner_main, ptr::from_mut(plan).cast()) }?;
    report.inner_done.store(1, SeqCst);
    // SAFETY: ends this process only.
    unsafe { libc::_exit(0) }
}

/// From here on it is the process that will be the VMM.
fn inner(plan: &mut Plan<'_>) -> Result<(), Errno> {
    plan.report.begin(Step::Lifeline);
    die_with_parent(true)?;
    plan.report.begin(Step::Session);
    numbers(libc::SYS_setsid, [0; 3])?;
    if plan.mode != Mode::Off {
        become_nobody(plan)?;
        plan.report.begin(Step::NoNewPrivs);
        sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)?;
        if plan.tools.landlock >= 0 {
            plan.report.begin(Step::Landlock);
            numbers(
                libc::SYS_landlock_restrict_self,
                [plan.tools.landlock as usize, 0, 0],
            )?;
        }
    }
    plan.report.begin(Step::Lifeline);
    // Changing ids cleared it; and what happened to the parent before it was set, the pipe tells.
    die_with_parent(true)?;
    parent_lives(plan.tools.lifeline)?;
    if !plan.die_with_parent {
        die_with_parent(false)?;
    }
    plan.report.begin(Step::Exec);
    plan.report.jailed_ns.store(monotonic_ns(), SeqCst);
    execute(plan)
}

/// What the kernel's page of the clock says: no system call on usual machines.
fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes one timespec. It cannot fail, so that errno, which is the parent's, stays as it is.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Gives up keys, limits, ids and capabilities.
fn become_nobody(plan: &Plan<'_>) -> Result<(), Errno> {
    let report = plan.report;
    report.begin(Step::Keyring);
    const JOIN_SESSION_KEYRING: usize = 1;
    match numbers(libc::SYS_keyctl, [JOIN_SESSION_KEYRING, 0, 0]) {
        // No keys in this kernel; or, rootless, the user's quota of keys is used up.
        Err(libc::ENOSYS | libc::EDQUOT) => report.skip(Step::Keyring),
        other => other?,
    }
    report.begin(Step::Limits);
    for (resource, limit) in plan.rlimits {
        let args = [0, *resource as usize, ptr::from_ref(limit) as usize, 0, 0, 0];
        // SAFETY: the limit is alive and of the type that prlimit64 reads.
        unsafe { raw(libc::SYS_prlimit64, args) }?;
    }
    // ADDR_NO_RANDOMIZE and its like, were they set for the daemon.
    numbers(libc::SYS_personality, [0; 3])?;
    numbers(libc::SYS_umask, [0o077, 0, 0])?;
    if plan.core_scheduling {
        report.begin(Step::CoreScheduling);
        const CREATE: usize = 1;
        const THREAD_GROUP: usize = 1;
        sys::prctl(libc::PR_SCHED_CORE, CREATE, 0, THREAD_GROUP, 0)?;
    }
    if plan.mode == Mode::Root && plan.tools.user >= 0 {
        report.begin(Step::UserNamespace);
        set_namespace(plan.tools.user, libc::CLONE_NEWUSER)?;
    }
    report.begin(Step::BoundingSet);
    // NOROOT, NO_SETUID_FIXUP, KEEP_CAPS off, NO_CAP_AMBIENT_RAISE, each with its lock (linux/securebits.h).
    const SECUREBITS: usize = 0b1110_1111;
    sys::prctl(libc::PR_SET_SECUREBITS, SECUREBITS, 0, 0, 0)?;
    for capability in 0..=plan.last_capability {
        sys::prctl(libc::PR_CAPBSET_DROP, capability as usize, 0, 0, 0)?;
    }
    report.begin(Step::Ids);
    if plan.mode == Mode::Root {
        let (uid, gid) = (plan.uid as usize, plan.gid as usize);
        numbers(libc::SYS_setgroups, [0; 3])?;
        numbers(libc::SYS_setresgid, [gid; 3])?;
        numbers(libc::SYS_setresuid, [uid; 3])?;
    }
    report.begin(Step::Capabilities);
    sys::prctl(
        libc::PR_CAP_AMBIENT,
        libc::PR_CAP_AMBIENT_CLEAR_ALL as usize,
        0,
        0,
        0,
    )?;
    let header: [u32; 2] = [0x2008_0522, 0];
    let none = [0_u32; 6];
    // SAFETY: header and data of capability version 3 (linux/capability.h), alive during the call.
    unsafe {
        raw(
            libc::SYS_capset,
            [header.as_ptr() as usize, none.as_ptr() as usize, 0, 0, 0, 0],
        )
    }?;
    Ok(())
}

/// Executes the program with an empty signal mask (dispositions were reset by CLONE_CLEAR_SIGHAND).
fn execute(plan: &Plan<'_>) -> Result<(), Errno> {
    let none = 0_u64;
    // SAFETY: a set of 8 bytes, as the kernel's size of a signal set says.
    unsafe {
        raw(
            libc::SYS_rt_sigprocmask,
            [libc::SIG_SETMASK as usize, &raw const none as usize, 0, 8, 0, 0],
        )
    }?;
    let args = [
        plan.tools.program as usize,
        c"".as_ptr() as usize,
        plan.argv as usize,
        plan.envp as usize,
        libc::AT_EMPTY_PATH as usize,
        0,
    ];
    // SAFETY: an open descriptor and null-terminated arrays of C strings, which the parent keeps alive.
    unsafe { raw(libc::SYS_execveat, args) }.map(|_| ())
}

/// Moves the descriptors to their numbers, the jailer's own tools above them, and closes all others.
fn arrange_descriptors(plan: &mut Plan<'_>) -> Result<(), Errno> {
    let highest = plan.handed.last().map_or(0, |placed| placed.target);
    let tools_at = highest + 1;
    // First everything out of the way of everything: above all numbers that will be used.
    let above = (tools_at + 8) as usize;
    for placed in plan.handed.iter_mut() {
        placed.source = fcntl(placed.source, libc::F_DUPFD_CLOEXEC, above)?;
    }
    for tool in plan.tools.each() {
        if *tool >= 0 {
            *tool = fcntl(*tool, libc::F_DUPFD_CLOEXEC, above)?;
        }
    }
    let mut next = 0;
    for placed in plan.handed.iter() {
        numbers(
            libc::SYS_dup3,
            [placed.source as usize, placed.target as usize, 0],
        )?;
        close_range(next, placed.target - 1)?;
        next = placed.target + 1;
    }
    for (index, tool) in plan.tools.each().into_iter().enumerate() {
        let target = tools_at + index as RawFd;
        if *tool >= 0 {
            numbers(
                libc::SYS_dup3,
                [*tool as usize, target as usize, libc::O_CLOEXEC as usize],
            )?;
            *tool = target;
        } else {
            close_range(target, target)?;
        }
    }
    close_range(tools_at + 6, RawFd::MAX)
}

/// Closes `first` to `last`; nothing when there is nothing between.
fn close_range(first: RawFd, last: RawFd) -> Result<(), Errno> {
    if first > last {
        return Ok(());
    }
    numbers(libc::SYS_close_range, [first as usize, last as usize, 0])
}

/// Writes the score. Not fatal: a host without /proc has no jails anyway, and a score below the wanted one only
/// changes who is killed first.
fn oom_score(plan: &Plan<'_>) {
    let Some(text) = plan.oom_score_adj else { return };
    plan.report.begin(Step::OomScore);
    let path = c"/proc/self/oom_score_adj".as_ptr() as usize;
    let flags = (libc::O_WRONLY | libc::O_CLOEXEC) as usize;
    // SAFETY: a C string and flags; then a buffer of the length given; the descriptor is ours.
    let written = unsafe {
        raw(libc::SYS_openat, [libc::AT_FDCWD as usize, path, flags, 0, 0, 0]).and_then(|fd| {
            let written = raw(libc::SYS_write, [fd, text.as_ptr() as usize, text.len(), 0, 0, 0]);
            raw(libc::SYS_close, [fd, 0, 0, 0, 0, 0])?;
            written
        })
    };
    if written.is_err() {
        plan.report.skip(Step::OomScore);
    }
}

fn set_namespace(fd: RawFd, kind: c_int) -> Result<(), Errno> {
    numbers(libc::SYS_setns, [fd as usize, kind as usize, 0])
}

fn die_with_parent(yes: bool) -> Result<(), Errno> {
    let signal = if yes { libc::SIGKILL } else { 0 };
    sys::prctl(libc::PR_SET_PDEATHSIG, signal as usize, 0, 0, 0).map(|_| ())
}

/// ESRCH when the parent, the only reader of the pipe, is gone.
fn parent_lives(lifeline: RawFd) -> Result<(), Errno> {
    let mut pipe = libc::pollfd {
        fd: lifeline,
        events: 0,
        revents: 0,
    };
    let zero = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let args = [&raw mut pipe as usize, 1, &raw const zero as usize, 0, 0, 0];
    // SAFETY: one pollfd and a time, alive during the call.
    unsafe { raw(libc::SYS_ppoll, args) }?;
    if pipe.revents & libc::POLLERR != 0 {
        Err(libc::ESRCH)
    } else {
        Ok(())
    }
}

fn fcntl(fd: RawFd, command: c_int, argument: usize) -> Result<RawFd, Errno> {
    // SAFETY: the commands used here take numbers.
    unsafe {
        raw(
            libc::SYS_fcntl,
            [fd as usize, command as usize, argument, 0, 0, 0],
        )
    }
    .map(|fd| fd as RawFd)
}

/// A system call that takes up to three numbers and no address.
fn numbers(number: libc::c_long, [a, b, c]: [usize; 3]) -> Result<(), Errno> {
    // SAFETY: all callers name system calls whose arguments are numbers (or null where an address may be null).
    unsafe { raw(number, [a, b, c, 0, 0, 0]) }.map(|_| ())
}
