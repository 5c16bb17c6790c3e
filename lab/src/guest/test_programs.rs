//! Runs test programs (libtest harnesses) one after another, inside the lab's machine.

use crate::tally::prefixed;
use std::io::{self, BufRead, BufReader, PipeReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

/// What stands for a program that ended badly without saying so, in the words of a harness.
const DIED: &str = "test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out";

/// Runs each of `programs` with `arguments`, prints their output with their names in front, and goes on after failures.
/// Each program gives at least one `test result:` line: when it gives none itself, or ends badly after a good one,
/// then a line that counts one failure. Returns whether all were good.
///
/// # Errors
/// When standard output cannot be written or a pipe cannot be made.
pub fn run(programs: &[PathBuf], arguments: &[String]) -> io::Result<bool> {
    let mut all_good = true;
    for program in programs {
        let name = display_name(program);
        let ended = run_one(program, arguments, &name);
        let complaint = match ended {
            Ok(ended) if ended.status.success() && ended.reported => continue,
            Ok(ended) if ended.failure_reported => None,
            Ok(ended) if ended.reported => Some(format!(
                "{}: it reported no failure, but: {}",
                program.display(),
                ended.status
            )),
            Ok(ended) => Some(format!(
                "{}: ended without a result: {}",
                program.display(),
                ended.status
            )),
            Err(error) => Some(format!("{}: cannot be run: {error}", program.display())),
        };
        all_good = false;
        if let Some(complaint) = complaint {
            let mut out = io::stdout().lock();
            writeln!(out, "{}", prefixed(&name, &complaint))?;
            writeln!(out, "{}", prefixed(&name, DIED))?;
        }
    }
    Ok(all_good)
}

struct Ended {
    status: ExitStatus,
    reported: bool,
    failure_reported: bool,
}

fn run_one(program: &Path, arguments: &[String], name: &str) -> io::Result<Ended> {
    let (reader, writer) = io::pipe()?;
    let mut command = Command::new(program);
    command.args(["--nocapture", "--test-threads=1"]).args(arguments);
    command.stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn()?;
    // The pipe's write ends in our process.
    drop(command);
    let reports = relay(reader, name);
    let status = child.wait()?;
    let (reported, failure_reported) = reports?;
    Ok(Ended {
        status,
        reported,
        failure_reported,
    })
}

/// Prints the lines as they come; tells whether there was a result, and whether there was a bad one.
fn relay(reader: PipeReader, name: &str) -> io::Result<(bool, bool)> {
    let mut reader = BufReader::new(reader);
    let (mut reported, mut failed) = (false, false);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end_matches(['\n', '\r']);
        reported |= text.starts_with("test result: ");
        failed |= text.starts_with("test result: FAILED");
        writeln!(io::stdout().lock(), "{}", prefixed(name, text))?;
        line.clear();
    }
    Ok((reported, failed))
}

/// The program's name without cargo's hash.
fn display_name(program: &Path) -> String {
    let name = program
        .file_name()
        .unwrap_or(program.as_os_str())
        .to_string_lossy()
        .replace(' ', "_");
    match name.rsplit_once('-') {
        Some((stem, hash)) if hash.len() == 16 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
            stem.to_owned()
        }
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_left_out() {
        assert_eq!(
            display_name(Path::new("/x/deps/linux_guest-0123456789abcdef")),
            "linux_guest"
        );
        assert_eq!(display_name(Path::new("a-b")), "a-b");
    }
}
