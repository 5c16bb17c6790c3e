//! Results as files: what is in them, and what a file must hold to be believed.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::accounts::Share;
use crate::api::Api;
use crate::churn::Churn;
use crate::costs::Costs;
use crate::io::limits::LimitResult;
use crate::io::results::IoResult;
use crate::jail::JailCost;
use crate::machine::Machine;
use crate::stats::{median, quantile, ratio_interval};

/// The form of a results file. It grows by one whenever a reader of the older form would be misled.
pub const SCHEMA: u32 = 1;
/// A larger file is none of ours.
const MAX_BYTES: u64 = 64 << 20;
const MAX_SAMPLES: usize = 100_000;
/// Things that a result lists, at most.
pub const MAX_SUBJECTS: usize = 64;
const MAX_TEXT: usize = 4096;
/// No figure of ours is larger: 10^9 ms are eleven days.
const MAX_FIGURE: f64 = 1e9;

/// Why a results file is refused.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// It cannot be read.
    #[error("cannot read the results file {0}")]
    Read(PathBuf, #[source] std::io::Error),
    /// It is larger than any result.
    #[error("{0} is larger than {MAX_BYTES} bytes: that is no results file of shoal-perf")]
    Large(PathBuf),
    /// It ends too early.
    #[error("{0} is truncated ({1}): measure again, or take a whole copy of it")]
    Truncated(PathBuf, serde_json::Error),
    /// It is not JSON, or holds something else.
    #[error("{0} is no results file of shoal-perf: {1}")]
    Malformed(PathBuf, serde_json::Error),
    /// It has another form.
    #[error(
        "{path} has the form {found} of results, this shoal-perf reads form {SCHEMA}: measure again with this one"
    )]
    Schema {
        /// The file.
        path: PathBuf,
        /// What it says of itself.
        found: String,
    },
    /// A figure in it cannot be.
    #[error("{path}: {what}: the file was damaged or written by something else")]
    Absurd {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

/// One run's result: how, on what, and what came out.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct ResultFile {
    /// [`SCHEMA`].
    pub schema: u32,
    /// How it was measured: never compare results of different methods.
    pub method: String,
    /// Version of shoal-perf.
    pub version: String,
    /// Of which commit or release, if it was told (--label).
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub label: String,
    /// Seconds since 1970.
    pub taken: u64,
    /// On what. In the lab: the machine that the lab ran on, which does not matter to the figure.
    pub machine: Machine,
    /// The user ended the run early; what was measured until then is here.
    #[serde(default)]
    pub interrupted: bool,
    /// What came out.
    #[serde(flatten)]
    pub measured: Measured,
}

/// What came out of a run, by the kind of run.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Measured {
    /// `boot --probe`.
    BootProbe(ProbeBoot),
    /// `boot --lab`, `boot --here`, also with `--daemon`.
    BootLinux(LinuxBoot),
    /// `density --probe`.
    Density(Density),
    /// `block`, `net`, `vsock`.
    Io(IoResult),
    /// `limits`.
    Limits(LimitResult),
    /// `api`.
    Api(Api),
    /// `density --churn`.
    Churn(Churn),
    /// `jail`.
    Jail(JailCost),
    /// `costs`.
    Costs(Costs),
}

/// Boots of the probe guest by several programs, in turns. Times in ms.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct ProbeBoot {
    /// Turns that counted.
    pub runs: u32,
    /// Median of `floor`.
    pub floor_ms: f64,
    /// Median of `shoal-vmm`.
    pub vmm_ms: f64,
    /// shoal-vmm ÷ floor.
    pub ratio: f64,
    /// With --jail: what the jail adds (jailed − unjailed, both started by the jailer).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jail_adds_ms: Option<f64>,
    /// With --jail: layers that this machine and user do not have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub jail_lacks: Vec<String>,
    /// All that was started, the floor first, then shoal-vmm.
    pub subjects: Vec<Subject>,
    /// When the VMM reached each step, from process start on (medians).
    pub stages: Vec<Stage>,
}

/// One program in a comparison. Times in ms.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Subject {
    /// Its name.
    pub name: String,
    /// What it says of its version; empty for our own.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub version: String,
    /// Median.
    pub median_ms: f64,
    /// 90th percentile.
    pub p90_ms: f64,
    /// Its median ÷ shoal-vmm's.
    pub ratio_to_shoal: f64,
    /// The 95 % confidence interval of that ratio.
    pub ratio_interval: (f64, f64),
    /// All samples, in the order of the turns.
    pub samples_ms: Vec<f64>,
    /// The same as an HDR histogram of nanoseconds (V2, compressed, base64).
    #[serde(default)]
    pub hdr_ns: String,
}

impl Subject {
    /// From its samples and those of shoal-vmm in the same turns.
    pub fn new(name: &str, version: &str, samples_ms: Vec<f64>, shoal: &[f64]) -> Self {
        Self {
            name: name.into(),
            version: version.into(),
            median_ms: median(&samples_ms),
            p90_ms: quantile(&samples_ms, 0.9),
            ratio_to_shoal: if shoal.is_empty() {
                0.0
            } else {
                median(&samples_ms) / median(shoal)
            },
            ratio_interval: ratio_interval(&samples_ms, shoal),
            hdr_ns: crate::hdr::histogram(&samples_ms),
            samples_ms,
        }
    }
}

/// Boots of a Linux guest. Times in ms.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct LinuxBoot {
    /// What was booted.
    #[serde(default)]
    pub guest: String,
    /// Boots that counted.
    pub runs: u32,
    /// VMM process start (of a daemon: the request) to the first line of the guest's init: median.
    pub init_ms: f64,
    /// Largest minus smallest sample, as a share of the median (percent).
    pub spread_percent: f64,
    /// All samples.
    pub samples_ms: Vec<f64>,
    /// When each step was reached, from the same moment on (medians).
    pub stages: Vec<Stage>,
    /// shoal-vmm and what was measured in turns with it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subjects: Vec<Subject>,
}

/// A step of a boot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    /// Its name.
    pub step: String,
    /// When it was reached (ms).
    pub at_ms: f64,
}

/// Idle guests on one host.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Density {
    /// Guests asked for.
    pub guests_asked: u32,
    /// Guests that ran at the end.
    pub guests: u32,
    /// Memory of each guest (MiB), of which an idle probe guest touches a few pages.
    pub guest_memory_mib: u64,
    /// Why there are fewer than asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped_because: Option<String>,
    /// Host memory per guest (MB, 10^6 bytes): slope of MemAvailable over the number of guests.
    pub host_mb_per_guest: f64,
    /// The same from the first and the last point only.
    pub host_mb_per_guest_end_to_end: f64,
    /// Sum of the PSS of all VMMs, per guest, at the end (MB).
    pub pss_mb_per_guest: f64,
    /// Where a guest's memory is, by the kernel's accounts (MB); `kernel` is the sum of those that follow it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<Share>,
    /// Whose accounts: `cgroup` (nothing else is in it) or `machine` (all programs are).
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub accounts: String,
    /// Processor time of all VMMs together while all guests idle, as a share of one processor (percent).
    pub rest_cpu_percent: f64,
    /// Median latency of all starts (ms).
    pub start_ms: f64,
    /// Latency of each start, in order (ms).
    pub starts_ms: Vec<f64>,
    /// Memory against the number of guests.
    pub points: Vec<DensityPoint>,
    /// What was left when all guests had been stopped.
    pub leaks: Leaks,
}

/// A moment of a density run.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct DensityPoint {
    /// Guests running.
    pub guests: u32,
    /// MemAvailable (bytes).
    pub mem_available: u64,
    /// Sum of the PSS of all VMMs (bytes).
    pub pss: u64,
}

/// What a run left behind.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Leaks {
    /// VMM processes that still exist.
    pub processes: u32,
    /// Descriptors of shoal-perf beyond those before the first guest.
    pub descriptors: u32,
}

impl ResultFile {
    /// A result of now, on `machine`.
    pub fn new(method: &str, machine: Machine, interrupted: bool, measured: Measured) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            schema: SCHEMA,
            method: method.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            label: String::new(),
            taken: now.map_or(0, |d| d.as_secs()),
            machine,
            interrupted,
            measured,
        }
    }

    /// Reads a file, which may be anything.
    pub fn load(path: &Path) -> Result<Self, Refused> {
        let unreadable = |e| Refused::Read(path.into(), e);
        let mut bytes = Vec::new();
        let file = File::open(path).map_err(unreadable)?;
        file.take(MAX_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(unreadable)?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(Refused::Large(path.into()));
        }
        Self::parse(path, &bytes)
    }

    /// The same from its bytes.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, Refused> {
        #[derive(Deserialize)]
        struct Head {
            schema: Option<serde_json::Value>,
        }
        let refuse = |e: serde_json::Error| match e.is_eof() || at_end(bytes, &e) {
            true => Refused::Truncated(path.into(), e),
            false => Refused::Malformed(path.into(), e),
        };
        let head: Head = serde_json::from_slice(bytes).map_err(refuse)?;
        let schema = head.schema.ok_or_else(|| Refused::Schema {
            path: path.into(),
            found: "0 (without a version)".into(),
        })?;
        if schema != SCHEMA {
            let mut found = schema.to_string();
            found.truncate(found.floor_char_boundary(40));
            return Err(Refused::Schema {
                path: path.into(),
                found,
            });
        }
        let file: Self = serde_json::from_slice(bytes).map_err(refuse)?;
        file.check().map_err(|what| Refused::Absurd {
            path: path.into(),
            what,
        })?;
        Ok(file)
    }

    fn check(&self) -> Result<(), String> {
        text("method", &self.method)?;
        text("version", &self.version)?;
        text("label", &self.label)?;
        let m = &self.machine;
        for t in [&m.cpu, &m.kernel, &m.kvm, &m.governor, &m.huge_pages] {
            text("machine", t)?;
        }
        count("mitigations", m.mitigations.len(), MAX_SUBJECTS)?;
        for t in &m.mitigations {
            text("mitigations", t)?;
        }
        match &self.measured {
            Measured::BootProbe(boot) => boot.check(),
            Measured::BootLinux(boot) => boot.check(),
            Measured::Density(density) => density.check(),
            Measured::Io(io) => io.check(),
            Measured::Limits(limits) => limits.check(),
            Measured::Api(api) => api.check(),
            Measured::Churn(churn) => churn.check(),
            Measured::Jail(cost) => cost.check(),
            Measured::Costs(costs) => costs.check(),
        }
    }

    /// Prints the result as JSON or as a table, and writes it to the file `save`, if any.
    pub fn deliver(&self, json: bool, save: Option<&Path>) -> Result<()> {
        if json {
            println!("{}", serde_json::to_string_pretty(self)?);
        } else {
            match &self.measured {
                Measured::BootProbe(boot) => crate::boot::print(boot),
                Measured::BootLinux(boot) => crate::linux::print(&self.method, boot),
                Measured::Density(density) => crate::density::print(density),
                Measured::Io(result) => crate::io::print(result),
                Measured::Limits(result) => crate::io::limits::print(result),
                Measured::Api(api) => crate::api::print(api),
                Measured::Churn(churn) => crate::churn::print(churn),
                Measured::Jail(cost) => crate::jail::print(cost),
                Measured::Costs(costs) => crate::costs::print(costs),
            }
            if self.interrupted {
                println!("  interrupted: these are the figures up to then");
            }
        }
        if let Some(path) = save {
            let text = serde_json::to_string_pretty(self)? + "\n";
            std::fs::write(path, text)
                .with_context(|| format!("writing the result to {}", path.display()))?;
        }
        Ok(())
    }
}

/// The parser stumbled over the last byte: a number that ends after its point, for one.
fn at_end(bytes: &[u8], e: &serde_json::Error) -> bool {
    let mut lines = bytes.split(|&b| b == b'\n');
    let last = lines.nth(e.line().saturating_sub(1));
    e.is_syntax() && lines.next().is_none() && last.is_some_and(|l| e.column() >= l.len())
}

/// Refuses text that is too long.
pub fn text(what: &str, text: &str) -> Result<(), String> {
    match text.len() <= MAX_TEXT {
        true => Ok(()),
        false => Err(format!("{what} has {} bytes of text", text.len())),
    }
}

/// Refuses more of something than there can be.
pub fn count(what: &str, n: usize, most: usize) -> Result<(), String> {
    match n <= most {
        true => Ok(()),
        false => Err(format!("{n} {what}, more than {most}")),
    }
}

/// Refuses a figure that cannot be.
pub fn figure(what: &str, value: f64) -> Result<(), String> {
    match (0.0..=MAX_FIGURE).contains(&value) {
        true => Ok(()),
        false => Err(format!("{what} is {value}")),
    }
}

/// Refuses samples that cannot be.
pub fn samples(what: &str, all: &[f64]) -> Result<(), String> {
    count(what, all.len(), MAX_SAMPLES)?;
    all.iter().try_for_each(|&s| figure(what, s))
}

fn subjects(all: &[Subject]) -> Result<(), String> {
    count("subjects", all.len(), MAX_SUBJECTS)?;
    all.iter().try_for_each(|s| {
        text("a name", &s.name)?;
        text("a version", &s.version)?;
        figure("median_ms", s.median_ms)?;
        figure("p90_ms", s.p90_ms)?;
        figure("ratio_to_shoal", s.ratio_to_shoal)?;
        figure("ratio_interval", s.ratio_interval.0)?;
        figure("ratio_interval", s.ratio_interval.1)?;
        samples("samples_ms", &s.samples_ms)
    })
}

fn stages(all: &[Stage]) -> Result<(), String> {
    count("stages", all.len(), MAX_SUBJECTS * 2)?;
    all.iter().try_for_each(|s| {
        text("a stage", &s.step)?;
        figure("a stage", s.at_ms)
    })
}

impl ProbeBoot {
    fn check(&self) -> Result<(), String> {
        figure("floor_ms", self.floor_ms)?;
        figure("vmm_ms", self.vmm_ms)?;
        figure("ratio", self.ratio)?;
        count("layers lacking", self.jail_lacks.len(), MAX_SUBJECTS)?;
        self.jail_lacks.iter().try_for_each(|l| text("a layer", l))?;
        subjects(&self.subjects)?;
        stages(&self.stages)
    }
}

impl LinuxBoot {
    /// Of some boots, at least one.
    pub fn new(guest: String, samples_ms: Vec<f64>, stages: Vec<Stage>) -> Self {
        let (min, max) = (quantile(&samples_ms, 0.0), quantile(&samples_ms, 1.0));
        Self {
            guest,
            runs: samples_ms.len() as u32,
            init_ms: median(&samples_ms),
            spread_percent: (max - min) / median(&samples_ms) * 100.0,
            samples_ms,
            stages,
            subjects: Vec::new(),
        }
    }

    fn check(&self) -> Result<(), String> {
        text("guest", &self.guest)?;
        figure("init_ms", self.init_ms)?;
        figure("spread_percent", self.spread_percent)?;
        samples("samples_ms", &self.samples_ms)?;
        subjects(&self.subjects)?;
        stages(&self.stages)
    }
}

impl Density {
    /// Host memory per guest (MB), and how it is known: where the guests have a cgroup of their own, by its account of all that
    /// they took. MemAvailable does not count pages that the kernel has freed and keeps at hand, which the first guests get.
    pub fn host_mb(&self) -> (f64, &'static str) {
        let all = ["anon", "file", "kernel"];
        let of_cgroup = self.shares.iter().filter(|s| all.contains(&s.kind.as_str()));
        match self.accounts.as_str() {
            "cgroup" => (of_cgroup.map(|s| s.mb).sum(), "the account of their cgroup"),
            _ => (self.host_mb_per_guest, "slope of MemAvailable"),
        }
    }

    fn check(&self) -> Result<(), String> {
        // Memory given back by others during the run makes these negative.
        figure("host_mb_per_guest", self.host_mb_per_guest.abs())?;
        figure(
            "host_mb_per_guest_end_to_end",
            self.host_mb_per_guest_end_to_end.abs(),
        )?;
        figure("pss_mb_per_guest", self.pss_mb_per_guest)?;
        text("accounts", &self.accounts)?;
        count("shares", self.shares.len(), MAX_SUBJECTS)?;
        for share in &self.shares {
            text("a kind of memory", &share.kind)?;
            figure("a kind of memory", share.mb.abs())?;
        }
        figure("rest_cpu_percent", self.rest_cpu_percent)?;
        figure("start_ms", self.start_ms)?;
        samples("starts_ms", &self.starts_ms)?;
        count("points", self.points.len(), MAX_SAMPLES)?;
        self.stopped_because
            .iter()
            .try_for_each(|t| text("stopped_because", t))
    }
}

#[cfg(test)]
#[path = "results_tests.rs"]
mod tests;
