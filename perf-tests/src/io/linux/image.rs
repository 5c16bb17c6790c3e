//! A root disk for a Linux guest, with a program of this machine and the libraries that it is linked with.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::driver::{on_path, sibling};

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

/// The libraries and the loader that `program` is linked with, as the loader finds them; none when it is static.
pub fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output();
    let output = output.context("starting ldd, which finds a program's libraries")?;
    let (text, errors) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    if format!("{text}{errors}").contains("not a dynamic executable") {
        return Ok(Vec::new());
    }
    ensure!(
        output.status.success(),
        "ldd {} failed: {}",
        program.display(),
        errors.trim()
    );
    parse(&text).with_context(|| format!("the libraries of {}", program.display()))
}

/// Lines as `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`, `/lib64/ld-linux-x86-64.so.2 (0x…)`, and those of the
/// kernel's own `linux-vdso.so.1 (0x…)`, which is no file.
fn parse(ldd: &str) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for line in ldd.lines() {
        let (name, place) = line
            .trim()
            .split_once(" => ")
            .unwrap_or((line.trim(), line.trim()));
        if place.starts_with("not found") {
            bail!("{name} is not found");
        }
        let path = place.rsplit_once(" (").map_or(place, |(path, _)| path);
        if path.starts_with('/') {
            all.push(path.into());
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loaders_list_is_read() {
        let list = "\tlinux-vdso.so.1 (0x00007f40825db000)\n\tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x00007f4082593000)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f40825dd000)\n";
        let paths: Vec<PathBuf> = vec![
            "/lib/x86_64-linux-gnu/libm.so.6".into(),
            "/lib64/ld-linux-x86-64.so.2".into(),
        ];
        assert_eq!(parse(list).unwrap(), paths);
        let told = parse("\tlibx.so.1 => not found\n").unwrap_err().to_string();
        assert_eq!(told, "libx.so.1 is not found");
        assert_eq!(parse("").unwrap(), Vec::<PathBuf>::new());
    }

    #[test]
    fn a_program_that_is_not_there_is_told_with_what_to_do() {
        let told = Image::with("no-such-program", "/bin/x")
            .err()
            .unwrap()
            .to_string();
        assert!(told.contains("apt install no-such-program"), "{told}");
        assert!(libraries(Path::new("/nonexistent")).is_err());
    }
}
