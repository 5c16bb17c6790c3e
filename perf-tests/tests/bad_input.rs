//! What goes wrong is told, the rest goes on, and nothing stays behind: with the real program.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn command() -> Command {
    let folder = std::env::var_os("SHOAL_BIN_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../build/bin"),
        PathBuf::from,
    );
    let mut command = Command::new(env!("CARGO_BIN_EXE_shoal-perf"));
    command.env("SHOAL_BIN_DIR", folder).env("RUST_BACKTRACE", "0");
    command
}

fn perf(arguments: &[&str]) -> Output {
    command().args(arguments).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn skip_without_kvm(name: &str) -> bool {
    let opened = fs::File::options().read(true).write(true).open("/dev/kvm");
    if let Err(e) = &opened {
        println!("SKIP: {name}: /dev/kvm cannot be opened: {e}");
    }
    opened.is_err()
}

/// A peer that only says its version, and then ends with nothing printed.
fn pretender(folder: &Path, version: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = folder.join("peer");
    let script =
        format!("#!/bin/sh\n[ \"$1\" = --version ] && echo '{version}' && exit 0\necho boom >&2\nexit 3\n");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn a_peer_that_is_missing_old_or_dies_is_told_and_the_rest_is_measured() {
    if skip_without_kvm("a_peer_that_is_missing_old_or_dies_is_told_and_the_rest_is_measured") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for (peer, why) in [
        ("qemu=/nonexistent/qemu".to_owned(), "/nonexistent/qemu"),
        (
            format!(
                "qemu={}",
                pretender(folder.path(), "QEMU emulator version 2.0.0").display()
            ),
            "too old",
        ),
    ] {
        let output = perf(&["boot", "--probe", "--runs", "1", "--json", "--peer", &peer]);
        assert!(output.status.success(), "{}", stderr(&output));
        assert!(stderr(&output).contains(why), "{}", stderr(&output));
        let result: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(
            result["subjects"].as_array().unwrap().len(),
            2,
            "floor and shoal-vmm"
        );
    }
    let dies = pretender(folder.path(), "QEMU emulator version 7.2.0");
    let peer = format!("qemu={}", dies.display());
    let output = perf(&["boot", "--probe", "--runs", "2", "--json", "--peer", &peer]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("boom"), "{}", stderr(&output));
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(result["runs"], 2);
}

#[test]
fn peers_that_are_unknown_are_refused_at_once() {
    let output = perf(&["boot", "--probe", "--peer", "xen=/x"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("firecracker"), "{}", stderr(&output));
}

/// The number that was given to a process or thread last.
fn newest_pid() -> u64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap();
    text.rsplit(' ').next().unwrap().trim().parse().unwrap()
}

#[test]
fn an_interrupted_run_saves_what_it_measured_and_leaves_no_process() {
    if skip_without_kvm("an_interrupted_run_saves_what_it_measured_and_leaves_no_process") {
        return;
    }
    for arguments in [
        &["boot", "--probe", "--runs", "100000"][..],
        &["density", "--probe", "--churn", "50", "--for", "1000"],
        &["jail", "--runs", "10000", "--jails", "0", "--mounts", "0"],
        &["api", "--probe", "--guests", "0,1", "--rounds", "10000"],
    ] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("r.json");
        let mut child = command()
            .args(arguments)
            .arg("--save")
            .arg(&file)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Each guest is five threads or more, kernel threads among them; warming up takes twenty guests at most.
        let (mut last, mut started) = (newest_pid(), 0);
        while started < 500 {
            std::thread::yield_now();
            // Numbers begin again from below when the highest was given.
            let newest = newest_pid();
            started += newest.saturating_sub(last);
            last = newest;
            assert!(
                child.try_wait().unwrap().is_none(),
                "{arguments:?} ended by itself"
            );
        }
        let session = children(child.id());
        let killed = Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status()
            .unwrap();
        assert!(killed.success());
        let printed: Vec<String> = BufReader::new(child.stdout.take().unwrap())
            .lines()
            .map_while(Result::ok)
            .collect();
        let status = child.wait().unwrap();
        assert!(status.success(), "{arguments:?}: {status}: {printed:?}");
        let result: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        assert_eq!(result["interrupted"], true, "{arguments:?}");
        assert!(printed.iter().any(|l| l.contains("interrupted")), "{printed:?}");
        for pid in session {
            assert!(
                !Path::new(&format!("/proc/{pid}")).exists(),
                "{arguments:?}: process {pid} stayed"
            );
        }
    }
}

/// Processes that `of` has started.
fn children(of: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|n| n.parse().ok()).collect()
}

#[test]
fn more_guests_than_memory_holds_are_refused_with_the_number_that_fits() {
    if skip_without_kvm("more_guests_than_memory_holds_are_refused_with_the_number_that_fits") {
        return;
    }
    let total = fs::read_to_string("/proc/meminfo").unwrap();
    let kib: u64 = total.split_whitespace().nth(1).unwrap().parse().unwrap();
    let many = (kib * 1024 / 600_000 + 1).min(100_000);
    if many == 100_000 {
        println!(
            "SKIP: more_guests_than_memory_holds_are_refused_with_the_number_that_fits: there is memory for all"
        );
        return;
    }
    let output = perf(&["density", "--probe", "--guests", &many.to_string()]);
    assert!(!output.status.success());
    assert!(stderr(&output).contains("ask for at most"), "{}", stderr(&output));
}

#[test]
fn results_of_another_form_and_truncated_ones_are_left_out_of_the_report() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    fs::write(path("old.json"), "{\"schema\":0,\"kind\":\"boot-probe\"}").unwrap();
    fs::write(path("cut.json"), "{\"schema\":1,\"kind\":\"boot-pr").unwrap();
    let page = path("r.html");
    let output = perf(&[
        "report",
        &path("old.json"),
        &path("cut.json"),
        &path("none.json"),
        "-o",
        &page,
    ]);
    assert!(!output.status.success());
    assert!(!Path::new(&page).exists());
    let output = perf(&["report", &path("old.json"), &path("cut.json"), "-o", &page]);
    let told = stderr(&output);
    assert!(
        told.contains("the form 0 of results") && told.contains("cut.json is truncated"),
        "{told}"
    );
}

#[test]
fn without_programs_kvm_or_names_the_message_says_what_to_do() {
    let empty = tempfile::tempdir().unwrap();
    let output = command()
        .args(["boot", "--probe"])
        .env("SHOAL_BIN_DIR", empty.path())
        .output()
        .unwrap();
    assert!(stderr(&output).contains("make build"), "{}", stderr(&output));
    let output = perf(&["all", "--only", "moon", "--out", &empty.path().to_string_lossy()]);
    assert!(
        stderr(&output).contains("there is no benchmark \"moon\""),
        "{}",
        stderr(&output)
    );
    let baseline = empty.path().join("b.json");
    fs::write(&baseline, "{\"schema\":9}").unwrap();
    let output = perf(&["check", &baseline.to_string_lossy()]);
    assert!(stderr(&output).contains("--update"), "{}", stderr(&output));
}
