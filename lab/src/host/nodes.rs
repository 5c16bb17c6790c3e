//! The nodes of a shared directory: the numbers by which the machine's kernel names files, and their paths.

use super::share_fs::Errno;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The nodes that the machine's kernel knows, by number and by path below the root. Node 1 is the root.
#[derive(Debug)]
pub struct Nodes {
    by_number: HashMap<u64, (PathBuf, u64)>,
    by_path: HashMap<PathBuf, u64>,
    next: u64,
}

impl Nodes {
    const ROOT: u64 = 1;

    pub fn new() -> Self {
        let root = (PathBuf::new(), 1);
        Self {
            by_number: [(Self::ROOT, root)].into(),
            by_path: HashMap::new(),
            next: Self::ROOT + 1,
        }
    }

    pub fn path(&self, node: u64) -> Result<&Path, Errno> {
        self.by_number
            .get(&node)
            .map(|(path, _)| path.as_path())
            .ok_or(Errno(libc::ESTALE))
    }

    /// The machine is told of a file once more.
    pub fn found(&mut self, path: PathBuf) -> u64 {
        let number = *self.by_path.entry(path.clone()).or_insert_with(|| {
            self.next += 1;
            self.next - 1
        });
        self.by_number.entry(number).or_insert((path, 0)).1 += 1;
        number
    }

    pub fn forget(&mut self, node: u64, count: u64) {
        if node == Self::ROOT {
            return;
        }
        let Some((path, known)) = self.by_number.get_mut(&node) else {
            return;
        };
        *known = known.saturating_sub(count);
        if *known == 0 {
            // Another node may have the path by now.
            if self.by_path.get(path) == Some(&node) {
                self.by_path.remove(path);
            }
            self.by_number.remove(&node);
        }
    }

    pub fn removed(&mut self, path: &Path) {
        self.by_path.remove(path);
    }

    /// A file or a directory with all below it has another path.
    pub fn renamed(&mut self, old: &Path, new: &Path) {
        self.by_path.remove(new);
        let moved: Vec<PathBuf> = self
            .by_path
            .keys()
            .filter(|path| path.starts_with(old))
            .cloned()
            .collect();
        for path in moved {
            let Some(number) = self.by_path.remove(&path) else {
                continue;
            };
            let below = path.strip_prefix(old).unwrap_or(Path::new(""));
            let path = if below.as_os_str().is_empty() {
                new.to_owned()
            } else {
                new.join(below)
            };
            if let Some((known, _)) = self.by_number.get_mut(&number) {
                known.clone_from(&path);
            }
            self.by_path.insert(path, number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> PathBuf {
        PathBuf::from(text)
    }

    #[test]
    fn a_path_keeps_its_number_until_forgotten() {
        let mut nodes = Nodes::new();
        let node = nodes.found(path("a"));
        assert_eq!(nodes.found(path("a")), node);
        nodes.forget(node, 1);
        assert_eq!(nodes.path(node), Ok(Path::new("a")));
        nodes.forget(node, u64::MAX);
        assert_eq!(nodes.path(node), Err(Errno(libc::ESTALE)));
        assert_ne!(nodes.found(path("a")), node);
        nodes.forget(Nodes::ROOT, u64::MAX);
        assert_eq!(nodes.path(Nodes::ROOT), Ok(Path::new("")));
    }

    #[test]
    fn what_is_below_moves_along() {
        let mut nodes = Nodes::new();
        let [directory, below, like] = ["d", "d/x/y", "dd"].map(|text| nodes.found(path(text)));
        let replaced = nodes.found(path("e"));
        nodes.renamed(Path::new("d"), Path::new("e"));
        assert_eq!(nodes.path(directory), Ok(Path::new("e")));
        assert_eq!(nodes.path(below), Ok(Path::new("e/x/y")));
        assert_eq!(nodes.path(like), Ok(Path::new("dd")));
        assert_eq!(nodes.found(path("e")), directory);
        nodes.forget(replaced, 1);
        assert_eq!(
            nodes.found(path("e")),
            directory,
            "the old owner of the path takes nothing with it"
        );
    }

    #[test]
    fn a_new_file_is_not_the_removed_one() {
        let mut nodes = Nodes::new();
        let old = nodes.found(path("a"));
        nodes.removed(Path::new("a"));
        assert_ne!(nodes.found(path("a")), old);
    }
}
