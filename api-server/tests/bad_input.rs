//! What clients do wrong: each time a clear answer, a daemon that goes on, and nothing left behind.

mod common;

use std::fs;
use std::io::{BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::process::Output;
use std::time::{Duration, Instant};

use common::{Daemon, Dir, read_answer};
use rustix::process::Signal;
use serde_json::{Value, json};

#[test]
fn descriptions_that_cannot_be_used_name_their_field() {
    let daemon = Daemon::start();
    let client = daemon.client();
    let dir = daemon.dir.path("");
    let odd = daemon.dir.path("odd");
    fs::write(&odd, [0; 700]).unwrap();
    let empty = daemon.dir.path("empty");
    fs::write(&empty, []).unwrap();
    let truncated = daemon.dir.path("truncated.elf");
    fs::write(&truncated, &shoal_probe::PROBE[..200]).unwrap();
    let huge = daemon.dir.path("huge");
    fs::File::create(&huge).unwrap().set_len(600 << 20).unwrap();
    let cases: Vec<(Value, Option<&str>, &str)> = vec![
        (json!({"kernel": {"path": dir}}), Some("kernel.path"), "directory"),
        (
            json!({"kernel": {"path": "/no/such/kernel"}}),
            Some("kernel.path"),
            "No such file",
        ),
        (
            json!({"kernel": {"path": "relative"}}),
            Some("kernel.path"),
            "absolute",
        ),
        (json!({"kernel": {"path": empty}}), Some("kernel.path"), "empty"),
        (
            json!({"kernel": {"path": odd}}),
            Some("kernel.path"),
            "neither an ELF",
        ),
        (
            json!({"kernel": {"path": truncated}}),
            Some("kernel.path"),
            "truncated",
        ),
        (json!({"kernel": {"path": huge}}), Some("kernel.path"), "limit"),
        (
            json!({"kernel": {"path": "/dev/zero"}}),
            Some("kernel.path"),
            "not a regular file",
        ),
        (
            json!({"kernel": {"cmdline": "x"}}),
            Some("kernel"),
            "missing field `path`",
        ),
        (
            json!({"kernel": {"cmdline": "x".repeat(2048)}}),
            Some("kernel"),
            "missing",
        ),
        (
            json!({"cmdline": "x".repeat(2048)}),
            Some("cmdline"),
            "unknown field",
        ),
        (
            json!({"initrd": {"path": "/no/such/initrd"}}),
            Some("initrd.path"),
            "No such file",
        ),
        (json!({"initrd": {"path": empty}}), Some("initrd.path"), "empty"),
        (
            json!({"initrd": {"path": huge}, "memory_mib": 64}),
            Some("initrd.path"),
            "more memory",
        ),
        (json!({"vcpus": 0}), Some("vcpus"), "1 to 32"),
        (json!({"vcpus": 33}), Some("vcpus"), "1 to 32"),
        (json!({"vcpus": -1}), Some("vcpus"), "integer `-1`"),
        (json!({"vcpus": "two"}), Some("vcpus"), "string"),
        (json!({"vcpus": 1.5}), Some("vcpus"), "1.5"),
        (json!({"memory_mib": 0}), Some("memory_mib"), "16 to"),
        (json!({"memory_mib": u64::MAX}), Some("memory_mib"), "16 to"),
        (json!({"memory_mib": null}), Some("memory_mib"), "null"),
        (
            json!({"disks": [{"path": dir}]}),
            Some("disks[0].path"),
            "directory",
        ),
        (
            json!({"disks": [{"path": "/no/such/disk"}]}),
            Some("disks[0].path"),
            "No such file",
        ),
        (
            json!({"disks": [{"path": odd}]}),
            Some("disks[0].path"),
            "700 bytes",
        ),
        (
            json!({"disks": [{"path": "/dev/null"}]}),
            Some("disks[0].path"),
            "neither a file",
        ),
        (
            json!({"disks": [{"path": "/d", "id": "x".repeat(21)}]}),
            Some("disks[0].id"),
            "1 to 20",
        ),
        (
            json!({"disks": [{"path": "/d", "queues": 2}]}),
            Some("disks[0].queues"),
            "not 1 to 1",
        ),
        (
            json!({"vcpus": 4, "networks": [{"tap": "t", "queues": 5}]}),
            Some("networks[0].queues"),
            "not 1 to 4",
        ),
        (
            json!({"vcpus": 32, "networks": [{"tap": "t", "queues": 30}, {"tap": "u", "queues": 30}]}),
            Some("networks"),
            "fewer queues",
        ),
        (
            json!({"vcpus": 2, "disks": [{"path": "/d", "queues": 0}]}),
            Some("disks[0].queues"),
            "not 1 to 2",
        ),
        (
            json!({"disks": [{"path": "/d", "engine": "threads"}]}),
            Some("disks[0].engine"),
            "`sync` or `io_uring`",
        ),
        (
            json!({"disks": [{"path": "/d"}, {"path": 7}]}),
            Some("disks[1].path"),
            "integer `7`",
        ),
        (
            json!({"disks": (0..20).map(|_| json!({"path": "/d"})).collect::<Vec<_>>()}),
            Some("disks"),
            "at most 15",
        ),
        (
            json!({"networks": [{"tap": "no-such-tap"}]}),
            Some("networks[0].tap"),
            "no interface",
        ),
        (
            json!({"networks": [{"tap": "../../etc"}]}),
            Some("networks[0].tap"),
            "interface name",
        ),
        (
            json!({"networks": [{"tap": "t", "mac": "xx"}]}),
            Some("networks[0].mac"),
            "MAC address",
        ),
        (json!({"vsock": {"cid": 2}}), Some("vsock.cid"), "reserved"),
        (
            json!({"console": {"keep_kib": 1}}),
            Some("console.keep_kib"),
            "16 to",
        ),
        (json!({"name": "no/slashes"}), Some("name"), "letters"),
        (json!({"nmae": "x"}), Some("nmae"), "unknown field `nmae`"),
    ];
    for (change, field, detail) in cases {
        let mut guest = daemon.dir.guest("exit=poweroff");
        for (key, value) in change.as_object().unwrap() {
            guest[key] = value.clone();
        }
        client
            .post("/v1/guests", &guest)
            .assert_problem(422, field, detail);
        daemon.assert_well(0);
    }
    let mut guest = daemon.dir.guest(&"x".repeat(2048));
    client
        .post("/v1/guests", &guest)
        .assert_problem(422, Some("kernel.cmdline"), "2048 bytes");
    guest = daemon.dir.guest("caf\u{e9}");
    client
        .post("/v1/guests", &guest)
        .assert_problem(422, Some("kernel.cmdline"), "ASCII");
    daemon.assert_well(0);
}

#[test]
fn bodies_that_are_no_json() {
    let daemon = Daemon::start();
    let client = daemon.client();
    for body in [
        "{",
        "{\"kernel\"",
        "nul",
        "[1,",
        "\u{0}",
        "{\"name\": \"\u{1}\"}",
        "{'a': 1}",
    ] {
        client
            .send("POST", "/v1/guests", Some(body.as_bytes()))
            .assert_problem(400, None, "line 1 column");
    }
    client
        .send("POST", "/v1/guests", Some(b"{\"name\": \"\xff\"}"))
        .assert_problem(400, None, "line 1 column");
    for body in ["[]", "7", "\"x\""] {
        client
            .send("POST", "/v1/guests", Some(body.as_bytes()))
            .assert_problem(422, None, "object");
    }
    let deep = "[".repeat(200_000);
    let answer = client.send("POST", "/v1/guests", Some(deep.as_bytes()));
    assert!((400..500).contains(&answer.status), "{}", answer.text());
    let form = "POST /v1/guests HTTP/1.1\r\nhost: s\r\ncontent-type: application/x-www-form-urlencoded\r\n\
                content-length: 2\r\nconnection: close\r\n\r\n{}";
    client
        .raw(form.as_bytes())
        .assert_problem(415, None, "application/json");
    let stop = client.post("/v1/guests/x/stop", &json!({"deadline_ms": 3_600_001}));
    stop.assert_problem(422, Some("deadline_ms"), "hour");
    daemon.assert_well(0);
}

#[test]
fn paths_and_methods_that_do_not_exist() {
    let daemon = Daemon::start();
    let client = daemon.client();
    for path in [
        "/",
        "/v1",
        "/v1/guest",
        "/v2/guests",
        "/v1/guests/a/b",
        "/v1/guests/%2e%2e/console/x",
    ] {
        client.get(path).assert_problem(404, None, "nothing at");
    }
    for path in [
        "/v1/guests/none",
        "/v1/guests/..%2f..%2fetc",
        "/v1/guests/none/console",
        "/v1/guests/%00",
    ] {
        client.get(path).assert_problem(404, None, "no guest");
    }
    let answer = client.send("PUT", "/v1/guests", Some(b"{}"));
    answer.assert_problem(405, None, "does not do PUT");
    assert!(answer.headers["allow"].contains("POST"), "{answer:?}");
    client
        .get("/v1/guests/none/console?offset=x")
        .assert_problem(400, None, "offset");
    client
        .get("/v1/guests/none/console?ofset=1")
        .assert_problem(400, None, "ofset");
    client
        .delete("/v1/guests/none?force=maybe")
        .assert_problem(400, None, "force");
    for rubbish in [
        "GET\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "\u{16}\u{3}\u{1}\r\n\r\n",
    ] {
        assert_eq!(client.raw(rubbish.as_bytes()).status, 400, "{rubbish:?}");
    }
    let long = format!("GET /v1/{} HTTP/1.1\r\nhost: s\r\n\r\n", "x".repeat(100_000));
    assert!([414, 431].contains(&client.raw(long.as_bytes()).status));
    daemon.assert_well(0);
}

#[test]
fn bodies_of_100_mb_are_refused_before_they_are_read() {
    let daemon = Daemon::start();
    let client = daemon.client();
    let head =
        "POST /v1/guests HTTP/1.1\r\nhost: s\r\nconnection: close\r\ncontent-length: 104857600\r\n\r\n{";
    let begun = Instant::now();
    client
        .raw(head.as_bytes())
        .assert_problem(413, None, "1048576 bytes");
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "it did not wait for the body"
    );

    // Without a length: refused when the limit is reached, and the rest is not taken.
    let mut stream = client.connect();
    stream
        .write_all(b"POST /v1/guests HTTP/1.1\r\nhost: s\r\ntransfer-encoding: chunked\r\n\r\n")
        .unwrap();
    let chunk = [
        format!("{:x}\r\n", 1 << 16).into_bytes(),
        vec![b' '; 1 << 16],
        b"\r\n".to_vec(),
    ]
    .concat();
    let taken = (0..1600).take_while(|_| stream.write_all(&chunk).is_ok()).count();
    assert!(taken < 1600, "100 MB were taken");
    read_answer(&mut BufReader::new(stream)).assert_problem(413, None, "1048576 bytes");
    daemon.assert_well(0);
}

/// Half requests and idle connections end by themselves; nobody else has to wait for them.
#[test]
fn silence_holds_up_nobody() {
    let daemon = Daemon::start();
    let client = daemon.client();
    let mut half_head = client.connect();
    half_head.write_all(b"POST /v1/guests HTTP/1.1\r\nhos").unwrap();
    let mut half_body = client.connect();
    half_body
        .write_all(b"POST /v1/guests HTTP/1.1\r\nhost: s\r\ncontent-length: 50\r\n\r\n{\"ker")
        .unwrap();
    let idle: Vec<_> = (0..1000).map(|_| client.connect()).collect();
    let begun = Instant::now();
    for _ in 0..20 {
        daemon.assert_well(0);
    }
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?} for 20 calls",
        begun.elapsed()
    );

    read_answer(&mut BufReader::new(half_body)).assert_problem(408, None, "10 seconds");
    let mut rest = Vec::new();
    half_head.read_to_end(&mut rest).expect("it is closed, not cut");
    for mut stream in idle {
        stream
            .read_to_end(&mut rest)
            .expect("an idle connection is closed");
    }
    let fds = fs::read_dir(format!("/proc/{}/fd", daemon.pid()))
        .unwrap()
        .count();
    assert!(fds < 100, "{fds} descriptors are open");
    daemon.assert_well(0);
}

fn refused(dir: &Dir, more: &[&str]) -> String {
    let Output { status, stderr, .. } = dir.command().args(more).output().unwrap();
    assert_eq!(status.code(), Some(1), "{}", String::from_utf8_lossy(&stderr));
    String::from_utf8_lossy(&stderr).into_owned()
}

#[test]
fn a_daemon_that_cannot_serve_says_why() {
    let dir = Dir::new();
    fs::write(dir.socket(), "precious").unwrap();
    assert!(refused(&dir, &[]).contains("is no socket"));
    assert_eq!(fs::read(dir.socket()).unwrap(), b"precious");
    fs::remove_file(dir.socket()).unwrap();
    assert!(refused(&dir, &["--vmm", "/no/such/vmm"]).contains("/no/such/vmm"));
    assert!(refused(&dir, &["--socket-group", "no such group"]).contains("no such group"));
    assert!(!dir.socket().exists());
    let long = dir.path(&"x".repeat(60));
    assert!(refused(&dir, &["--state", long.to_str().unwrap()]).contains("shorter path"));

    let daemon = Daemon::start_in(dir, &[]);
    let other = daemon.dir.path("other");
    assert!(refused(&daemon.dir, &["--socket", other.to_str().unwrap()]).contains("another daemon"));
    assert!(refused(&daemon.dir, &["--state", other.to_str().unwrap()]).contains("another daemon listens"));
    daemon.assert_well(0);

    // A killed daemon leaves its socket; the next one takes its place.
    let (_, dir) = daemon.end(Signal::KILL);
    assert!(dir.socket().exists());
    let daemon = Daemon::start_in(dir, &[]);
    daemon.assert_well(0);
    // A socket that has been replaced is not the daemon's to remove.
    fs::remove_file(daemon.dir.socket()).unwrap();
    let _theirs = UnixListener::bind(daemon.dir.socket()).unwrap();
    let (_, dir) = daemon.end(Signal::TERM);
    assert!(dir.socket().exists());
}
