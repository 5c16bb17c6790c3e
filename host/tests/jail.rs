//! The confinement of VMMs as the host makes it: looked at from outside, over a restart of the daemon, and what a filter's
//! kill looks like. What the jail itself holds back is tried by `shoal-escape` (jailer/escape).
//!
//! These need `/dev/kvm` and root; a test that cannot run says so.

#![forbid(unsafe_code)]

#[allow(dead_code, reason = "shared with the tests of guests")]
#[path = "guests/fleet.rs"]
mod fleet;

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fleet::{Fleet, PATIENCE, kvm_opens, program};
use shoal_host::{GuestSpec, Host, HostConfig, State, StopReason, now_ns};

/// Whether jails of root can be tested; says so when not.
fn root_and_kvm(test: &str) -> bool {
    if !rustix::process::geteuid().is_root() {
        println!("SKIP: {test}: it needs root");
        return false;
    }
    kvm_opens(test)
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

#[test]
fn every_vmm_is_jailed_with_all_its_threads() {
    if !root_and_kvm("every_vmm_is_jailed_with_all_its_threads") {
        return;
    }
    let fleet = Fleet::new();
    let mut spec = GuestSpec::new(fleet.probe(), 2, 32);
    spec.cmdline = "exit=halt".into();
    let guests: Vec<_> = (0..3).map(|_| fleet.start(spec.clone())).collect();
    let mut users = HashSet::new();
    let mut leaves = Vec::new();
    for guest in &guests {
        guest.await_output("probe: halt");
        let process = PathBuf::from(format!("/proc/{}", guest.pid()));
        assert!(
            users.insert(uid(guest.pid())),
            "two guests run as {}",
            uid(guest.pid())
        );
        assert_ne!(uid(guest.pid()).split('\t').next(), Some("0"));
        let tasks = fs::read_dir(process.join("task")).expect("it runs");
        let tasks: Vec<PathBuf> = tasks.map(|task| task.expect("it runs").path()).collect();
        assert!(tasks.len() >= 3, "the event loop and two vCPUs: {tasks:?}");
        for task in &tasks {
            let of_guest =
                status(task, "Name").starts_with("vcpu") || task.ends_with(guest.pid().to_string());
            // KVM's own threads run no code of the VMM.
            if of_guest {
                assert_eq!(status(task, "Seccomp"), "2", "{}", status(task, "Name"));
            }
            for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                assert_eq!(status(task, set), "0000000000000000", "{set}");
            }
            assert_eq!(status(task, "NoNewPrivs"), "1");
        }
        for namespace in ["mnt", "net", "pid", "ipc", "uts", "user", "cgroup"] {
            let link = |of: &Path| fs::read_link(of.join("ns").join(namespace)).expect("it runs");
            assert_ne!(link(&process), link(Path::new("/proc/self")), "{namespace}");
        }
        let files = fs::read_dir(process.join("root/"))
            .expect("root may read it")
            .count();
        assert_eq!(files, 0, "files in its root");
        let environment = fs::read(process.join("environ")).expect("it runs");
        assert_eq!(environment.len(), 0);
        leaves.extend(leaf(guest.pid()));
    }
    for leaf in &leaves {
        let limit = |file: &str| fs::read_to_string(leaf.join(file)).expect("the limit is there");
        let memory: u64 = limit("memory.max").trim().parse().expect("a number");
        assert!((32 << 20..128 << 20).contains(&memory), "{memory}");
        assert_eq!(limit("pids.max").trim(), "10");
        assert_eq!(limit("cpu.max").trim(), "300000 100000");
    }
    if leaves.is_empty() {
        println!(
            "SKIP: every_vmm_is_jailed_with_all_its_threads (limits): no cgroup of version 2 with controllers"
        );
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
    if !root_and_kvm("an_adopted_guest_keeps_its_user") {
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
    assert_ne!(uid(new_pid), user, "the adopted guest's user was given away");
    for guest in [&old, &new] {
        let stopped = fleet.wait("stopping", second.stop(guest, Duration::ZERO));
        stopped.expect("it stops");
    }
    assert!(leaf.is_none_or(|leaf| !leaf.exists()), "its cgroup is left");
}

#[test]
fn a_filter_s_kill_names_the_system_call() {
    const TEST: &str = "a_filter_s_kill_names_the_system_call";
    if !root_and_kvm(TEST) {
        return;
    }
    let me = std::env::current_exe().expect("a program has a path");
    let deps = me.parent().expect("it lies in a folder");
    let vmm = deps.with_file_name("examples").join("forbidden-vmm");
    if !vmm.exists() {
        println!("SKIP: {TEST}: {vmm:?} is missing; cargo test builds it");
        return;
    }
    let fleet = Fleet::new();
    let probe = fleet.probe();
    let config = HostConfig::new(fleet.path("forbidden"), vmm);
    let host = fleet.wait("opening", Host::open(config)).expect("it opens");
    let created = fleet.wait("creating", host.create(GuestSpec::new(probe, 1, 16)));
    let id = created.expect("it is created").id;
    let started = fleet.wait("starting", host.start(&id, now_ns()));
    started.expect("it answers");
    // Whatever it is asked next is what it ends at.
    let stopped = fleet.wait("stopping", host.stop(&id, PATIENCE));
    let State::Stopped { reason } = stopped.expect("it stops").state else {
        panic!("stopping returns when it has ended")
    };
    let syscall = Some("socket".to_owned());
    assert_eq!(reason, StopReason::SeccompKill { syscall });
}
