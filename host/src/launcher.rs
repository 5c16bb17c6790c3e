//! Starts VMM processes. The one place that does, so that every VMM is started the same way.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Starts VMM processes.
///
/// A VMM gets its control socket as standard input, `/dev/null` as output, its log as error output, no environment, and
/// nothing else: all other descriptors of this process are closed on exec. It leads a process group of its own, so that
/// a terminal's Ctrl-C for the daemon does not reach it.
#[derive(Clone, Debug)]
pub struct Launcher {
    vmm: PathBuf,
}

impl Launcher {
    /// Starts VMMs from this program.
    ///
    /// # Errors
    /// When the program is missing or may not be executed.
    pub fn new(vmm: impl Into<PathBuf>) -> io::Result<Self> {
        let vmm = vmm.into();
        rustix::fs::access(&vmm, rustix::fs::Access::EXEC_OK)?;
        if !vmm.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file"));
        }
        // Relative paths would be looked up again after a change of directory.
        Ok(Self {
            vmm: std::path::absolute(vmm)?,
        })
    }

    /// The program.
    pub fn program(&self) -> &Path {
        &self.vmm
    }

    /// Starts a VMM that serves `control`, a Unix seqpacket socket (listening or connected).
    pub(crate) fn spawn(&self, guest_id: &str, control: OwnedFd, log: File) -> io::Result<Child> {
        Command::new(&self.vmm)
            .args(["--control-fd", "0", "--guest-id", guest_id])
            .env_clear()
            .current_dir("/")
            .stdin(control)
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0)
            .spawn()
    }
}
