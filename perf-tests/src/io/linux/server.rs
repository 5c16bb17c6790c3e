//! The host's end of a program that measures a network: a process that ends when it is dropped.

use std::io::BufReader;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};

use crate::driver::Reaped;
use crate::io::watch::read_line;

/// A server that runs.
pub struct Server {
    _child: Reaped,
}

impl Server {
    /// Starts it and waits until it says `ready`.
    pub fn start(command: &mut Command, ready: &str) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let (lines, end) = std::io::pipe()?;
        command
            .stdin(Stdio::null())
            .stdout(end.try_clone()?)
            .stderr(end)
            // Ctrl-C in a terminal is for shoal-perf alone.
            .process_group(0);
        let child = Reaped(command.spawn().with_context(|| format!("starting {name}"))?);
        // The command keeps the writing ends open.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut lines = BufReader::new(lines);
        let mut before = String::new();
        loop {
            match read_line(&mut lines)? {
                Some(line) if line.starts_with(ready) => break,
                Some(line) => before = line,
                None => bail!("{name} ended before it was ready; it said {before:?}"),
            }
        }
        // Nobody wants the rest, but it must not have to wait for a reader.
        thread::Builder::new()
            .spawn(move || std::io::copy(&mut lines, &mut std::io::sink()))
            .with_context(|| format!("starting a thread that reads what {name} says"))?;
        Ok(Self { _child: child })
    }
}
