//! What a result was measured on.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// The machine, as far as it matters to a figure. What cannot be read is "unknown".
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's name.
    pub cpu: String,
    /// Processors that this process may use.
    pub cpus: u32,
    /// Memory (MiB).
    pub memory_mib: u64,
    /// The kernel's release.
    pub kernel: String,
    /// What stands behind /dev/kvm.
    pub kvm: String,
    /// The frequency governor of the first processor.
    pub governor: String,
    /// The kernel's setting of transparent huge pages.
    pub huge_pages: String,
    /// The kernel's list of the processor's faults, and what it does about each.
    pub mitigations: Vec<String>,
    /// Tasks ready to run, averaged over a minute, when the run began: other work makes wall time longer.
    pub load: f64,
}

const UNKNOWN: &str = "unknown";

fn read(path: &str) -> String {
    fs::read_to_string(path).map_or_else(|_| UNKNOWN.into(), |s| s.trim().to_owned())
}

impl Machine {
    /// This one, now.
    pub fn here() -> Self {
        let cpuinfo = read("/proc/cpuinfo");
        Self {
            cpu: cpu_name(&cpuinfo),
            cpus: std::thread::available_parallelism().map_or(0, |n| n.get() as u32),
            memory_mib: meminfo(&read("/proc/meminfo"), "MemTotal").unwrap_or(0) >> 20,
            kernel: read("/proc/sys/kernel/osrelease"),
            kvm: kvm_sort(&cpuinfo).into(),
            governor: read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            huge_pages: chosen(&read("/sys/kernel/mm/transparent_hugepage/enabled")),
            mitigations: mitigations(),
            load: read("/proc/loadavg")
                .split(' ')
                .next()
                .and_then(|s| s.parse().ok())
                .unwrap_or(0.0),
        }
    }
}

fn cpu_name(cpuinfo: &str) -> String {
    let line = cpuinfo.lines().find(|l| l.starts_with("model name"));
    line.and_then(|l| l.split_once(':'))
        .map_or_else(|| UNKNOWN.into(), |(_, name)| name.trim().to_owned())
}

/// By the processor's flags and the module that serves KVM; `shoal doctor` tells by trying.
fn kvm_sort(cpuinfo: &str) -> &'static str {
    let flags = cpuinfo.lines().find(|l| l.starts_with("flags")).unwrap_or("");
    let has = |flag| flags.split_whitespace().any(|f| f == flag);
    if !Path::new("/dev/kvm").exists() {
        "none"
    } else if has("vmx") {
        "hardware (VMX)"
    } else if has("svm") {
        "hardware (SVM)"
    } else {
        "pagetable (no hardware virtualization)"
    }
}

/// The value in brackets of a kernel setting that lists all.
fn chosen(setting: &str) -> String {
    let inside = setting.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    inside.map_or(setting, |(value, _)| value).to_owned()
}

fn mitigations() -> Vec<String> {
    let Ok(folder) = fs::read_dir("/sys/devices/system/cpu/vulnerabilities") else {
        return Vec::new();
    };
    let mut all: Vec<String> = folder
        .flatten()
        .map(|e| {
            format!(
                "{}: {}",
                e.file_name().display(),
                read(&e.path().to_string_lossy())
            )
        })
        .filter(|line| !line.ends_with("Not affected"))
        .collect();
    all.sort();
    all
}

/// A line of /proc/meminfo or of a smaps_rollup (bytes).
pub fn meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim()
        .strip_suffix(" kB")?
        .parse()
        .ok()
        .map(|kib: u64| kib << 10)
}

/// What the kernel says can be had without swapping (bytes).
pub fn mem_available() -> anyhow::Result<u64> {
    meminfo(&read("/proc/meminfo"), "MemAvailable")
        .ok_or_else(|| anyhow::anyhow!("/proc/meminfo has no MemAvailable: density cannot be measured here"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_files_are_read() {
        let text = "MemTotal:       24683520 kB\nMemAvailable:   22414336 kB\nPss:  12 kB\nBad: 7\n";
        assert_eq!(meminfo(text, "MemAvailable"), Some(22_414_336 << 10));
        assert_eq!(meminfo(text, "Mem"), None);
        assert_eq!(meminfo(text, "Bad"), None);
        assert_eq!(chosen("always [madvise] never"), "madvise");
        assert_eq!(chosen("unknown"), "unknown");
        assert_eq!(cpu_name("processor : 0\nmodel name\t: Fast CPU\n"), "Fast CPU");
        assert!(!kvm_sort("flags : fpu svmx\n").starts_with("hardware"));
    }
}
