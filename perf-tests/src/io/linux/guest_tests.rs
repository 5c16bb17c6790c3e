//! A guest that plays by the book, and others.

use super::*;

/// Measures three operations.
struct Three;

impl Tool for Three {
    fn name(&self) -> &'static str {
        "three"
    }

    fn path(&self) -> &'static str {
        "/bin/three"
    }

    fn kernel_words(&self) -> &'static str {
        "shoal.ip=192.0.2.2/24"
    }

    fn arguments(&self, ops: u64) -> Vec<String> {
        vec![format!("--ops={ops}"), "two words".into()]
    }

    fn read(&self, printed: &str, ops: u64) -> Result<Outcome> {
        let text = json(printed)?;
        anyhow::ensure!(text == "{\n3\n}", "{text}");
        let run = Run {
            ops,
            seconds: 1.0,
            ..Run::default()
        };
        Ok(Outcome {
            run,
            version: "three 1".into(),
        })
    }
}

struct Script;

impl Vmm for Script {
    fn pid(&self) -> u32 {
        std::process::id()
    }

    fn console(&mut self) -> Result<Box<dyn Read + Send>> {
        bail!("the lines are given")
    }

    fn last_words(&mut self) -> String {
        "bye".into()
    }
}

fn play(lines: &[&str]) -> Result<Outcome> {
    let (said, heard) = sync_channel(lines.len());
    for line in lines {
        said.send((*line).into())?;
    }
    drop(said);
    let outcome = watch(&mut Script, &heard, &Three, 3, false, None)?;
    outcome.context("it stood still")
}

#[test]
fn a_guest_that_stands_still_is_noticed() {
    let (said, heard) = sync_channel(1);
    said.send(READY.to_owned()).unwrap();
    let silence = Some(Duration::from_millis(1));
    let outcome = watch(&mut Script, &heard, &Three, 3, false, silence).unwrap();
    assert!(outcome.is_none());
}

const END: &str = "shoal-init: workload exited with code 0";

#[test]
fn a_run_is_watched() {
    let outcome = play(&[READY, BEGINS, ENDS, "{", "3", "}", END]).unwrap();
    assert_eq!((outcome.run.ops, outcome.version.as_str()), (3, "three 1"));
    assert_eq!(outcome.run.counts, Counts::default());
}

#[test]
fn what_goes_wrong_is_told() {
    let many = "x".repeat(500);
    let flood = vec![many.as_str(); MAX_OUTPUT / 500 + 1];
    for (lines, told) in [
        (&[READY, "oops"][..], "the guest ended before three was done"),
        (&[], "the VMM: \"bye\""),
        (
            &["nothing there", "shoal-init: workload exited with code 127"],
            "could not run three",
        ),
        (
            &["no such device", "shoal-init: workload exited with code 1"],
            "(exit code 1); its console: \"no such device",
        ),
        (&[BEGINS, ENDS, "{", "3", END], "ends early"),
        (&[BEGINS, ENDS, "{", "4", "}", END], "4"),
        (&[BEGINS, "{", "3", "}", END], "when it began and ended"),
        (&[ENDS, "{", "3", "}", END], "when it began and ended"),
        (&flood, "more than 1024 KiB"),
    ] {
        let error = format!("{:#}", play(lines).unwrap_err());
        assert!(error.contains(told), "{told}: {error}");
    }
}

#[test]
fn the_command_line_is_what_init_takes_apart() {
    let line = cmdline(&Three, 3).unwrap();
    assert!(
        line.ends_with("quiet shoal.ip=192.0.2.2/24 shoal.exec=/bin/three -- --ops=3 \"two words\""),
        "{line}"
    );
}

#[test]
fn json_is_found_between_other_lines() {
    assert_eq!(json("x\n{\n1\n}\ny\n").unwrap(), "{\n1\n}");
    assert_eq!(json("{\n}\n").unwrap(), "{\n}");
    for bad in ["", "{", "{}", "x\n{\n", "{\n1\n}", "\n}\n{\n"] {
        assert!(json(bad).is_err(), "{bad:?}");
    }
}
