//! The limits of a leaf and the files they are written to (Documentation/admin-guide/cgroup-v2.rst).

use std::ffi::CStr;
use std::io;

use super::{CgroupError, Leaf, Missing, Parent};
use crate::error::Degradation;

/// A ceiling of processor time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuMax {
    /// Microseconds of processor time per period.
    pub quota_us: u64,
    /// The period in microseconds, usually 100,000.
    pub period_us: u64,
}

/// A ceiling for one block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoMax {
    /// Major device number.
    pub major: u32,
    /// Minor device number.
    pub minor: u32,
    /// Bytes read per second.
    pub read_bps: Option<u64>,
    /// Bytes written per second.
    pub write_bps: Option<u64>,
    /// Reads per second.
    pub read_iops: Option<u64>,
    /// Writes per second.
    pub write_iops: Option<u64>,
}

/// What a guest may use. `None` sets no limit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of memory, guest memory and VMM together (memory.max). Swap is forbidden along with it, and the whole
    /// VMM is killed when it is reached (memory.oom.group).
    pub memory_max: Option<u64>,
    /// Ceiling of processor time (cpu.max).
    pub cpu_max: Option<CpuMax>,
    /// Share of processor time beside others, 1 to 10,000 (cpu.weight).
    pub cpu_weight: Option<u32>,
    /// Share of disk time, 1 to 10,000 (io.weight).
    pub io_weight: Option<u32>,
    /// Ceilings per block device (io.max).
    pub io_max: Vec<IoMax>,
    /// Number of threads (pids.max).
    pub pids_max: Option<u32>,
}

/// One control file and what goes into it.
struct Setting {
    controller: &'static str,
    file: &'static CStr,
    value: String,
    /// The kernel may lack the file (no swap accounting, no io.weight without BFQ or iocost): then it is passed over.
    optional: bool,
}

impl Limits {
    /// Writes all limits to a new leaf.
    pub(super) fn apply(
        &self,
        leaf: &Leaf,
        parent: &Parent,
        missing: Missing,
    ) -> Result<Vec<Degradation>, CgroupError> {
        let mut lacking: Vec<&'static str> = Vec::new();
        for setting in self.settings() {
            match leaf.write(setting.file, &setting.value) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    if setting.optional {
                        continue;
                    }
                    if missing == Missing::Refuse {
                        return Err(CgroupError::NoController {
                            limit: setting.file.to_str().unwrap_or_default(),
                            leaf: leaf.name(),
                            because: parent.reason(setting.controller),
                        });
                    }
                    lacking.push(setting.controller);
                }
                Err(source) => {
                    let attempt = "setting a limit (memory.max, cpu.*, io.* or pids.max)";
                    return Err(CgroupError::System {
                        attempt,
                        leaf: leaf.name(),
                        source,
                    });
                }
            }
        }
        lacking.dedup();
        Ok(lacking
            .into_iter()
            .map(|controller| parent.degradation(controller))
            .collect())
    }

    fn settings(&self) -> Vec<Setting> {
        let mut all = Vec::new();
        let mut add = |controller, file, value: String, optional| {
            all.push(Setting {
                controller,
                file,
                value,
                optional,
            });
        };
        if let Some(bytes) = self.memory_max {
            add("memory", c"memory.max", bytes.to_string(), false);
            add("memory", c"memory.swap.max", "0".to_owned(), true);
            add("memory", c"memory.oom.group", "1".to_owned(), true);
        }
        if let Some(CpuMax { quota_us, period_us }) = self.cpu_max {
            add("cpu", c"cpu.max", format!("{quota_us} {period_us}"), false);
        }
        if let Some(weight) = self.cpu_weight {
            add("cpu", c"cpu.weight", weight.to_string(), false);
        }
        if let Some(weight) = self.io_weight {
            add("io", c"io.weight", weight.to_string(), true);
        }
        for device in &self.io_max {
            add("io", c"io.max", device.line(), false);
        }
        if let Some(count) = self.pids_max {
            add("pids", c"pids.max", count.to_string(), false);
        }
        all
    }
}

impl IoMax {
    fn line(&self) -> String {
        let value = |limit: Option<u64>| limit.map_or_else(|| "max".to_owned(), |n| n.to_string());
        format!(
            "{}:{} rbps={} wbps={} riops={} wiops={}",
            self.major,
            self.minor,
            value(self.read_bps),
            value(self.write_bps),
            value(self.read_iops),
            value(self.write_iops)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_max_names_every_limit() {
        let device = IoMax {
            major: 8,
            minor: 0,
            read_bps: Some(5),
            write_bps: None,
            read_iops: None,
            write_iops: Some(7),
        };
        assert_eq!(device.line(), "8:0 rbps=5 wbps=max riops=max wiops=7");
    }
}
