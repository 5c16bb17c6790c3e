//! A root disk for a Linux guest, with a program of this machine and the libraries that it is linked with.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::driver::{on_path, sibling};
use crate::libraries::libraries;

/// A root disk in a folder of its own, which goes with it.
pub struct Image {
    _folder: TempDir,
    /// The disk.
    pub path: PathBuf,
}

/// Why `program` cannot be put into an image, if so.
pub fn missing(program: &str) -> Option<String> {
    on_path(program)
        .is_none()
        .then(|| format!("{program} is not installed: scripts/deps.sh --bench, or apt install {program}"))
}

impl Image {
    /// Puts `program` at `destination` in a root disk.
    ///
    /// # Errors
    /// When it is not installed, its libraries are not found, or the image cannot be built.
    pub fn with(program: &str, destination: &str) -> Result<Self> {
        if let Some(why) = missing(program) {
            bail!(why);
        }
        let source = on_path(program).with_context(|| format!("{program} went away"))?;
        let folder = tempfile::tempdir().context("making a folder for the guest's root disk")?;
        let path = folder.path().join(format!("{program}.erofs"));
        let images = sibling("shoal-images")?;
        let mut command = Command::new(&images);
        command.args(["rootfs", "--out"]).arg(&path);
        command.arg("--file").arg(file(&source, destination));
        for library in libraries(&source)? {
            let destination = library.to_string_lossy().into_owned();
            command.arg("--file").arg(file(&library, &destination));
        }
        let output = command
            .output()
            .with_context(|| format!("starting {}", images.display()))?;
        ensure!(
            output.status.success(),
            "shoal-images could not build a root disk with {program}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(Self {
            _folder: folder,
            path,
        })
    }
}

fn file(source: &Path, destination: &str) -> OsString {
    let mut both = source.as_os_str().to_owned();
    both.push(":");
    both.push(destination);
    both
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_not_there_is_told_with_what_to_do() {
        let told = Image::with("no-such-program", "/bin/x")
            .err()
            .unwrap()
            .to_string();
        assert!(told.contains("apt install no-such-program"), "{told}");
    }
}
