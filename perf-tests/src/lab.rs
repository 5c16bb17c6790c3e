//! The lab: this program once more, on a machine of its own in which time is counted in instructions.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::driver::sibling;
use crate::results::ResultFile;

/// A machine of the lab.
pub struct Lab {
    /// How long it may take for everything, by this machine's clock.
    pub limit: Duration,
    /// Its memory (MiB).
    pub memory_mib: u64,
}

impl Default for Lab {
    fn default() -> Self {
        Self {
            limit: Duration::from_secs(300),
            memory_mib: 2048,
        }
    }
}

/// What the lab ends with when the time is up.
const TIME_IS_UP: i32 = 124;

/// Runs `shoal-perf` with `arguments`, which ask for JSON, in a lab that also has `files` at their own paths.
pub fn run(arguments: &[OsString], files: &[&PathBuf]) -> Result<ResultFile> {
    let lab = Lab::default();
    let result = lab.run(arguments, files)?;
    result.with_context(|| format!("the lab was not done after {} s", lab.limit.as_secs()))
}

impl Lab {
    /// The same in this machine; none when it was not done in time.
    pub fn run(&self, arguments: &[OsString], files: &[&PathBuf]) -> Result<Option<ResultFile>> {
        let lab = sibling("shoal-lab")?;
        let (perf, vmm) = (sibling("shoal-perf")?, sibling("shoal-vmm")?);
        let mut command = Command::new(&lab);
        command.args(["run", "--icount", "--timeout", &self.limit.as_secs().to_string()]);
        command.args(["--memory", &self.memory_mib.to_string()]);
        for file in [&perf, &vmm].into_iter().chain(files.iter().copied()) {
            command.arg("--copy").arg(file);
        }
        command.arg("--").arg(&perf).args(arguments);
        let output = command
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("starting {}", lab.display()))?;
        if output.status.code() == Some(TIME_IS_UP) {
            return Ok(None);
        }
        if !output.status.success() {
            bail!("the lab ended with {}", output.status);
        }
        let result = ResultFile::parse(Path::new("what the lab printed"), &output.stdout)?;
        Ok(Some(result))
    }
}
