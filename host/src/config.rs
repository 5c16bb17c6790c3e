//! What a host is opened with.

use std::path::PathBuf;
use std::time::Duration;

use shoal_jailer::{CoreScheduling, seccomp};

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
    /// How VMMs are kept from the host.
    pub confinement: Confinement,
}

/// How VMMs are kept from the host. Anything but the default is for debugging, and warned of at every start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confinement {
    /// Whether each VMM is put into a jail.
    pub jail: bool,
    /// What becomes of system calls that a VMM has no need of.
    pub seccomp: seccomp::Mode,
    /// The cgroup (version 2, an absolute path) below which guests get their limits; found when it is not given.
    pub cgroup: Option<PathBuf>,
    /// The first of the 4,096 users that VMMs run as when the host is root; chosen by the state directory's path when
    /// it is not given.
    pub first_user: Option<u32>,
    /// Whether threads of a guest share a core with those of no other.
    pub core_scheduling: CoreScheduling,
}

impl Default for Confinement {
    fn default() -> Self {
        Self {
            jail: true,
            seccomp: seccomp::Mode::Kill,
            cgroup: None,
            first_user: None,
            core_scheduling: CoreScheduling::Auto,
        }
    }
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
            confinement: Confinement::default(),
        }
    }
}
