//! Settings of the host that guests run with nevertheless, but that a machine with hostile guests of several owners should
//! have otherwise: side channels between guests, memory that guests share or that reaches a disk, speed of starts.
//!
//! Each is read from /proc and /sys. A file that is missing says something too: an old kernel, or a feature that is not
//! there.

use std::fs;
use std::path::Path;

use super::{Check, Status};

/// Looks at all of them.
pub(super) fn all() -> Vec<Check> {
    below(Path::new("/"))
}

/// The same with the files below another directory than the root.
fn below(root: &Path) -> Vec<Check> {
    let files = Files(root);
    let mut checks = vec![
        kernel(&files),
        smt(&files),
        mitigations(&files),
        ksm(&files),
        swap(&files),
        huge_pages(&files),
        ptrace_scope(&files),
    ];
    checks.extend(nx_huge_pages(&files));
    checks.extend(grace_periods(&files));
    checks
}

struct Files<'a>(&'a Path);

impl Files<'_> {
    fn read(&self, path: &str) -> Option<String> {
        let text = fs::read_to_string(self.0.join(path.trim_start_matches('/'))).ok()?;
        Some(text.trim().to_owned())
    }

    /// The names in a directory, sorted.
    fn list(&self, path: &str) -> Vec<String> {
        let entries = fs::read_dir(self.0.join(path.trim_start_matches('/')));
        let mut names: Vec<_> = entries
            .into_iter()
            .flatten()
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }
}

fn ok(name: &'static str, detail: impl Into<String>) -> Check {
    Check {
        name,
        status: Status::Ok,
        detail: detail.into(),
        advice: None,
    }
}

fn warning(name: &'static str, detail: impl Into<String>, advice: &str) -> Check {
    Check {
        name,
        status: Status::Warning,
        detail: detail.into(),
        advice: Some(advice.to_owned()),
    }
}

/// The newest layers of the jail need 6.12 (landlock's scopes); all that is needed is there since 5.15 (clone3 into a
/// cgroup, landlock).
fn kernel(files: &Files<'_>) -> Check {
    let release = files.read("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|n| n.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    match version {
        (0..5, _) | (5, 0..15) => warning(
            "kernel",
            format!("Linux {release} is older than 5.15: the jail cannot be made with it"),
            "use Linux 6.12 or newer on the host",
        ),
        (5, _) | (6, 0..12) => warning(
            "kernel",
            format!(
                "Linux {release}: every guest gets a network namespace of its own, which takes 0.5 ms of its start, and \
                 landlock does not hold back abstract sockets and signals"
            ),
            "use Linux 6.12 or newer on the host",
        ),
        _ => ok("kernel", format!("Linux {release}")),
    }
}

fn smt(files: &Files<'_>) -> Check {
    match files.read("/sys/devices/system/cpu/smt/active").as_deref() {
        Some("1") => warning(
            "smt",
            "processors share cores (SMT): what a guest computes can be guessed from the other half of its core. Core \
             scheduling (PR_SCHED_CORE, shoald --core-scheduling auto) keeps other guests away from there, but not the \
             host's own kernel",
            "for guests that do not trust each other: echo off > /sys/devices/system/cpu/smt/control",
        ),
        Some(_) => ok("smt", "no two processors share a core"),
        None => ok("smt", "the kernel does not tell of processors that share cores"),
    }
}

fn mitigations(files: &Files<'_>) -> Check {
    const DIRECTORY: &str = "/sys/devices/system/cpu/vulnerabilities";
    let names = files.list(DIRECTORY);
    if names.is_empty() {
        return warning(
            "cpu-flaws",
            "the kernel does not tell which flaws the processor has",
            "mount /sys, or use a kernel with CONFIG_GENERIC_CPU_VULNERABILITIES",
        );
    }
    let open: Vec<_> = names
        .into_iter()
        .filter(|name| {
            let text = files.read(&format!("{DIRECTORY}/{name}"));
            // "KVM: Vulnerable" (itlb_multihit) counts; "Mitigation: …; SMT vulnerable" is the check above.
            text.is_some_and(|text| text.starts_with("Vulnerable") || text.starts_with("KVM: Vulnerable"))
        })
        .collect();
    match open.is_empty() {
        true => ok("cpu-flaws", "all known flaws of the processor are mitigated"),
        false => warning(
            "cpu-flaws",
            format!(
                "not mitigated: {}; a guest may read memory of other guests or of the host through them",
                open.join(", ")
            ),
            "do not boot with mitigations=off, and install the newest microcode; inside of a virtual machine its host \
             decides",
        ),
    }
}

fn ksm(files: &Files<'_>) -> Check {
    match files.read("/sys/kernel/mm/ksm/run").as_deref() {
        Some("1") => warning(
            "ksm",
            "equal pages of different guests are merged (KSM): by the time that a write takes, a guest learns which pages \
             others have, and bits of merged pages can be flipped (rowhammer). Shoal's VMMs do not offer their memory, \
             other programs may",
            "echo 2 > /sys/kernel/mm/ksm/run",
        ),
        _ => ok("ksm", "pages are not merged"),
    }
}

fn swap(files: &Files<'_>) -> Check {
    let swaps = files.read("/proc/swaps").unwrap_or_default();
    // zram stays in memory.
    let disks: Vec<_> = swaps
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .filter(|device| !device.contains("zram"))
        .collect();
    match disks.is_empty() {
        true => ok("swap", "no memory reaches a disk"),
        false => warning(
            "swap",
            format!(
                "memory is swapped to {}: secrets of guests may stay there, and guests stall. Guests in a cgroup with the \
                 memory controller are not swapped",
                disks.join(", ")
            ),
            "swapoff -a, or swap to an encrypted device only",
        ),
    }
}

/// The setting in brackets of a file like `always [madvise] never`.
fn chosen(text: &str) -> &str {
    text.split_whitespace()
        .find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))
        .unwrap_or(text)
}

fn huge_pages(files: &Files<'_>) -> Check {
    let setting = files.read("/sys/kernel/mm/transparent_hugepage/enabled");
    match setting.as_deref().map(chosen) {
        Some("always") => warning(
            "thp",
            "transparent huge pages are always on: memory of other programs grows in steps of 2 MiB. Shoal asks for 4 KiB \
             pages for its guests, which stay dense",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        Some(setting) => ok("thp", format!("transparent huge pages: {setting}")),
        None => ok("thp", "this kernel has no transparent huge pages"),
    }
}

fn ptrace_scope(files: &Files<'_>) -> Check {
    match files.read("/proc/sys/kernel/yama/ptrace_scope").as_deref() {
        Some("0") | None => warning(
            "ptrace",
            "any process may trace others of the same user. A VMM cannot trace another (it is not dumpable), but other \
             programs of the user that runs the daemon can trace the daemon, and without root its VMMs too",
            "sysctl kernel.yama.ptrace_scope=1 (or 2), where the kernel has Yama",
        ),
        Some(scope) => ok("ptrace", format!("kernel.yama.ptrace_scope is {scope}")),
    }
}

fn nx_huge_pages(files: &Files<'_>) -> Option<Check> {
    let setting = files.read("/sys/module/kvm/parameters/nx_huge_pages")?;
    let affected = files
        .read("/sys/devices/system/cpu/vulnerabilities/itlb_multihit")
        .is_some_and(|text| text != "Not affected");
    let on = matches!(setting.as_str(), "Y" | "1" | "force");
    Some(match (affected, on) {
        (true, false) => warning(
            "nx-huge",
            "a guest can stop the processor through a flaw of its instruction TLB (itlb_multihit), for kvm.nx_huge_pages \
             is off",
            "echo force > /sys/module/kvm/parameters/nx_huge_pages",
        ),
        (false, true) => warning(
            "nx-huge",
            "kvm.nx_huge_pages is on, which this processor does not need: KVM starts a thread for each guest because of it, \
             and making that thread may wait for a grace period of the kernel (see start-up)",
            "echo never > /sys/module/kvm/parameters/nx_huge_pages, before guests are started",
        ),
        _ => ok("nx-huge", format!("kvm.nx_huge_pages is {setting}")),
    })
}

/// KVM moves the thread that it starts for a VM into the cgroups of its maker. Where threads are rarely moved, the first
/// move waits for an RCU grace period, unless the cgroup file systems are mounted with favordynmods.
fn grace_periods(files: &Files<'_>) -> Option<Check> {
    let mounts = files.read("/proc/mounts")?;
    let slow: Vec<_> = mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ').skip(1);
            let (path, kind, options) = (words.next()?, words.next()?, words.next()?);
            let favors = options.split(',').any(|option| option == "favordynmods");
            (matches!(kind, "cgroup" | "cgroup2") && !favors).then_some(path)
        })
        .collect();
    let worker = files.read("/sys/module/kvm/parameters/nx_huge_pages");
    if slow.is_empty() || worker.is_some_and(|setting| setting == "never") {
        return Some(ok("start-up", "no start waits for the cgroups' grace period"));
    }
    Some(warning(
        "start-up",
        format!(
            "making a VM may wait some 10 ms for a grace period of the kernel: KVM starts a thread for each and moves it \
             into its maker's cgroups, and {} is mounted without favordynmods",
            slow.first().copied().unwrap_or_default()
        ),
        "for fast starts: mount -o remount,favordynmods /sys/fs/cgroup (cgroup v2; Linux 6.0), or on a processor without \
         itlb_multihit: echo never > /sys/module/kvm/parameters/nx_huge_pages (Linux 6.4)",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The checks by name on a machine that has these files.
    fn examined(files: &[(&str, &str)]) -> impl Fn(&str) -> Check {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let checks = below(dir.path());
        move |name| checks.iter().find(|c| c.name == name).expect(name).clone()
    }

    #[test]
    fn a_hardened_machine_passes() {
        let check = examined(&[
            ("proc/sys/kernel/osrelease", "6.18.44-x\n"),
            ("sys/devices/system/cpu/smt/active", "0\n"),
            (
                "sys/devices/system/cpu/vulnerabilities/meltdown",
                "Mitigation: PTI\n",
            ),
            (
                "sys/devices/system/cpu/vulnerabilities/itlb_multihit",
                "Not affected\n",
            ),
            ("sys/kernel/mm/ksm/run", "0\n"),
            (
                "sys/kernel/mm/transparent_hugepage/enabled",
                "always [madvise] never\n",
            ),
            ("proc/sys/kernel/yama/ptrace_scope", "1\n"),
            ("sys/module/kvm/parameters/nx_huge_pages", "never\n"),
            ("proc/mounts", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n"),
            ("proc/swaps", "Filename Type Size\n/dev/zram0 partition 1 2\n"),
        ]);
        let names = [
            "kernel",
            "smt",
            "cpu-flaws",
            "ksm",
            "swap",
            "thp",
            "ptrace",
            "nx-huge",
            "start-up",
        ];
        for name in names {
            assert_eq!(check(name).status, Status::Ok, "{:?}", check(name));
        }
    }

    #[test]
    fn each_weakness_is_named_with_what_to_do() {
        let check = examined(&[
            ("proc/sys/kernel/osrelease", "6.1.0-56-cloud-amd64\n"),
            ("sys/devices/system/cpu/smt/active", "1\n"),
            ("sys/devices/system/cpu/vulnerabilities/meltdown", "Vulnerable\n"),
            (
                "sys/devices/system/cpu/vulnerabilities/itlb_multihit",
                "KVM: Vulnerable\n",
            ),
            ("sys/kernel/mm/ksm/run", "1\n"),
            (
                "sys/kernel/mm/transparent_hugepage/enabled",
                "[always] madvise never\n",
            ),
            ("proc/sys/kernel/yama/ptrace_scope", "0\n"),
            ("sys/module/kvm/parameters/nx_huge_pages", "N\n"),
            ("proc/mounts", "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n"),
            ("proc/swaps", "Filename Type Size\n/dev/sda2 partition 1 2\n"),
        ]);
        for (name, word) in [
            ("kernel", "6.1.0"),
            ("smt", "PR_SCHED_CORE"),
            ("cpu-flaws", "itlb_multihit, meltdown"),
            ("ksm", "merged"),
            ("swap", "/dev/sda2"),
            ("thp", "always on"),
            ("ptrace", "trace others"),
            ("nx-huge", "itlb_multihit"),
            ("start-up", "grace period"),
        ] {
            let found = check(name);
            assert_eq!(found.status, Status::Warning, "{found:?}");
            assert!(found.detail.contains(word) && found.advice.is_some(), "{found:?}");
        }
    }

    #[test]
    fn a_machine_that_tells_nothing_is_examined_nevertheless() {
        let check = examined(&[]);
        assert_eq!(check("kernel").status, Status::Warning);
        assert_eq!(check("cpu-flaws").status, Status::Warning);
    }
}
