//! The document that the daemon serves describes what it does.

mod common;

use std::collections::BTreeSet;

use common::Daemon;
use serde_json::Value;

const ROUTES: [(&str, &str); 12] = [
    ("/v1/guests", "get"),
    ("/v1/guests", "post"),
    ("/v1/guests/{guest}", "delete"),
    ("/v1/guests/{guest}", "get"),
    ("/v1/guests/{guest}/console", "get"),
    ("/v1/guests/{guest}/console", "post"),
    ("/v1/guests/{guest}/limits", "patch"),
    ("/v1/guests/{guest}/start", "post"),
    ("/v1/guests/{guest}/stop", "post"),
    ("/v1/health", "get"),
    ("/v1/openapi.json", "get"),
    ("/v1/version", "get"),
];

#[test]
fn names_every_route_and_schema() {
    let daemon = Daemon::start();
    let client = daemon.client();
    let document = client.get("/v1/openapi.json").json();
    assert!(
        document["openapi"].as_str().unwrap().starts_with("3.1"),
        "{}",
        document["openapi"]
    );
    let mut routes = BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys().filter(|k| *k != "parameters") {
            routes.insert((path.clone(), method.clone()));
        }
    }
    let want: BTreeSet<_> = ROUTES
        .iter()
        .map(|(p, m)| (p.to_string(), m.to_string()))
        .collect();
    assert_eq!(routes, want);
    for (path, method) in &routes {
        let answer = client.send(&method.to_uppercase(), &path.replace("{guest}", "none"), None);
        assert_ne!(answer.status, 405, "{method} {path}");
        assert!(
            !answer.text().contains("no-such-path"),
            "{method} {path} is served"
        );
    }

    let schemas = document["components"]["schemas"].as_object().unwrap();
    let mut references = BTreeSet::new();
    collect_references(&document, &mut references);
    for reference in &references {
        let name = reference
            .strip_prefix("#/components/schemas/")
            .expect("a reference to a schema");
        assert!(schemas.contains_key(name), "{name} is described");
    }
    for name in [
        "CreateGuest",
        "Guest",
        "Guests",
        "StopGuest",
        "SetLimits",
        "Limits",
        "Rate",
        "Problem",
        "Version",
        "Health",
        "Disk",
        "TimelineStep",
    ] {
        assert!(
            references.iter().any(|r| r.ends_with(&format!("/{name}"))),
            "{name} is used"
        );
    }
    for (name, schema) in schemas {
        assert!(
            schema["description"].is_string() || schema["oneOf"].is_array(),
            "{name} has a description: {schema}"
        );
    }
    assert_eq!(schemas["CreateGuest"]["properties"]["vcpus"]["maximum"], 32);
}

fn collect_references(value: &Value, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            into.extend(map.get("$ref").and_then(Value::as_str).map(str::to_owned));
            map.values().for_each(|v| collect_references(v, into));
        }
        Value::Array(list) => list.iter().for_each(|v| collect_references(v, into)),
        _ => {}
    }
}
