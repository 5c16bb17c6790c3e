//! Where things lie in the state directory.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Longest path that a socket address holds (bytes; 108 with the final zero).
pub(crate) const SOCKET_PATH: usize = 107;

/// The state directory.
#[derive(Clone, Debug)]
pub(crate) struct StateDir(PathBuf);

impl StateDir {
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    pub fn database(&self) -> PathBuf {
        self.0.join("shoal.db")
    }

    pub fn lock(&self) -> PathBuf {
        self.0.join("lock")
    }

    pub fn guests(&self) -> PathBuf {
        self.0.join("guests")
    }

    pub fn guest(&self, id: &str) -> GuestDir {
        GuestDir(self.guests().join(id))
    }

    /// Length of the longest socket path below this directory.
    pub fn longest_socket(&self) -> usize {
        self.guest("0123456789ab").vsock_port(u32::MAX).as_os_str().len()
    }
}

/// A guest's directory.
#[derive(Clone, Debug)]
pub(crate) struct GuestDir(PathBuf);

impl GuestDir {
    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn control(&self) -> PathBuf {
        self.0.join("control.sock")
    }

    pub fn broker(&self) -> PathBuf {
        self.0.join("broker.sock")
    }

    pub fn console(&self) -> PathBuf {
        self.0.join("console.ring")
    }

    pub fn log(&self) -> PathBuf {
        self.0.join("vmm.log")
    }

    pub fn exit_record(&self) -> PathBuf {
        self.0.join("exit.rec")
    }

    pub fn vsock(&self) -> PathBuf {
        self.0.join("vsock.sock")
    }

    pub fn vsock_port(&self, port: u32) -> PathBuf {
        self.0.join(format!("vsock.sock_{port}"))
    }

    /// Makes the directory, for its owner only.
    pub fn create(&self) -> io::Result<()> {
        fs::DirBuilder::new().mode(0o700).create(&self.0)
    }

    /// Removes the sockets of a run that is over.
    pub fn remove_sockets(&self) {
        for path in [self.control(), self.broker(), self.vsock()] {
            remove(&path);
        }
    }

    /// Removes the directory and all in it.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.0) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

/// Removes a file that may be missing; anything else is worth a line in the log, not a failure.
pub(crate) fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(?path, %error, "cannot remove a file");
    }
}
