//! What a host is opened with.

use std::path::PathBuf;
use std::time::Duration;

/// What a host is opened with.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// The state directory; made (0700) when it is missing.
    pub state_dir: PathBuf,
    /// The `shoal-vmm` program.
    pub vmm: PathBuf,
    /// How long a VMM may take from its start until it says that the guest runs.
    pub start_timeout: Duration,
    /// How long a VMM may take to end after it was told to, before it gets SIGKILL.
    pub kill_grace: Duration,
    /// Kernels and initial RAM disks kept ready for the next guest: at most this many bytes of files.
    pub image_cache_bytes: u64,
}

impl HostConfig {
    /// The usual settings.
    pub fn new(state_dir: impl Into<PathBuf>, vmm: impl Into<PathBuf>) -> Self {
        Self {
            state_dir: state_dir.into(),
            vmm: vmm.into(),
            start_timeout: Duration::from_secs(30),
            kill_grace: Duration::from_secs(2),
            image_cache_bytes: 1 << 30,
        }
    }
}
