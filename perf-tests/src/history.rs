//! How the figures that matter changed from commit to commit, from results that were kept.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::plot::{self, Plot};
use crate::results::{Measured, ResultFile};

/// Folders in folders that are looked into, and files taken, at most.
const DEPTH: u32 = 3;
const MAX_FILES: usize = 10_000;

/// All results files under `paths`, each of which is a file or a folder, in their order; those of a folder by name.
pub fn find(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        let from = files.len();
        collect(path, DEPTH, &mut files)?;
        files[from..].sort();
    }
    Ok(files)
}

fn collect(path: &Path, depth: u32, files: &mut Vec<PathBuf>) -> Result<()> {
    let kind = fs::metadata(path).with_context(|| format!("looking for results in {}", path.display()))?;
    if !kind.is_dir() {
        files.push(path.to_owned());
    } else if depth > 0 {
        let folder = fs::read_dir(path).with_context(|| format!("reading the folder {}", path.display()))?;
        for entry in folder {
            let path = entry?.path();
            if path.is_dir() || path.extension().is_some_and(|e| e == "json") {
                collect(&path, depth - 1, files)?;
            }
        }
    }
    if files.len() > MAX_FILES {
        bail!("more than {MAX_FILES} results files: name fewer folders");
    }
    Ok(())
}

/// One figure over time.
struct Series {
    name: String,
    unit: &'static str,
    /// When it was taken, what it is called, and the figure.
    points: Vec<(u64, String, f64)>,
}

/// The figures of a result by which it is known, with their units.
pub fn headlines(measured: &Measured) -> Vec<(String, &'static str, f64)> {
    match measured {
        Measured::BootProbe(boot) => {
            vec![("Start of the probe guest, × floor".into(), "× floor", boot.ratio)]
        }
        Measured::BootLinux(boot) => vec![(format!("{}, to init", boot.guest), "ms", boot.init_ms)],
        Measured::Density(density) => vec![
            ("Memory per idle guest".into(), "MB", density.host_mb().0),
            ("PSS per idle guest".into(), "MB", density.pss_mb_per_guest),
        ],
        Measured::Io(io) => io.headlines(),
        Measured::Limits(limits) => limits.headlines(),
        Measured::Churn(churn) => vec![("Churn: start of a guest".into(), "ms", churn.start.median_ms)],
        Measured::Jail(cost) => {
            let each = cost.conditions.iter();
            each.map(|c| {
                (
                    format!("The jail adds, {}", crate::jail::name(c)),
                    "ms",
                    c.adds_ms,
                )
            })
            .collect()
        }
        Measured::Costs(costs) => {
            let each = costs.costs.iter();
            each.map(|c| (format!("Cost: {}", c.name), "µs", c.us)).collect()
        }
        Measured::Api(api) => {
            let most = api.points.last();
            let calls = most.iter().flat_map(|p| p.calls.iter().map(|c| (p.guests, c)));
            let start = calls.filter(|(_, c)| c.name == "POST start");
            start
                .map(|(guests, c)| (format!("API: start, {guests} guests running"), "ms", c.median_ms))
                .collect()
        }
    }
}

/// A plot of each figure that was taken at two times or more, and by the same method.
pub fn plots(results: &[ResultFile]) -> Vec<Plot> {
    let mut all: Vec<Series> = Vec::new();
    for result in results {
        for (name, unit, figure) in headlines(&result.measured) {
            let name = format!("{name} ({})", result.method);
            let label = match result.label.is_empty() {
                true => "now".to_owned(),
                false => result.label.clone(),
            };
            let point = (result.taken, label, figure);
            match all.iter_mut().find(|s| s.name == name) {
                Some(series) if series.points.contains(&point) => {}
                Some(series) => series.points.push(point),
                None => all.push(Series {
                    name,
                    unit,
                    points: vec![point],
                }),
            }
        }
    }
    all.retain(|s| s.points.len() > 1);
    for series in &mut all {
        series.points.sort_by_key(|p| p.0);
    }
    let draw = |s: Series| {
        let points: Vec<(&str, f64)> = s.points.iter().map(|p| (p.1.as_str(), p.2)).collect();
        plot::history(&s.name, s.unit, &points)
    };
    all.into_iter().map(draw).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Machine;
    use crate::results::LinuxBoot;

    fn boot(taken: u64, label: &str, method: &str, init_ms: f64) -> ResultFile {
        let boot = LinuxBoot {
            guest: "g".into(),
            runs: 1,
            init_ms,
            spread_percent: 0.0,
            subjects: vec![],
            samples_ms: vec![],
            stages: vec![],
        };
        let mut result = ResultFile::new(method, Machine::here(), false, Measured::BootLinux(boot));
        (result.taken, result.label) = (taken, label.into());
        result
    }

    #[test]
    fn figures_of_one_method_make_a_series_in_the_order_of_time() {
        let results = [
            boot(30, "c", "lab", 90.0),
            boot(10, "a", "lab", 120.0),
            boot(20, "b", "lab", 100.0),
            boot(10, "a", "elsewhere", 10.0),
        ];
        let plots = plots(&results);
        assert_eq!(plots.len(), 1, "one point is no history");
        let svg = plots[0].inline();
        let at = |label: &str| svg.find(&format!(">{label}</text>")).unwrap();
        assert!(at("a") < at("b") && at("b") < at("c"), "{svg}");
    }

    #[test]
    fn the_same_result_given_twice_counts_once() {
        assert!(plots(&[boot(1, "a", "lab", 1.0), boot(1, "a", "lab", 1.0)]).is_empty());
    }

    #[test]
    fn folders_are_searched_and_what_is_missing_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("v1");
        fs::create_dir(&inner).unwrap();
        for name in ["a.json", "b.json", "notes.txt"] {
            fs::write(inner.join(name), "").unwrap();
        }
        let found = find(&[folder.path().to_owned()]).unwrap();
        assert_eq!(found, [inner.join("a.json"), inner.join("b.json")]);
        let told = format!("{:#}", find(&[folder.path().join("none")]).unwrap_err());
        assert!(told.contains("none"), "{told}");
    }
}
