//! The machine's first file system: this program as `/init`, busybox, kernel modules, the job, and what is copied.

use super::{LabError, Sources};
use crate::cpio::Archive;
use crate::job::{JOB_PATH, Job};
use crate::modules::{Module, modules_alias, modules_dep};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

/// Loaded before the command starts.
const LOADED: &[&str] = &["virtio_pci", "virtio_console", "fuse", "kvm-amd", "tun"];

/// There for `modprobe`, and for the kernel to ask for when they are needed.
const AT_HAND: &[&str] = &[
    "erofs",
    "squashfs",
    "overlay",
    "loop",
    "nbd",
    "dm-mod",
    "virtio_blk",
    "vhost_net",
    "vhost_vsock",
    "vsock_loopback",
    "bridge",
    "veth",
    "dummy",
    "macvtap",
    "8021q",
    "nf_tables",
    "nft_chain_nat",
    "nft_masq",
    "nft_ct",
    "nft_reject_inet",
    "nfnetlink",
    "nf_conntrack",
    "sch_ingress",
    "sch_tbf",
    "sch_fq_codel",
    "cls_u32",
    "cls_matchall",
    "act_mirred",
    "act_police",
    "crc32c_generic",
    "crc32c-intel",
    "msr",
    "cpuid",
];

/// The root user's world; the groups and users that programs look up by name.
const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n";
const GROUP: &[u8] = b"root:x:0:\nkvm:x:36:\nnogroup:x:65534:\n";
const HOSTS: &[u8] = b"127.0.0.1 localhost shoal-lab\n::1 localhost\n";

/// Builds the archive. `job` gets the list of modules to load.
pub fn build(sources: &Sources, job: &mut Job, copies: &[PathBuf]) -> Result<Vec<u8>, LabError> {
    let mut archive = Archive::new();
    for directory in [
        "dev", "proc", "sys", "run", "tmp", "root", "mnt", "var/tmp", "lab", "etc", "usr/bin",
    ] {
        archive.directory(directory);
    }
    // Programs that are copied to /usr/bin find what lies beside it, as /usr/share, by their own path.
    for (link, target) in [
        ("bin", "usr/bin"),
        ("sbin", "usr/bin"),
        ("usr/sbin", "bin"),
        ("var/run", "../run"),
    ] {
        archive.symlink(link, target);
    }
    archive.file("etc/passwd", 0o644, PASSWD)?;
    archive.file("etc/group", 0o644, GROUP)?;
    archive.file("etc/hosts", 0o644, HOSTS)?;
    archive.file("init", 0o755, &read(Path::new("/proc/self/exe"))?)?;
    archive.symlink("usr/bin/shoal-lab", "/init");
    add_busybox(&mut archive, &sources.busybox)?;
    add_modules(&mut archive, sources, job)?;
    for path in copies {
        add_tree(&mut archive, path)?;
    }
    let json = serde_json::to_vec(job).map_err(|error| LabError::system("write the job")(error.into()))?;
    archive.file(JOB_PATH, 0o600, &json)?;
    Ok(archive.finish())
}

fn add_busybox(archive: &mut Archive, busybox: &Path) -> Result<(), LabError> {
    archive.file("usr/bin/busybox", 0o755, &read(busybox)?)?;
    let list = Command::new(busybox)
        .arg("--list")
        .output()
        .map_err(LabError::system(format!("run {} --list", busybox.display())))?;
    for applet in String::from_utf8_lossy(&list.stdout).lines() {
        if applet != "busybox" && !applet.contains('/') {
            archive.symlink(&format!("usr/bin/{applet}"), "busybox");
        }
    }
    Ok(())
}

fn add_modules(archive: &mut Archive, sources: &Sources, job: &mut Job) -> Result<(), LabError> {
    let kernel = &sources.kernel;
    let loaded = kernel.resolve(LOADED)?;
    let wanted: Vec<&str> = LOADED
        .iter()
        .chain(AT_HAND)
        .copied()
        .filter(|name| LOADED.contains(name) || kernel.has(name))
        .collect();
    let all = kernel.resolve(&wanted)?;
    let directory = format!("lib/modules/{}", kernel.version);
    for module in &all {
        archive.file(&format!("{directory}/{}", module.path), 0o644, &module.contents)?;
    }
    archive.file(
        &format!("{directory}/modules.dep"),
        0o644,
        modules_dep(&all).as_bytes(),
    )?;
    archive.file(
        &format!("{directory}/modules.alias"),
        0o644,
        modules_alias(&all).as_bytes(),
    )?;
    let path = |module: &Module| format!("/{directory}/{}", module.path);
    job.modules = loaded.iter().map(path).collect();
    Ok(())
}

/// Adds a file or a directory with all below it, at its own absolute path. Links are followed, but for those below a
/// directory that lead to something beside or below them.
fn add_tree(archive: &mut Archive, path: &Path) -> Result<(), LabError> {
    let meta = fs::metadata(path).map_err(LabError::system(format!("copy {}", path.display())))?;
    let name = path.to_str().ok_or_else(|| LabError::Share {
        path: path.to_owned(),
        why: "its name is not UTF-8".into(),
    })?;
    if meta.is_file() {
        archive.file(name, meta.permissions().mode(), &read(path)?)?;
        return Ok(());
    }
    if !meta.is_dir() {
        let why = "it is neither a file nor a directory".into();
        return Err(LabError::Share {
            path: path.to_owned(),
            why,
        });
    }
    archive.directory(name);
    let failed = || LabError::system(format!("list {}", path.display()));
    for entry in fs::read_dir(path).map_err(failed())? {
        let entry = entry.map_err(failed())?.path();
        let near = |target: &Path| {
            target
                .components()
                .all(|part| matches!(part, Component::Normal(_)))
        };
        match fs::read_link(&entry) {
            Ok(target) if near(&target) => {
                archive.symlink(&entry.to_string_lossy(), &target.to_string_lossy())
            }
            _ => add_tree(archive, &entry)?,
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>, LabError> {
    fs::read(path).map_err(LabError::system(format!("read {}", path.display())))
}
