//! Resource limits of the process: what holds where no cgroup does.

/// Limits that the jail sets, soft and hard alike, so that the VMM cannot raise them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rlimits {
    /// Highest number of open descriptors. Stops a VMM that was taken over from filling the kernel's file table.
    pub open_files: u64,
    /// Highest number of threads of the guest's user. Needs a uid of the guest's own, so not set when rootless.
    pub threads: u64,
    /// Bytes that may be locked in memory.
    pub locked_memory: u64,
    /// Largest file that may be written, in bytes: at least the size of the largest disk. `None` is no limit.
    pub file_size: Option<u64>,
    /// Bytes of address space. `None` is no limit.
    pub address_space: Option<u64>,
}

impl Default for Rlimits {
    fn default() -> Rlimits {
        Rlimits {
            open_files: 1024,
            threads: 512,
            locked_memory: 64 << 10,
            file_size: None,
            address_space: None,
        }
    }
}

/// One limit as the kernel takes it: resource and value.
pub(crate) type Setting = (u32, libc::rlimit64);

impl Rlimits {
    /// All settings. Core dumps (which would write guest memory to disk), message queues and real-time priority are
    /// always zero.
    pub(crate) fn settings(&self, own_uid: bool) -> Vec<Setting> {
        let mut all = vec![
            (libc::RLIMIT_NOFILE, self.open_files),
            (libc::RLIMIT_MEMLOCK, self.locked_memory),
            (libc::RLIMIT_CORE, 0),
            (libc::RLIMIT_MSGQUEUE, 0),
            (libc::RLIMIT_RTPRIO, 0),
            (libc::RLIMIT_NICE, 0),
            (libc::RLIMIT_SIGPENDING, 256),
        ];
        if own_uid {
            all.push((libc::RLIMIT_NPROC, self.threads));
        }
        all.extend(self.file_size.map(|bytes| (libc::RLIMIT_FSIZE, bytes)));
        all.extend(self.address_space.map(|bytes| (libc::RLIMIT_AS, bytes)));
        all.into_iter()
            .map(|(what, value)| {
                (
                    what,
                    libc::rlimit64 {
                        rlim_cur: value,
                        rlim_max: value,
                    },
                )
            })
            .collect()
    }
}
