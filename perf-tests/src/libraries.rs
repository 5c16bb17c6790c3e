//! The libraries of a program of this machine, which has to run elsewhere.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

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
    fn a_program_that_is_not_there_is_told() {
        assert!(libraries(Path::new("/nonexistent")).is_err());
    }
}
