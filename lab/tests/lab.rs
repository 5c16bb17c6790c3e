//! Starts the lab and looks at what comes back. Without QEMU or its kernel the tests say that they were skipped.

use shoal_lab::host::{LabError, Sources};
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// `shoal-lab ARGUMENTS`, or `None` when this machine lacks something, which is said.
fn lab(test: &str, arguments: &[&str]) -> Option<Command> {
    let tree = std::env::var_os("SHOAL_LAB_KERNEL").map(PathBuf::from);
    match Sources::find(tree.as_deref(), None) {
        Ok(_) => {}
        Err(error @ (LabError::NoQemu | LabError::NoBusybox { .. } | LabError::NoKernelTree { .. })) => {
            println!("SKIP: {test}: {error}");
            return None;
        }
        Err(error) => panic!("{error}"),
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_shoal-lab"));
    command.args(arguments).stdin(Stdio::null());
    Some(command)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn code(output: &Output) -> i32 {
    output
        .status
        .code()
        .unwrap_or_else(|| panic!("shoal-lab was killed: {}", output.status))
}

/// A directory that goes away with it.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("shoal-lab-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// One machine, everything that a program may expect of it.
#[test]
fn machine_has_what_it_should() {
    const SCRIPT: &str = r#"
        set -e
        test -c /dev/kvm; test -c /dev/net/tun; test -d /dev/shm; test -r /dev/fd/0
        grep -q svm /proc/cpuinfo
        test "$(hostname)" = shoal-lab; test "$ASKED" = 'a b'
        for controller in cpu memory io pids; do grep -qw $controller /sys/fs/cgroup/cgroup.subtree_control; done
        ping -c 1 -W 5 127.0.0.1 >/dev/null
        ip link add name br0 type bridge # the kernel asks modprobe for it
        # A jailer does this; the first root file system of a kernel would refuse.
        unshare -m sh -ec 'mount -t tmpfs t /mnt; cp /bin/busybox /mnt; mkdir /mnt/old; pivot_root /mnt /mnt/old; /busybox true'
        cd /in; cat file; test "$(readlink link)" = file
        if touch /in/new 2>/dev/null; then exit 90; fi
        cd /out; mkdir deep; head -c 3000000 /in/random > deep/copy; mv deep/copy copy; chmod 751 copy; sync copy
        echo first >&2; echo last >&2
        exit 7
    "#;
    let (input, output) = (Scratch::new("in"), Scratch::new("out"));
    let random: Vec<u8> = (0..3_000_000_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    fs::write(input.0.join("random"), &random).unwrap();
    fs::write(input.0.join("file"), b"from the host\0\xff\n").unwrap();
    std::os::unix::fs::symlink("file", input.0.join("link")).unwrap();
    let (share_in, share_out) = (
        format!("{}:/in", input.0.display()),
        format!("{}:/out:rw", output.0.display()),
    );
    let arguments = [
        "run",
        "--timeout",
        "120",
        "--env",
        "ASKED=a b",
        "--share",
        &share_in,
        "--share",
        &share_out,
        "--",
        "sh",
        "-c",
        SCRIPT,
    ];
    let Some(mut command) = lab("machine_has_what_it_should", &arguments) else {
        return;
    };
    let result = command.output().unwrap();
    assert_eq!(
        (code(&result), text(&result.stderr).as_str()),
        (7, "first\nlast\n")
    );
    assert_eq!(
        result.stdout, b"from the host\0\xff\n",
        "standard output is binary-safe and by itself"
    );
    assert!(
        fs::read(output.0.join("copy")).unwrap() == random,
        "3 MB went in and out"
    );
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(
        fs::metadata(output.0.join("copy")).unwrap().permissions().mode() & 0o777,
        0o751
    );
    assert!(!input.0.join("new").exists());
}

#[test]
fn time_is_limited() {
    let arguments = [
        "run",
        "--timeout",
        "8",
        "--",
        "sh",
        "-c",
        "echo started; sleep 1000",
    ];
    let Some(mut command) = lab("time_is_limited", &arguments) else {
        return;
    };
    let result = command.output().unwrap();
    assert_eq!(code(&result), 124);
    assert!(
        text(&result.stderr).contains("the time is up: 8 s"),
        "{}",
        text(&result.stderr)
    );
}

#[test]
fn kernel_panic_is_reported() {
    let arguments = [
        "run",
        "--timeout",
        "120",
        "--",
        "sh",
        "-c",
        "echo c > /proc/sysrq-trigger",
    ];
    let Some(mut command) = lab("kernel_panic_is_reported", &arguments) else {
        return;
    };
    let result = command.output().unwrap();
    assert_eq!(code(&result), 125);
    assert!(
        text(&result.stderr).contains("Kernel panic - not syncing"),
        "{}",
        text(&result.stderr)
    );
}

#[test]
fn signals_and_missing_programs_are_a_shells() {
    let Some(mut command) = lab(
        "signals_and_missing_programs_are_a_shells",
        &["run", "--", "sh", "-c", "kill -TERM $$"],
    ) else {
        return;
    };
    assert_eq!(code(&command.output().unwrap()), 128 + 15);
    let mut command = lab("", &["run", "--", "no-such-program"]).unwrap();
    let result = command.output().unwrap();
    assert_eq!(code(&result), 127);
    assert!(
        text(&result.stderr).contains("cannot run no-such-program"),
        "{}",
        text(&result.stderr)
    );
}

#[test]
fn standard_input_arrives_and_ends() {
    let arguments = ["run", "--timeout", "120", "--stdin", "--", "sh", "-c", "wc -c"];
    let Some(mut command) = lab("standard_input_arrives_and_ends", &arguments) else {
        return;
    };
    let scratch = Scratch::new("stdin");
    let path = scratch.0.join("input");
    fs::write(&path, vec![b'x'; 200_000]).unwrap();
    let result = command.stdin(fs::File::open(&path).unwrap()).output().unwrap();
    assert_eq!(
        (code(&result), text(&result.stdout).trim()),
        (0, "200000"),
        "{}",
        text(&result.stderr)
    );
}

/// Killed without a chance to clean up, the lab leaves no QEMU.
#[test]
fn qemu_dies_with_the_lab() {
    let arguments = ["run", "--", "sh", "-c", "echo up; sleep 1000"];
    let Some(mut command) = lab("qemu_dies_with_the_lab", &arguments) else {
        return;
    };
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "up\n");
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
    let qemu: libc::pid_t = children.trim().parse().expect("one child, QEMU");
    // SAFETY: pidfd_open has no pointer arguments.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, qemu, 0) };
    assert!(fd >= 0);
    // SAFETY: the call above returned this new descriptor, which nothing else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    child.kill().unwrap();
    child.wait().unwrap();
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: the one pollfd is valid for the call.
    let ended = unsafe { libc::poll(&raw mut poll, 1, 30_000) };
    assert_eq!(ended, 1, "QEMU (process {qemu}) lives on");
}

/// The same instructions give the same time, to the nanosecond.
#[test]
fn counted_time_repeats() {
    let arguments = [
        "run",
        "--icount",
        "--timeout",
        "240",
        "--",
        "sh",
        "-c",
        "dd if=/dev/zero bs=1M count=20 | md5sum; cat /proc/uptime",
    ];
    let Some(mut first) = lab("counted_time_repeats", &arguments) else {
        return;
    };
    let [first, second] = [
        first.output().unwrap(),
        lab("", &arguments).unwrap().output().unwrap(),
    ];
    assert_eq!(code(&first), 0, "{}", text(&first.stderr));
    assert_eq!(
        (text(&first.stdout), text(&first.stderr)),
        (text(&second.stdout), text(&second.stderr))
    );
}

/// This very program runs in the lab, twice: its test `inside_kvm_opens`; and a program that is no test harness.
#[test]
fn test_programs_are_tallied() {
    let scratch = Scratch::new("programs");
    let own = std::env::current_exe().unwrap();
    let skipping = scratch.0.join(SKIPPING);
    fs::copy(&own, &skipping).unwrap();
    let programs = [own.to_str().unwrap(), "/bin/busybox", skipping.to_str().unwrap()];
    let mut arguments = vec!["test", "--timeout", "120", "--env", "LAB_INSIDE=1"];
    arguments.extend(programs);
    arguments.extend(["--", "inside_"]);
    let Some(mut command) = lab("test_programs_are_tallied", &arguments) else {
        return;
    };
    let result = command.output().unwrap();
    let output = text(&result.stdout);
    assert_eq!(
        code(&result),
        1,
        "busybox is no test program\n{output}\n{}",
        text(&result.stderr)
    );
    assert_eq!(
        output.lines().last(),
        Some("1 passed, 1 failed, 1 skipped"),
        "{output}"
    );
    assert!(
        output
            .lines()
            .any(|line| line.starts_with("lab| test inside_kvm_opens ... ok")),
        "{output}"
    );
    assert!(output.contains("/busybox: ended without a result"), "{output}");
}

/// The bad news of a test run's end: the time was up before all programs ran.
#[test]
fn cut_off_test_programs_have_failed() {
    let own = std::env::current_exe().unwrap();
    let own = own.to_str().unwrap();
    let arguments = [
        "test",
        "--timeout",
        "10",
        "--env",
        "LAB_INSIDE=1",
        "--env",
        "LAB_HANG=1",
        own,
        own,
        "--",
        "inside_",
    ];
    let Some(mut command) = lab("cut_off_test_programs_have_failed", &arguments) else {
        return;
    };
    let result = command.output().unwrap();
    assert_eq!(code(&result), 124);
    let output = text(&result.stdout);
    assert_eq!(
        output.lines().last(),
        Some("0 passed, 2 failed, 0 skipped"),
        "{output}"
    );
}

/// Under this name the program's test skips itself.
const SKIPPING: &str = "skipping";

#[test]
fn inside_kvm_opens() {
    if std::env::var_os("LAB_INSIDE").is_none() {
        println!("SKIP: inside_kvm_opens: test_programs_are_tallied runs it in the lab");
        return;
    }
    if std::env::current_exe().unwrap().ends_with(SKIPPING) {
        println!("SKIP: inside_kvm_opens: the runner is to see a test that skips itself");
        return;
    }
    if std::env::var_os("LAB_HANG").is_some() {
        std::thread::park();
    }
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .unwrap();
}
