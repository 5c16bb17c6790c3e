//! A writer for cpio archives of the kind "newc", uncompressed: what Linux unpacks as its initramfs.
//!
//! Format: Linux `Documentation/driver-api/early-userspace/buffer-format.rst`.

use std::collections::BTreeSet;

/// A file of 4 GiB or more does not fit: sizes in a "newc" header have eight hexadecimal digits.
#[derive(Debug, thiserror::Error)]
#[error(
    "{path}: {size} bytes do not fit into an initramfs, whose files end below 4 GiB; share its directory instead"
)]
pub struct TooLarge {
    /// The file's path in the archive.
    pub path: String,
    /// Its size in bytes.
    pub size: u64,
}

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// An archive under construction. Parent directories are added by themselves, mode 0755; everything is owned by root
/// and has no time stamp, so equal contents give equal bytes.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    seen: BTreeSet<String>,
    inode: u32,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the directory `path` (absolute or not) and its parents, unless they are there.
    pub fn directory(&mut self, path: &str) {
        let path = normal(path);
        self.parents(&path);
        self.add_directory(&path);
    }

    /// Adds a file with `contents` and the permission bits `mode`. A path that is in the archive already stays as it is.
    ///
    /// # Errors
    /// [`TooLarge`] for 4 GiB and more.
    pub fn file(&mut self, path: &str, mode: u32, contents: &[u8]) -> Result<(), TooLarge> {
        let path = normal(path);
        if u32::try_from(contents.len()).is_err() {
            return Err(TooLarge {
                path,
                size: contents.len() as u64,
            });
        }
        self.parents(&path);
        if self.seen.insert(path.clone()) {
            self.entry(&path, S_IFREG | (mode & 0o7777), contents);
        }
        Ok(())
    }

    /// Adds a symbolic link at `path` that points to `target`.
    pub fn symlink(&mut self, path: &str, target: &str) {
        let path = normal(path);
        self.parents(&path);
        if self.seen.insert(path.clone()) {
            self.entry(&path, S_IFLNK | 0o777, target.as_bytes());
        }
    }

    /// Whether `path` is in the archive.
    pub fn contains(&self, path: &str) -> bool {
        self.seen.contains(&normal(path))
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was added yet.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Closes the archive and returns its bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.inode = u32::MAX; // the trailer's number is 0 after the increment
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        for (index, _) in path.match_indices('/') {
            self.add_directory(&path[..index]);
        }
    }

    fn add_directory(&mut self, path: &str) {
        if !path.is_empty() && self.seen.insert(path.to_owned()) {
            self.entry(path, S_IFDIR | 0o755, &[]);
        }
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.inode = self.inode.wrapping_add(1);
        let links = if mode & S_IFDIR == S_IFDIR { 2 } else { 1 };
        // magic, inode, mode, uid, gid, links, mtime, file size, device (2), rdevice (2), name size with NUL, check
        self.bytes.extend_from_slice(b"070701");
        let fields = [
            self.inode,
            mode,
            0,
            0,
            links,
            0,
            data.len() as u32,
            0,
            0,
            0,
            0,
            name.len() as u32 + 1,
            0,
        ];
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// The path as cpio has it: no leading, doubled or trailing slash, no `.` component.
fn normal(path: &str) -> String {
    let parts: Vec<&str> = path
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".")
        .collect();
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    #[test]
    fn layout_of_one_file() {
        let mut archive = Archive::new();
        archive.file("/a", 0o644, b"hello").unwrap();
        let bytes = archive.finish();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[14..22], b"000081a4", "mode");
        assert_eq!(&bytes[54..62], b"00000005", "size");
        assert_eq!(&bytes[94..102], b"00000002", "name size with NUL");
        assert_eq!(&bytes[110..112], b"a\0");
        assert_eq!(&bytes[112..120], b"hello\0\0\0");
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.windows(10).any(|w| w == b"TRAILER!!!"));
    }

    #[test]
    fn parents_come_first_and_once() {
        let mut archive = Archive::new();
        archive.file("/x/y/one", 0o755, b"1").unwrap();
        archive.file("x//y/./two", 0o755, b"2").unwrap();
        archive.directory("/x/y/");
        assert!(archive.contains("/x") && archive.contains("x/y/two"));
        let text = String::from_utf8_lossy(&archive.finish()).into_owned();
        assert_eq!(text.matches("x/y\0").count(), 1);
        assert!(text.find("x\0").unwrap() < text.find("x/y\0").unwrap());
    }

    #[test]
    fn first_of_two_files_stays() {
        let mut archive = Archive::new();
        archive.file("a", 0o644, b"first").unwrap();
        archive.file("a", 0o644, b"second").unwrap();
        let bytes = archive.finish();
        assert!(!bytes.windows(6).any(|w| w == b"second"));
    }

    /// Another implementation reads what this one writes.
    #[test]
    fn cpio_lists_it() {
        let mut archive = Archive::new();
        archive.file("dir/file", 0o640, b"contents").unwrap();
        archive.symlink("link", "dir/file");
        let Ok(mut child) = Command::new("cpio")
            .args(["-itv", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
        else {
            println!("SKIP: cpio_lists_it: the cpio command is not installed");
            return;
        };
        child.stdin.take().unwrap().write_all(&archive.finish()).unwrap();
        let listing = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        assert!(listing.contains("drwxr-xr-x"), "{listing}");
        assert!(listing.contains("-rw-r-----"), "{listing}");
        assert!(listing.contains("link -> dir/file"), "{listing}");
    }
}
