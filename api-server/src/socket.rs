//! The daemon's socket file.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// A bound socket.
pub struct Bound {
    /// Listens.
    pub listener: UnixListener,
    /// Removes the file when it is dropped.
    pub guard: Guard,
}

/// Removes the socket file, if it is still the one that was made.
pub struct Guard {
    path: PathBuf,
    inode: (u64, u64),
}

impl Drop for Guard {
    fn drop(&mut self) {
        let same = fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.inode);
        if same && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = ?self.path, %error, "cannot remove the socket");
        }
    }
}

/// Reads an octal mode.
pub fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err(format!("{text:?} is no mode; one looks like 0660")),
    }
}

/// Binds the socket. One that nobody listens at is replaced; anything else at `path` is left alone.
pub fn bind(path: &Path, mode: u32, group: Option<&str>) -> Result<Bound> {
    let gid = group.map(group_id).transpose()?;
    clear_the_way(path)?;
    let listener = UnixListener::bind(path)
        .with_context(|| format!("listening at {path:?}; --socket chooses another path"))?;
    let meta = fs::symlink_metadata(path).with_context(|| format!("examining {path:?}"))?;
    let guard = Guard {
        path: path.to_owned(),
        inode: (meta.dev(), meta.ino()),
    };
    if gid.is_some() {
        chown(path, None, gid).with_context(|| format!("giving {path:?} to group {group:?}"))?;
    }
    fs::set_permissions(path, Permissions::from_mode(mode))
        .with_context(|| format!("setting the mode of {path:?}"))?;
    listener.set_nonblocking(true).context("preparing the socket")?;
    Ok(Bound { listener, guard })
}

fn clear_the_way(path: &Path) -> Result<()> {
    let Ok(meta) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !meta.file_type().is_socket() {
        bail!("{path:?} exists and is no socket; remove it or choose another path with --socket");
    }
    match UnixStream::connect(path) {
        Ok(_) => bail!("another daemon listens at {path:?}; stop it or choose another path with --socket"),
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).with_context(|| format!("removing the stale socket {path:?}"))
        }
        Err(e) => Err(e).with_context(|| format!("finding out whether a daemon listens at {path:?}")),
    }
}

fn group_id(group: &str) -> Result<u32> {
    if let Ok(gid) = group.parse() {
        return Ok(gid);
    }
    let groups = fs::read_to_string("/etc/group").context("reading /etc/group")?;
    let id = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(group)).then(|| fields.nth(1)?.parse().ok())?
    });
    id.with_context(|| format!("there is no group {group:?} in /etc/group"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_only_what_is_stale() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        fs::write(&path, "precious").unwrap();
        assert!(bind(&path, 0o660, None).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        fs::remove_file(&path).unwrap();

        let first = bind(&path, 0o600, None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let Err(error) = bind(&path, 0o600, None) else {
            panic!("it is in use")
        };
        assert!(error.to_string().contains("another daemon"), "{error}");

        // As after a kill: the file stays, nobody listens.
        drop(first.listener);
        std::mem::forget(first.guard);
        let second = bind(&path, 0o660, None).unwrap();
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn reads_modes_and_groups() {
        assert_eq!(parse_mode("0660"), Ok(0o660));
        assert!(parse_mode("8").is_err() && parse_mode("10000").is_err() && parse_mode("").is_err());
        assert_eq!(group_id("root").unwrap(), 0);
        assert_eq!(group_id("17").unwrap(), 17);
        assert!(group_id("no such group").is_err());
    }
}
