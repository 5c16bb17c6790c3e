//! The fleet of guests on one host, as a library: what `shoald` serves over HTTP and what a scheduler embeds.
//!
//! ```no_run
//! # async fn f() -> Result<(), Box<dyn std::error::Error>> {
//! use shoal_host::{GuestSpec, Host, HostConfig};
//!
//! let host = Host::open(HostConfig::new("/var/lib/shoal", "/usr/bin/shoal-vmm")).await?;
//! let spec = GuestSpec { name: Some("first".into()), ..GuestSpec::new("/images/vmlinux", 1, 128) };
//! let guest = host.create(spec).await?;
//! let guest = host.start(&guest.id, shoal_host::now_ns()).await?;
//! println!("{} runs as process {:?}", guest.id, guest.pid);
//! # Ok(()) }
//! ```
//!
//! Every guest has one task ([`actor`]) that owns it: calls on one guest are served in order, calls on another do not
//! wait for it. Every change of state is in the store before it is answered. The host opens all files; a VMM gets
//! descriptors only.
//!
//! The state directory (0700):
//!
//! ```text
//! shoal.db                     records (SQLite, WAL)
//! lock                         locked by the one daemon that serves this directory
//! guests/ID/control.sock       the VMM listens here (seqpacket) for the host
//!           console.ring       the serial console's output, the last of it
//!           vmm.log            what the VMM said, bounded
//!           exit.rec           why the guest ended, written by the VMM
//!           broker.sock        the VMM listens here for whom to ask about the guest's vsock connections
//!           vsock.sock         connections to the guest: `CONNECT PORT\n`
//!           vsock.sock_PORT    made by whoever serves connections from the guest to PORT
//! ```

#![forbid(unsafe_code)]

mod actor;
mod adopt;
mod agent;
mod async_fd;
mod cgroups;
mod config;
mod console;
mod disk;
pub mod doctor;
mod error;
mod host;
mod images;
mod launcher;
mod limits;
mod link;
mod lock;
mod log;
mod memory;
mod paths;
mod process;
mod resources;
mod running;
mod spec;
mod state;
mod store;
mod timeline;
mod view;
mod vsock;
mod watch;

pub use config::{Confinement, HostConfig};
pub use console::{ConsoleChunk, ConsoleReader};
pub use error::{HostError, OpenError, chain};
pub use host::Host;
pub use launcher::{Launcher, LauncherError};
pub use limits::{LimitChanges, NetworkLimits};
pub use memory::MemoryFigures;
pub use shoal_jailer::seccomp::Mode as SeccompMode;
pub use shoal_jailer::{CoreScheduling, Degradation};
pub use shoal_vmm::protocol::VERSION as VMM_PROTOCOL;
pub use spec::{Disk, DiskEngine, GuestSpec, Limits, Mac, Network, Rate, RateLimits, Vsock};
pub use state::{State, StopReason};
pub use timeline::now_ns;
pub use view::{GuestView, VsockView};
