//! The content of a root file system, as a list that is the same whoever builds it.

use crate::error::ImageError;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// One file of the tree; owners are root and time stamps zero for all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// A directory with these permissions.
    Directory(u32),
    /// A regular file with these permissions and this content.
    File(u32, Vec<u8>),
    /// A symbolic link to this target.
    Link(String),
}

/// Paths without a leading `/`, in order, so that a directory comes before what it holds.
#[derive(Clone, Debug, Default)]
pub struct Tree(pub BTreeMap<String, Node>);

/// A file to be added: `SOURCE:/DESTINATION` on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtraFile {
    /// On this machine.
    pub source: PathBuf,
    /// In the guest, absolute.
    pub destination: String,
}

impl std::str::FromStr for ExtraFile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.rsplit_once(':') {
            Some((source, destination)) if !source.is_empty() && destination.starts_with('/') => {
                Ok(ExtraFile {
                    source: source.into(),
                    destination: destination.to_owned(),
                })
            }
            _ => Err(format!(
                "'{text}' is not SOURCE:/DESTINATION with an absolute destination"
            )),
        }
    }
}

/// What a root file system or initramfs is made of.
#[derive(Clone, Debug)]
pub struct Ingredients {
    /// A static busybox.
    pub busybox: PathBuf,
    /// A static init.
    pub init: PathBuf,
    /// More files, the later ones winning.
    pub files: Vec<ExtraFile>,
}

impl Tree {
    /// Busybox with its applets, init, the usual directories, and the extra files.
    pub fn build(ingredients: &Ingredients) -> Result<Tree, ImageError> {
        let mut tree = Tree::default();
        for (path, mode) in [
            ("dev", 0o755),
            ("etc/shoal", 0o755),
            ("mnt", 0o755),
            ("proc", 0o555),
            ("root", 0o700),
            ("run", 0o755),
        ] {
            tree.directory(path, mode);
        }
        for (path, mode) in [
            ("sys", 0o555),
            ("tmp", 0o1777),
            ("var/log", 0o755),
            ("var/tmp", 0o1777),
        ] {
            tree.directory(path, mode);
        }
        tree.copy(&ingredients.init, "sbin/init")?;
        tree.insert("init", Node::Link("sbin/init".into()));
        tree.copy(&ingredients.busybox, "bin/busybox")?;
        for applet in applets(&ingredients.busybox)? {
            if !tree.0.contains_key(&applet) {
                tree.insert(&applet, Node::Link("/bin/busybox".into()));
            }
        }
        for (path, text) in [
            (
                "etc/passwd",
                "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
            ),
            ("etc/group", "root:x:0:\nnobody:x:65534:\n"),
            ("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
        ] {
            tree.insert(path, Node::File(0o644, text.into()));
        }
        for extra in &ingredients.files {
            tree.copy(&extra.source, extra.destination.trim_start_matches('/'))?;
        }
        Ok(tree)
    }

    /// Adds a directory and those above it.
    pub fn directory(&mut self, path: &str, mode: u32) {
        self.parents(path);
        self.0.insert(path.to_owned(), Node::Directory(mode));
    }

    /// Adds a node and the directories above it.
    pub fn insert(&mut self, path: &str, node: Node) {
        self.parents(path);
        self.0.insert(path.to_owned(), node);
    }

    fn parents(&mut self, path: &str) {
        for (i, _) in path.match_indices('/') {
            self.0
                .entry(path[..i].to_owned())
                .or_insert(Node::Directory(0o755));
        }
    }

    /// Adds a file of this machine; it is executable there when it is so here.
    pub fn copy(&mut self, source: &Path, destination: &str) -> Result<(), ImageError> {
        if destination.is_empty() || destination.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(ImageError::Argument(format!(
                "'/{destination}' is not a plain path of a file"
            )));
        }
        use std::os::unix::fs::PermissionsExt;
        let content = std::fs::read(source).map_err(ImageError::file("read", source))?;
        let mode = std::fs::metadata(source)
            .map_err(ImageError::file("read", source))?
            .permissions()
            .mode();
        let mode = if mode & 0o111 == 0 { 0o644 } else { 0o755 };
        self.insert(destination, Node::File(mode, content));
        Ok(())
    }

    /// Writes the tree below a directory.
    pub fn write_to(&self, directory: &Path) -> Result<(), ImageError> {
        use std::os::unix::fs::{PermissionsExt, symlink};
        for (path, node) in &self.0 {
            let at = directory.join(path);
            match node {
                Node::Directory(_) => std::fs::create_dir(&at),
                Node::File(_, content) => std::fs::write(&at, content),
                Node::Link(target) => symlink(target, &at),
            }
            .map_err(ImageError::file("create", &at))?;
            if let Node::Directory(mode) | Node::File(mode, _) = node {
                std::fs::set_permissions(&at, std::fs::Permissions::from_mode(*mode))
                    .map_err(ImageError::file("set the permissions of", &at))?;
            }
        }
        Ok(())
    }
}

/// The applets' paths that a busybox was built with.
fn applets(busybox: &Path) -> Result<Vec<String>, ImageError> {
    let program = busybox.display().to_string();
    let output = Command::new(busybox)
        .arg("--list-full")
        .output()
        .map_err(|source| ImageError::Start {
            program: program.clone(),
            source,
        })?;
    if !output.status.success() {
        let status = output.status.to_string();
        return Err(ImageError::Program {
            program,
            status,
            output: "is it a busybox?".into(),
        });
    }
    let mut list: Vec<String> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| line.trim_start_matches('/').to_owned())
        .filter(|path| !path.is_empty() && path != "linuxrc")
        .collect();
    list.sort();
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_come_before_what_they_hold() {
        let mut tree = Tree::default();
        tree.insert("a/b/c", Node::Link("x".into()));
        tree.directory("a/b", 0o700);
        let paths: Vec<_> = tree.0.keys().cloned().collect();
        assert_eq!(paths, ["a", "a/b", "a/b/c"]);
        assert_eq!(tree.0["a/b"], Node::Directory(0o700));
    }

    #[test]
    fn an_extra_file_needs_both_sides() {
        let file: ExtraFile = "some:where/app:/bin/app".parse().unwrap();
        assert_eq!(
            file,
            ExtraFile {
                source: "some:where/app".into(),
                destination: "/bin/app".into()
            }
        );
        for bad in ["app", ":/bin/app", "app:bin/app", "app:"] {
            assert!(bad.parse::<ExtraFile>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_destination_stays_inside() {
        let mut tree = Tree::default();
        for bad in ["", "../x", "a/../../x", "a//b", "a/"] {
            assert!(tree.copy(Path::new("/proc/self/exe"), bad).is_err(), "{bad}");
        }
        assert!(tree.0.is_empty());
    }
}
