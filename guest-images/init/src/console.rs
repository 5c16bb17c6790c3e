//! Lines on the console, which is where a guest's problems are looked for.

use std::io::Write;

/// Writes one line. A console that cannot be written to is no reason to stop.
pub fn say(text: &str) {
    let _ = std::io::stdout().write_all(format!("shoal-init: {text}\n").as_bytes());
}

/// Tells that a step failed; the boot goes on without it.
pub fn report(what: &str, result: std::io::Result<()>) {
    if let Err(e) = result {
        say(&format!("could not {what}: {e}"));
    }
}
