//! The "newc" archive that the kernel unpacks as an initramfs (Documentation/driver-api/early-userspace/buffer-format).

use crate::tree::{Node, Tree};

const MAGIC: &str = "070701";
const TRAILER: &str = "TRAILER!!!";

/// Serialises a tree. Inode numbers count up, owners are root and times zero: the same tree gives the same bytes.
///
/// `None` when a file is 4 GiB or more, which the format has no room for.
pub fn archive(tree: &Tree) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    for (inode, (path, node)) in (1..).zip(&tree.0) {
        let (mode, content): (u32, &[u8]) = match node {
            Node::Directory(mode) => (0o040000 | mode, &[]),
            Node::File(mode, content) => (0o100000 | mode, content),
            Node::Link(target) => (0o120777, target.as_bytes()),
        };
        entry(&mut out, path, inode, mode, content)?;
    }
    entry(&mut out, TRAILER, 0, 0, &[])?;
    out.resize(out.len().next_multiple_of(512), 0);
    Some(out)
}

fn entry(out: &mut Vec<u8>, name: &str, inode: u32, mode: u32, content: &[u8]) -> Option<()> {
    let size = u32::try_from(content.len()).ok()?;
    let name_size = u32::try_from(name.len() + 1).ok()?;
    // ino, mode, uid, gid, nlink, mtime, filesize, dev major and minor, rdev major and minor, namesize, check
    let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
    out.extend_from_slice(MAGIC.as_bytes());
    for field in fields {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(name.as_bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend_from_slice(content);
    out.resize(out.len().next_multiple_of(4), 0);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    fn sample() -> Tree {
        let mut tree = Tree::default();
        tree.directory("dev", 0o755);
        tree.insert("bin/app", Node::File(0o755, b"hello".to_vec()));
        tree.insert("init", Node::Link("bin/app".into()));
        tree
    }

    #[test]
    fn the_same_tree_gives_the_same_bytes() {
        assert_eq!(archive(&sample()), archive(&sample()));
    }

    #[test]
    fn cpio_reads_it() {
        let directory = tempfile::tempdir().unwrap();
        let child = Command::new("cpio")
            .args(["-i", "--quiet", "--no-preserve-owner"])
            .current_dir(directory.path())
            .stdin(Stdio::piped())
            .spawn();
        let Ok(mut child) = child else {
            eprintln!("SKIPPED: there is no cpio here");
            return;
        };
        child
            .stdin
            .take()
            .unwrap()
            .write_all(&archive(&sample()).unwrap())
            .unwrap();
        assert!(child.wait().unwrap().success());
        assert_eq!(std::fs::read(directory.path().join("init")).unwrap(), b"hello");
        assert!(directory.path().join("dev").is_dir());
    }
}
