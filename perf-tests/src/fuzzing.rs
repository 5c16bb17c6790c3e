//! The parsers of what guests print and of files, for `fuzz/targets/perf.rs`.

use std::path::Path;

use crate::io::fuzzing::{TOOLS, probe};
use crate::results::ResultFile;

/// Gives `bytes` to the parser that the first of them chooses. What it makes of them is dropped; it must come to an end.
pub fn parse(bytes: &[u8]) {
    let Some((&which, bytes)) = bytes.split_first() else {
        return;
    };
    let name = Path::new("fuzz");
    match usize::from(which) % (TOOLS.len() + 3) {
        0 => drop(ResultFile::parse(name, bytes)),
        1 => drop(crate::gate::Baseline::parse(name, bytes)),
        2 => probe(bytes),
        n => TOOLS[n - 3](&String::from_utf8_lossy(bytes)),
    }
}
