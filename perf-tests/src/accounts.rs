//! Where a host's memory goes: the kernel's own accounts, before and after.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::machine::meminfo;

/// A kind of memory, and how much of it one guest takes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// Which kind, by the kernel's own word.
    pub kind: String,
    /// Megabytes (10^6 bytes); less than zero where others gave some back.
    pub mb: f64,
}

/// A cgroup of version 2 for this program and what it starts. It is left, and removed, when this is dropped.
pub struct Account {
    folder: PathBuf,
    parent: PathBuf,
}

impl Account {
    /// Enters a new one beside this program's; None where there is no version 2 with memory accounts, or no right to.
    pub fn enter() -> Option<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let path = own.lines().find_map(|l| l.strip_prefix("0::/"))?.to_owned();
        let parent = Path::new("/sys/fs/cgroup").join(path);
        let folder = parent
            .parent()?
            .join(format!("shoal-perf-{}", std::process::id()));
        // In the root, the new one lies in it; elsewhere beside ours, where no process may be in the way.
        let folder = match parent.join("cgroup.type").exists() {
            true => folder,
            false => parent.join(folder.file_name()?),
        };
        fs::create_dir(&folder).ok()?;
        let account = Self { folder, parent };
        let entered = fs::write(account.folder.join("cgroup.procs"), "0").is_ok();
        (entered && account.folder.join("memory.stat").exists()).then_some(account)
    }

    fn read(&self) -> Option<Vec<(String, u64)>> {
        stat(&fs::read_to_string(self.folder.join("memory.stat")).ok()?)
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        // Whoever cannot go back stays; the machine's administrator sees an empty name of ours.
        let _ = fs::write(self.parent.join("cgroup.procs"), "0");
        let _ = fs::remove_dir(&self.folder);
    }
}

/// Kinds of memory.stat that do not contain each other, and `kernel`, which is the sum of several.
const KINDS: [&str; 9] = [
    "anon",
    "file",
    "kernel",
    "kernel_stack",
    "pagetables",
    "sec_pagetables",
    "percpu",
    "vmalloc",
    "slab",
];

fn stat(text: &str) -> Option<Vec<(String, u64)>> {
    let all = text.lines().filter_map(|l| l.split_once(' '));
    let ours = all.filter(|(kind, _)| KINDS.contains(kind));
    ours.map(|(kind, bytes)| Some((kind.to_owned(), bytes.parse().ok()?)))
        .collect()
}

/// Of /proc/meminfo, for the whole machine.
const MACHINE_KINDS: [&str; 6] = [
    "AnonPages",
    "Slab",
    "KernelStack",
    "PageTables",
    "SecPageTables",
    "Percpu",
];

fn of_machine() -> Vec<(String, u64)> {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let all = MACHINE_KINDS.iter();
    all.filter_map(|kind| Some(((*kind).to_owned(), meminfo(&text, kind)?)))
        .collect()
}

/// The accounts at one moment.
pub struct Moment(Vec<(String, u64)>);

impl Moment {
    /// Those of the cgroup, if there is one, else those of the machine.
    pub fn now(account: Option<&Account>) -> Self {
        Self(account.and_then(Account::read).unwrap_or_else(of_machine))
    }

    /// What came since, for each of `guests`.
    pub fn shares(&self, since: &Self, guests: u32) -> Vec<Share> {
        let each = self.0.iter().filter_map(|(kind, now)| {
            let before = since.0.iter().find(|b| b.0 == *kind)?.1;
            Some(Share {
                kind: kind.clone(),
                mb: (*now as f64 - before as f64) / 1e6 / f64::from(guests.max(1)),
            })
        });
        each.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_s_account_is_read() {
        let text = "anon 4096\nfile 0\nkernel 8192\nshmem 77\nslab 12\nslab_reclaimable 3\n";
        let all = stat(text).unwrap();
        let names: Vec<&str> = all.iter().map(|a| a.0.as_str()).collect();
        assert_eq!(names, ["anon", "file", "kernel", "slab"]);
        assert!(stat("anon x\n").is_none());
        assert!(of_machine().iter().any(|a| a.0 == "AnonPages" && a.1 > 0));
    }

    #[test]
    fn shares_are_differences_for_each_guest() {
        let before = Moment(vec![("anon".into(), 1_000_000), ("gone".into(), 1)]);
        let after = Moment(vec![("anon".into(), 5_000_000), ("new".into(), 9)]);
        let shares = after.shares(&before, 4);
        assert_eq!(shares.len(), 1);
        assert_eq!((shares[0].kind.as_str(), shares[0].mb), ("anon", 1.0));
    }
}
