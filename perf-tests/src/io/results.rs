//! Results of the I/O benchmarks.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::watch::{Counts, Run};
use crate::hdr;
use crate::results::{MAX_SUBJECTS, count, figure, samples, text};
use crate::stats::{median, ratio_interval};

/// What `block`, `net` and `vsock` measure: one part for each pattern.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct IoResult {
    /// `block`, `net`, `vsock`.
    pub device: String,
    /// Its patterns.
    pub parts: Vec<IoPart>,
}

/// One pattern, by several programs in turns.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct IoPart {
    /// What was done, as `4 KiB random reads, 32 in flight`.
    pub name: String,
    /// Bytes of data in each operation.
    pub bytes_per_op: u64,
    /// Operations in each run.
    pub ops: u64,
    /// Turns that counted.
    pub turns: u32,
    /// Shoal first.
    pub subjects: Vec<IoSubject>,
}

/// Latencies of single operations (µs).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Median.
    pub p50: f64,
    /// 90 % are below.
    pub p90: f64,
    /// 99 % are below.
    pub p99: f64,
    /// 99.9 % are below.
    pub p999: f64,
    /// The longest.
    pub max: f64,
}

impl Latency {
    fn of(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
        Self {
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: histogram.max() as f64 / 1e3,
        }
    }
}

/// One program in a comparison. Medians over the turns.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct IoSubject {
    /// Its name.
    pub name: String,
    /// What it says of its version; empty for our own.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub version: String,
    /// Operations in one second of the guest's clock.
    pub ops_per_s: f64,
    /// The first subject's operations per second ÷ this one's: above 1, the first is faster.
    pub first_is_faster_by: f64,
    /// The 95 % confidence interval of that ratio.
    pub interval: (f64, f64),
    /// Processor time of the VMM's threads but the vCPU's, for one operation (µs).
    pub device_cpu_us_per_op: f64,
    /// Processor time of all of the VMM's threads for one operation (µs): the guest's own, which polls, included.
    pub all_cpu_us_per_op: f64,
    /// Notifications that the guest wrote, for one operation; none where the guest does not count them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kicks_per_op: Option<f64>,
    /// System calls of the VMM for one operation, in a run apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_calls_per_op: Option<f64>,
    /// Exits of the vCPU for one operation, in that run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exits_per_op: Option<f64>,
    /// Of single operations of all runs (µs). In files without `hdr_ns` medians of each run's figure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_us: Option<Latency>,
    /// The same as an HDR histogram of nanoseconds (V2, compressed, base64).
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hdr_ns: String,
    /// Lost on the way, of all that were sent (percent).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub lost_percent: f64,
    /// Operations per second of each run, in the order of the turns.
    pub samples_ops_per_s: Vec<f64>,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's way to call it
fn is_zero(n: &f64) -> bool {
    *n == 0.0
}

impl IoSubject {
    /// From its runs and those of the first subject in the same turns; `counted` is the run in which was counted.
    pub fn new(name: &str, version: &str, runs: &[Run], first: &[Run], counted: Option<&Run>) -> Self {
        let of = |f: &dyn Fn(&Run) -> f64| median(&runs.iter().map(f).collect::<Vec<_>>());
        let rates = |runs: &[Run]| runs.iter().map(Run::rate).collect::<Vec<_>>();
        let (own, others) = (rates(runs), rates(first));
        let per_op = |pick: &dyn Fn(&Counts) -> Option<u64>| {
            let run = counted?;
            Some(pick(&run.counts)? as f64 / run.ops as f64)
        };
        let mut all = runs.iter().filter_map(|r| r.latencies.as_ref());
        let latencies = all.next().map(|first| {
            all.fold(first.clone(), |mut sum, run| {
                sum.add(run)
                    .expect("a histogram that grows by itself takes every other");
                sum
            })
        });
        Self {
            name: name.into(),
            version: version.into(),
            ops_per_s: median(&own),
            first_is_faster_by: match own.is_empty() {
                true => 0.0,
                false => median(&others) / median(&own),
            },
            interval: ratio_interval(&others, &own),
            device_cpu_us_per_op: of(&|r| r.cpu.devices_ns as f64 / 1e3 / r.ops as f64),
            all_cpu_us_per_op: of(&|r| (r.cpu.devices_ns + r.cpu.vcpu_ns) as f64 / 1e3 / r.ops as f64),
            kicks_per_op: runs
                .iter()
                .all(|r| r.kicks.is_some())
                .then(|| of(&|r| r.kicks.unwrap_or(0) as f64 / r.ops as f64)),
            system_calls_per_op: per_op(&|c| c.system_calls),
            exits_per_op: per_op(&|c| c.exits),
            latency_us: latencies.as_ref().map(Latency::of),
            hdr_ns: latencies.as_ref().map(hdr::write).unwrap_or_default(),
            lost_percent: of(&|r| 100.0 * r.lost as f64 / (r.lost + r.ops) as f64),
            samples_ops_per_s: own,
        }
    }

    /// Latencies of all runs (ns); none where they were not measured, or were not kept.
    pub fn latencies(&self) -> Option<Histogram<u64>> {
        hdr::read(&self.hdr_ns).ok().flatten()
    }
}

impl IoResult {
    /// For each part the device's processor time for one operation, by the first subject: other work on the machine
    /// changes it least.
    pub fn headlines(&self) -> Vec<(String, &'static str, f64)> {
        let parts = self.parts.iter().filter_map(|p| Some((p, p.subjects.first()?)));
        parts
            .map(|(part, first)| {
                (
                    format!("{}: {}, {}", self.device, part.name, first.name),
                    "µs of CPU",
                    first.device_cpu_us_per_op,
                )
            })
            .collect()
    }

    /// What a file must hold to be believed.
    pub fn check(&self) -> Result<(), String> {
        text("device", &self.device)?;
        count("parts", self.parts.len(), MAX_SUBJECTS)?;
        for part in &self.parts {
            text("a part", &part.name)?;
            count("subjects", part.subjects.len(), MAX_SUBJECTS)?;
            part.subjects.iter().try_for_each(|s| s.check(part.ops))?;
        }
        Ok(())
    }
}

impl IoSubject {
    fn check(&self, ops: u64) -> Result<(), String> {
        text("a name", &self.name)?;
        text("a version", &self.version)?;
        samples("samples_ops_per_s", &self.samples_ops_per_s)?;
        if let Some(latencies) = hdr::read(&self.hdr_ns).map_err(|e| format!("hdr_ns: {e}"))? {
            let all = ops.saturating_mul(self.samples_ops_per_s.len() as u64);
            if latencies.len() != all {
                return Err(format!("hdr_ns holds {} operations of {all}", latencies.len()));
            }
        }
        let latency = self.latency_us.unwrap_or_default();
        for value in [
            self.ops_per_s,
            self.first_is_faster_by,
            self.interval.0,
            self.interval.1,
            self.device_cpu_us_per_op,
            self.all_cpu_us_per_op,
            self.kicks_per_op.unwrap_or_default(),
            self.system_calls_per_op.unwrap_or_default(),
            self.exits_per_op.unwrap_or_default(),
            self.lost_percent,
            latency.p50,
            latency.p90,
            latency.p99,
            latency.p999,
            latency.max,
        ] {
            figure("a figure", value)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(latencies: &[&[(u64, u64)]]) -> IoSubject {
        let run = |all: &&[(u64, u64)]| Run {
            ops: 4,
            seconds: 1.0,
            latencies: (!all.is_empty()).then(|| hdr::of(all.iter().copied())),
            ..Run::default()
        };
        let runs: Vec<Run> = latencies.iter().map(run).collect();
        IoSubject::new("s", "", &runs, &runs, None)
    }

    #[test]
    fn latencies_are_those_of_all_runs() {
        let s = subject(&[&[(1000, 3), (2000, 1)], &[(1000, 2), (9_000_000, 2)]]);
        let all = s.latencies().unwrap();
        assert_eq!((all.len(), all.count_at(1000)), (8, 5));
        let l = s.latency_us.unwrap();
        assert!(
            (l.p50 - 1.0).abs() < 0.001 && (l.max - 9000.0).abs() < 9.0,
            "{l:?}"
        );
        assert!(s.check(4).is_ok());
        let s = subject(&[&[], &[]]);
        assert_eq!((s.latency_us, s.latencies(), s.hdr_ns.as_str()), (None, None, ""));
    }

    #[test]
    fn a_histogram_of_other_runs_or_rubbish_is_refused() {
        let mut s = subject(&[&[(1000, 4)]]);
        let told = s.check(5).unwrap_err();
        assert!(told.contains("4 operations of 5"), "{told}");
        s.hdr_ns = "AAAA".into();
        let told = s.check(4).unwrap_err();
        assert!(told.contains("hdr_ns: a histogram"), "{told}");
        assert_eq!(s.latencies(), None);
    }

    #[test]
    fn a_file_from_before_the_histograms_is_read() {
        let mut older = serde_json::to_value(subject(&[&[(1000, 4)]])).unwrap();
        assert!(older.as_object_mut().unwrap().remove("hdr_ns").is_some());
        let older: IoSubject = serde_json::from_value(older).unwrap();
        older.check(4).unwrap();
        assert!(older.latency_us.is_some() && older.latencies().is_none());
    }
}
