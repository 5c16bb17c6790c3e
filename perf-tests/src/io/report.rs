//! I/O results on the report's page.

use std::fmt::Write;

use hdrhistogram::Histogram;

use super::results::{IoPart, IoResult, IoSubject};
use crate::plot::{self, Plot, Ratio, Shares, escape, short};

/// File names of the plots of each part: rates, latencies. Further parts get none.
const PLOTS: [(&str, &str); 6] = [
    ("io-1", "latency-1"),
    ("io-2", "latency-2"),
    ("io-3", "latency-3"),
    ("io-4", "latency-4"),
    ("io-5", "latency-5"),
    ("io-6", "latency-6"),
];

/// The title, the figures and the plots.
pub fn section(io: &IoResult) -> (String, String, Vec<(&'static str, Plot)>) {
    let title = match io.device.as_str() {
        "block" => "A disk: requests per second, and what one costs",
        "net" => "A network: frames per second, and what one costs",
        _ => "Sockets between guest and host",
    };
    let html = io.parts.iter().map(part).collect();
    let plots = PLOTS
        .into_iter()
        .zip(&io.parts)
        .flat_map(|((rates, latencies), part)| {
            let bars = (part.subjects.len() > 1).then(|| (rates, bars(part)));
            bars.into_iter()
                .chain(distributions(part).map(|p| (latencies, p)))
        })
        .collect();
    (title.into(), html, plots)
}

fn bars(part: &IoPart) -> Plot {
    let all: Vec<Ratio<'_>> = part
        .subjects
        .iter()
        .map(|s| Ratio {
            name: &s.name,
            ratio: s.first_is_faster_by,
            interval: s.interval,
        })
        .collect();
    plot::ratios(&part.name, "× as many operations per second by the first", &all)
}

/// Latencies of all who have them.
fn distributions(part: &IoPart) -> Option<Plot> {
    let subjects = part.subjects.iter();
    let series: Vec<(&str, Shares)> = subjects
        .filter_map(|s| Some((s.name.as_str(), shares(&s.latencies()?))))
        .collect();
    let title = format!("{}: latency, distribution", part.name);
    (!series.is_empty()).then(|| plot::distributions(&title, "µs", &series))
}

/// The distribution (µs) that a histogram (ns) holds.
fn shares(histogram: &Histogram<u64>) -> Shares {
    let all = histogram.len() as f64;
    let mut below = 0;
    let met = histogram.iter_recorded().map(|met| {
        below += met.count_at_value();
        (met.value_iterated_to() as f64 / 1e3, below as f64 / all)
    });
    met.collect()
}

fn part(part: &IoPart) -> String {
    let mut html = format!(
        "<h3>{}</h3>\n<p>Medians of {} runs of {} operations.</p>\n<table><tr><th>by<th class=n>operations/s\
         <th class=n>MB/s<th class=n>first is faster by<th>95 % interval</tr>\n",
        escape(&part.name),
        part.turns,
        part.ops
    );
    for s in &part.subjects {
        let (low, high) = s.interval;
        let figures = [
            s.ops_per_s,
            s.ops_per_s * part.bytes_per_op as f64 / 1e6,
            s.first_is_faster_by,
        ];
        row(
            &mut html,
            s,
            &figures.map(Some),
            &format!("<td>{} to {}", short(low), short(high)),
        );
    }
    html.push_str(
        "</table>\n<table><tr><th>for one operation<th class=n>device CPU, µs<th class=n>all CPU, µs\
         <th class=n>system calls<th class=n>exits<th class=n>kicks</tr>\n",
    );
    for s in &part.subjects {
        let costs = [
            Some(s.device_cpu_us_per_op),
            Some(s.all_cpu_us_per_op),
            s.system_calls_per_op,
            s.exits_per_op,
            s.kicks_per_op,
        ];
        row(&mut html, s, &costs, "");
    }
    html.push_str("</table>\n");
    if part.subjects.iter().any(|s| s.latency_us.is_some()) {
        latencies(&mut html, part);
    }
    for s in part.subjects.iter().filter(|s| !s.version.is_empty()) {
        // Writing to a string does not fail.
        let _ = writeln!(
            html,
            "<p class=dim>{}: {}</p>",
            escape(&s.name),
            escape(&s.version)
        );
    }
    html
}

fn row(html: &mut String, s: &IoSubject, figures: &[Option<f64>], more: &str) {
    let cells: String = figures
        .iter()
        .map(|n| format!("<td class=n>{}", n.map_or_else(|| "–".to_owned(), short)))
        .collect();
    let _ = writeln!(html, "<tr><td>{}{cells}{more}</tr>", escape(&s.name));
}

fn latencies(html: &mut String, part: &IoPart) {
    html.push_str(
        "<table><tr><th>latency, µs<th class=n>median<th class=n>90 %<th class=n>99 %<th class=n>99.9 %<th class=n>longest\
         </tr>\n",
    );
    for (s, l) in part.subjects.iter().filter_map(|s| Some((s, s.latency_us?))) {
        let figures = [l.p50, l.p90, l.p99, l.p999, l.max].map(|n| format!("<td class=n>{}", short(n)));
        let _ = writeln!(html, "<tr><td>{}{}</tr>", escape(&s.name), figures.concat());
    }
    html.push_str("</table>\n");
}

#[cfg(test)]
mod tests {
    use super::super::watch::Run;
    use super::*;
    use crate::hdr;

    #[test]
    fn names_are_escaped_and_every_subject_has_a_row() {
        let run = Run {
            ops: 10,
            seconds: 1.0,
            latencies: Some(hdr::of([(1000, 9), (2_000_000, 1)])),
            ..Run::default()
        };
        let runs = [run];
        let subjects = ["shoal", "<qemu>"].map(|name| IoSubject::new(name, "", &runs, &runs, None));
        let mut io = IoResult {
            device: "block".into(),
            parts: vec![IoPart {
                name: "reads".into(),
                bytes_per_op: 4096,
                ops: 10,
                turns: 1,
                subjects: subjects.into(),
            }],
        };
        io.check().unwrap();
        let (_, html, plots) = section(&io);
        // Its rates, its costs, its latencies.
        assert_eq!(html.matches("&lt;qemu&gt;").count(), 3);
        assert!(!html.contains("<qemu>"));
        let names: Vec<_> = plots.iter().map(|p| p.0).collect();
        assert_eq!(names, ["io-1", "latency-1"]);
        let drawn = plots[1].1.inline();
        assert!(
            drawn.contains("&lt;qemu&gt;") && drawn.matches("<path").count() == 2,
            "{drawn}"
        );
        // As files from before the histograms.
        io.parts[0].subjects.iter_mut().for_each(|s| s.hdr_ns.clear());
        assert_eq!(section(&io).2.len(), 1);
    }

    #[test]
    fn shares_end_with_all() {
        let shares = shares(&hdr::of([(1000, 9), (2_000_000, 1)]));
        assert_eq!(shares.len(), 2);
        assert!(
            (shares[0].0 - 1.0).abs() < 0.001 && (shares[0].1 - 0.9).abs() < 1e-9,
            "{shares:?}"
        );
        assert!(
            (shares[1].0 - 2000.0).abs() < 2.0 && shares[1].1 == 1.0,
            "{shares:?}"
        );
    }
}
