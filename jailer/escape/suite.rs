//! Runs the driver as root and as an ordinary user, each with a cgroup delegated to it.

use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use shoal_jailer::cgroup;

/// The user of the rootless run, if none is given.
const DEFAULT_USER: u32 = 61_234;

/// `suite [UID]`. Gives whether all attempts of both runs were refused.
pub fn run(arguments: &[String]) -> Result<bool> {
    // SAFETY: it cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        bail!("the suite needs root; `shoal-escape drive` alone tests the rootless jail");
    }
    let user = arguments
        .first()
        .map_or(Ok(DEFAULT_USER), |text| text.parse())
        .context("the user id")?;
    let mut all_well = true;
    for user in [None, Some(user)] {
        let cgroup = Delegated::new(user)?;
        if cgroup.is_none() {
            println!("lacking a mount of cgroup version 2");
        }
        let mut drive = Command::new("/proc/self/exe");
        drive
            .arg("drive")
            .args(cgroup.as_ref().map(|c| &c.parent))
            .stdin(Stdio::null());
        if let Some(user) = user {
            drive.uid(user).gid(user);
        }
        all_well &= drive.status().context("starting the driver")?.success();
    }
    Ok(all_well)
}

/// A cgroup made for a run, with this process in a child of it, as the rules of delegation ask: whoever moves a
/// process into a leaf must own the nearest cgroup above both.
struct Delegated {
    parent: PathBuf,
    driver: PathBuf,
    before: PathBuf,
    /// Controllers that were turned on at the top for this run.
    enabled: Vec<String>,
    top: PathBuf,
}

impl Delegated {
    fn new(user: Option<u32>) -> Result<Option<Delegated>> {
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let mount = mounts.lines().find_map(|line| {
            let mut fields = line.split(' ');
            let (place, kind) = (fields.nth(1)?, fields.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(place))
        });
        let Some(top) = mount else { return Ok(None) };
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let own = own
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .unwrap_or_default();
        let parent = top.join(format!("shoal-escape-{}", std::process::id()));
        let driver = parent.join("driver");
        let before = top.join(own);
        let mut made = Delegated {
            parent,
            driver,
            before,
            enabled: Vec::new(),
            top,
        };
        made.turn_on()?;
        fs::create_dir(&made.parent).with_context(|| format!("making {}", made.parent.display()))?;
        fs::create_dir(&made.driver)?;
        if let Some(user) = user {
            for place in [&made.parent, &made.driver] {
                chown(place, Some(user), Some(user))?;
                for file in ["cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
                    chown(place.join(file), Some(user), Some(user))?;
                }
            }
        }
        enter(&made.driver)?;
        Ok(Some(made))
    }

    /// Hands the controllers down from the top, where they are not.
    fn turn_on(&mut self) -> Result<()> {
        let control = self.top.join("cgroup.subtree_control");
        let available = fs::read_to_string(self.top.join("cgroup.controllers"))?;
        let active = fs::read_to_string(&control)?;
        for controller in ["memory", "cpu", "io", "pids"] {
            let has = |list: &str| list.split_whitespace().any(|word| word == controller);
            if has(&available) && !has(&active) {
                fs::write(&control, format!("+{controller}"))?;
                self.enabled.push(controller.to_owned());
            }
        }
        Ok(())
    }

    /// Removes jails that a driver which failed has left.
    fn remove_leaves(&self) -> Result<()> {
        let parent = cgroup::Parent::open(&self.parent)?;
        for (id, _) in parent.leaves()? {
            if let Some(mut leaf) = parent.existing(&id)? {
                leaf.kill()?;
                leaf.remove()?;
            }
        }
        Ok(())
    }
}

impl Drop for Delegated {
    fn drop(&mut self) {
        let undone = enter(&self.before)
            .and_then(|()| self.remove_leaves())
            .and_then(|()| fs::remove_dir(&self.driver).context("removing the driver's cgroup"))
            .and_then(|()| fs::remove_dir(&self.parent).context("removing the test's cgroup"));
        if let Err(error) = undone {
            eprintln!("shoal-escape: {error:#}");
        }
        for controller in &self.enabled {
            // Somebody else may use it by now; then it stays on.
            let _ = fs::write(self.top.join("cgroup.subtree_control"), format!("-{controller}"));
        }
    }
}

/// Moves this process into a cgroup.
fn enter(cgroup: &Path) -> Result<()> {
    fs::write(cgroup.join("cgroup.procs"), "0").with_context(|| format!("entering {}", cgroup.display()))
}
