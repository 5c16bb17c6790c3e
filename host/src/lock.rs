//! Waiting for a file's lock, but not for ever.

use std::fs::File;
use std::io;
use std::time::Duration;

use tokio::sync::oneshot;

/// Locks a file (flock, exclusive); `None` when somebody else still has it after `within`.
///
/// The kernel's wait has no time limit, so it is done by a thread. After a timeout that thread goes on waiting, and
/// gives the lock back as soon as it has it.
pub(crate) async fn lock_within(file: File, within: Duration) -> io::Result<Option<File>> {
    let (locked, wait) = oneshot::channel();
    std::thread::Builder::new().name("lock".into()).spawn(move || {
        let result = file.lock().map(|()| file);
        // Nobody waits any more: the file is closed, and with it the lock is gone.
        drop(locked.send(result));
    })?;
    match tokio::time::timeout(within, wait).await {
        Ok(Ok(result)) => result.map(Some),
        Ok(Err(_)) => Err(io::Error::other("the thread that waits for a lock has ended")),
        Err(_) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waits_for_the_holder_but_not_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let open = || {
            File::options()
                .create(true)
                .append(true)
                .open(dir.path().join("lock"))
                .unwrap()
        };
        let holder = lock_within(open(), Duration::from_secs(10))
            .await
            .unwrap()
            .unwrap();
        assert!(
            lock_within(open(), Duration::from_millis(1))
                .await
                .unwrap()
                .is_none()
        );
        let waits = tokio::spawn(lock_within(open(), Duration::from_secs(10)));
        drop(holder);
        assert!(waits.await.unwrap().unwrap().is_some());
    }
}
