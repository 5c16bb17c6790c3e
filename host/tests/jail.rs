//! The confinement of VMMs as the host makes it: looked at from outside, over a restart of the daemon, and what a filter's
//! kill looks like. What the jail itself holds back is tried by `shoal-escape` (jailer/escape).
//!
//! These need `/dev/kvm`; a test that cannot run says so. `scripts/test.sh` runs them on this machine, and in the lab as root
//! and as an ordinary user.

#![forbid(unsafe_code)]

#[allow(dead_code, reason = "shared with the tests of guests")]
#[path = "guests/fleet.rs"]
mod fleet;

use std::collections::HashSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fleet::{Fleet, PATIENCE, kvm_opens, program};
use shoal_host::{CoreScheduling, GuestSpec, Host, HostConfig, State, StopReason, now_ns};

/// Whether the jails are made by root.
fn by_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A field of /proc/PID/status, of a process or of one of its threads.
fn status(of: &Path, field: &str) -> String {
    let text = fs::read_to_string(of.join("status")).expect("it runs");
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    value.expect("every kernel has it").trim().to_owned()
}

fn uid(pid: u32) -> String {
    status(&PathBuf::from(format!("/proc/{pid}")), "Uid")
}

/// Where the cgroup of version 2 of a process lies, when it is one of a guest.
fn leaf(pid: u32) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("it runs");
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    (path.contains("shoal-")).then(|| Path::new("/sys/fs/cgroup").join(path))
}

/// All threads of a VMM: under their filters, without privileges.
fn threads_are_confined(process: &Path) {
    let tasks = fs::read_dir(process.join("task")).expect("it runs");
    let tasks: Vec<PathBuf> = tasks.map(|task| task.expect("it runs").path()).collect();
    let main = process.file_name().expect("the process's number");
    let of_vmm = |task: &&PathBuf| task.ends_with(main) || status(task, "Name").starts_with("vcpu");
    assert_eq!(
        tasks.iter().filter(of_vmm).count(),
        3,
        "the event loop and two vCPUs: {tasks:?}"
    );
    for task in &tasks {
        // KVM's own threads run no code of the VMM.
        if of_vmm(&task) {
            assert_eq!(status(task, "Seccomp"), "2", "{}", status(task, "Name"));
        }
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status(task, set), "0000000000000000", "{set}");
        }
        assert_eq!(status(task, "NoNewPrivs"), "1");
    }
}

/// Neither files nor an environment, and namespaces of its own. The user that started it may look, as may root: of a user
/// namespace its maker has every capability.
fn has_nothing(process: &Path, root: bool) {
    for namespace in ["mnt", "net", "pid", "ipc", "uts", "user", "cgroup"] {
        let link = |of: &Path| fs::read_link(of.join("ns").join(namespace)).expect("it runs");
        assert_ne!(link(process), link(Path::new("/proc/self")), "{namespace}");
    }
    // The first process of a pid namespace: it sees no other.
    let numbers = status(process, "NSpid");
    assert!(numbers.ends_with("\t1"), "{numbers}");
    // The directory has mode 0000, and of a process that may not be dumped /proc belongs to root.
    let files = fs::read_dir(process.join("root/")).map(Iterator::count);
    let environment = fs::read(process.join("environ")).map(|text| text.len());
    for (what, found) in [("files in its root", files), ("environment", environment)] {
        match found {
            Ok(found) => assert_eq!(found, 0, "{what}"),
            Err(error) if !root => assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{what}"),
            Err(error) => panic!("{what}: {error}"),
        }
    }
}

#[test]
fn every_vmm_is_jailed_with_all_its_threads() {
    const TEST: &str = "every_vmm_is_jailed_with_all_its_threads";
    if !kvm_opens(TEST) {
        return;
    }
    let root = by_root();
    let fleet = Fleet::new();
    let mut spec = GuestSpec::new(fleet.probe(), 2, 32);
    spec.cmdline = "exit=halt".into();
    let guests: Vec<_> = (0..3).map(|_| fleet.start(spec.clone())).collect();
    let (mut users, mut leaves) = (HashSet::new(), HashSet::new());
    for guest in &guests {
        guest.await_output("probe: halt");
        let process = PathBuf::from(format!("/proc/{}", guest.pid()));
        users.insert(uid(guest.pid()));
        leaves.extend(leaf(guest.pid()));
        threads_are_confined(&process);
        has_nothing(&process, root);
    }
    let mine = uid(std::process::id());
    match root {
        true => assert!(users.len() == guests.len() && !users.contains(&mine), "{users:?}"),
        false => assert_eq!(users, HashSet::from([mine])),
    }
    for leaf in &leaves {
        let limit = |file: &str| fs::read_to_string(leaf.join(file)).expect("the limit is there");
        let memory: u64 = limit("memory.max").trim().parse().expect("a number");
        assert!((32 << 20..128 << 20).contains(&memory), "{memory}");
        // Kernels without swap lack the file.
        let swap = fs::read_to_string(leaf.join("memory.swap.max"));
        assert_eq!(swap.map_or("0".into(), |text| text.trim().to_owned()), "0");
        assert_eq!(limit("pids.max").trim(), "10");
        assert_eq!(limit("cpu.max").trim(), "300000 100000");
    }
    if leaves.is_empty() && std::env::var_os("SHOAL_LAB").is_none() {
        println!("SKIP: {TEST} (limits): no cgroup of version 2 with controllers");
    } else {
        assert_eq!(leaves.len(), guests.len(), "a leaf for each guest: {leaves:?}");
    }
    for guest in &guests {
        guest.stop(Duration::ZERO);
    }
    for leaf in &leaves {
        assert!(!leaf.exists(), "{leaf:?} is left");
    }
}

#[test]
fn an_adopted_guest_keeps_its_user() {
    if !kvm_opens("an_adopted_guest_keeps_its_user") {
        return;
    }
    let fleet = Fleet::new();
    let probe = fleet.probe();
    let vmm = program("shoal-vmm").expect("shoal-vmm is built");
    let config = HostConfig::new(fleet.path("adopted"), vmm);
    let start = |host: &Host| {
        let mut spec = GuestSpec::new(&probe, 1, 16);
        spec.cmdline = "exit=halt".into();
        let created = fleet.wait("creating", host.create(spec)).expect("it is created");
        let started = fleet.wait("starting", host.start(&created.id, now_ns()));
        let view = started.expect("it starts");
        (view.id, view.pid.expect("it runs"))
    };
    let first = fleet
        .wait("opening", Host::open(config.clone()))
        .expect("it opens");
    let (old, pid) = start(&first);
    let (user, leaf) = (uid(pid), leaf(pid));
    fleet.wait("closing", first.close(None));

    let second = fleet.wait("opening", Host::open(config)).expect("it opens");
    assert_eq!(second.show(&old).expect("it was adopted").pid, Some(pid));
    let (new, new_pid) = start(&second);
    if by_root() {
        assert_ne!(uid(new_pid), user, "the adopted guest's user was given away");
    } else {
        assert_eq!(uid(new_pid), user, "there is only one");
    }
    for guest in [&old, &new] {
        let stopped = fleet.wait("stopping", second.stop(guest, Duration::ZERO));
        stopped.expect("it stops");
    }
    assert!(leaf.is_none_or(|leaf| !leaf.exists()), "its cgroup is left");
}

/// How a VMM ends that does `what` instead of its work, and what it says; none where it cannot be tried.
fn misbehaved(test: &str, what: &str) -> Option<(StopReason, String)> {
    if !kvm_opens(test) {
        return None;
    }
    let me = std::env::current_exe().expect("a program has a path");
    let deps = me.parent().expect("it lies in a folder");
    let vmm = deps.with_file_name("examples").join("forbidden-vmm");
    if !vmm.exists() {
        println!("SKIP: {test}: {vmm:?} is missing; cargo test builds it");
        return None;
    }
    let fleet = Fleet::new();
    let mut spec = GuestSpec::new(fleet.probe(), 1, 16);
    spec.cmdline = what.into();
    let config = HostConfig::new(fleet.path("forbidden"), vmm);
    let host = fleet.wait("opening", Host::open(config)).expect("it opens");
    let created = fleet.wait("creating", host.create(spec));
    let id = created.expect("it is created").id;
    let started = fleet.wait("starting", host.start(&id, now_ns()));
    started.expect("it answers");
    // Whatever it is asked next is what it ends at.
    let stopped = fleet.wait("stopping", host.stop(&id, PATIENCE));
    let State::Stopped { reason } = stopped.expect("it stops").state else {
        panic!("stopping returns when it has ended")
    };
    let log = fleet.path("forbidden").join("guests").join(&id).join("vmm.log");
    let log = fs::read_to_string(&log).unwrap_or_else(|e| panic!("{log:?}: {e}"));
    Some((reason, log))
}

#[test]
fn a_filter_s_kill_names_the_system_call() {
    let Some((reason, log)) = misbehaved("a_filter_s_kill_names_the_system_call", "socket") else {
        return;
    };
    let StopReason::SeccompKill { syscall } = reason else {
        panic!("{reason:?}: {log}")
    };
    // Not every ordinary user may read the record of the kill.
    if by_root() || syscall.is_some() {
        assert_eq!(syscall.as_deref(), Some("socket"));
    }
}

#[test]
fn a_panic_is_told_from_an_escape_and_tells_nothing_of_the_guest() {
    const TEST: &str = "a_panic_is_told_from_an_escape_and_tells_nothing_of_the_guest";
    let Some((reason, log)) = misbehaved(TEST, "panic") else {
        return;
    };
    let StopReason::VmmBug { place } = reason else {
        panic!("{reason:?}: {log}")
    };
    assert!(place.contains("forbidden-vmm.rs:"), "{place}");
    assert!(log.contains(&place) && !log.contains("guest's own data"), "{log}");
}

#[test]
fn a_vmm_cannot_fill_the_disk() {
    let Some((reason, log)) = misbehaved("a_vmm_cannot_fill_the_disk", "grow") else {
        return;
    };
    // As the first process of its pid namespace it is not ended by the signal that comes with it.
    assert!(log.contains("FileTooLarge"), "{log}");
    assert_eq!(reason, StopReason::VmmExit { code: 1 });
}

#[test]
fn core_scheduling_is_each_guest_s_own_or_refused() {
    const TEST: &str = "core_scheduling_is_each_guest_s_own_or_refused";
    if !kvm_opens(TEST) {
        return;
    }
    let fleet = Fleet::new();
    let vmm = program("shoal-vmm").expect("shoal-vmm is built");
    let mut config = HostConfig::new(fleet.path("cores"), vmm);
    config.confinement.core_scheduling = CoreScheduling::On;
    let opened = fleet.wait("opening", Host::open(config.clone()));
    if shoal_jailer::core_scheduling_works().is_ok() {
        let host = opened.expect("it opens");
        let mut spec = GuestSpec::new(fleet.probe(), 2, 16);
        spec.cmdline = "exit=halt".into();
        let mut cookies = HashSet::from([0]);
        for _ in 0..2 {
            let created = fleet
                .wait("creating", host.create(spec.clone()))
                .expect("it is created");
            let started = fleet.wait("starting", host.start(&created.id, now_ns()));
            let pid = started.expect("it starts").pid.expect("it runs");
            let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
            let threads = tasks.map(|task| task.expect("it runs").file_name().into_string());
            let of_guest: HashSet<u64> = threads
                .map(|thread| thread.expect("a number").parse().expect("a number"))
                .map(|thread| shoal_jailer::cookie(thread).expect("root may ask"))
                .collect();
            assert_eq!(of_guest.len(), 1, "threads of one guest have {of_guest:x?}");
            assert!(
                cookies.is_disjoint(&of_guest),
                "{of_guest:x?}, and others {cookies:x?}"
            );
            cookies.extend(of_guest);
            let deleted = fleet.wait("deleting", host.delete(&created.id, true));
            deleted.expect("it is deleted");
        }
        return;
    }
    println!("SKIP: {TEST} (cookies): the kernel refuses them here");
    let error = shoal_host::chain(&opened.expect_err("it was asked for"));
    assert!(
        error.contains("PR_SCHED_CORE") && error.contains("leave it at auto"),
        "{error}"
    );
    // The daemon's default starts guests nevertheless.
    config.confinement.core_scheduling = CoreScheduling::Auto;
    let host = fleet.wait("opening", Host::open(config)).expect("it opens");
    fleet.wait("closing", host.close(None));
}
