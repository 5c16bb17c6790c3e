//! The commands against a real daemon. Programs are taken from `SHOAL_BIN_DIR`, else from cargo's target directory;
//! `make test` builds them first.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

fn program(name: &str) -> PathBuf {
    let built = Path::new(env!("CARGO_BIN_EXE_shoal"))
        .parent()
        .expect("a program lies in a folder");
    let candidates = match std::env::var_os("SHOAL_BIN_DIR") {
        Some(dir) => vec![PathBuf::from(dir).join(name)],
        None => vec![built.join(name), built.with_file_name("vmm").join(name)],
    };
    candidates.iter().find(|p| p.exists()).cloned().unwrap_or_else(|| {
        panic!("{name} is at none of {candidates:?}; build it (cargo build --bin {name}) or set SHOAL_BIN_DIR")
    })
}

fn skip_without_kvm(name: &str) -> bool {
    let opened = fs::File::options().read(true).write(true).open("/dev/kvm");
    if let Err(e) = &opened {
        eprintln!("SKIP: {name}: /dev/kvm cannot be opened: {e}");
    }
    opened.is_err()
}

/// A daemon that takes its guests along when the test ends.
struct Daemon {
    child: Child,
    dir: tempfile::TempDir,
}

impl Daemon {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        fs::write(dir.path().join("probe.elf"), shoal_probe::PROBE).expect("writing the probe");
        let mut command = Command::new(program("shoald"));
        command
            .arg("--socket")
            .arg(dir.path().join("s"))
            .arg("--state")
            .arg(dir.path().join("state"));
        command
            .arg("--vmm")
            .arg(program("shoal-vmm"))
            .arg("--stop-guests-on-exit");
        let mut child = command.stderr(Stdio::piped()).spawn().expect("starting shoald");
        let mut lines = BufReader::new(child.stderr.take().expect("it is piped"));
        let mut said = String::new();
        while !said.contains("ready") {
            assert!(
                lines.read_line(&mut said).expect("reading what shoald says") > 0,
                "shoald ended: {said}"
            );
        }
        std::thread::spawn(move || lines.read_to_string(&mut said));
        Self { child, dir }
    }

    fn shoal(&self, arguments: &[&str]) -> Output {
        let socket = self.dir.path().join("s");
        let mut command = Command::new(env!("CARGO_BIN_EXE_shoal"));
        command
            .args(arguments)
            .env("SHOAL_SOCKET", socket)
            .current_dir(self.dir.path());
        command.stdin(Stdio::null()).output().expect("starting shoal")
    }

    /// Runs a command that must succeed; what it printed.
    #[track_caller]
    fn prints(&self, arguments: &[&str]) -> String {
        let out = self.shoal(arguments);
        assert!(
            out.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8(out.stdout).expect("text")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        // It ends its guests; one that does not end is found by the test runner's own limit.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}

#[test]
fn runs_a_guest_and_ends_as_it_does() {
    if skip_without_kvm("runs_a_guest_and_ends_as_it_does") {
        return;
    }
    let daemon = Daemon::start();
    let run = ["run", "--kernel", "probe.elf", "--rm", "--cmdline"];
    for (cmdline, code, said) in [
        ("print=hello exit=poweroff", 0, ""),
        ("exit=reset", 64, "reset"),
        ("exit=triple", 65, "triple fault"),
    ] {
        let out = daemon.shoal(&[&run[..], &[cmdline]].concat());
        let (stdout, stderr) = (
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr),
        );
        assert_eq!(out.status.code(), Some(code), "{cmdline}: {stderr}");
        assert!(
            stdout.starts_with("probe: ready\n") && stderr.contains(said),
            "{stdout} {stderr}"
        );
    }
    let timed = daemon.shoal(
        &[
            &run[..],
            &["exit=poweroff", "--timeline", "--memory", "1G", "--cpus", "2"],
        ]
        .concat(),
    );
    assert!(
        String::from_utf8_lossy(&timed.stderr).contains("first-instruction"),
        "{timed:?}"
    );
    assert_eq!(
        daemon.prints(&["ps", "-a"]).lines().count(),
        1,
        "nothing is left but the heading"
    );
}

#[test]
fn manages_a_guest_that_runs_on() {
    if skip_without_kvm("manages_a_guest_that_runs_on") {
        return;
    }
    let daemon = Daemon::start();
    let cmdline = ["--cmdline", "print=hello exit=halt"];
    let id = daemon.prints(
        &[
            &["run", "-d", "--name", "web", "--kernel", "probe.elf"][..],
            &cmdline,
        ]
        .concat(),
    );
    let id = id.trim();
    assert!(daemon.prints(&["ps"]).contains(&format!("{id}  web   running")));
    let shown: Value = serde_json::from_str(&daemon.prints(&["show", "web", "--json"])).expect("JSON");
    assert_eq!((&shown["id"], &shown["state"]), (&id.into(), &"running".into()));
    assert!(
        shown["kernel"]["path"].as_str().unwrap().starts_with('/'),
        "paths are made absolute"
    );
    assert!(daemon.prints(&["show", id]).contains("overhead of its VMM"));
    assert_eq!(
        daemon.prints(&["limit", "web", "rng", "bandwidth=1K/10"]).trim(),
        id
    );
    assert!(
        daemon
            .prints(&["show", id])
            .contains("bandwidth 1024/s (burst 10)")
    );
    let refused = daemon.shoal(&["limit", "web", "disk:none", "operations=0"]);
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        stderr.contains("no disk with the id") && stderr.contains("disks.none"),
        "{stderr}"
    );
    let follower = std::thread::scope(|scope| {
        let follower = scope.spawn(|| daemon.prints(&["logs", "-f", "web"]));
        assert!(
            daemon
                .prints(&["stop", "-t", "0.1", "web"])
                .contains("ended by force")
        );
        follower.join().expect("it ends with the guest")
    });
    assert_eq!(follower, daemon.prints(&["logs", "web"]));
    assert!(!daemon.prints(&["ps"]).contains("web"));
    assert!(daemon.prints(&["ps", "--all"]).contains("stopped (killed)"));
    assert_eq!(daemon.prints(&["start", "web"]).trim(), id);

    let refused = daemon.shoal(&["rm", "web", "none"]);
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        stderr.contains("it is running") && stderr.contains("?force=true") && stderr.contains("\"none\""),
        "{stderr}"
    );
    daemon.prints(&["rm", "-f", "web"]);
    assert_eq!(
        daemon
            .prints(&["ps", "--json", "-a"])
            .split_whitespace()
            .collect::<String>(),
        r#"{"guests":[]}"#
    );
}

#[test]
fn errors_say_what_is_wrong_and_what_to_do() {
    let daemon = Daemon::start();
    let cases: [(&[&str], &[&str]); 7] = [
        (
            &["run", "--kernel", "no-such"],
            &["No such file", "field: kernel.path"],
        ),
        (
            &["run", "--kernel", "probe.elf", "--cpus", "33"],
            &["1 to 32", "field: vcpus"],
        ),
        (
            &["run", "--kernel", "probe.elf", "--disk", "."],
            &["a directory", "field: disks[0].path"],
        ),
        (
            &["run", "--kernel", "probe.elf", "--tap", "no-such-tap"],
            &["no interface", "ip tuntap add"],
        ),
        (
            &["run", "--image", "/no/such/image"],
            &["/no/such/image/vmlinux", "--image", "SHOAL_IMAGE"],
        ),
        (&["show", "../../etc"], &["no guest", "hint: "]),
        (
            &["--socket", "/no/such/socket", "ps"],
            &["no daemon listens", "shoald --socket"],
        ),
    ];
    for (arguments, wants) in cases {
        let out = daemon.shoal(arguments);
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{arguments:?}");
        for want in wants {
            assert!(
                stderr.contains(want),
                "{arguments:?}: {stderr:?} should tell of {want:?}"
            );
        }
    }
    for wrong in [
        &["run", "--memory", "1.5G"][..],
        &["stop"],
        &["stop", "x", "-t", "-1"],
        &["rum"],
    ] {
        assert_eq!(daemon.shoal(wrong).status.code(), Some(2), "{wrong:?}");
    }
    assert_eq!(daemon.prints(&["ps", "-a"]).lines().count(), 1);
    assert!(daemon.prints(&["completion", "bash"]).contains("shoal"));
}

#[test]
fn doctor_tells_one_of_three_things() {
    let vmm = program("shoal-vmm");
    let out = Command::new(env!("CARGO_BIN_EXE_shoal"))
        .args(["doctor", "--json", "--vmm"])
        .arg(vmm)
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    let want = match report["verdict"].as_str().expect("a verdict") {
        "linux" => 0,
        "bare-metal" => 3,
        "none" => 4,
        other => panic!("{other}"),
    };
    assert_eq!(out.status.code(), Some(want), "{report}");
    assert_eq!(report["probe"].is_object(), want != 4, "{report}");
    // What it says must be so: where /dev/kvm opens, at least the probe guest runs.
    let opens = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    assert_eq!(want == 4, !opens, "{report}");

    let broken = Command::new(env!("CARGO_BIN_EXE_shoal"))
        .args(["doctor", "--vmm", "/no/such/vmm"])
        .output()
        .unwrap();
    assert_eq!(broken.status.code(), Some(4));
}
