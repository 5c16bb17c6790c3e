//! Cleaning up after a jailer that was killed: a process of its own waits for the jailer's end, and removes the cgroup
//! that the jailer could not.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use anyhow::{Context, Result};
use clap::Args;
use shoal_jailer::JailId;
use shoal_jailer::cgroup::Parent;

/// Arguments of `sweep`.
#[derive(Args)]
pub struct SweepArguments {
    /// The cgroup of the jails
    cgroup_parent: PathBuf,
    /// Whose jail
    id: JailId,
}

/// A running sweeper. Dropping it tells it that nothing is left to clean.
pub struct Sweeper {
    process: Child,
}

impl Sweeper {
    /// Starts one for the jail `id`.
    ///
    /// # Errors
    /// When no process can be made.
    pub fn start(cgroup_parent: &Path, id: &JailId) -> Result<Sweeper> {
        let process = Command::new("/proc/self/exe")
            .arg("sweep")
            .arg(cgroup_parent)
            .arg(id.as_str())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            // A terminal's Ctrl-C is for the jailer.
            .process_group(0)
            .spawn()
            .context("starting the process that cleans up after a killed jailer")?;
        Ok(Sweeper { process })
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        use std::io::Write;
        if let Some(pipe) = &mut self.process.stdin {
            // It has been killed, if the pipe is broken: then there is nobody to tell.
            let _ = pipe.write_all(b"clean");
        }
        // Closes the pipe and waits.
        let _ = self.process.wait();
    }
}

/// Waits for the end of the jailer.
pub fn sweep(arguments: &SweepArguments) -> Result<ExitCode> {
    let mut word = Vec::new();
    std::io::stdin().read_to_end(&mut word)?;
    if word.is_empty()
        && let Some(mut leaf) = Parent::open(&arguments.cgroup_parent)?.existing(&arguments.id)?
    {
        leaf.kill()?;
        leaf.remove()?;
    }
    Ok(ExitCode::SUCCESS)
}
