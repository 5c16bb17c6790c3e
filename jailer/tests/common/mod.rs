//! What the tests of jails share.
#![allow(dead_code)]

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use shoal_jailer::{
    Executable, HandOver, IdRange, Ids, Jail, JailError, JailSpec, Jailer, JailerConfig, Mode, Rlimits,
    cgroup,
};

/// Whether a test that needs root can run; says why not.
pub fn is_root(test: &str) -> bool {
    let root = fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
    if !root {
        println!("SKIP: {test}: it needs root");
    }
    root
}

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A user that no other test uses.
pub fn fresh_uid() -> u32 {
    3_300_000 + (std::process::id() % 10_000) * 50 + NEXT.fetch_add(1, Relaxed)
}

/// The program that is jailed.
pub fn escape() -> Executable {
    Executable::from_path(&real(env!("CARGO_BIN_EXE_shoal-escape"))).unwrap()
}

/// The path without symbolic links.
pub fn real(path: &str) -> PathBuf {
    Path::new(path).canonicalize().unwrap()
}

/// A cgroup (version 2) for one test, empty again when it is dropped.
pub struct TestCgroup {
    pub path: PathBuf,
}

impl TestCgroup {
    /// None without a mount of cgroup version 2; says so.
    pub fn new(test: &str) -> Option<TestCgroup> {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let top = mounts.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            (fields[2] == "cgroup2").then(|| PathBuf::from(fields[1]))
        });
        let Some(top) = top else {
            println!("SKIP: {test}: no cgroup of version 2 is mounted");
            return None;
        };
        let path = top.join(format!(
            "shoal-test-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Relaxed)
        ));
        fs::create_dir(&path).unwrap();
        Some(TestCgroup { path })
    }

    /// Gives it to a user.
    pub fn delegate(&self, uid: u32) {
        for name in ["", "cgroup.procs", "cgroup.subtree_control"] {
            chown(self.path.join(name), Some(uid), Some(uid)).unwrap();
        }
    }

    /// Names of the cgroups in it.
    pub fn children(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.path).unwrap().map(Result::unwrap);
        let directories = entries.filter(|entry| entry.file_type().unwrap().is_dir());
        directories
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect()
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        for child in self.children() {
            fs::write(self.path.join(&child).join("cgroup.kill"), "1").ok();
            until("a leaf to be empty", || {
                fs::remove_dir(self.path.join(&child)).is_ok()
            });
        }
        fs::remove_dir(&self.path).unwrap();
    }
}

/// Waits for what must come true, looking again and again.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::yield_now();
    }
}

/// Numbers of all processes that run as a user.
pub fn processes_of(uid: u32) -> Vec<u32> {
    let numbers = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    numbers
        .filter(|pid| {
            status(*pid, "Uid").is_some_and(|ids| ids.split_whitespace().next() == Some(&uid.to_string()))
        })
        .collect()
}

/// A field of /proc/PID/status.
pub fn status(pid: u32, field: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    Some(value.trim().to_owned())
}

/// A jailer for one user.
pub fn jailer(mode: Mode, uid: u32, parent: Option<&TestCgroup>) -> Jailer {
    Jailer::new(&JailerConfig {
        mode,
        uids: IdRange::new(uid, 1).unwrap(),
        gids: IdRange::new(uid, 1).unwrap(),
        cgroup_parent: parent.map(|parent| parent.path.clone()),
        missing_controllers: cgroup::Missing::Refuse,
    })
    .unwrap()
}

/// Starts `shoal-escape` with arguments.
pub fn spawn(
    jailer: &Jailer,
    program: &Executable,
    uid: u32,
    arguments: &[&str],
    fds: &[HandOver<'_>],
    limits: &cgroup::Limits,
) -> Result<Jail, JailError> {
    let spec = JailSpec {
        id: &"test".parse().unwrap(),
        ids: Ids::new(uid, uid).unwrap(),
        argv: &words(arguments),
        fds,
        limits,
        rlimits: Rlimits::default(),
        oom_score_adj: Some(345),
        core_scheduling: false,
        die_with_parent: false,
    };
    jailer.spawn(program, &spec)
}

/// The arguments of `shoal-escape`.
pub fn words(arguments: &[&str]) -> Vec<CString> {
    let words = ["shoal-escape"].iter().chain(arguments);
    words.map(|word| CString::new(*word).unwrap()).collect()
}
