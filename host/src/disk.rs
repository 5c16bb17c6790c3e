//! Opens the files behind disks, and sees to it that nobody writes to one that another uses.
//!
//! Two layers: an advisory lock on the open file (flock: exclusive to write, shared to read), which the VMM inherits
//! with the descriptor, so that it holds as long as the guest lives, whatever becomes of the daemon; and a list of
//! who has what, so that a refusal can name the guest.

use std::collections::HashMap;
use std::fs::{self, File, Metadata, OpenOptions, TryLockError};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::OFlags;

use crate::error::HostError;
use crate::spec::Disk;

/// Size of a sector (bytes; virtio 1.2 §5.2.4).
const SECTOR: u64 = 512;

/// Device and inode: the same file under any path. Or [`TAP`] and the index of an interface.
type FileId = (u64, u64);
/// No device's number.
const TAP: u64 = u64::MAX;

/// Who uses which file, and which TAP.
#[derive(Clone, Debug, Default)]
pub(crate) struct DiskUsers(Arc<Mutex<HashMap<FileId, Vec<String>>>>);

impl DiskUsers {
    fn with<R>(&self, f: impl FnOnce(&mut HashMap<FileId, Vec<String>>) -> R) -> R {
        // The map is whole between any two statements of the closures below.
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Notes a user until the guard is dropped.
    pub fn note(&self, file: &Metadata, guest: &str) -> DiskUse {
        self.note_id((file.dev(), file.ino()), guest)
    }

    /// Notes a user of the interface with this index until the guard is dropped.
    pub fn note_tap(&self, index: u32, guest: &str) -> DiskUse {
        self.note_id((TAP, index.into()), guest)
    }

    /// The guest that uses the interface with this index.
    pub fn tap_user(&self, index: u32) -> Option<String> {
        self.with(|m| {
            m.get(&(TAP, index.into()))
                .and_then(|guests| guests.first().cloned())
        })
    }

    fn note_id(&self, id: FileId, guest: &str) -> DiskUse {
        self.with(|m| m.entry(id).or_default().push(guest.to_owned()));
        DiskUse {
            users: self.clone(),
            id,
            guest: guest.to_owned(),
        }
    }

    fn who(&self, id: FileId) -> String {
        let users = self.with(|m| m.get(&id).cloned()).unwrap_or_default();
        match users.first() {
            Some(guest) => format!("guest {guest}"),
            None => "another process".into(),
        }
    }
}

/// A guest uses a file or an interface.
#[derive(Debug)]
pub(crate) struct DiskUse {
    users: DiskUsers,
    id: FileId,
    guest: String,
}

impl Drop for DiskUse {
    fn drop(&mut self) {
        self.users.with(|m| {
            if let Some(guests) = m.get_mut(&self.id) {
                if let Some(at) = guests.iter().position(|g| *g == self.guest) {
                    guests.remove(at);
                }
                if guests.is_empty() {
                    m.remove(&self.id);
                }
            }
        });
    }
}

/// Opens and locks the file behind disk `index`.
///
/// # Errors
/// Names `disks[index].path` when the file is missing, of the wrong kind or size, or in use.
pub(crate) fn open(disk: &Disk, index: usize, users: &DiskUsers) -> Result<File, HostError> {
    let field = format!("disks[{index}].path");
    let path = &disk.path;
    let bad = |why: String| HostError::invalid(field.clone(), format!("{path:?} {why}"));
    // Looked at before it is opened: opening a pipe or a device can wait or have effects.
    let kind = fs::metadata(path)
        .map_err(|e| bad(format!("cannot be used: {e}")))?
        .file_type();
    if !kind.is_file() && !kind.is_block_device() {
        let what = if kind.is_dir() {
            "a directory"
        } else {
            "neither a file nor a block device"
        };
        return Err(bad(format!(
            "is {what}; a disk is a regular file or a block device"
        )));
    }
    let flags = (OFlags::NONBLOCK | OFlags::CLOEXEC).bits() as i32;
    let mut file = OpenOptions::new()
        .read(true)
        .write(!disk.read_only)
        .custom_flags(flags)
        .open(path)
        .map_err(|e| bad(format!("cannot be opened: {e}")))?;
    let meta = file.metadata().map_err(HostError::io("examining", path))?;
    if meta.file_type() != kind {
        return Err(bad("was replaced while it was being opened".into()));
    }
    let size = file
        .seek(SeekFrom::End(0))
        .map_err(HostError::io("measuring", path))?;
    if size == 0 || size % SECTOR != 0 {
        return Err(bad(format!(
            "has {size} bytes; a disk is a multiple of {SECTOR} bytes, and not empty"
        )));
    }
    let locked = if disk.read_only {
        file.try_lock_shared()
    } else {
        file.try_lock()
    };
    match locked {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let by = users.who((meta.dev(), meta.ino()));
            let how = if disk.read_only { "to write" } else { "already" };
            Err(HostError::InUse {
                field,
                what: format!("{path:?}"),
                by: format!("{by} ({how})"),
            })
        }
        Err(TryLockError::Error(source)) => Err(HostError::io("locking", path)(source)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn disk(path: &Path, read_only: bool) -> Disk {
        Disk {
            id: "d".into(),
            path: path.into(),
            read_only,
            ..Disk::default()
        }
    }

    #[test]
    fn refuses_what_is_no_disk() {
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("odd");
        fs::write(&odd, [0; 700]).unwrap();
        let empty = dir.path().join("empty");
        fs::write(&empty, []).unwrap();
        let sock = dir.path().join("sock");
        let _listener = std::os::unix::net::UnixListener::bind(&sock).unwrap();
        let missing = dir.path().join("missing");
        for (path, want) in [
            (dir.path(), "a directory"),
            (&odd, "700 bytes"),
            (&empty, "0 bytes"),
            (&sock, "neither a file"),
            (&missing, "No such file"),
            (Path::new("/dev/null"), "neither a file"),
        ] {
            match open(&disk(path, false), 3, &DiskUsers::default()) {
                Err(HostError::Invalid { field, why }) => {
                    assert_eq!(field, "disks[3].path");
                    assert!(why.contains(want), "{why}");
                }
                other => panic!("{path:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn one_writes_or_many_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        fs::write(&path, [0; 1024]).unwrap();
        let link = dir.path().join("link");
        fs::hard_link(&path, &link).unwrap();
        let users = DiskUsers::default();
        let writer = open(&disk(&path, false), 0, &users).unwrap();
        let used = users.note(&writer.metadata().unwrap(), "abc");
        for read_only in [false, true] {
            match open(&disk(&link, read_only), 0, &users) {
                Err(HostError::InUse { by, .. }) => assert!(by.starts_with("guest abc"), "{by}"),
                other => panic!("{other:?}"),
            }
        }
        drop((writer, used));
        let _readers = [
            open(&disk(&path, true), 0, &users).unwrap(),
            open(&disk(&link, true), 0, &users).unwrap(),
        ];
        match open(&disk(&path, false), 0, &users) {
            Err(HostError::InUse { by, .. }) => assert!(by.starts_with("another process"), "{by}"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_tap_has_one_guest() {
        let users = DiskUsers::default();
        assert_eq!(users.tap_user(7), None);
        let used = users.note_tap(7, "abc");
        assert_eq!(
            (users.tap_user(7).as_deref(), users.tap_user(8)),
            (Some("abc"), None)
        );
        drop(used);
        assert_eq!(users.tap_user(7), None);
    }
}
