//! The machine's side: what this program does as process 1 in the lab, and the runner of test programs.

mod init;
mod ports;
mod session;
mod shares;
mod test_programs;

pub use test_programs::run as run_test_programs;

use crate::job::{JOB_PATH, Job, Message, port};
use std::fs::{self, File};
use std::io::{self, Write};

/// Why the machine cannot do its job.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}")]
pub struct GuestError {
    what: String,
    source: io::Error,
}

/// Puts what was tried in front of an I/O error.
trait Attempt<T> {
    fn attempt(self, what: impl FnOnce() -> String) -> Result<T, GuestError>;
}

impl<T> Attempt<T> for io::Result<T> {
    fn attempt(self, what: impl FnOnce() -> String) -> Result<T, GuestError> {
        self.map_err(|source| GuestError { what: what(), source })
    }
}

/// Process 1 of the machine. It returns only by failing, and the kernel's panic then ends the machine.
///
/// # Errors
/// When not even the control port could be opened, so that nobody was told.
pub fn main() -> Result<std::convert::Infallible, GuestError> {
    init::mount_kernel_file_systems()?;
    init::make_root_a_mount()?;
    let job = read_job()?;
    init::load_modules(&job.modules)?;
    let mut control = ports::open_for_writing(port::CONTROL)?;
    let last = match work(&job, &mut control) {
        Ok(message) => message,
        Err(error) => Message::Failed(format!("{error}: {}", error.source)),
    };
    say(&mut control, &last)?;
    // The host ends the machine as soon as it has read that and all output.
    loop {
        // SAFETY: pause has no arguments and touches no memory.
        unsafe { libc::pause() };
    }
}

fn work(job: &Job, control: &mut File) -> Result<Message, GuestError> {
    init::prepare()?;
    if job.heartbeat {
        take_heartbeats()?;
    }
    shares::mount_all(&job.shares)?;
    session::run(job, |uptime_ns| say(control, &Message::Up { uptime_ns }))
}

/// Starts a thread that takes what comes on [`port::HEARTBEAT`]: it comes to wake the machine, and says nothing.
fn take_heartbeats() -> Result<(), GuestError> {
    let mut port = ports::open_for_reading(port::HEARTBEAT)?;
    std::thread::spawn(move || io::copy(&mut port, &mut io::sink()));
    Ok(())
}

fn say(control: &mut File, message: &Message) -> Result<(), GuestError> {
    control
        .write_all(format!("{message}\n").as_bytes())
        .attempt(|| "write to the control port".into())
}

fn read_job() -> Result<Job, GuestError> {
    let bytes = fs::read(JOB_PATH).attempt(|| format!("read {JOB_PATH}"))?;
    serde_json::from_slice(&bytes)
        .map_err(io::Error::from)
        .attempt(|| format!("understand {JOB_PATH}"))
}
