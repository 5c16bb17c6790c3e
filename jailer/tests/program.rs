//! The program shoal-jailer: its arguments, its exit codes, and that killing any process of the chain leaves nothing.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

mod common;
use common::{TestCgroup, fresh_uid, is_root, processes_of, real, status, until};

const JAILER: &str = env!("CARGO_BIN_EXE_shoal-jailer");

/// `shoal-jailer` with a user of its own, a cgroup, and `shoal-escape` with arguments.
fn command(uid: u32, parent: Option<&TestCgroup>, options: &[&str], program: &[&str]) -> Command {
    let mut command = Command::new(JAILER);
    command.args([
        "--id",
        "test",
        "--uid",
        &uid.to_string(),
        "--gid",
        &uid.to_string(),
    ]);
    if let Some(parent) = parent {
        command.arg("--cgroup-parent").arg(&parent.path);
    }
    command
        .args(options)
        .arg("--")
        .arg(real(env!("CARGO_BIN_EXE_shoal-escape")))
        .args(program);
    command.stdin(Stdio::null());
    command
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs a jailer that must refuse, and checks that it leaves nothing.
fn refused(mut command: Command, code: i32, why: &str) {
    let output = command.output().unwrap();
    assert_eq!(
        (output.status.code(), words(&output).contains(why)),
        (Some(code), true),
        "{}",
        words(&output)
    );
}

#[test]
fn hostile_ids_are_refused() {
    let long = "a".repeat(300);
    for id in ["", "a/b", "..", "a.b", &long] {
        let mut command = Command::new(JAILER);
        command.args(["--id", id, "--uid", "5", "--gid", "5", "--", "/bin/true"]);
        refused(command, 2, "refused");
    }
}

#[test]
fn wrong_arguments_are_refused() {
    let run = |options: &[&str]| {
        let mut command = command(77_777, None, options, &["exit", "0"]);
        command.output().unwrap()
    };
    for (options, why) in [
        (&["--fd", "900"][..], "is not open"),
        (&["--fd", "x"], "no descriptor"),
        (&["--memory-max", "5M"], "--cgroup-parent"),
        (&["--oom-score-adj", "1001"], "1001"),
        (&["--core-scheduling", "always"], "auto, on or off"),
        (&["--nonsense"], "--nonsense"),
    ] {
        let output = run(options);
        assert_eq!(
            (output.status.code(), words(&output).contains(why)),
            (Some(2), true),
            "{}",
            words(&output)
        );
    }
}

#[test]
fn root_and_shared_users_are_refused() {
    let name = "root_and_shared_users_are_refused";
    let (true, Some(parent)) = (is_root(name), TestCgroup::new(name)) else {
        return;
    };
    for uid in [0, 65534] {
        refused(
            command(uid, Some(&parent), &[], &["exit", "0"]),
            125,
            "refused for a jail",
        );
    }
    let mut without = Command::new(JAILER);
    without.args(["--id", "test", "--", "/bin/true"]);
    refused(without, 125, "--uid and --gid");
    assert!(parent.children().is_empty());
}

#[test]
fn core_scheduling_that_cannot_be_had_is_refused() {
    let name = "core_scheduling_that_cannot_be_had_is_refused";
    if !is_root(name) {
        return;
    }
    if shoal_jailer::core_scheduling_works().is_ok() {
        return println!("SKIP: {name}: it can be had here");
    }
    let uid = fresh_uid();
    let on = command(uid, None, &["--core-scheduling", "on"], &["exit", "0"]);
    refused(on, 125, "PR_SCHED_CORE");
    for word in ["auto", "off"] {
        let mut other = command(uid, None, &["--core-scheduling", word], &["exit", "4"]);
        assert_eq!(other.output().unwrap().status.code(), Some(4), "{word}");
    }
}

#[test]
fn the_exit_code_and_the_outputs_are_passed_on() {
    if !is_root("the_exit_code_and_the_outputs_are_passed_on") {
        return;
    }
    let uid = fresh_uid();
    assert_eq!(
        command(uid, None, &[], &["exit", "7"])
            .output()
            .unwrap()
            .status
            .code(),
        Some(7)
    );
    let listening = command(uid, None, &[], &["listen", "shoal-jailer-test", "0"])
        .output()
        .unwrap();
    assert_eq!(
        (listening.status.code(), &listening.stdout[..]),
        (Some(0), &b"y"[..])
    );
}

#[test]
fn a_filter_s_kill_names_the_system_call() {
    if !is_root("a_filter_s_kill_names_the_system_call") {
        return;
    }
    let output = command(
        fresh_uid(),
        None,
        &["--fd", "2=3"],
        &["attempt", "open-root", "kill"],
    )
    .output()
    .unwrap();
    assert_eq!(output.status.code(), Some(159), "{}", words(&output));
    assert!(
        words(&output).contains("forbidden system call: openat"),
        "{}",
        words(&output)
    );
}

#[test]
fn a_cgroup_that_is_not_delegated_is_refused() {
    let name = "a_cgroup_that_is_not_delegated_is_refused";
    let (true, Some(parent)) = (is_root(name), TestCgroup::new(name)) else {
        return;
    };
    let Some((mut command, _scratch)) = rootless(name, fresh_uid(), Some(&parent), &["exit", "0"]) else {
        return;
    };
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(125), "{}", words(&output));
    assert!(words(&output).contains("not delegated"), "{}", words(&output));
    assert!(parent.children().is_empty());
}

#[test]
fn an_ordinary_user_gets_a_jail() {
    let name = "an_ordinary_user_gets_a_jail";
    if !is_root(name) {
        return;
    }
    let uid = fresh_uid();
    // Without a cgroup: whoever moves a process into one must be below the delegated one already.
    let Some((mut command, _scratch)) = rootless(name, uid, None, &["exit", "6"]) else {
        return;
    };
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(6), "{}", words(&output));
    assert!(words(&output).contains("a user per guest"), "{}", words(&output));
    assert!(processes_of(uid).is_empty());
}

/// The jailer as an ordinary user. It is copied to where that user can execute it.
fn rootless(
    test: &str,
    uid: u32,
    parent: Option<&TestCgroup>,
    program: &[&str],
) -> Option<(Command, Scratch)> {
    let limit = fs::read_to_string("/proc/sys/user/max_user_namespaces").ok()?;
    if limit.trim() == "0" {
        println!("SKIP: {test}: user namespaces are turned off");
        return None;
    }
    let directory = std::env::temp_dir()
        .canonicalize()
        .ok()?
        .join(format!("shoal-rootless-{uid}"));
    fs::create_dir_all(&directory).unwrap();
    let jailer = directory.join("shoal-jailer");
    let escape = directory.join("shoal-escape");
    fs::copy(JAILER, &jailer).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_shoal-escape"), &escape).unwrap();
    let mut command = Command::new(jailer);
    command.args(["--id", "test"]);
    if let Some(parent) = parent {
        command.arg("--cgroup-parent").arg(&parent.path);
    }
    command.arg("--").arg(escape).args(program);
    command.uid(uid).gid(uid).stdin(Stdio::null());
    Some((command, Scratch(directory)))
}

/// A directory that goes with the test.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// Starts a jailer whose program listens, and waits until it does.
fn started(uid: u32, parent: &TestCgroup) -> (Child, std::io::PipeWriter) {
    let (held, hold) = std::io::pipe().unwrap();
    let name = format!("shoal-chain-{uid}");
    let mut jailer = command(uid, Some(parent), &["--fd", "0=3"], &["listen", &name, "3"]);
    let mut child = jailer.stdin(held).stdout(Stdio::piped()).spawn().unwrap();
    let mut byte = [0];
    child.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
    assert_eq!(byte, *b"y");
    (child, hold)
}

fn nothing_left(uid: u32, parent: &TestCgroup) {
    until("the program to end", || processes_of(uid).is_empty());
    until("the cgroup to go", || parent.children().is_empty());
}

fn kill(pid: u32, signal: i32) {
    // SAFETY: a process that this test started and has not waited for, or one below it.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
}

#[test]
fn killing_any_process_of_the_chain_leaves_nothing() {
    let name = "killing_any_process_of_the_chain_leaves_nothing";
    let (true, Some(parent)) = (is_root(name), TestCgroup::new(name)) else {
        return;
    };
    let uid = fresh_uid();
    // The jailer.
    let (mut jailer, _hold) = started(uid, &parent);
    kill(jailer.id(), libc::SIGKILL);
    jailer.wait().unwrap();
    nothing_left(uid, &parent);
    // The program.
    let (mut jailer, _hold) = started(uid, &parent);
    kill(processes_of(uid)[0], libc::SIGKILL);
    assert_eq!(jailer.wait().unwrap().code(), Some(137));
    nothing_left(uid, &parent);
    // The process that cleans up after the jailer.
    let (mut jailer, hold) = started(uid, &parent);
    kill(sweeper_of(jailer.id()), libc::SIGKILL);
    drop(hold);
    assert_eq!(jailer.wait().unwrap().code(), Some(0));
    nothing_left(uid, &parent);
}

/// The child of a jailer that is not jailed.
fn sweeper_of(jailer: u32) -> u32 {
    let children = fs::read_to_string(format!("/proc/{jailer}/task/{jailer}/children")).unwrap();
    let mut children = children.split_whitespace().map(|pid| pid.parse().unwrap());
    children
        .find(|pid| status(*pid, "Name").as_deref() == Some("exe"))
        .unwrap()
}

#[test]
fn a_first_signal_is_forwarded_and_a_second_kills() {
    let name = "a_first_signal_is_forwarded_and_a_second_kills";
    let (true, Some(parent)) = (is_root(name), TestCgroup::new(name)) else {
        return;
    };
    let uid = fresh_uid();
    let (mut jailer, _hold) = started(uid, &parent);
    // The program has no handler, and as number 1 of its namespace ignores the signal.
    kill(jailer.id(), libc::SIGTERM);
    until("the jailer to read the signal", || {
        status(jailer.id(), "ShdPnd").is_some_and(|set| set == "0".repeat(16))
    });
    assert_eq!(jailer.try_wait().unwrap(), None);
    kill(jailer.id(), libc::SIGTERM);
    assert_eq!(jailer.wait().unwrap().code(), Some(137));
    nothing_left(uid, &parent);
}

#[test]
fn without_a_jail_there_is_a_warning() {
    let mut command = command(77_777, None, &["--no-jail"], &["exit", "3"]);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stderr.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert!(line.contains("warning: jail:"), "{line}");
    assert_eq!(child.wait().unwrap().code(), Some(3));
}

#[test]
fn a_terminal_does_not_reach_the_jail() {
    let Ok(_terminal) = File::options().read(true).write(true).open("/dev/ptmx") else {
        println!("SKIP: a_terminal_does_not_reach_the_jail: there is no /dev/ptmx");
        return;
    };
    if !is_root("a_terminal_does_not_reach_the_jail") {
        return;
    }
    let mut command = command(fresh_uid(), None, &["--fd", "0=3"], &["exit", "0"]);
    command.stdin(_terminal);
    refused(command, 125, "is a terminal");
}

#[test]
fn a_trace_finds_what_no_policy_allows() {
    let file = std::env::temp_dir().join(format!("shoal-trace-of-{}", std::process::id()));
    let mut traced = Command::new(JAILER);
    let script = format!(
        "exec {} attempt open-root trace 3>/dev/null",
        env!("CARGO_BIN_EXE_shoal-escape")
    );
    let done = traced
        .arg("trace")
        .arg("--output")
        .arg(&file)
        .args(["--", "/bin/sh", "-c", &script])
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", words(&done));
    let report = Command::new(JAILER)
        .arg("policy-report")
        .arg(&file)
        .output()
        .unwrap();
    fs::remove_file(&file).unwrap();
    let text = String::from_utf8(report.stdout).unwrap();
    assert!(text.contains("NOT ALLOWED openat"), "{text}");
    assert!(
        text.contains("NOT ALLOWED")
            && text
                .lines()
                .any(|line| line.contains("1 line") && line.contains(" exit_group ")),
        "{text}"
    );
    assert_eq!(report.status.code(), Some(1));
}
