//! The page's sections on guests: how they start, and what idle ones cost.

use super::{Part, line, plain};
use crate::gate::durations;
use crate::plot::{self, Plot, Ratio, escape, short};
use crate::results::{Density, LinuxBoot, ProbeBoot, Stage, Subject};

/// Boots of the probe guest.
pub fn probe_boot(boot: &ProbeBoot) -> Part {
    let mut html = format!(
        "<p class=\"big\">shoal-vmm: {} ms, {} × the floor</p>\n",
        short(boot.vmm_ms),
        short(boot.ratio)
    );
    html.push_str(&table(&boot.subjects));
    if let Some(adds) = boot.jail_adds_ms {
        line(&mut html, &format!("<p>The jail adds {} ms.</p>", short(adds)));
    }
    if !boot.jail_lacks.is_empty() {
        let lacks = escape(&boot.jail_lacks.join(", "));
        line(
            &mut html,
            &format!("<p>Where this was measured the jail lacks: {lacks}.</p>"),
        );
    }
    let mut plots = comparison(&boot.subjects);
    plots.push(("timeline", stacked("What a start is made of", &boot.stages)));
    (
        "From process start to the guest's first output".into(),
        html,
        plots,
    )
}

/// How fast each was.
fn table(subjects: &[Subject]) -> String {
    let mut html =
        "<table><tr><th>started<th class=n>ms<th class=n>p90<th class=n>÷ shoal-vmm<th>95 % interval\
        <th>version</tr>\n"
            .to_owned();
    for s in subjects {
        let figures = [s.median_ms, s.p90_ms, s.ratio_to_shoal]
            .map(|f| format!("<td class=n>{}", short(f)))
            .concat();
        let (low, high) = s.ratio_interval;
        let (name, version) = (escape(&s.name), escape(&s.version));
        line(
            &mut html,
            &format!(
                "<tr><td>{name}{figures}<td>{} to {}<td class=v>{version}</tr>",
                short(low),
                short(high)
            ),
        );
    }
    line(&mut html, "</table>");
    html
}

fn comparison(subjects: &[Subject]) -> Vec<(&'static str, Plot)> {
    let series: Vec<(&str, &[f64])> = subjects
        .iter()
        .map(|s| (s.name.as_str(), s.samples_ms.as_slice()))
        .collect();
    let all: Vec<Ratio<'_>> = subjects
        .iter()
        .map(|s| Ratio {
            name: &s.name,
            ratio: s.ratio_to_shoal,
            interval: s.ratio_interval,
        })
        .collect();
    vec![
        (
            "ratios",
            plot::ratios("Start latency as a ratio", "× shoal-vmm", &all),
        ),
        ("latency", plot::cdf("Start latency, distribution", &series)),
    ]
}

/// A boot's pieces, each named after the step that ends it, in words.
fn stacked(title: &str, stages: &[Stage]) -> Plot {
    let pieces: Vec<(String, f64)> = durations(stages)
        .iter()
        .map(|&(n, d)| (n.replace('-', " "), d))
        .collect();
    let pieces: Vec<(&str, f64)> = pieces.iter().map(|(n, d)| (n.as_str(), *d)).collect();
    plot::timeline(&format!("{title} (pieces are named after their end)"), &pieces)
}

/// Boots of Linux.
pub fn linux_boot(boot: &LinuxBoot) -> Part {
    let mut html = format!(
        "<p class=\"big\">{} ms</p>\n<p>Median of {} boots; all within {} %.</p>\n",
        short(boot.init_ms),
        boot.runs,
        short(boot.spread_percent)
    );
    let mut plots = Vec::new();
    if boot.subjects.len() > 1 {
        html.push_str(&table(&boot.subjects));
        plots = comparison(&boot.subjects);
    }
    plots.push(("timeline", stacked("What a boot is made of", &boot.stages)));
    (
        match boot.guest.as_str() {
            "" => "A Linux guest: to the first line of init".into(),
            guest => format!("{guest}: to the first line of init"),
        },
        html,
        plots,
    )
}

/// Idle guests.
pub fn density_run(d: &Density) -> Part {
    let (mb, how) = d.host_mb();
    let mut html = format!(
        "<p class=\"big\">{} MB of host memory per guest</p>\n<p>By {how}; {} idle guests of {} MiB.</p>\n<table>\n",
        short(mb),
        d.guests,
        d.guest_memory_mib
    );
    for (name, value, unit) in [
        (
            "host memory per guest, slope of MemAvailable",
            d.host_mb_per_guest,
            "MB",
        ),
        (
            "the same, first and last point",
            d.host_mb_per_guest_end_to_end,
            "MB",
        ),
        ("PSS per guest", d.pss_mb_per_guest, "MB"),
        (
            "processor time at rest, all guests together",
            d.rest_cpu_percent,
            "% of one",
        ),
        ("start, median", d.start_ms, "ms"),
        ("processes left behind", f64::from(d.leaks.processes), ""),
        ("descriptors left behind", f64::from(d.leaks.descriptors), ""),
    ] {
        line(
            &mut html,
            &format!("<tr><td>{name}<td class=n>{}<td>{unit}</tr>", plain(value)),
        );
    }
    line(&mut html, "</table>");
    if !d.shares.is_empty() {
        let head = format!(
            "<table><tr><th>a guest's memory by the {}'s account<th class=n>MB</tr>",
            escape(&d.accounts)
        );
        line(&mut html, &head);
        for share in &d.shares {
            let row = format!(
                "<tr><td>{}<td class=n>{}</tr>",
                escape(&share.kind),
                short(share.mb)
            );
            line(&mut html, &row);
        }
        line(&mut html, "</table>");
    }
    if let Some(why) = &d.stopped_because {
        let why = escape(why);
        line(
            &mut html,
            &format!("<p>Fewer than the {} asked for: {why}.</p>", d.guests_asked),
        );
    }
    let first = d.points.first().map_or(0, |p| p.mem_available);
    let taken = |available: u64| (first as f64 - available as f64) / 1e6;
    let at = |p: &crate::results::DensityPoint, y: f64| (f64::from(p.guests), y);
    let memory = [
        (
            "host memory taken",
            d.points.iter().map(|p| at(p, taken(p.mem_available))).collect(),
        ),
        (
            "sum of the VMMs' PSS",
            d.points.iter().map(|p| at(p, p.pss as f64 / 1e6)).collect(),
        ),
    ];
    let starts = d
        .starts_ms
        .iter()
        .enumerate()
        .map(|(i, &ms)| (i as f64, ms))
        .collect();
    let plots = vec![
        (
            "memory",
            plot::over_guests("Host memory against guests", "MB", &memory, plot::Look::Lines),
        ),
        (
            "starts",
            plot::over_guests(
                "Start latency against guests",
                "ms",
                &[("one start", starts)],
                plot::Look::Dots,
            ),
        ),
    ];
    ("Density".into(), html, plots)
}
