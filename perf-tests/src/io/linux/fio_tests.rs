//! What fio prints, and what a guest might print in its place.

use super::*;

/// As fio 3.33 prints it, shortened.
const GOOD: &str = r#"perf : Saving output of prerun in perf.prerun.txt
shoal-perf: begins
shoal-perf: ends
{
  "fio version" : "fio-3.33",
  "jobs" : [
    {
      "jobname" : "perf",
      "error" : 0,
      "read" : {
        "iops" : 40.0,
        "runtime" : 250,
        "total_ios" : 10,
        "lat_ns" : {
          "N" : 10,
          "percentile" : { "50.000000" : 9000 },
          "bins" : { "52992" : 1, "104960" : 8, "9000" : 1 }
        }
      },
      "write" : { "runtime" : 0, "total_ios" : 0, "lat_ns" : { "min" : 0 } }
    }
  ]
}
"#;

#[test]
fn what_fio_prints_is_read() {
    let Outcome { run, version } = read(GOOD, 10).unwrap();
    assert_eq!((run.ops, run.seconds, version.as_str()), (10, 0.25, "fio 3.33"));
    let latencies = run.latencies.clone().unwrap();
    assert_eq!(latencies.len(), 10);
    assert!(latencies.equivalent(latencies.value_at_quantile(0.5), 104_960));
    assert!(latencies.equivalent(latencies.min(), 9000));
    // The same of a run that wrote.
    let swapped = GOOD
        .replace("\"read\"", "\"?\"")
        .replace("\"write\"", "\"read\"")
        .replace("\"?\"", "\"write\"");
    assert_eq!(read(&swapped, 10).unwrap().run, run);
}

#[test]
fn what_cannot_be_is_refused() {
    for (from, to, told) in [
        ("{\n", "", "no JSON"),
        ("\n}\n", "", "ends early"),
        ("\"total_ios\" : 10", "\"total_ios\" : 9", "9 operations of 10"),
        ("\"total_ios\" : 10", "\"total_ios\" : -1", "not what fio prints"),
        (
            "\"total_ios\" : 10",
            "\"total_ios\" : 1e999",
            "not what fio prints",
        ),
        ("\"total_ios\" : 0", "\"total_ios\" : 10", "read and written"),
        ("\"runtime\" : 250", "\"runtime\" : 0", "less than a millisecond"),
        ("\"error\" : 0", "\"error\" : 5", "the error 5"),
        ("\"jobs\" : [", "\"jobs\" : [], \"x\" : [", "0 jobs"),
        ("fio-3.33", "<script>", "its version"),
        ("fio-3.33", "", "its version"),
        ("\"104960\" : 8", "\"104960\" : 7", "latencies of 9 operations"),
        (
            "\"104960\" : 8",
            "\"104960\" : 18446744073709551615",
            "latencies of countless operations",
        ),
        ("\"104960\"", "\"-5\"", "latencies that cannot be"),
        (
            "\"104960\"",
            "\"18446744073709551615\"",
            "latencies that cannot be",
        ),
    ] {
        assert!(GOOD.contains(from), "{from}");
        let error = format!("{:#}", read(&GOOD.replacen(from, to, 1), 10).unwrap_err());
        assert!(error.contains(told), "{from} -> {to}: {error}");
    }
}

#[test]
fn cut_off_anywhere_it_is_an_error_and_no_panic() {
    for end in 0..GOOD.len() - 1 {
        assert!(read(&GOOD[..end], 10).is_err(), "{end}");
    }
    let deep = format!("{{\n{}\n}}\n", "[".repeat(100_000));
    assert!(read(&deep, 10).is_err());
}

#[test]
fn requests_reach_the_device_and_their_number_is_told() {
    let fio = Fio {
        access: "randread",
        size: 4096,
        depth: 32,
    };
    let words = fio.arguments(1000);
    for word in [
        "--direct=1",
        "--rw=randread",
        "--bs=4096",
        "--iodepth=32",
        "--io_size=4096000",
    ] {
        assert!(words.iter().any(|w| w == word), "{word}");
    }
    // Linux panics at more than 32.
    assert!(words.len() < 30);
}
