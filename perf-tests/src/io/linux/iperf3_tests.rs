//! What iperf3 prints, and what a guest might print in its place.

use super::*;

/// As iperf3 3.12 prints it, shortened.
const TCP: &str = r#"{
	"start":	{ "version":	"iperf 3.12", "cookie":	"x" },
	"intervals":	[],
	"end":	{
		"sum_sent":	{ "seconds":	0.51, "bytes":	13107200, "retransmits":	0 },
		"sum_received":	{ "seconds":	0.5, "bytes":	13107200 }
	}
}
"#;
const UDP: &str = r#"{
	"start":	{ "version":	"iperf 3.12" },
	"end":	{
		"sum":	{ "seconds":	0.25, "bytes":	6400, "packets":	100, "lost_packets":	4 }
	}
}
"#;

#[test]
fn what_iperf3_prints_is_read() {
    let Outcome { run, version } = read(Stream::TcpToGuest, TCP, 100).unwrap();
    assert_eq!((run.ops, run.lost, run.seconds), (100, 0, 0.5));
    assert_eq!(version, "iperf 3.12");
    let Outcome { run, .. } = read(Stream::UdpToHost, UDP, 100).unwrap();
    assert_eq!((run.ops, run.lost, run.seconds), (96, 4, 0.25));
}

#[test]
fn what_cannot_be_is_refused() {
    let told = |stream, text: &str, ops| format!("{:#}", read(stream, text, ops).unwrap_err());
    for (from, to, why) in [
        (
            "\"intervals\"",
            "\"error\": \"no route\", \"intervals\"",
            "no route",
        ),
        ("\"sum_received\"", "\"other\"", "does not tell"),
        ("0.5,", "-1,", "-1 seconds"),
        ("0.5,", "0,", "0 seconds"),
        ("0.5,", "1e300,", "seconds"),
        ("0.5, \"bytes\":	13107200", "0.5, \"bytes\":	0", "0 operations"),
        (
            "0.5, \"bytes\":	13107200",
            "0.5, \"bytes\":	99999999999",
            "asked for 100",
        ),
        (
            "0.5, \"bytes\":	13107200",
            "0.5, \"bytes\":	-1",
            "not what iperf3 prints",
        ),
        ("iperf 3.12", "\\u001b[2J", "its version"),
        ("\n}\n", "\n", "ends early"),
    ] {
        assert!(TCP.contains(from), "{from}");
        let error = told(Stream::TcpToHost, &TCP.replacen(from, to, 1), 100);
        assert!(error.contains(why), "{from} -> {to}: {error}");
    }
    for lost in ["101", "-1", "9223372036854775807"] {
        let text = UDP.replace("\"lost_packets\":	4", &format!("\"lost_packets\":	{lost}"));
        let error = told(Stream::UdpToHost, &text, 100);
        assert!(error.contains("lost more than it sent"), "{lost}: {error}");
    }
    assert!(told(Stream::UdpToHost, TCP, 100).contains("does not tell"));
}

#[test]
fn cut_off_anywhere_it_is_an_error_and_no_panic() {
    for end in 0..TCP.len() - 1 {
        assert!(read(Stream::TcpToHost, &TCP[..end], 100).is_err(), "{end}");
    }
}

#[test]
fn each_stream_has_its_own_words() {
    let words = |stream| {
        let tool = Iperf3 {
            stream,
            server: "/x".into(),
        };
        tool.arguments(7).join(" ")
    };
    assert!(words(Stream::TcpToHost).contains("-k 7 -l 128K >"));
    assert!(words(Stream::TcpToGuest).contains("-l 128K -R >"));
    assert!(words(Stream::UdpToHost).contains("-u -b 0 >"));
}
