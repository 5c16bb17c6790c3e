//! The jailer: a guest that takes over its VMM gets nothing.
//!
//! [`Jailer::new`] makes once what all jails of a host share; [`Jailer::spawn`] starts a static program (the VMM) in a
//! jail of its own and returns its pid and pidfd. The steps of the way in, in order, and the attack that each
//! stops, stand in the table of the module `child`; docs/security.md puts them together with the other layers.
//!
//! ```no_run
//! use shoal_jailer::{Executable, HandOver, IdRange, Ids, JailSpec, Jailer, JailerConfig, Mode, Rlimits, cgroup};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let control = std::fs::File::open("/dev/null")?;
//! use std::os::fd::AsFd;
//! let jailer = Jailer::new(&JailerConfig {
//!     mode: Mode::detect(),
//!     uids: IdRange::new(200_000, 4_096)?,
//!     gids: IdRange::new(200_000, 4_096)?,
//!     cgroup_parent: Some("/sys/fs/cgroup/shoal".into()),
//!     missing_controllers: cgroup::Missing::Refuse,
//! })?;
//! let vmm = Executable::from_path("/usr/lib/shoal/shoal-vmm".as_ref())?;
//! let jail = jailer.spawn(&vmm, &JailSpec {
//!     id: &"guest-1".parse()?,
//!     ids: Ids::new(200_001, 200_001)?,
//!     argv: &[c"shoal-vmm".to_owned(), c"--control-fd".to_owned(), c"3".to_owned()],
//!     fds: &[HandOver { fd: control.as_fd(), target: 3 }],
//!     limits: &cgroup::Limits { memory_max: Some(256 << 20), pids_max: Some(16), ..Default::default() },
//!     rlimits: Rlimits::default(),
//!     oom_score_adj: Some(500),
//!     core_scheduling: false,
//!     die_with_parent: false,
//! })?;
//! println!("{} runs", jail.pid);
//! let exit = jail.destroy()?;
//! # Ok(()) }
//! ```

pub mod cgroup;
mod child;
mod clone;
mod core_scheduling;
mod error;
mod exec;
mod id;
mod jail;
mod killed;
mod lacks;
mod landlock;
mod path;
mod rlimits;
mod shared;
mod spawn;
mod spec;
mod sys;

pub use child::Mode;
pub use core_scheduling::{CoreScheduling, cookie, core_scheduling_works, smt_is_active};
pub use error::{Degradation, JailError, Step};
pub use exec::Executable;
pub use id::{IdAllocator, IdRange, Ids, JailId};
pub use jail::Jail;
pub use killed::{KillLog, SeccompKill};
pub use rlimits::Rlimits;
pub use shoal_seccomp as seccomp;
pub use spawn::{Jailer, JailerConfig};
pub use spec::{HandOver, JailSpec, MAX_TARGET_FD};
pub use sys::Exit;
