//! `shoal-perf block`, `net` and `vsock` on /dev/kvm, short: what they print can be believed, and what goes wrong is told.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

/// Runs shoal-perf with the programs of SHOAL_BIN_DIR, or else of build/bin. None: this cannot run here.
fn perf(arguments: &[&str]) -> Option<Output> {
    if File::options().read(true).write(true).open("/dev/kvm").is_err() {
        println!("SKIP: io: /dev/kvm does not open");
        return None;
    }
    let folder = std::env::var_os("SHOAL_BIN_DIR").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../build/bin"),
        PathBuf::from,
    );
    assert!(
        folder.join("shoal-vmm").exists(),
        "no shoal-vmm in {}: make build",
        folder.display()
    );
    let mut command = Command::new(env!("CARGO_BIN_EXE_shoal-perf"));
    Some(
        command
            .args(arguments)
            .env("SHOAL_BIN_DIR", folder)
            .output()
            .unwrap(),
    )
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The parts of a result that was printed as JSON.
fn parts(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{}", text(&output.stderr));
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(result["kind"], "io");
    result["parts"].as_array().unwrap().clone()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn every_pattern_of_a_disk_is_measured_with_both_engines() {
    let mut arguments = vec![
        "block",
        "--json",
        "--turns",
        "2",
        "--ops",
        "2000",
        "--disk-mib",
        "4",
        "--check",
    ];
    for pattern in ["rand-read", "rand-write", "read", "write", "flush"] {
        arguments.extend(["--pattern", pattern]);
    }
    let Some(output) = perf(&arguments) else { return };
    let parts = parts(&output);
    assert_eq!(parts.len(), 5);
    for part in parts {
        let subjects = part["subjects"].as_array().unwrap();
        assert_eq!(subjects.len(), 2, "{part}");
        for s in subjects {
            assert!(
                number(&s["ops_per_s"]) > 0.0 && number(&s["latency_us"]["p50"]) > 0.0,
                "{s}"
            );
            // As the tools of HdrHistogram read it.
            assert!(s["hdr_ns"].as_str().unwrap().starts_with("HISTFAAA"), "{s}");
            // A run cannot be done without telling the device once.
            assert!(number(&s["kicks_per_op"]) > 0.0, "{s}");
            assert_eq!(s["samples_ops_per_s"].as_array().unwrap().len(), 2, "{s}");
        }
        assert_eq!(subjects[0]["first_is_faster_by"], 1.0, "{part}");
    }
}

#[test]
fn frames_go_both_ways() {
    let Some(output) = perf(&["net", "--json", "--turns", "1", "--ops", "2000"]) else {
        return;
    };
    let errors = text(&output.stderr);
    if errors.contains("making a network namespace") || errors.contains("making a TAP") {
        println!("SKIP: net: {errors}");
        return;
    }
    let parts = parts(&output);
    assert_eq!(parts.len(), 5);
    for part in parts {
        assert!(number(&part["subjects"][0]["ops_per_s"]) > 0.0, "{part}");
    }
}

#[test]
fn streams_go_both_ways() {
    let arguments = [
        "vsock", "--json", "--turns", "1", "--ops", "200", "--check", "--peer", "qemu=/x",
    ];
    let Some(output) = perf(&arguments) else { return };
    assert!(text(&output.stderr).contains("has no sockets of this kind"));
    let parts = parts(&output);
    assert_eq!(parts.len(), 3);
    for part in &parts {
        assert!(number(&part["subjects"][0]["ops_per_s"]) > 0.0, "{part}");
    }
    assert!(number(&parts[2]["subjects"][0]["latency_us"]["p50"]) > 0.0);
    // A stream that goes one way only has none.
    assert!(parts[0]["subjects"][0].get("hdr_ns").is_none());
}

#[test]
fn limits_hold() {
    let Some(output) = perf(&["limits", "--json", "--runs", "1", "--seconds", "0.2"]) else {
        return;
    };
    assert!(output.status.success(), "{}", text(&output.stderr));
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    let cases = result["cases"].as_array().unwrap();
    // Without a network namespace there are those of disks and sockets.
    assert!(cases.len() == 11 || cases.len() == 7, "{cases:?}");
    for case in cases {
        // A machine under load does less. Two hundredths of a second are the burst, a tenth of this run.
        let (asked, measured) = (number(&case["asked"]), number(&case["measured"]));
        assert!(measured > 0.0 && measured < 1.15 * asked, "{case}");
    }
}

#[test]
fn a_peer_that_is_missing_or_dies_is_left_out_and_the_rest_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("qemu");
    let mut script = File::create(&program).unwrap();
    writeln!(
        script,
        "#!/bin/sh\n[ \"$1\" = --version ] && echo 'QEMU emulator version 9.9.9' && exit\necho no such machine >&2; exit 1"
    )
    .unwrap();
    script.set_permissions(PermissionsExt::from_mode(0o755)).unwrap();
    drop(script);
    let dies = format!("qemu={}", program.display());
    for (peer, told) in [
        (
            "qemu=/nonexistent/qemu",
            "the peer qemu=/nonexistent/qemu is left out",
        ),
        ("firecracker=/bin/true", "I/O is compared with qemu=PATH only"),
        (dies.as_str(), "no such machine"),
    ] {
        let arguments = [
            "block",
            "--json",
            "--turns",
            "1",
            "--ops",
            "500",
            "--disk-mib",
            "1",
            "--pattern",
            "rand-read",
            "--peer",
            peer,
        ];
        let Some(output) = perf(&arguments) else { return };
        let errors = text(&output.stderr);
        assert!(errors.contains(told), "{peer}: {errors}");
        assert_eq!(
            parts(&output)[0]["subjects"].as_array().unwrap().len(),
            2,
            "{peer}"
        );
    }
}

/// In the lab, where there is one, with this machine's program in the guest.
fn in_the_lab(program: &str, arguments: &[&str]) -> Option<Vec<Value>> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = |name: &str| std::env::split_paths(&path).any(|folder| folder.join(name).is_file());
    if let Some(missing) = [program, "qemu-system-x86_64"].into_iter().find(|p| !found(p)) {
        println!("SKIP: a Linux guest with {program}: {missing} is not installed");
        return None;
    }
    let output = perf(arguments)?;
    let errors = text(&output.stderr);
    if !output.status.success()
        && ["run `make images`", "cloud-kernel.sh"]
            .iter()
            .any(|w| errors.contains(w))
    {
        println!("SKIP: a Linux guest with {program}: {errors}");
        return None;
    }
    Some(parts(&output))
}

#[test]
fn fio_measures_a_disk_in_a_linux_guest() {
    let arguments = [
        "block",
        "--fio",
        "--lab",
        "--json",
        "--ops",
        "500",
        "--disk-mib",
        "4",
        "--pattern",
        "rand-write",
    ];
    let Some(parts) = in_the_lab("fio", &arguments) else {
        return;
    };
    let name = parts[0]["name"].as_str().unwrap();
    assert!(name.starts_with("Linux guest, fio "), "{name}");
    let subjects = parts[0]["subjects"].as_array().unwrap();
    assert_eq!(subjects.len(), 2);
    for s in subjects {
        for figure in [
            "ops_per_s",
            "device_cpu_us_per_op",
            "system_calls_per_op",
            "exits_per_op",
        ] {
            assert!(number(&s[figure]) > 0.0, "{figure}: {s}");
        }
        assert!(
            number(&s["latency_us"]["p50"]) > 0.0 && s["hdr_ns"].is_string(),
            "{s}"
        );
    }
}

#[test]
fn iperf3_measures_a_network_in_a_linux_guest() {
    let arguments = [
        "net",
        "--iperf3",
        "--lab",
        "--json",
        "--ops",
        "100",
        "--pattern",
        "to-guest",
    ];
    let Some(parts) = in_the_lab("iperf3", &arguments) else {
        return;
    };
    let name = parts[0]["name"].as_str().unwrap();
    assert!(
        name.starts_with("Linux guest, iperf ") && name.contains("TCP to the guest"),
        "{name}"
    );
    let shoal = &parts[0]["subjects"][0];
    assert!(
        number(&shoal["ops_per_s"]) > 0.0 && number(&shoal["system_calls_per_op"]) > 0.0,
        "{shoal}"
    );
}

#[test]
fn what_cannot_be_is_refused() {
    for (arguments, told) in [
        (&["block", "--fio"][..], "--lab|--here"),
        (&["block", "--lab"], "--fio"),
        (&["net", "--here"], "--iperf3"),
        (&["block", "--fio", "--lab", "--here"], "cannot be used with"),
        (&["block", "--fio", "--lab", "--check"], "cannot be used with"),
        (
            &["net", "--iperf3", "--lab", "--size", "60"],
            "cannot be used with",
        ),
        (
            &["block", "--fio", "--lab", "--pattern", "flush"],
            "fio does no flushes alone",
        ),
        (
            &["block", "--fio", "--lab", "--peer", "qemu=/x"],
            "--peer goes with --here",
        ),
        (
            &["block", "--fio", "--lab", "--root", "/nonexistent"],
            "the guest's root disk (--root)",
        ),
        (
            &["net", "--iperf3", "--lab", "--kernel", "/nonexistent"],
            "the guest's kernel (--kernel)",
        ),
        (&["block", "--depth", "65"], "1..=64"),
        (&["block", "--size", "100"], "no multiple of 512"),
        (
            &["block", "--size", "1048576", "--depth", "64"],
            "take a smaller --depth or --size",
        ),
        (&["block", "--turns", "0"], "1..=10000"),
        (&["net", "--size", "59"], "60..=1514"),
        (&["vsock", "--size", "12"], "no multiple of 8"),
        (&["limits", "--seconds", "0"], "not from 0.05 to 60"),
    ] {
        let Some(output) = perf(arguments) else { return };
        assert!(!output.status.success(), "{arguments:?}");
        let errors = text(&output.stderr);
        assert!(errors.contains(told), "{arguments:?}: {errors}");
    }
}
