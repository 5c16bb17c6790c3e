//! Where the guests' cgroups lie, when nobody says it.
//!
//! | the daemon is | guests go below |
//! |---|---|
//! | in a cgroup that was delegated to it (systemd: `Delegate=yes`) | `guests` in it; the daemon itself moves to `shoald` in it, for a cgroup with processes of its own cannot hand limits down |
//! | in such a `shoald` already, where it moved before | `guests` beside it |
//! | root elsewhere | `shoal` at the top |
//! | an ordinary user elsewhere | nowhere: there are no limits |

use std::fs::{self, DirBuilder};
use std::io;
use std::path::{Path, PathBuf};

/// Limits that guests get.
const CONTROLLERS: [&str; 4] = ["memory", "cpu", "io", "pids"];

/// Finds or makes the cgroup of all guests.
///
/// # Errors
/// Why there is none, for a person.
pub(crate) fn prepare() -> Result<PathBuf, String> {
    let (mountinfo, own) = (read("/proc/self/mountinfo")?, read("/proc/self/cgroup")?);
    let mount = mount_point(&mountinfo).ok_or("no cgroup of version 2 is mounted")?;
    let offered = read(mount.join("cgroup.controllers"))?;
    if !offered.split_whitespace().any(|c| CONTROLLERS.contains(&c)) {
        return Err(format!(
            "{mount:?} has none of the controllers {} (version 1 holds them)",
            CONTROLLERS.join(", ")
        ));
    }
    let own = mount.join(own_path(&own).ok_or("this process is in no cgroup of version 2")?);
    let root = rustix::process::geteuid().is_root();
    if let Some(delegated) = delegated(&own, |path| path != mount && is_delegated(path, root)) {
        move_into(&delegated.join("shoald"))?;
        return below(delegated, "guests");
    }
    match root {
        true => below(&mount, "shoal"),
        false => Err(format!("the cgroup {own:?} is not delegated to this user")),
    }
}

fn read(path: impl AsRef<Path>) -> Result<String, String> {
    let path = path.as_ref();
    fs::read_to_string(path).map_err(|e| format!("reading {path:?} failed: {e}"))
}

/// Where cgroup version 2 is mounted (proc_pid_mountinfo(5): the type follows a lone hyphen).
fn mount_point(mountinfo: &str) -> Option<PathBuf> {
    let line = mountinfo.lines().find(|line| line.contains(" - cgroup2 "))?;
    line.split(' ').nth(4).map(PathBuf::from)
}

/// The process's own cgroup of version 2 below the mount (cgroups(7): the line with hierarchy 0).
fn own_path(cgroups: &str) -> Option<&str> {
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::"))?;
    // What lies outside of this process's cgroup namespace cannot be reached by its path.
    (!path.contains("..")).then(|| path.trim_start_matches('/'))
}

/// Which cgroup was given to the process whose own is `own`: the one around it where this process, or the one that it
/// came from, has moved already.
fn delegated(own: &Path, is_delegated: impl Fn(&Path) -> bool) -> Option<&Path> {
    let around = own.parent().filter(|_| own.ends_with("shoald"));
    around.into_iter().chain([own]).find(|path| is_delegated(path))
}

fn is_delegated(own: &Path, root: bool) -> bool {
    let mut value = [0; 8];
    let marked = ["user.delegate", "trusted.delegate"].into_iter().any(|name| {
        rustix::fs::getxattr(own, name, &mut value).is_ok_and(|n| value.get(..n) == Some(&b"1"[..]))
    });
    let may_write = || {
        ["", "cgroup.procs", "cgroup.subtree_control"]
            .into_iter()
            .all(|file| rustix::fs::access(own.join(file), rustix::fs::Access::WRITE_OK).is_ok())
    };
    marked || (!root && may_write())
}

fn make(path: &Path) -> Result<(), String> {
    match DirBuilder::new().create(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(format!("making {path:?} failed: {e}")),
        _ => Ok(()),
    }
}

fn move_into(path: &Path) -> Result<(), String> {
    make(path)?;
    // 0 is the process that writes.
    fs::write(path.join("cgroup.procs"), "0").map_err(|e| format!("moving to {path:?} failed: {e}"))
}

/// Makes a cgroup, with as many of the wanted controllers as its parent gives away. The jailer tells which are missing.
fn below(parent: &Path, name: &str) -> Result<PathBuf, String> {
    let path = parent.join(name);
    make(&path)?;
    for controller in CONTROLLERS {
        // One by one: a single one that is refused must not take the others with it.
        let _ = fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}"));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_mount_and_the_own_cgroup() {
        let mountinfo = "31 1 0:28 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n\
                         41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(
            mount_point(mountinfo),
            Some(PathBuf::from("/sys/fs/cgroup/unified"))
        );
        assert_eq!(mount_point("31 1 0:28 / / ro - tmpfs tmpfs ro\n"), None);
        assert_eq!(own_path("4:memory:/a\n0::/b/c\n"), Some("b/c"));
        assert_eq!(own_path("0::/\n"), Some(""));
        assert_eq!(own_path("0::/../x\n"), None);
        assert_eq!(own_path("4:memory:/a\n"), None);
    }

    #[test]
    fn a_second_host_in_one_process_stays_beside_the_first() {
        let own = Path::new("/sys/fs/cgroup/unit/shoald");
        let given = |name: &'static str| move |path: &Path| path.ends_with(name);
        let found = |name| delegated(own, given(name)).map(|path| path.to_str().unwrap().to_owned());
        assert_eq!(found("unit").as_deref(), Some("/sys/fs/cgroup/unit"));
        assert_eq!(found("shoald").as_deref(), Some("/sys/fs/cgroup/unit/shoald"));
        assert_eq!(found("other"), None);
        // Whoever owns all of it: only its own move is undone.
        assert_eq!(delegated(own, |_| true), own.parent());
        let elsewhere = Path::new("/sys/fs/cgroup/unit/session");
        assert_eq!(delegated(elsewhere, |_| true), Some(elsewhere));
    }

    #[test]
    fn a_directory_that_is_no_cgroup_is_not_delegated() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_delegated(dir.path(), true));
        assert!(!is_delegated(dir.path(), false), "it has no cgroup.procs");
    }
}
