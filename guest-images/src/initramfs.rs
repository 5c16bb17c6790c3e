//! Initramfs archives, gzip-compressed.

use crate::cpio;
use crate::error::ImageError;
use crate::tree::{Node, Tree};
use flate2::{Compression, GzBuilder};
use std::io::Write;
use std::path::Path;

/// `/init` of the reference initramfs, whose boot time is compared with other VMMs'.
const REFERENCE_INIT: &str = "#!/bin/busybox sh\necho GUEST-UP\n/bin/busybox reboot -f\n";

/// The reference initramfs: a busybox, an empty `/dev`, and a script that says it is there and resets.
pub fn reference_tree(busybox: &Path) -> Result<Tree, ImageError> {
    let mut tree = Tree::default();
    tree.copy(busybox, "bin/busybox")?;
    tree.directory("dev", 0o755);
    tree.insert("init", Node::File(0o755, REFERENCE_INIT.into()));
    Ok(tree)
}

/// Writes a tree as a compressed archive.
pub fn write(tree: &Tree, out: &Path) -> Result<(), ImageError> {
    let archive = cpio::archive(tree)
        .ok_or_else(|| ImageError::Argument("a file of 4 GiB or more cannot be in an initramfs".into()))?;
    let bytes = gzip(&archive).map_err(ImageError::file("compress", out))?;
    std::fs::write(out, bytes).map_err(ImageError::file("write", out))
}

/// gzip without a time stamp or a name, so that the same input gives the same bytes.
pub fn gzip(data: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut encoder = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
    encoder.write_all(data)?;
    encoder.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_tree_gives_the_same_file() {
        let directory = tempfile::tempdir().unwrap();
        let mut tree = Tree::default();
        tree.insert("init", Node::File(0o755, REFERENCE_INIT.into()));
        let (a, b) = (directory.path().join("a"), directory.path().join("b"));
        write(&tree, &a).unwrap();
        write(&tree, &b).unwrap();
        let a = std::fs::read(a).unwrap();
        assert_eq!(a[..2], [0x1f, 0x8b]);
        assert_eq!(a, std::fs::read(b).unwrap());
    }
}
