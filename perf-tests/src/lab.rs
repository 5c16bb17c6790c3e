//! The lab: this program once more, on a machine of its own in which time is counted in instructions.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::driver::sibling;
use crate::results::ResultFile;

/// Runs `shoal-perf` with `arguments`, which ask for JSON, in a lab that also has `files` at their own paths.
pub fn run(arguments: &[OsString], files: &[&PathBuf]) -> Result<ResultFile> {
    let lab = sibling("shoal-lab")?;
    let (perf, vmm) = (sibling("shoal-perf")?, sibling("shoal-vmm")?);
    let mut command = Command::new(&lab);
    command.args(["run", "--icount", "--timeout", "300"]);
    for file in [&perf, &vmm].into_iter().chain(files.iter().copied()) {
        command.arg("--copy").arg(file);
    }
    command.arg("--").arg(&perf).args(arguments);
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("starting {}", lab.display()))?;
    if !output.status.success() {
        bail!("the lab ended with {}", output.status);
    }
    Ok(ResultFile::parse(
        Path::new("what the lab printed"),
        &output.stdout,
    )?)
}
