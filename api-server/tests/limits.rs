//! Rate limits: given with a guest, changed while it runs or not, and what is wrong with them.

mod common;

use std::fs;

use common::{Answer, Client, Daemon, skip_without_kvm};
use serde_json::{Value, json};

fn patch(client: &Client, guest: &str, body: &Value) -> Answer {
    let path = format!("/v1/guests/{guest}/limits");
    client.send("PATCH", &path, Some(body.to_string().as_bytes()))
}

/// A guest with a disk and a socket device.
fn description(daemon: &Daemon, start: bool) -> Value {
    let disk = daemon.dir.path("data.img");
    fs::write(&disk, [0; 4096]).unwrap();
    let mut guest = daemon.dir.guest("exit=halt");
    guest["disks"] = json!([{"id": "data", "path": disk, "limits": {"operations": {"per_second": 500}}}]);
    guest["vsock"] = json!({"limits": {"bandwidth": {"per_second": 1000, "burst": 7}}});
    guest["rng"] = json!({"limits": {"bandwidth": {"per_second": 5}}});
    guest["start"] = json!(start);
    guest
}

#[test]
fn are_shown_and_kept_for_the_next_start() {
    let daemon = Daemon::start();
    let client = daemon.client();
    let guest = client.create(&description(&daemon, false));
    let id = guest["id"].as_str().unwrap();
    assert_eq!(
        guest["disks"][0]["limits"],
        json!({"operations": {"per_second": 500, "burst": 50}})
    );
    assert_eq!(
        guest["vsock"]["limits"],
        json!({"bandwidth": {"per_second": 1000, "burst": 7}})
    );
    assert_eq!(
        guest["rng"]["limits"],
        json!({"bandwidth": {"per_second": 5, "burst": 1}})
    );
    let answer = patch(
        &client,
        id,
        &json!({"disks": {"data": {"bandwidth": {"per_second": 9, "burst": 1}}}, "rng": {}}),
    );
    assert_eq!(answer.status, 200, "{}", answer.text());
    let shown = client.get(&format!("/v1/guests/{id}")).json();
    assert_eq!(answer.json()["disks"], shown["disks"]);
    assert_eq!(
        shown["disks"][0]["limits"],
        json!({"bandwidth": {"per_second": 9, "burst": 1}}),
        "the new ones take the place of the old"
    );
    assert_eq!(shown["rng"], json!({}));
    assert_eq!(
        shown["vsock"]["limits"]["bandwidth"]["burst"], 7,
        "not named, so not changed"
    );
    // Nothing to change is no mistake.
    assert_eq!(patch(&client, id, &json!({})).json()["disks"], shown["disks"]);
}

#[test]
fn are_changed_while_the_guest_runs() {
    if skip_without_kvm("are_changed_while_the_guest_runs") {
        return;
    }
    let daemon = Daemon::start();
    let client = daemon.client();
    let guest = client.create(&description(&daemon, true));
    let id = guest["id"].as_str().unwrap();
    let answer = patch(
        &client,
        id,
        &json!({"disks": {"data": {}}, "vsock": {"operations": {"per_second": 3}}, "rng": {"operations": {"per_second": 4}}}),
    );
    assert_eq!(answer.status, 200, "{}", answer.text());
    let shown = client.get(&format!("/v1/guests/{id}")).json();
    assert_eq!(shown["state"], "running");
    assert_eq!(shown["disks"][0].get("limits"), None, "lifted");
    assert_eq!(shown["vsock"]["limits"]["operations"]["per_second"], 3);
    assert_eq!(shown["rng"]["limits"]["operations"]["burst"], 1);
    daemon.assert_well(1);
    let stopped = client.post(&format!("/v1/guests/{id}/stop"), &json!({"deadline_ms": 0}));
    assert_eq!(
        stopped.json()["stopped"]["reason"],
        "killed",
        "{}",
        stopped.text()
    );
    // A guest that has ended is changed for its next start.
    let answer = patch(&client, id, &json!({"rng": {}}));
    assert_eq!((answer.status, &answer.json()["state"]), (200, &json!("stopped")));
}

#[test]
fn that_are_wrong_are_named_and_change_nothing() {
    let daemon = Daemon::start();
    let client = daemon.client();
    let guest = client.create(&description(&daemon, false));
    let id = guest["id"].as_str().unwrap();
    let rate = |per_second: u64, burst: u64| json!({"per_second": per_second, "burst": burst});
    for (body, field, detail) in [
        (
            json!({"disks": {"root": {}}}),
            "disks.root",
            "no disk with the id \"root\"",
        ),
        (
            json!({"networks": {"tap0": {}}}),
            "networks.tap0",
            "no network interface",
        ),
        (
            json!({"rng": {}, "disks": {"data": {"bandwidth": rate(0, 1)}}}),
            "disks.data.bandwidth.per_second",
            "from 1 to",
        ),
        (
            json!({"rng": {"operations": rate(1, u64::MAX)}}),
            "rng.operations.burst",
            "from 1 to",
        ),
        (
            json!({"rng": {"operations": rate(u64::MAX, 1)}}),
            "rng.operations.per_second",
            "from 1 to",
        ),
    ] {
        patch(&client, id, &body).assert_problem(422, Some(field), detail);
    }
    for (body, detail) in [
        (json!({"disk": {}}), "unknown field"),
        (json!({"rng": {"speed": 1}}), "unknown field"),
        (json!({"rng": {"operations": {"per_second": -1}}}), "integer `-1`"),
        (
            json!({"rng": {"operations": {"burst": 1}}}),
            "missing field `per_second`",
        ),
        (json!([]), ""),
    ] {
        let answer = patch(&client, id, &body);
        assert!(matches!(answer.status, 400 | 422), "{}", answer.text());
        assert!(
            answer.json()["detail"].as_str().unwrap().contains(detail),
            "{}",
            answer.text()
        );
    }
    patch(&client, "nobody", &json!({})).assert_problem(404, None, "no guest \"nobody\"");
    assert_eq!(client.get(&format!("/v1/guests/{id}/limits")).status, 405);
    assert_eq!(
        client.get(&format!("/v1/guests/{id}")).json(),
        guest,
        "all as it was"
    );

    let mut wrong = description(&daemon, false);
    wrong["name"] = json!("wrong");
    wrong["disks"][0]["limits"]["operations"]["per_second"] = json!(0);
    client.post("/v1/guests", &wrong).assert_problem(
        422,
        Some("disks[0].limits.operations.per_second"),
        "from 1 to",
    );
    daemon.assert_well(1);
}
