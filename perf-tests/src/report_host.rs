//! The page's sections on what the host's own programs do: calls, churn, jail, costs.

use super::{Part, line};
use crate::api::Api;
use crate::churn::Churn;
use crate::costs::Costs;
use crate::daemon::Census;
use crate::hdr::Latencies;
use crate::jail::{JailCost, name};
use crate::plot::{self, escape, short};

/// Calls of the API.
pub fn api_calls(api: &Api) -> Part {
    let jailed = if api.jailed { "jailed" } else { "not jailed" };
    let mut html = format!("<p>Guests {jailed}. Milliseconds.</p>\n");
    for point in &api.points {
        let head = format!("with {} guests running", point.guests);
        html.push_str(&latencies(&head, &point.calls.iter().collect::<Vec<_>>()));
    }
    html.push_str(&leaks(&api.leaks));
    let names: Vec<&str> = api
        .points
        .iter()
        .flat_map(|p| &p.calls)
        .map(|c| c.name.as_str())
        .collect();
    let mut curves: Vec<(&str, Vec<(f64, f64)>)> = Vec::new();
    for name in names {
        if !curves.iter().any(|c| c.0 == name) {
            let points = api.points.iter().filter_map(|p| {
                let call = p.calls.iter().find(|c| c.name == name)?;
                Some((f64::from(p.guests), call.median_ms))
            });
            curves.push((name, points.collect()));
        }
    }
    let mut plots = vec![(
        "calls",
        plot::over_guests(
            "Median latency of calls against guests",
            "ms (logarithmic)",
            &curves,
            plot::Look::LogLines,
        ),
    )];
    if let Some(last) = api.points.last() {
        let series: Vec<(&str, &[f64])> = last
            .calls
            .iter()
            .map(|c| (c.name.as_str(), c.samples_ms.as_slice()))
            .collect();
        let title = format!("Latency of calls with {} guests, distribution", last.guests);
        plots.push(("distribution", plot::cdf(&title, &series)));
    }
    ("Calls of the API".into(), html, plots)
}

/// What was left behind, in a sentence.
fn leaks(census: &Census) -> String {
    let rows = census.rows().map(|(name, n)| format!("{n} {name}"));
    format!(
        "<p>Left behind when all guests had been deleted: {}.</p>\n",
        rows.join(", ")
    )
}

/// Guests that come and go.
pub fn churn(c: &Churn) -> Part {
    let mut html = format!(
        "<p class=\"big\">{} guests a second</p>\n<p>{} asked for; {} guests in {} s. The daemon's memory grew by {:.0} KiB \
         in the first half and {:.0} KiB in the second.</p>\n",
        short(c.rate),
        short(c.rate_asked),
        c.guests,
        short(c.seconds),
        c.daemon_grew_kib.0,
        c.daemon_grew_kib.1
    );
    html.push_str(&latencies("Milliseconds", &[&c.start, &c.end]));
    html.push_str(&leaks(&c.leaks));
    let series = [&c.start, &c.end].map(|l| (l.name.as_str(), l.samples_ms.as_slice()));
    let plots = vec![(
        "latency",
        plot::cdf("Start and end of guests that come and go", &series),
    )];
    ("Churn".into(), html, plots)
}

/// What the jail adds.
pub fn jail(cost: &JailCost) -> Part {
    let mut html = "<table><tr><th><th class=n>without, ms<th class=n>with, ms<th class=n>adds, ms<th>95 % interval</tr>\n".to_owned();
    for c in &cost.conditions {
        let figures = [c.without.median_ms, c.with.median_ms, c.adds_ms];
        let figures = figures.map(|f| format!("<td class=n>{}", short(f))).concat();
        let (low, high) = c.interval_ms;
        line(
            &mut html,
            &format!(
                "<tr><td>{}{figures}<td>{} to {}</tr>",
                name(c),
                short(low),
                short(high)
            ),
        );
    }
    line(&mut html, "</table>");
    for (what, all) in [("The jail lacks", &cost.lacks), ("Left out", &cost.left_out)] {
        if !all.is_empty() {
            line(&mut html, &format!("<p>{what}: {}.</p>", escape(&all.join("; "))));
        }
    }
    let names: Vec<(String, &[f64])> = cost
        .conditions
        .iter()
        .flat_map(|c| {
            [("without", &c.without), ("with", &c.with)]
                .map(|(w, l)| (format!("{}, {w}", name(c)), l.samples_ms.as_slice()))
        })
        .collect();
    let series: Vec<(&str, &[f64])> = names.iter().map(|(n, s)| (n.as_str(), *s)).collect();
    let plots = vec![("latency", plot::cdf("Starts with and without a jail", &series))];
    ("What the jail adds to a start".into(), html, plots)
}

/// What the host pays.
pub fn costs(costs: &Costs) -> Part {
    let mut html = "<table><tr><th><th class=n>µs<th class=n>system calls<th class=n>exits</tr>\n".to_owned();
    for c in &costs.costs {
        let counted = |n: Option<u64>| n.map_or("–".into(), |n| n.to_string());
        line(
            &mut html,
            &format!(
                "<tr><td>{}<td class=n>{}<td class=n>{}<td class=n>{}</tr>",
                escape(&c.name),
                short(c.us),
                counted(c.system_calls),
                counted(c.exits)
            ),
        );
    }
    line(&mut html, "</table>");
    ("What the host pays".into(), html, Vec::new())
}

fn latencies(head: &str, all: &[&Latencies]) -> String {
    let mut html = format!(
        "<table><tr><th>{head}<th class=n>median<th class=n>p90<th class=n>p99<th class=n>longest</tr>\n"
    );
    for l in all {
        let figures = [l.median_ms, l.p90_ms, l.p99_ms, l.max_ms];
        let figures = figures.map(|f| format!("<td class=n>{}", short(f))).concat();
        line(&mut html, &format!("<tr><td>{}{figures}</tr>", escape(&l.name)));
    }
    html + "</table>\n"
}
