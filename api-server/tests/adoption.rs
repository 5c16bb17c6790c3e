//! Guests outlive their daemon, and the next one finds them.

mod common;

use std::fs;
use std::time::{Duration, Instant};

use common::{Daemon, Dir, end_process, skip_without_kvm, vmms, wait_process};
use rustix::process::Signal;
use serde_json::{Value, json};

fn id(guest: &Value) -> String {
    guest["id"].as_str().unwrap().to_owned()
}

fn pid(guest: &Value) -> u32 {
    guest["pid"].as_u64().unwrap() as u32
}

#[test]
fn a_killed_daemons_guests_are_taken_over() {
    if skip_without_kvm("a_killed_daemons_guests_are_taken_over") {
        return;
    }
    let daemon = Daemon::start();
    let client = daemon.client();
    let disk = daemon.dir.path("disk.img");
    fs::write(&disk, [0; 4096]).unwrap();
    let mut with_disk = daemon.dir.guest("print=one exit=halt");
    with_disk["disks"] = json!([{"path": &disk}]);
    with_disk["name"] = json!("lives");
    let lives = client.create(&with_disk);
    let dies = client.create(&daemon.dir.guest("exit=halt"));
    // About a second of work in ring 3; it ends when no daemon is there to see it, or at the worst before.
    let ends = client.create(&daemon.dir.guest("spin=3000000000 exit=poweroff"));
    let mut spec = daemon.dir.guest("exit=halt");
    spec["start"] = json!(false);
    let created = client.create(&spec);
    client.await_output("lives", "probe: halt");

    let (_, dir) = daemon.end(Signal::KILL);
    end_process(pid(&dies));
    wait_process(pid(&ends));
    assert_eq!(vmms(&dir), vec![pid(&lives)]);
    // What nobody remembers is removed.
    fs::create_dir(dir.path("state/guests/00112233aabb")).unwrap();
    fs::write(dir.path("state/guests/00112233aabb/console.ring"), "x").unwrap();

    let daemon = Daemon::start_in(dir, &[]);
    let client = daemon.client();
    let show = |guest: &Value| client.get(&format!("/v1/guests/{}", id(guest))).json();
    let adopted = show(&lives);
    assert_eq!(
        (&adopted["state"], &adopted["pid"]),
        (&json!("running"), &lives["pid"]),
        "{adopted}"
    );
    assert!(adopted["memory"]["used"]["guest_kib"].as_u64().unwrap() > 0);
    assert_eq!(show(&dies)["stopped"]["reason"], "lost");
    assert_eq!(show(&ends)["stopped"]["reason"], "power-off");
    assert_eq!(show(&created)["state"], "created");
    assert!(!daemon.dir.guests().contains(&"00112233aabb".to_owned()));
    assert!(client.get("/v1/guests/lives/console").text().contains("one"));
    with_disk["name"] = json!("other");
    client
        .post("/v1/guests", &with_disk)
        .assert_problem(409, Some("disks[0].path"), "guest ");
    with_disk["name"] = json!("lives");
    client
        .post("/v1/guests", &with_disk)
        .assert_problem(409, Some("name"), "exists");

    let stopped = client
        .post("/v1/guests/lives/stop", &json!({"deadline_ms": 100}))
        .json();
    assert_eq!(stopped["stopped"]["reason"], "killed", "{stopped}");
    daemon.assert_well(4);
    assert_eq!(
        client.post("/v1/guests/lives/start", &json!({})).json()["state"],
        "running"
    );
}

#[test]
fn a_daemon_that_ends_in_order_leaves_guests_unless_told_otherwise() {
    if skip_without_kvm("a_daemon_that_ends_in_order_leaves_guests_unless_told_otherwise") {
        return;
    }
    let daemon = Daemon::start();
    let guest = daemon.client().create(&daemon.dir.guest("exit=halt"));
    let (said, dir) = daemon.end(Signal::TERM);
    assert!(said.contains("ended"), "{said}");
    assert!(!dir.socket().exists(), "the socket is removed");
    assert_eq!(vmms(&dir), vec![pid(&guest)]);

    let daemon = Daemon::start_in(dir, &["--stop-guests-on-exit"]);
    // The probe takes no notice of a power button: typing ends it sooner than the deadline would.
    assert_eq!(
        daemon.client().get(&format!("/v1/guests/{}", id(&guest))).json()["state"],
        "running"
    );
    let answer = daemon
        .client()
        .delete(&format!("/v1/guests/{}?force=true", id(&guest)));
    assert_eq!(answer.status, 204);
    let begun = Instant::now();
    daemon
        .client()
        .create(&daemon.dir.guest("spin=3000000000 exit=poweroff"));
    let (_, dir) = daemon.end(Signal::INT);
    assert!(vmms(&dir).is_empty());
    assert!(
        begun.elapsed() < Duration::from_secs(9),
        "the guest's own end was enough"
    );
}

#[test]
fn a_daemon_killed_at_any_moment_of_a_start_leaves_nothing() {
    if skip_without_kvm("a_daemon_killed_at_any_moment_of_a_start_leaves_nothing") {
        return;
    }
    let mut dir = Dir::new();
    for round in 0..24_u32 {
        let daemon = Daemon::start_in(dir, &[]);
        let mut stream = daemon.client().connect();
        let body = daemon.dir.guest("exit=halt").to_string();
        let request = format!(
            "POST /v1/guests HTTP/1.1\r\nhost: s\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
        let moment = Instant::now() + Duration::from_micros(u64::from(round) * 700);
        while Instant::now() < moment {
            std::hint::spin_loop();
        }
        dir = daemon.end(Signal::KILL).1;
    }
    let daemon = Daemon::start_in(dir, &[]);
    let guests = daemon.client().get("/v1/guests").json();
    let guests = guests["guests"].as_array().unwrap().clone();
    let states: Vec<_> = guests.iter().map(|g| g["state"].as_str().unwrap()).collect();
    assert!(
        states
            .iter()
            .all(|s| ["created", "running", "failed"].contains(s)),
        "{states:?}"
    );
    // As many processes as guests that run, as many directories as guests.
    daemon.assert_well(guests.len());
    for guest in &guests {
        assert_eq!(
            daemon
                .client()
                .delete(&format!("/v1/guests/{}?force=true", id(guest)))
                .status,
            204
        );
    }
    daemon.assert_well(0);
}
