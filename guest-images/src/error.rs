//! Why an image could not be built.

use std::io;
use std::path::{Path, PathBuf};

/// What went wrong, on what, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A file or directory could not be used.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A program is missing or cannot be started.
    #[error("cannot run {program}; scripts/deps.sh installs what is missing")]
    Start {
        /// Its name.
        program: String,
        /// What the system said.
        source: io::Error,
    },
    /// A program failed.
    #[error("{program} failed ({status}): {output}")]
    Program {
        /// Its name.
        program: String,
        /// How it ended.
        status: String,
        /// The end of what it wrote, or where to read it.
        output: String,
    },
    /// The kernel's configuration does not hold what the fragment asks for.
    #[error("the kernel's configuration lacks what {} asks for: {}", fragment.display(), lost.join(", "))]
    Configuration {
        /// The fragment.
        fragment: PathBuf,
        /// The lines that did not stick.
        lost: Vec<String>,
    },
    /// An argument cannot be meant.
    #[error("{0}")]
    Argument(String),
}

impl ImageError {
    /// For `map_err` on file operations.
    pub fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImageError {
        let path = path.to_owned();
        move |source| ImageError::File { action, path, source }
    }
}
