//! What a process uses while it is watched: processor time of its threads, system calls, exits of its vCPU.

use std::collections::HashMap;
use std::fs;

use anyhow::{Context, Result};

/// Processor time of a process, by what it was spent on.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CpuTime {
    /// The vCPU's thread: the guest itself, and the exits that it makes (ns).
    pub vcpu_ns: u64,
    /// All other threads, those of the kernel that work for the process among them: the devices (ns).
    pub devices_ns: u64,
}

/// Processor time of each thread at one moment.
pub struct CpuMoment(HashMap<u32, (bool, u64)>);

impl CpuMoment {
    /// Now. A thread that ends while they are read is left out.
    pub fn of(pid: u32) -> Result<Self> {
        let tasks = format!("/proc/{pid}/task");
        let mut all = HashMap::new();
        for entry in fs::read_dir(&tasks).with_context(|| format!("reading {tasks}"))? {
            let path = entry?.path();
            let Some(tid) = path.file_name().and_then(|n| n.to_str()?.parse().ok()) else {
                continue;
            };
            let (Ok(name), Ok(time)) = (
                fs::read_to_string(path.join("comm")),
                fs::read_to_string(path.join("schedstat")),
            ) else {
                continue;
            };
            if let Some(ns) = run_time(&time) {
                all.insert(tid, (is_vcpu(&name), ns));
            }
        }
        Ok(Self(all))
    }

    /// The threads of vCPUs.
    pub fn vcpus(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().filter(|(_, t)| t.0).map(|(tid, _)| *tid)
    }

    /// All threads.
    pub fn threads(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.keys().copied()
    }

    /// What was spent from `self` to `later`.
    pub fn until(&self, later: &Self) -> CpuTime {
        let mut spent = CpuTime::default();
        for (tid, &(vcpu, after)) in &later.0 {
            let before = self.0.get(tid).map_or(0, |t| t.1);
            let ns = after.saturating_sub(before);
            match vcpu {
                true => spent.vcpu_ns += ns,
                false => spent.devices_ns += ns,
            }
        }
        spent
    }
}

/// `vcpu0` of Shoal, `CPU 0/KVM` of QEMU with debug-threads, `fc_vcpu 0` of Firecracker.
fn is_vcpu(name: &str) -> bool {
    let name = name.trim();
    name.starts_with("vcpu")
        || name.starts_with("fc_vcpu")
        || (name.starts_with("CPU ") && name.ends_with("/KVM"))
}

/// The first figure of a schedstat: time on a processor (ns).
fn run_time(schedstat: &str) -> Option<u64> {
    schedstat.split(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_told_apart() {
        assert!(["vcpu0\n", "CPU 0/KVM\n", "fc_vcpu 0"].into_iter().all(is_vcpu));
        assert!(
            !["shoal-vmm", "IO io0", "CPU 0/TCG", "worker"]
                .into_iter()
                .any(is_vcpu)
        );
        assert_eq!(run_time("126548 133740 2\n"), Some(126_548));
        assert_eq!(run_time(""), None);
    }

    #[test]
    fn time_is_that_between_two_moments() {
        let early = CpuMoment(HashMap::from([
            (1, (true, 100)),
            (2, (false, 10)),
            (4, (false, 5)),
        ]));
        let late = CpuMoment(HashMap::from([
            (1, (true, 150)),
            (2, (false, 30)),
            (3, (false, 7)),
        ]));
        let spent = early.until(&late);
        assert_eq!((spent.vcpu_ns, spent.devices_ns), (50, 27));
    }

    #[test]
    fn work_is_seen() {
        let pid = std::process::id();
        let before = CpuMoment::of(pid).unwrap();
        // The kernel brings a running thread's time up to date at its next tick.
        let spent = loop {
            for n in 0..1_000_000_u32 {
                std::hint::black_box(n);
            }
            let spent = before.until(&CpuMoment::of(pid).unwrap());
            if spent.devices_ns > 0 {
                break spent;
            }
        };
        assert_eq!(spent.vcpu_ns, 0);
    }
}
