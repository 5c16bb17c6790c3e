//! One self-contained page from results files: figures, plots, and how and on what each was measured.

#[path = "report_guest.rs"]
mod guest;
#[path = "report_host.rs"]
mod host;

use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::canvas::{DARK, LIGHT, style};
use crate::history;
use crate::machine::Machine;
use crate::plot::{Plot, escape, short};
use crate::png::png;
use crate::results::{Measured, ResultFile};

const PAGE_STYLE: &str = "\
html{color-scheme:light dark;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif}
body{max-width:820px;margin:2rem auto;padding:0 1rem}
h1,h2{line-height:1.2}h2{margin-top:2.5rem;border-top:1px solid var(--grid);padding-top:1rem}
table{border-collapse:collapse;margin:.6rem 0}
td,th{padding:.15rem .9rem .15rem 0;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
th{color:var(--dim);font-weight:500}
td.v{white-space:normal}td,th{white-space:nowrap}
figure{margin:1.4rem 0}figcaption{font-weight:600}
svg{max-width:100%;height:auto;display:block;margin:.4rem 0 1rem}
.dim,summary{color:var(--dim)}.big{font-size:1.5rem}
";

/// A part of the page, and its plots with their file names.
struct Section {
    html: String,
    plots: Vec<(String, Plot)>,
}

/// Where a report goes.
pub struct Output<'a> {
    /// The page.
    pub page: &'a Path,
    /// The folder for each plot as SVG, if any.
    pub svg: Option<&'a Path>,
    /// The folder for each plot as PNG, if any.
    pub png: Option<&'a Path>,
}

/// Reads `files` and writes the page, with a history of those and of `earlier` ones, and each plot as files. A file that
/// is refused is told, and the page is made of the others.
pub fn write(files: &[PathBuf], earlier: &[PathBuf], output: &Output<'_>) -> Result<()> {
    let (mut sections, mut results, mut refused) = (Vec::new(), Vec::new(), 0);
    let mut load = |path: &PathBuf| {
        let told = |e| eprintln!("shoal-perf: left out: {:#}", anyhow::Error::from(e));
        let result = ResultFile::load(path).map_err(told).ok();
        refused += u32::from(result.is_none());
        result
    };
    let files = history::find(files)?;
    for path in &files {
        if let Some(result) = load(path) {
            sections.push(section(path, &result));
            results.push(result);
        }
    }
    if sections.is_empty() {
        bail!("no results file could be used: the reasons are above");
    }
    let each = |r: &ResultFile| {
        let headlines = history::headlines(&r.measured).into_iter();
        let named = headlines.map(|(name, unit, figure)| (format!("{name} ({})", r.method), unit, figure));
        named.collect::<Vec<_>>()
    };
    let headlines: Vec<_> = results.iter().flat_map(each).collect();
    results.extend(history::find(earlier)?.iter().filter_map(&mut load));
    let used = results.len();
    sections.extend(over_time(&results));
    std::fs::write(output.page, page(&headlines, &sections))
        .with_context(|| format!("writing the report {}", output.page.display()))?;
    println!("{}: {used} results", output.page.display());
    let plots = named_apart(&sections);
    if let Some(folder) = output.svg {
        for (name, plot) in &plots {
            write_plot(folder, &format!("{name}.svg"), plot.file().as_bytes())?;
        }
    }
    if let Some(folder) = output.png {
        for (name, plot) in &plots {
            write_plot(folder, &format!("{name}.png"), &png(plot, &LIGHT)?)?;
            write_plot(folder, &format!("{name}-dark.png"), &png(plot, &DARK)?)?;
        }
    }
    if refused > 0 {
        bail!(
            "{refused} of {} results files were left out",
            used + refused as usize
        );
    }
    Ok(())
}

/// All plots, with names that none shares with another.
fn named_apart(sections: &[Section]) -> Vec<(String, &Plot)> {
    let all = || sections.iter().flat_map(|s| &s.plots);
    let mut named = Vec::new();
    for (i, (name, plot)) in all().enumerate() {
        // Two files of one name in two folders.
        let name = match all().filter(|p| p.0 == *name).count() {
            1 => name.clone(),
            _ => format!("{name}-{i}"),
        };
        named.push((name, plot));
    }
    named
}

fn write_plot(folder: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("making the folder {}", folder.display()))?;
    let path = folder.join(name);
    std::fs::write(&path, bytes).with_context(|| format!("writing the plot {}", path.display()))
}

/// What changed from result to result; none if nothing was measured twice.
fn over_time(results: &[ResultFile]) -> Option<Section> {
    let plots = history::plots(results);
    if plots.is_empty() {
        return None;
    }
    let mut html = "<h2>History</h2>\n<p>Each figure in the order in which it was measured, by the label that it was \
                    given. The lab's are comparable from machine to machine; the others are, if at all, on one \
                    machine only.</p>\n"
        .to_owned();
    let mut named = Vec::new();
    for (i, plot) in plots.into_iter().enumerate() {
        html.push_str(&plot.figure());
        named.push((format!("history-{}", i + 1), plot));
    }
    Some(Section { html, plots: named })
}

fn page(headlines: &[(String, &str, f64)], sections: &[Section]) -> String {
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\
         <title>Shoal: measurements</title>\n<style>{}{PAGE_STYLE}</style></head>\n<body><h1>Shoal: measurements</h1>\n\
         <p>Figures of different methods are never to be compared with each other. Ratios were taken in one run, in \
         turns; their intervals hold the true ratio of medians with 95 % confidence (bootstrap over turns).</p>\n",
        style()
    );
    html.push_str("<table>\n");
    for (name, unit, figure) in headlines {
        let row = format!(
            "<tr><td class=n>{}<td>{unit}<td class=v>{}</tr>",
            plain(*figure),
            escape(name)
        );
        line(&mut html, &row);
    }
    html.push_str("</table>\n");
    for section in sections {
        html.push_str(&section.html);
    }
    html + "</body></html>\n"
}

fn section(path: &Path, result: &ResultFile) -> Section {
    let (title, figures, plots) = match &result.measured {
        Measured::BootProbe(boot) => guest::probe_boot(boot),
        Measured::BootLinux(boot) => guest::linux_boot(boot),
        Measured::Density(density) => guest::density_run(density),
        Measured::Io(io) => crate::io::report::section(io),
        Measured::Limits(limits) => {
            let (title, html) = limits.section();
            (title, html, vec![])
        }
        Measured::Api(api) => host::api_calls(api),
        Measured::Churn(churn) => host::churn(churn),
        Measured::Jail(cost) => host::jail(cost),
        Measured::Costs(costs) => host::costs(costs),
    };
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let mut html = format!(
        "<h2>{}</h2>\n<p class=\"dim\">{}; file {}{}</p>\n{figures}",
        escape(&title),
        escape(&result.method),
        escape(&path.file_name().unwrap_or_default().to_string_lossy()),
        if result.interrupted {
            "; <b>interrupted, and therefore shorter than asked for</b>"
        } else {
            ""
        }
    );
    let mut named = Vec::new();
    for (name, plot) in plots {
        html.push_str(&plot.figure());
        named.push((format!("{stem}-{name}"), plot));
    }
    html.push_str(&machine(&result.machine, result.taken));
    Section { html, plots: named }
}

/// Its title, its figures, and its plots with their names.
pub type Part = (String, String, Vec<(&'static str, Plot)>);

/// A count without a point, another figure with three digits.
pub fn plain(value: f64) -> String {
    match value.fract() == 0.0 {
        true => format!("{value:.0}"),
        false => short(value),
    }
}

/// Adds a line.
pub fn line(html: &mut String, text: &str) {
    writeln!(html, "{text}").expect("a String takes all text");
}

fn machine(m: &Machine, taken: u64) -> String {
    let mut rows = String::new();
    let processors = format!("{} × {}", m.cpus, m.cpu);
    let memory = format!("{} MiB", m.memory_mib);
    let load = short(m.load);
    let mitigations = m.mitigations.join("; ");
    for (name, value) in [
        ("processors", processors.as_str()),
        ("memory", &memory),
        ("kernel", &m.kernel),
        ("KVM", &m.kvm),
        ("governor", &m.governor),
        ("huge pages", &m.huge_pages),
        ("mitigations", &mitigations),
        ("load when it began", &load),
        ("measured", &date(taken)),
    ] {
        line(&mut rows, &format!("<tr><th>{name}<td>{}</tr>", escape(value)));
    }
    format!("<details><summary>The machine</summary><table>\n{rows}</table></details>\n")
}

/// A day and time of UTC, of seconds since 1970.
fn date(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Years that begin in March, so that the leap day ends them (Howard Hinnant, chrono-compatible low-level date
    // algorithms, days_from_civil inverted).
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_based = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_based + 2) / 5 + 1;
    let month = if march_based < 10 {
        march_based + 3
    } else {
        march_based - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year}-{month:02}-{day:02} {:02}:{:02} UTC",
        rest / 3600,
        rest / 60 % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::{Density, Leaks, ProbeBoot, Subject};

    fn files(folder: &Path) -> Vec<PathBuf> {
        let shoal = vec![1.6, 1.7, 1.8];
        let boot = ProbeBoot {
            runs: 3,
            floor_ms: 1.2,
            vmm_ms: 1.7,
            ratio: 1.4,
            jail_adds_ms: Some(0.3),
            jail_lacks: vec!["cgroup".into()],
            subjects: vec![Subject::new(
                "<script>alert(1)</script>",
                "\"><b>",
                shoal.clone(),
                &shoal,
            )],
            stages: vec![],
        };
        let density = Density {
            guests_asked: 2,
            guests: 0,
            guest_memory_mib: 128,
            stopped_because: Some("no </p><script>".into()),
            host_mb_per_guest: 0.0,
            host_mb_per_guest_end_to_end: 0.0,
            pss_mb_per_guest: 0.0,
            shares: vec![],
            accounts: String::new(),
            rest_cpu_percent: 0.0,
            start_ms: 0.0,
            starts_ms: vec![],
            points: vec![],
            leaks: Leaks::default(),
        };
        let write = |name: &str, measured| {
            let result = ResultFile::new("<i>", Machine::here(), true, measured);
            let path = folder.join(name);
            std::fs::write(&path, serde_json::to_string(&result).unwrap()).unwrap();
            path
        };
        vec![
            write("boot.json", Measured::BootProbe(boot)),
            write("density.json", Measured::Density(density)),
        ]
    }

    #[test]
    fn the_page_holds_all_results_and_no_markup_of_theirs() {
        let folder = tempfile::tempdir().unwrap();
        let page = folder.path().join("r.html");
        let (svg, png) = (folder.path().join("svg"), folder.path().join("png"));
        let output = Output {
            page: &page,
            svg: Some(&svg),
            png: Some(&png),
        };
        write(&files(folder.path()), &[], &output).unwrap();
        let html = std::fs::read_to_string(&page).unwrap();
        assert!(!html.contains("<script") && !html.contains("<i>") && !html.contains("\"><b>"));
        assert_eq!(html.matches("<svg").count(), 5);
        assert_eq!(std::fs::read_dir(svg).unwrap().count(), 5);
        // Light and dark.
        assert_eq!(std::fs::read_dir(&png).unwrap().count(), 10);
        for name in ["boot-latency.png", "boot-latency-dark.png"] {
            let bytes = std::fs::read(png.join(name)).unwrap();
            let drawn = tiny_skia::Pixmap::decode_png(&bytes).unwrap();
            assert!(drawn.width() == 1520 && drawn.pixels().iter().any(|p| *p != drawn.pixels()[0]));
        }
        for outside in ["src=", "href=", "@import", "url("] {
            assert!(!html.contains(outside), "the page loads something: {outside}");
        }
    }

    #[test]
    fn dates_are_readable() {
        assert_eq!(date(0), "1970-01-01 00:00 UTC");
        assert_eq!(date(951_782_400), "2000-02-29 00:00 UTC");
        assert_eq!(date(1_735_689_599), "2024-12-31 23:59 UTC");
    }

    fn only(page: &Path) -> Output<'_> {
        Output {
            page,
            svg: None,
            png: None,
        }
    }

    #[test]
    fn results_that_are_kept_can_be_read() {
        let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("results");
        let files = history::find(&[kept]).unwrap();
        assert!(!files.is_empty());
        for path in files {
            ResultFile::load(&path).unwrap();
        }
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let (page, taken) = (folder.path().join("r.html"), folder.path().join("taken"));
        std::fs::write(&taken, "").unwrap();
        let output = Output {
            png: Some(&taken),
            ..only(&page)
        };
        let told = format!("{:#}", write(&files(folder.path()), &[], &output).unwrap_err());
        assert!(
            told.contains("making the folder") && told.contains("taken"),
            "{told}"
        );
    }

    #[test]
    fn what_is_refused_is_left_out_and_told() {
        let folder = tempfile::tempdir().unwrap();
        let page = folder.path().join("r.html");
        let mut all = files(folder.path());
        std::fs::write(&all[1], "{\"schema\":1,").unwrap();
        let told = write(&all, &[], &only(&page)).unwrap_err().to_string();
        assert!(told.contains("1 of 2"), "{told}");
        assert!(page.exists());
        std::fs::remove_file(&page).unwrap();
        all.remove(0);
        assert!(write(&all, &[], &only(&page)).is_err());
        assert!(!page.exists());
    }
}
