#![forbid(unsafe_code)]
//! Builds small, reproducible guest images: a kernel, a root file system, an initramfs, and a manifest of them.
//!
//! The same inputs give the same bytes: time stamps, owners, order and identifiers are fixed.

pub mod cpio;
pub mod error;
pub mod initramfs;
pub mod kernel;
pub mod manifest;
pub mod rootfs;
pub mod tree;

pub use error::ImageError;

use std::path::PathBuf;

/// Where expensive results are kept: `$SHOAL_CACHE`, else `$XDG_CACHE_HOME/shoal`, else `~/.cache/shoal`.
pub fn cache_directory() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/tmp".into())).join(".cache");
    std::env::var_os("SHOAL_CACHE").map_or_else(
        || {
            std::env::var_os("XDG_CACHE_HOME")
                .map_or_else(home, PathBuf::from)
                .join("shoal")
        },
        PathBuf::from,
    )
}
