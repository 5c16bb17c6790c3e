//! The root file system: read-only EROFS, compressed with LZ4 (what the kernel's configuration can read).

use crate::error::ImageError;
use crate::tree::Tree;
use std::path::Path;
use std::process::Command;

/// Fixed, so that the same content gives the same image.
const UUID: &str = "5b0a1000-0000-4000-8000-000000000001";

/// Writes a tree as an EROFS image.
pub fn write(tree: &Tree, out: &Path) -> Result<(), ImageError> {
    let staging =
        tempfile::tempdir().map_err(ImageError::file("make a directory in", &std::env::temp_dir()))?;
    let root = staging.path().join("root");
    std::fs::create_dir(&root).map_err(ImageError::file("create", &root))?;
    tree.write_to(&root)?;
    let image = staging.path().join("image");
    let program = "mkfs.erofs".to_owned();
    // Version 1.5 has no way to be quiet; what it writes is shown when it fails.
    let output = Command::new(&program)
        .args(["-zlz4hc,12", "-T0", "-x-1", "--all-root", "-U", UUID])
        .args([&image, &root])
        .env(
            "PATH",
            format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()),
        )
        .output()
        .map_err(|source| ImageError::Start {
            program: program.clone(),
            source,
        })?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(ImageError::Program {
            program,
            status: output.status.to_string(),
            output: text,
        });
    }
    std::fs::copy(&image, out).map_err(ImageError::file("write", out))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Node;

    #[test]
    fn the_same_tree_gives_the_same_image() {
        let mut tree = Tree::default();
        tree.directory("dev", 0o755);
        for i in 0..50 {
            tree.insert(&format!("bin/app{i}"), Node::Link("busybox".into()));
        }
        tree.insert("bin/busybox", Node::File(0o755, vec![7; 100_000]));
        tree.insert("etc/hosts", Node::File(0o644, b"127.0.0.1 localhost\n".to_vec()));
        let directory = tempfile::tempdir().unwrap();
        let (a, b) = (directory.path().join("a"), directory.path().join("b"));
        match write(&tree, &a) {
            Err(ImageError::Start { .. }) => return eprintln!("SKIPPED: there is no mkfs.erofs here"),
            other => other.unwrap(),
        }
        // Another order of creation on disk must not show.
        write(&tree, &b).unwrap();
        let image = std::fs::read(a).unwrap();
        assert_eq!(image[1024..1028], 0xe0f5_e1e2_u32.to_le_bytes(), "EROFS magic");
        assert!(image == std::fs::read(b).unwrap(), "the second image differs");
    }
}
