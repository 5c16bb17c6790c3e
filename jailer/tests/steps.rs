//! Killing any process of the chain at any of its steps leaves nothing behind: every process, at each of its system calls,
//! from the start of shoal-jailer to its end.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

mod common;
use common::{TestCgroup, fresh_uid, is_root, processes_of, real, status};

const ESCAPE: &str = env!("CARGO_BIN_EXE_shoal-escape");
const JAILER: &str = env!("CARGO_BIN_EXE_shoal-jailer");

/// A run of shoal-jailer with a program that ends by itself.
struct Chain<'a> {
    uid: u32,
    /// Whether shoal-jailer runs as this user.
    rootless: bool,
    cgroup: Option<&'a TestCgroup>,
    /// Where the programs lie.
    folder: &'a Path,
}

impl Chain<'_> {
    /// Kills process `victim` at its system call `call`, and looks that nothing is left.
    fn killed(&self, victim: usize, call: u64) -> Outcome {
        let (mounts, uid) = (mounts(), self.uid.to_string());
        let mut kill = Command::new(ESCAPE);
        kill.arg("kill-at").args([victim.to_string(), call.to_string()]);
        if self.rootless {
            kill.args(["--user", &uid]);
        }
        kill.arg("--")
            .arg(self.folder.join("shoal-jailer"))
            .args(["--id", "test"]);
        if !self.rootless {
            kill.args(["--uid", &uid, "--gid", &uid]);
        }
        if let Some(parent) = self.cgroup {
            kill.arg("--cgroup-parent").arg(&parent.path);
        }
        kill.arg("--")
            .arg(self.folder.join("shoal-escape"))
            .args(["exit", "9"]);
        let output = kill.output().unwrap();
        let outcome = Outcome::of(&output);
        let what = format!("process {victim} at its call {call}: {outcome:?}");
        // The tool has seen every process of the chain end; whose parent was killed may still be init's to bury.
        let mut left = processes_of(self.uid);
        left.retain(|pid| status(*pid, "State").is_some_and(|state| !state.starts_with('Z')));
        assert_eq!(left, [0; 0], "{what}");
        assert_eq!(
            self.cgroup.map(TestCgroup::children).unwrap_or_default(),
            [""; 0],
            "{what}"
        );
        assert_eq!(self::mounts(), mounts, "{what}");
        outcome
    }

    /// Every process at every call.
    fn every_step(&self, test: &str) {
        let all = self.killed(usize::MAX, 1);
        assert_eq!(
            (all.killed.as_deref(), all.status),
            (None, 9),
            "it runs undisturbed"
        );
        let mut calls = Vec::new();
        for victim in 0..all.processes {
            let mut call = 0;
            let last = loop {
                call += 1;
                let outcome = self.killed(victim, call);
                if outcome.killed.is_none() {
                    break outcome;
                }
            };
            assert_eq!(last.status, 9, "it runs undisturbed");
            calls.push(call - 1);
        }
        println!(
            "{test}: killed at {calls:?} system calls of {} processes",
            all.processes
        );
        // The jailer, the child in its jail and the one that cleans up take dozens of steps each.
        assert!(
            calls.iter().filter(|calls| **calls > 30).count() >= 2,
            "{calls:?}"
        );
    }
}

#[derive(Debug)]
struct Outcome {
    /// The system call's name.
    killed: Option<String>,
    processes: usize,
    /// The jailer's.
    status: i32,
}

impl Outcome {
    /// `killed NAME, processes N, status N` or `passed, processes N, status N`
    fn of(output: &Output) -> Outcome {
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        let mut parts = text.trim().split(", ");
        let mut part = |name: &str| {
            parts
                .next()
                .and_then(|part| part.strip_prefix(name))
                .map(str::to_owned)
        };
        let killed = match text.starts_with("passed") {
            true => part("passed").and(None),
            false => Some(part("killed ").unwrap_or_else(|| panic!("{text}{errors}"))),
        };
        let mut number = |name| {
            part(name)
                .and_then(|n| n.parse().ok())
                .unwrap_or_else(|| panic!("{text}{errors}"))
        };
        Outcome {
            killed,
            processes: number("processes ") as usize,
            status: number("status "),
        }
    }
}

/// What is mounted at /proc, where the jails' empty file system is mounted in their namespace.
fn mounts() -> Vec<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let at_proc = text
        .lines()
        .filter(|line| line.split(' ').nth(4) == Some("/proc"));
    at_proc.map(str::to_owned).collect()
}

#[test]
fn any_process_of_root_s_chain_can_be_killed_at_any_step() {
    let name = "any_process_of_root_s_chain_can_be_killed_at_any_step";
    let (true, Some(parent)) = (is_root(name), TestCgroup::new(name)) else {
        return;
    };
    let folder = real(JAILER);
    let chain = Chain {
        uid: fresh_uid(),
        rootless: false,
        cgroup: Some(&parent),
        folder: folder.parent().unwrap(),
    };
    chain.every_step(name);
}

#[test]
fn any_process_of_a_user_s_chain_can_be_killed_at_any_step() {
    let name = "any_process_of_a_user_s_chain_can_be_killed_at_any_step";
    if !is_root(name) {
        return;
    }
    let limit = fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap_or_default();
    if limit.trim() == "0" {
        return println!("SKIP: {name}: user namespaces are turned off");
    }
    let uid = fresh_uid();
    // Where that user can execute them.
    let folder = std::env::temp_dir()
        .canonicalize()
        .unwrap()
        .join(format!("shoal-steps-{uid}"));
    fs::create_dir(&folder).unwrap();
    for program in [JAILER, ESCAPE] {
        fs::copy(program, folder.join(Path::new(program).file_name().unwrap())).unwrap();
    }
    Chain {
        uid,
        rootless: true,
        cgroup: None,
        folder: &folder,
    }
    .every_step(name);
    fs::remove_dir_all(&folder).unwrap();
}
