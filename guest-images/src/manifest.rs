//! What an image directory holds: names, sizes, digests.

use crate::error::ImageError;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Version of the manifest's form.
pub const VERSION: u32 = 1;

/// `manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The form's version, [`VERSION`].
    pub version: u32,
    /// Shoal's version.
    pub shoal: String,
    /// The kernel's release, as `uname -r` in the guest gives it.
    pub kernel_release: String,
    /// The files, by name.
    pub files: Vec<Entry>,
    /// Kernel plus root file system as they are shipped, compressed, in bytes.
    pub compressed_bytes: u64,
}

/// One file of the directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// SHA-256 in hexadecimal.
    pub sha256: String,
}

impl Entry {
    /// Describes a file.
    pub fn of(directory: &Path, name: &str) -> Result<Entry, ImageError> {
        let path = directory.join(name);
        let bytes = std::fs::metadata(&path)
            .map_err(ImageError::file("read", &path))?
            .len();
        Ok(Entry {
            name: name.to_owned(),
            bytes,
            sha256: sha256_file(&path)?,
        })
    }
}

/// SHA-256 of a file's content, in hexadecimal.
pub fn sha256_file(path: &Path) -> Result<String, ImageError> {
    let mut file = File::open(path).map_err(ImageError::file("open", path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer).map_err(ImageError::file("read", path))? {
            0 => return Ok(format!("{:x}", hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// The release in a kernel image: what follows "Linux version " up to the next space.
pub fn kernel_release(image: &[u8]) -> Option<String> {
    const BEFORE: &[u8] = b"Linux version ";
    let at = image.windows(BEFORE.len()).position(|w| w == BEFORE)? + BEFORE.len();
    let end = image[at..].iter().take(128).position(|b| *b == b' ')?;
    String::from_utf8(image[at..at + end].to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_digest() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "abc").unwrap();
        assert_eq!(
            sha256_file(file.path()).unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn the_release_is_found_or_not() {
        assert_eq!(
            kernel_release(b"xxLinux version 6.1.0-shoal (gcc)").as_deref(),
            Some("6.1.0-shoal")
        );
        assert_eq!(kernel_release(b"Linux version "), None);
        assert_eq!(kernel_release(b""), None);
    }
}
