use super::*;

fn sample() -> ResultFile {
    let shoal = vec![2.0; 3];
    ResultFile::new(
        "test",
        Machine::here(),
        false,
        Measured::BootProbe(ProbeBoot {
            runs: 3,
            floor_ms: 1.2,
            vmm_ms: 1.6,
            ratio: 1.33,
            jail_adds_ms: None,
            jail_lacks: vec![],
            subjects: vec![Subject::new("qemu", "7.2", vec![30.0, 31.0, 29.0], &shoal)],
            stages: vec![Stage {
                step: "FirstOutput".into(),
                at_ms: 1.6,
            }],
        }),
    )
}

fn parse(text: &str) -> Result<ResultFile, Refused> {
    ResultFile::parse(Path::new("r.json"), text.as_bytes())
}

#[test]
fn memory_is_told_by_the_best_account() {
    let text = |accounts: &str| {
        format!(
            r#"{{"guests_asked":1,"guests":1,"guest_memory_mib":128,"host_mb_per_guest":0.4,
            "host_mb_per_guest_end_to_end":0.4,"pss_mb_per_guest":0.1,"rest_cpu_percent":0.0,"start_ms":1.0,"starts_ms":[],
            "points":[],"leaks":{{"processes":0,"descriptors":0}},"accounts":"{accounts}",
            "shares":[{{"kind":"anon","mb":0.125}},{{"kind":"kernel","mb":0.5}},{{"kind":"slab","mb":0.25}}]}}"#
        )
    };
    let mb = |accounts| {
        serde_json::from_str::<Density>(&text(accounts))
            .unwrap()
            .host_mb()
            .0
    };
    assert_eq!((mb("cgroup"), mb("machine")), (0.625, 0.4));
}

#[test]
fn what_is_written_is_read() {
    let file = sample();
    let text = serde_json::to_string_pretty(&file).unwrap();
    assert_eq!(parse(&text).unwrap(), file);
}

#[test]
fn every_truncation_is_refused_as_such() {
    let text = serde_json::to_string(&sample()).unwrap();
    for end in 0..text.len() {
        if text.is_char_boundary(end) {
            let refused = parse(&text[..end]).unwrap_err();
            assert!(matches!(refused, Refused::Truncated(..)), "{end}: {refused}");
        }
    }
}

#[test]
fn other_forms_are_refused_with_their_version() {
    let text = serde_json::to_string(&sample()).unwrap();
    let newer = text.replace("\"schema\":1", "\"schema\":2");
    assert!(
        parse(&newer)
            .unwrap_err()
            .to_string()
            .contains("the form 2 of results")
    );
    let older = text.replace("\"schema\":1,", "");
    assert!(
        parse(&older)
            .unwrap_err()
            .to_string()
            .contains("without a version")
    );
    let odd = text.replace("\"schema\":1", &format!("\"schema\":\"{}\"", "é".repeat(5000)));
    assert!(parse(&odd).unwrap_err().to_string().len() < 300);
}

#[test]
fn hostile_content_is_refused() {
    let text = serde_json::to_string(&sample()).unwrap();
    for (from, to) in [
        ("\"median_ms\":30.0", "\"median_ms\":-1.0"),
        ("\"median_ms\":30.0", "\"median_ms\":1e300"),
        ("29.0]", "29.0,1e10]"),
    ] {
        let bad = text.replace(from, to);
        assert_ne!(bad, text, "{from} is in the sample");
        assert!(matches!(parse(&bad).unwrap_err(), Refused::Absurd { .. }), "{to}");
    }
    for bad in [
        "[]",
        "null",
        "7",
        "{\"schema\":1}",
        "{\"schema\":1,\"kind\":\"x\"}",
        "\u{0} ",
    ] {
        assert!(matches!(parse(bad).unwrap_err(), Refused::Malformed(..)), "{bad}");
    }
    let deep = "[".repeat(100_000);
    assert!(parse(&format!("{{\"schema\":{deep}")).is_err());
    let many = text.replace("29.0]", &format!("29.0{}]", ",1.0".repeat(MAX_SAMPLES)));
    assert!(matches!(parse(&many).unwrap_err(), Refused::Absurd { .. }));
    let long = text.replace("\"qemu\"", &format!("\"{}\"", "q".repeat(MAX_TEXT + 1)));
    assert!(matches!(parse(&long).unwrap_err(), Refused::Absurd { .. }));
}

#[test]
fn a_missing_file_is_told() {
    let refused = ResultFile::load(Path::new("/nonexistent/r.json")).unwrap_err();
    assert!(refused.to_string().contains("/nonexistent/r.json"));
}
