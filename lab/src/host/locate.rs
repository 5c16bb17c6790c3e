//! Finds what the lab is made of: QEMU, busybox, the kernel tree, this workspace's build directory.

use super::LabError;
use crate::modules::KernelTree;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// The workspace's `build/`, with `bin/` in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildDir(pub PathBuf);

impl BuildDir {
    /// The named directory; or the one that this program lies in; or the nearest `build/` at or above the current directory.
    pub fn find(named: Option<&Path>) -> Option<Self> {
        let with_bin = |directory: &Path| directory.join("bin").is_dir().then(|| directory.to_owned());
        let own = || {
            let program = env::current_exe().ok()?;
            let bin = program.parent()?;
            (bin.file_name()? == "bin" && bin.parent()?.file_name()? == "build")
                .then(|| bin.parent().map(Path::to_owned))?
        };
        let above = || {
            env::current_dir()
                .ok()?
                .ancestors()
                .find_map(|directory| with_bin(&directory.join("build")))
        };
        let found = match named {
            Some(named) => Some(named.to_owned()),
            None => own().or_else(above),
        };
        found
            .and_then(|directory| fs::canonicalize(directory).ok())
            .map(Self)
    }
}

/// The programs and files that every machine is made of.
#[derive(Debug)]
pub struct Sources {
    /// QEMU.
    pub qemu: PathBuf,
    /// A static busybox.
    pub busybox: PathBuf,
    /// The outer kernel and its modules.
    pub kernel: KernelTree,
}

impl Sources {
    /// Finds them all. `kernel_tree` names the kernel's directory; without it `scripts/cloud-kernel.sh` of the
    /// workspace around `build` is asked.
    ///
    /// # Errors
    /// Each missing one has its own, with what to do.
    pub fn find(kernel_tree: Option<&Path>, build: Option<&BuildDir>) -> Result<Self, LabError> {
        let qemu = in_path("qemu-system-x86_64").ok_or(LabError::NoQemu)?;
        let tree = match kernel_tree {
            Some(tree) => tree.to_owned(),
            None => ask_script(build)?,
        };
        Ok(Self {
            qemu,
            busybox: find_busybox()?,
            kernel: KernelTree::open(&tree)?,
        })
    }
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

fn find_busybox() -> Result<PathBuf, LabError> {
    let mut tried = Vec::new();
    for candidate in ["/bin/busybox", "/usr/bin/busybox"] {
        match fs::read(candidate) {
            Err(error) => tried.push(format!("{candidate}: {error}")),
            Ok(bytes) if names_a_loader(&bytes) => tried.push(format!("{candidate} needs shared libraries")),
            Ok(_) => return Ok(candidate.into()),
        }
    }
    Err(LabError::NoBusybox {
        tried: tried.join("; "),
    })
}

/// Whether a 64-bit ELF program has the segment PT_INTERP, which names the dynamic loader.
fn names_a_loader(elf: &[u8]) -> bool {
    const PT_INTERP: u8 = 3;
    let number = |range: std::ops::Range<usize>| {
        let bytes = elf.get(range)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0_usize, |value, byte| value << 8 | usize::from(*byte)),
        )
    };
    let (Some(table), Some(count)) = (number(0x20..0x28), number(0x38..0x3a)) else {
        return false;
    };
    let kinds = (0..count).filter_map(|index| elf.get(table.checked_add(index * 56)?..)?.first());
    kinds.into_iter().any(|kind| *kind == PT_INTERP)
}

/// The directory that the workspace's `scripts/cloud-kernel.sh` prints. What it says on its way goes to our standard error.
fn ask_script(build: Option<&BuildDir>) -> Result<PathBuf, LabError> {
    let missing = |why: String| LabError::NoKernelTree { why };
    let roots = build
        .iter()
        .filter_map(|build| build.0.parent().map(Path::to_owned));
    let here = env::current_dir()
        .into_iter()
        .flat_map(|here| here.ancestors().map(Path::to_owned).collect::<Vec<_>>());
    let script = roots
        .chain(here)
        .map(|root| root.join("scripts/cloud-kernel.sh"))
        .find(|script| script.is_file())
        .ok_or_else(|| missing("none was named, and there is no scripts/cloud-kernel.sh around".into()))?;
    let output = Command::new("sh")
        .arg(&script)
        .stderr(std::process::Stdio::inherit())
        .output()
        .map_err(LabError::system(format!("run {}", script.display())))?;
    if !output.status.success() {
        return Err(missing(format!(
            "{} failed ({})",
            script.display(),
            output.status
        )));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().last().map(str::trim) {
        Some(tree) if !tree.is_empty() => Ok(tree.into()),
        _ => Err(missing(format!("{} printed no directory", script.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loader_is_seen() {
        let own = fs::read("/proc/self/exe").unwrap();
        assert!(!names_a_loader(&own), "this workspace builds static programs");
        let mut dynamic = vec![0; 0x40 + 2 * 56];
        (dynamic[0x20], dynamic[0x38], dynamic[0x40], dynamic[0x40 + 56]) = (0x40, 2, 6, 3);
        assert!(names_a_loader(&dynamic));
        assert!(!names_a_loader(&dynamic[..0x40]));
        assert!(!names_a_loader(b""));
    }
}
