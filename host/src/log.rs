//! A VMM's log file: what it says on standard error, kept small while it runs.
//!
//! It is locked (flock) as long as the VMM has it open, which is until the VMM has ended: so whoever comes later can tell
//! whether there is a VMM, and wait for its end, without knowing its process.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::lock::lock_within;
use crate::paths::GuestDir;
use crate::watch::Watch;

/// A log that grows beyond this is emptied (bytes). A VMM bounds its own lines; one that was taken over does not.
const LIMIT: u64 = 1 << 20;

/// Opens the log for a new VMM: empty, and locked.
///
/// # Errors
/// `ResourceBusy` while an earlier VMM of the guest lives.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(io::ErrorKind::ResourceBusy.into()),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    file.set_len(0)?;
    Ok(file)
}

/// Waits until no VMM has the log open, but not longer than `within`. True when none has.
pub(crate) async fn await_end(path: &Path, within: Duration) -> bool {
    let Ok(file) = File::open(path) else { return true };
    matches!(lock_within(file, within).await, Ok(Some(_)))
}

/// Keeps a log small.
#[derive(Debug)]
pub(crate) struct LogKeeper {
    path: PathBuf,
    changes: Watch,
}

impl LogKeeper {
    /// Watches a log, which must exist.
    fn new(path: PathBuf) -> io::Result<Self> {
        Ok(Self {
            changes: Watch::new(&path)?,
            path,
        })
    }

    /// Watches a guest's log. Without the watch the guest runs nevertheless.
    pub fn of(dir: &GuestDir) -> Option<Self> {
        let keeper = Self::new(dir.log());
        keeper
            .inspect_err(|error| tracing::warn!(dir = ?dir.path(), %error, "a log is not watched"))
            .ok()
    }

    /// Works for ever; may be cancelled and called again.
    pub async fn keep(&self) {
        loop {
            if let Err(error) = self.step().await {
                tracing::warn!(path = ?self.path, %error, "a log is not watched any more");
                std::future::pending::<()>().await;
            }
        }
    }

    async fn step(&self) -> io::Result<()> {
        self.changes.changed().await?;
        if fs::metadata(&self.path)?.len() > LIMIT {
            // The VMM appends, so it goes on at the new end.
            OpenOptions::new()
                .write(true)
                .truncate(true)
                .open(&self.path)
                .map(drop)?;
        }
        Ok(())
    }
}

/// The end of a log.
pub(crate) fn tail(path: &Path) -> String {
    const TAIL: u64 = 1000;
    let read = || -> io::Result<Vec<u8>> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        let mut bytes = vec![0; len.min(TAIL) as usize];
        file.read_exact_at(&mut bytes, len.saturating_sub(TAIL))?;
        Ok(bytes)
    };
    String::from_utf8_lossy(&read().unwrap_or_default())
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[tokio::test]
    async fn empties_a_log_that_grew_too_long() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = open(&path).unwrap();
        assert_eq!(open(&path).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        let keeper = LogKeeper::new(path.clone()).unwrap();
        log.write_all(b"early words\n").unwrap();
        keeper.step().await.unwrap();
        assert_eq!(tail(&path), "early words");
        log.write_all(&vec![b'x'; LIMIT as usize]).unwrap();
        keeper.step().await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
        log.write_all(b"last words\n").unwrap();
        assert_eq!(tail(&path), "last words");
        assert!(!await_end(&path, Duration::from_millis(1)).await);
        drop(log);
        assert!(await_end(&path, Duration::from_secs(10)).await);
        assert!(open(&path).is_ok());
    }
}
