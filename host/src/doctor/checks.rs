//! What can be told without a guest.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::path::Path;

use super::{Check, Status};

/// Looks at everything that guests need or may need.
pub(super) fn all() -> Vec<Check> {
    vec![
        kvm(Path::new("/dev/kvm")),
        tun(Path::new("/dev/net/tun")),
        io_uring(Path::new("/proc/sys/kernel/io_uring_disabled")),
        cgroup(Path::new("/sys/fs/cgroup")),
        user(),
    ]
}

fn check(name: &'static str, status: Status, detail: impl Into<String>, advice: Option<&str>) -> Check {
    Check {
        name,
        status,
        detail: detail.into(),
        advice: advice.map(str::to_owned),
    }
}

fn kvm(path: &Path) -> Check {
    let modules = "load the module (modprobe kvm-intel or kvm-amd); if that fails, switch on VT-x or SVM in the \
                   firmware, or on a cloud machine choose a type with nested virtualization";
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => check("kvm", Status::Ok, format!("{path:?} opens"), None),
        Err(e) if e.kind() == ErrorKind::NotFound => check(
            "kvm",
            Status::Failed,
            format!("there is no {path:?}"),
            Some(modules),
        ),
        Err(e) if e.kind() == ErrorKind::PermissionDenied => {
            let advice = "join the group that owns it (usually: usermod -aG kvm $USER, then log in again)";
            check(
                "kvm",
                Status::Failed,
                format!("{path:?} may not be opened by this user"),
                Some(advice),
            )
        }
        Err(e) => check(
            "kvm",
            Status::Failed,
            format!("{path:?} does not open: {e}"),
            Some(modules),
        ),
    }
}

fn tun(path: &Path) -> Check {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => check(
            "tun",
            Status::Ok,
            format!("{path:?} opens: guests can have network interfaces"),
            None,
        ),
        Err(e) => {
            let advice =
                "for guests with a network: load the module tun, and let this user open /dev/net/tun";
            check(
                "tun",
                Status::Warning,
                format!("{path:?} does not open: {e}"),
                Some(advice),
            )
        }
    }
}

/// Disks whose engine is io_uring need it in the VMM, which is an ordinary user.
fn io_uring(disabled: &Path) -> Check {
    // Missing before Linux 6.6: never disabled.
    let disabled = fs::read_to_string(disabled).unwrap_or_default();
    let advice =
        "for disks with the engine io_uring: sysctl kernel.io_uring_disabled=0; the engine sync does without";
    let refused = match disabled.trim() {
        "1" => Some("is for the group in kernel.io_uring_group only, which no VMM is in".to_owned()),
        "2" => Some("is switched off (kernel.io_uring_disabled is 2)".to_owned()),
        _ => try_ring().err().map(|e| format!("cannot be used: {e}")),
    };
    match refused {
        None => check("io_uring", Status::Ok, "disks can have the engine io_uring", None),
        Some(why) => check(
            "io_uring",
            Status::Warning,
            format!("io_uring {why}"),
            Some(advice),
        ),
    }
}

fn try_ring() -> Result<(), Box<dyn std::error::Error>> {
    let file = fs::File::open("/dev/null")?;
    shoal_devices::uring::Ring::new(&file, 1)?;
    Ok(())
}

fn cgroup(root: &Path) -> Check {
    let Ok(controllers) = fs::read_to_string(root.join("cgroup.controllers")) else {
        let advice =
            "for limits on guests: boot with systemd.unified_cgroup_hierarchy=1 or mount cgroup2 there";
        return check(
            "cgroup",
            Status::Warning,
            format!("no cgroup v2 at {root:?}"),
            Some(advice),
        );
    };
    let missing: Vec<_> = ["cpu", "io", "memory", "pids"]
        .into_iter()
        .filter(|wanted| !controllers.split_whitespace().any(|c| c == *wanted))
        .collect();
    if !missing.is_empty() {
        let detail = format!("cgroup v2 without the controllers {}", missing.join(", "));
        return check(
            "cgroup",
            Status::Warning,
            detail,
            Some("give the missing controllers to cgroup v2"),
        );
    }
    check(
        "cgroup",
        Status::Ok,
        format!("cgroup v2 with {}", controllers.trim()),
        None,
    )
}

fn user() -> Check {
    let uid = rustix::process::geteuid();
    if uid.is_root() {
        return check("user", Status::Ok, "root", None);
    }
    let detail = format!("user {} without root's rights", uid.as_raw());
    let advice =
        "as an ordinary user, TAP interfaces must be made for it beforehand (ip tuntap add … user NAME)";
    check("user", Status::Warning, detail, Some(advice))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let missing = kvm(&dir.path().join("kvm"));
        assert!(
            missing.status == Status::Failed && missing.detail.contains("there is no"),
            "{missing:?}"
        );
        assert_eq!(
            kvm(dir.path()).status,
            Status::Failed,
            "a directory does not open for writing"
        );
        assert_eq!(tun(&dir.path().join("tun")).status, Status::Warning);
        let disabled = dir.path().join("io_uring_disabled");
        for (value, want) in [("1\n", "group"), ("2\n", "switched off")] {
            fs::write(&disabled, value).unwrap();
            let found = io_uring(&disabled);
            assert!(
                found.status == Status::Warning && found.detail.contains(want),
                "{found:?}"
            );
        }
        fs::write(&disabled, "0\n").unwrap();
        assert_eq!(io_uring(&disabled).status == Status::Ok, try_ring().is_ok());
        assert_eq!(cgroup(dir.path()).status, Status::Warning);
        fs::write(dir.path().join("cgroup.controllers"), "cpu io memory").unwrap();
        assert!(cgroup(dir.path()).detail.contains("pids"));
        fs::write(dir.path().join("cgroup.controllers"), "cpu io memory pids\n").unwrap();
        assert_eq!(cgroup(dir.path()).status, Status::Ok);
    }
}
