//! Guests on `/dev/kvm`: every call the good way, and what they leave behind.

mod common;

use std::collections::BTreeSet;
use std::fs;

use common::{Daemon, PATIENCE, end_process, skip_without_kvm, vmms};
use serde_json::{Value, json};

#[test]
fn a_guest_lives_and_ends() {
    if skip_without_kvm("a_guest_lives_and_ends") {
        return;
    }
    let daemon = Daemon::start();
    let client = daemon.client();
    let mut spec = daemon.dir.guest("print=hello exit=halt");
    spec["start"] = json!(false);
    spec["name"] = json!("web");
    let answer = client.post("/v1/guests", &spec);
    assert_eq!(answer.status, 201, "{}", answer.text());
    let guest = answer.json();
    let id = guest["id"].as_str().unwrap().to_owned();
    assert_eq!(answer.headers["location"], format!("/v1/guests/{id}"));
    assert_eq!(
        (&guest["state"], &guest["name"]),
        (&json!("created"), &json!("web"))
    );

    let started = client.post("/v1/guests/web/start", &json!({}));
    assert_eq!(
        (started.status, &started.json()["state"]),
        (200, &json!("running")),
        "{}",
        started.text()
    );
    client.await_output("web", "probe: halt");
    let guest = client.await_step(&id, "first-output");
    let steps: Vec<_> = guest["timeline"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["step"].as_str().unwrap())
        .collect();
    for step in [
        "request-received",
        "process-begun",
        "jailed",
        "process-spawned",
        "vm-created",
        "first-instruction",
        "first-output",
    ] {
        assert!(steps.contains(&step), "{step} in {steps:?}");
    }
    let used = &guest["memory"]["used"];
    let (overhead, total) = (
        used["overhead_kib"].as_u64().unwrap(),
        used["proportional_kib"].as_u64().unwrap(),
    );
    assert!(overhead > 0 && overhead < 16 << 10 && total > overhead, "{used}");
    assert_eq!(
        client.get("/v1/guests").json()["guests"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    daemon.assert_well(1);

    let stopped = client.post("/v1/guests/web/stop", &json!({"deadline_ms": 50}));
    assert_eq!(
        (stopped.status, &stopped.json()["state"]),
        (200, &json!("stopped"))
    );
    assert_eq!(stopped.json()["stopped"]["reason"], "killed");
    assert!(vmms(&daemon.dir).is_empty());
    let console = client.get("/v1/guests/web/console");
    assert_eq!(console.text(), "probe: ready\nhello\nprobe: halt\n");

    // The console goes on where it was.
    assert_eq!(client.post("/v1/guests/web/start", &json!({})).status, 200);
    let next = &console.headers["shoal-console-next"];
    client.await_output("web", "hello\nprobe: halt\nprobe: ready\nhello\nprobe: halt\n");
    let rest = client.get(&format!("/v1/guests/web/console?offset={next}"));
    assert_eq!(rest.text(), "probe: ready\nhello\nprobe: halt\n");

    assert_eq!(client.delete("/v1/guests/web?force=true").status, 204);
    client.get("/v1/guests/web").assert_problem(404, None, "web");
    daemon.assert_well(0);
}

#[test]
fn each_end_has_its_reason() {
    if skip_without_kvm("each_end_has_its_reason") {
        return;
    }
    let daemon = Daemon::start();
    let client = daemon.client();
    for (exit, reason) in [
        ("poweroff", "power-off"),
        ("reset", "reset"),
        ("triple", "triple-fault"),
    ] {
        let guest = client.create(&daemon.dir.guest(&format!("exit={exit}")));
        let ended = client.await_end(guest["id"].as_str().unwrap());
        assert_eq!(ended["stopped"]["reason"], reason, "{ended}");
    }
    let guest = client.create(&daemon.dir.guest("exit=halt"));
    end_process(guest["pid"].as_u64().unwrap() as u32);
    let ended = client.await_end(guest["id"].as_str().unwrap());
    assert_eq!(
        (&ended["stopped"]["reason"], &ended["stopped"]["signal"]),
        (&json!("vmm-signal"), &json!(9))
    );
    daemon.assert_well(4);
    let left: Vec<_> = daemon
        .dir
        .guests()
        .iter()
        .flat_map(|id| files(&daemon, id))
        .collect();
    assert!(
        left.iter().all(|f| !f.ends_with(".sock")),
        "sockets are left: {left:?}"
    );
}

fn files(daemon: &Daemon, id: &str) -> Vec<String> {
    let entries = fs::read_dir(daemon.dir.path("state/guests").join(id)).unwrap();
    entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
fn the_console_takes_what_is_typed() {
    if skip_without_kvm("the_console_takes_what_is_typed") {
        return;
    }
    let daemon = Daemon::start();
    let client = daemon.client();
    let guest = client.create(&daemon.dir.guest("echo=3 exit=poweroff"));
    let id = guest["id"].as_str().unwrap();
    client.await_output(id, "probe: ready");
    let typed = client.send("POST", &format!("/v1/guests/{id}/console"), Some(b"abc"));
    assert_eq!(typed.status, 204, "{}", typed.text());
    client.await_end(id);
    assert!(
        client
            .get(&format!("/v1/guests/{id}/console"))
            .text()
            .contains("abc")
    );
}

#[test]
fn guests_share_their_kernel_and_get_nothing_else() {
    if skip_without_kvm("guests_share_their_kernel_and_get_nothing_else") {
        return;
    }
    let daemon = Daemon::start();
    let client = daemon.client();
    let pids = [(); 2].map(|()| {
        client.create(&daemon.dir.guest("exit=halt"))["pid"]
            .as_u64()
            .unwrap()
    });
    let kernel_inodes = pids.map(|pid| {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let line = maps
            .lines()
            .find(|l| l.contains("memfd:shoal-kernel"))
            .unwrap_or_else(|| panic!("{maps}"));
        line.split_whitespace().nth(4).unwrap().to_owned()
    });
    assert_eq!(kernel_inodes[0], kernel_inodes[1], "both map the same file");
    if !rustix::process::geteuid().is_root() {
        println!(
            "SKIP: guests_share_their_kernel_and_get_nothing_else (descriptors): only root sees what a jailed VMM has"
        );
        return daemon.assert_well(2);
    }
    for pid in pids {
        let open: BTreeSet<_> = fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .filter_map(|e| fs::read_link(e.unwrap().path()).ok())
            .map(|target| target.to_string_lossy().into_owned())
            .collect();
        let foreign: Vec<_> = open
            .iter()
            .filter(|t| t.contains("shoal.db") || t.ends_with("state/lock"))
            .collect();
        assert!(foreign.is_empty(), "a VMM has the daemon's files open: {open:?}");
    }
    daemon.assert_well(2);
}

#[test]
fn a_disk_has_one_writer_or_many_readers() {
    if skip_without_kvm("a_disk_has_one_writer_or_many_readers") {
        return;
    }
    let daemon = Daemon::start();
    let client = daemon.client();
    let disk = daemon.dir.path("disk.img");
    fs::write(&disk, [0; 4096]).unwrap();
    let with_disk = |read_only: bool| {
        let mut guest = daemon.dir.guest("exit=halt");
        guest["disks"] = json!([{"path": &disk, "read_only": read_only}]);
        guest
    };
    let writer = client.create(&with_disk(false));
    let writer = writer["id"].as_str().unwrap();
    for read_only in [false, true] {
        let refused = client.post("/v1/guests", &with_disk(read_only));
        refused.assert_problem(409, Some("disks[0].path"), &format!("guest {writer}"));
    }
    let mut twice = with_disk(false);
    twice["disks"]
        .as_array_mut()
        .unwrap()
        .push(json!({"path": &disk}));
    client
        .post("/v1/guests", &twice)
        .assert_problem(409, Some("disks[0].path"), "in use");
    daemon.assert_well(1);
    assert_eq!(
        client.delete(&format!("/v1/guests/{writer}?force=true")).status,
        204
    );
    client
        .post("/v1/guests", &twice)
        .assert_problem(409, Some("disks[1].path"), "in use");
    client.create(&with_disk(true));
    client.create(&with_disk(true));
    client
        .post("/v1/guests", &with_disk(false))
        .assert_problem(409, Some("disks[0].path"), "in use");
    daemon.assert_well(2);
}

#[test]
fn calls_in_the_wrong_state_change_nothing() {
    if skip_without_kvm("calls_in_the_wrong_state_change_nothing") {
        return;
    }
    let daemon = Daemon::start();
    let client = daemon.client();
    let mut spec = daemon.dir.guest("exit=halt");
    spec["start"] = json!(false);
    spec["name"] = json!("g");
    client.create(&spec);
    let state = || client.get("/v1/guests/g").json()["state"].clone();
    client
        .post("/v1/guests/g/stop", &json!({}))
        .assert_problem(409, None, "it is created");
    client
        .send("POST", "/v1/guests/g/console", Some(b"x"))
        .assert_problem(409, None, "it is created");
    client
        .post("/v1/guests", &spec)
        .assert_problem(409, Some("name"), "exists already");
    assert_eq!(state(), "created");
    assert_eq!(client.post("/v1/guests/g/start", &json!({})).status, 200);
    client
        .post("/v1/guests/g/start", &json!({}))
        .assert_problem(409, None, "it is running");
    client
        .delete("/v1/guests/g")
        .assert_problem(409, None, "it is running");
    assert_eq!(state(), "running");
    assert_eq!(
        client
            .post("/v1/guests/g/stop", &json!({"deadline_ms": 0}))
            .status,
        200
    );
    client
        .post("/v1/guests/g/stop", &json!({}))
        .assert_problem(409, None, "it is stopped");
    assert_eq!(client.delete("/v1/guests/g").status, 204);
    for call in ["/v1/guests/g/start", "/v1/guests/g/stop"] {
        client
            .post(call, &json!({}))
            .assert_problem(404, None, "no guest");
    }
    daemon.assert_well(0);
}

#[test]
fn many_starts_at_once_do_not_wait_for_each_other() {
    if skip_without_kvm("many_starts_at_once_do_not_wait_for_each_other") {
        return;
    }
    let daemon = Daemon::start();
    let spec = daemon.dir.guest("exit=halt");
    let threads: Vec<_> = (0..16)
        .map(|_| {
            let (client, spec) = (daemon.client(), spec.clone());
            std::thread::spawn(move || {
                let guest: Value = client.create(&spec);
                let path = format!("/v1/guests/{}", guest["id"].as_str().unwrap());
                assert_eq!(
                    client
                        .post(&format!("{path}/stop"), &json!({"deadline_ms": 0}))
                        .status,
                    200
                );
                assert_eq!(client.delete(&path).status, 204);
            })
        })
        .collect();
    // One that takes its time to stop must hold up nobody.
    let client = daemon.client();
    let slow = client.create(&spec)["id"].as_str().unwrap().to_owned();
    let slow = {
        let client = client.clone();
        std::thread::spawn(move || {
            client.post(&format!("/v1/guests/{slow}/stop"), &json!({"deadline_ms": 2000}))
        })
    };
    let begun = std::time::Instant::now();
    assert!(threads.into_iter().all(|t| t.join().is_ok()));
    assert!(begun.elapsed() < PATIENCE);
    assert_eq!(slow.join().unwrap().status, 200);
    daemon.assert_well(1);
}

#[test]
fn a_disk_s_engine_is_chosen_and_shown() {
    if skip_without_kvm("a_disk_s_engine_is_chosen_and_shown") {
        return;
    }
    let daemon = Daemon::start();
    let client = daemon.client();
    let mut guest = daemon.dir.guest("exit=halt");
    let disks = ["a.img", "b.img"].map(|name| daemon.dir.path(name));
    disks.iter().for_each(|disk| fs::write(disk, [0; 4096]).unwrap());
    guest["disks"] = json!([{"path": &disks[0], "engine": "io_uring"}, {"path": &disks[1]}]);
    let answer = client.post("/v1/guests", &guest);
    if answer.text().contains("io_uring") && answer.status == 422 {
        answer.assert_problem(422, Some("disks[0]"), "set the disk's engine to sync");
        return println!("SKIP: a_disk_s_engine_is_chosen_and_shown: no io_uring here");
    }
    assert_eq!(answer.status, 201, "{}", answer.text());
    let shown = answer.json();
    assert_eq!(shown["state"], "running");
    assert_eq!(
        (&shown["disks"][0]["engine"], &shown["disks"][1]["engine"]),
        (&json!("io_uring"), &json!("sync"))
    );
    let id = shown["id"].as_str().unwrap();
    // Ended by the VMM itself, under its filter: what the disk held is let go.
    let stopped = client.post(&format!("/v1/guests/{id}/stop"), &json!({"deadline_ms": 0}));
    assert_eq!(
        stopped.json()["stopped"]["reason"],
        "killed",
        "{}",
        stopped.text()
    );
    daemon.assert_well(1);
}
