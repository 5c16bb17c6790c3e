//! A directory of the host as the FUSE server sees it: nodes, handles, and what can be done to them.
//!
//! Nothing outside the directory can be reached: paths are resolved by openat2(2) beneath the directory's own
//! descriptor and without following links (the machine's kernel follows them, in the machine). Everything else goes
//! through the descriptors that this gives, by their names in `/proc/self/fd`.

use super::nodes::Nodes;
use std::collections::HashMap;
use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File, FileTimes, Permissions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, DirEntryExt, FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// The error number that the machine's kernel is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

impl From<io::Error> for Errno {
    fn from(error: io::Error) -> Self {
        Self(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

/// What stat(2) tells.
#[derive(Debug)]
pub struct Attr {
    pub inode: u64,
    pub size: u64,
    pub blocks: u64,
    /// Access, modification, change; seconds and nanoseconds.
    pub times: [(i64, i64); 3],
    pub mode: u32,
    pub links: u32,
    pub uid: u32,
    pub gid: u32,
}

/// A file that was looked up. The machine's kernel holds on to the node until it forgets it.
#[derive(Debug)]
pub struct Entry {
    pub node: u64,
    pub attr: Attr,
}

/// What setattr changes; the owner stays, whatever the machine wants.
#[derive(Debug, Default)]
pub struct SetAttr {
    pub mode: Option<u32>,
    pub size: Option<u64>,
    pub accessed: Option<(u64, u32)>,
    pub modified: Option<(u64, u32)>,
    pub handle: Option<u64>,
}

/// A name in a directory.
#[derive(Debug)]
pub struct Name {
    pub name: OsString,
    pub inode: u64,
    /// DT_REG and so on.
    pub kind: u32,
}

enum Handle {
    File(File),
    Directory(Vec<Name>),
}

/// The directory, and what the machine holds of it.
pub struct ShareFs {
    root: OwnedFd,
    writable: bool,
    nodes: Nodes,
    handles: HashMap<u64, Handle>,
    next_handle: u64,
    /// Files of this user are the machine's root's.
    own_uid: u32,
    own_gid: u32,
}

impl ShareFs {
    /// Opens the directory.
    pub fn open_root(directory: &Path, writable: bool) -> io::Result<Self> {
        let root = File::open(directory)?;
        let meta = fs::metadata("/proc/self")?;
        Ok(Self {
            root: root.into(),
            writable,
            nodes: Nodes::new(),
            handles: HashMap::new(),
            next_handle: 1,
            own_uid: meta.uid(),
            own_gid: meta.gid(),
        })
    }

    /// How long the machine may believe what it was told. The host may change a writable directory at the same time;
    /// what is read-only, a build, is not expected to change under a run.
    pub fn cache_seconds(&self) -> u64 {
        if self.writable { 0 } else { 60 }
    }

    pub fn lookup(&mut self, parent: u64, name: &OsStr) -> Result<Entry, Errno> {
        let path = self.child(parent, name)?;
        self.entry(path)
    }

    pub fn forget(&mut self, node: u64, count: u64) {
        self.nodes.forget(node, count);
    }

    pub fn attributes(&self, node: u64, handle: Option<u64>) -> Result<Attr, Errno> {
        let meta = match handle.and_then(|handle| self.handles.get(&handle)) {
            Some(Handle::File(file)) => file.metadata()?,
            _ => File::from(self.look(self.nodes.path(node)?)?).metadata()?,
        };
        Ok(self.attr(&meta))
    }

    pub fn change(&mut self, node: u64, changes: &SetAttr) -> Result<Attr, Errno> {
        self.must_be_writable()?;
        let path = self.nodes.path(node)?;
        if let Some(mode) = changes.mode {
            let fd = self.look(path)?;
            fs::set_permissions(proc_path(&fd), Permissions::from_mode(mode))?;
        }
        if let Some(size) = changes.size {
            match changes.handle.and_then(|handle| self.handles.get(&handle)) {
                Some(Handle::File(file)) => file.set_len(size)?,
                _ => File::from(self.resolve(path, libc::O_WRONLY | libc::O_NONBLOCK, 0)?).set_len(size)?,
            }
        }
        if changes.accessed.is_some() || changes.modified.is_some() {
            let time =
                |(seconds, ns): (u64, u32)| SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, ns));
            let mut times = FileTimes::new();
            if let Some(accessed) = changes.accessed {
                times = times.set_accessed(time(accessed).ok_or(Errno(libc::EINVAL))?);
            }
            if let Some(modified) = changes.modified {
                times = times.set_modified(time(modified).ok_or(Errno(libc::EINVAL))?);
            }
            File::from(self.resolve(path, libc::O_RDONLY | libc::O_NONBLOCK, 0)?).set_times(times)?;
        }
        self.attributes(node, changes.handle)
    }

    pub fn read_link(&self, node: u64) -> Result<Vec<u8>, Errno> {
        let (parent, name) = self.split(self.nodes.path(node)?)?;
        Ok(fs::read_link(proc_path(&parent).join(name))?
            .into_os_string()
            .into_vec())
    }

    pub fn statistics(&self) -> Result<libc::statvfs, Errno> {
        // SAFETY: statvfs is plain data, for which all zeroes is a value.
        let mut numbers: libc::statvfs = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is open and the structure is valid for the call.
        if unsafe { libc::fstatvfs(self.root.as_raw_fd(), &raw mut numbers) } != 0 {
            return Err(io::Error::last_os_error().into());
        }
        Ok(numbers)
    }

    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, Errno> {
        if flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0 {
            self.must_be_writable()?;
        }
        // Never wait for a FIFO's other end; the machine's kernel takes care of appending.
        let flags = flags & (libc::O_ACCMODE | libc::O_TRUNC) | libc::O_NONBLOCK;
        let file = self.resolve(self.nodes.path(node)?, flags, 0)?.into();
        Ok(self.keep(Handle::File(file)))
    }

    pub fn create(
        &mut self,
        parent: u64,
        name: &OsStr,
        flags: i32,
        mode: u32,
    ) -> Result<(Entry, u64), Errno> {
        self.must_be_writable()?;
        let path = self.child(parent, name)?;
        let flags =
            flags & (libc::O_ACCMODE | libc::O_TRUNC | libc::O_EXCL) | libc::O_CREAT | libc::O_NONBLOCK;
        let file = self.resolve(&path, flags, mode & 0o7777)?.into();
        let entry = self.entry(path)?;
        Ok((entry, self.keep(Handle::File(file))))
    }

    pub fn open_directory(&mut self, node: u64) -> Result<u64, Errno> {
        let fd = self.resolve(self.nodes.path(node)?, libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
        let mut names = Vec::new();
        for entry in fs::read_dir(proc_path(&fd))? {
            let entry = entry?;
            let kind = entry.file_type()?;
            let kind = if kind.is_dir() {
                libc::DT_DIR
            } else if kind.is_symlink() {
                libc::DT_LNK
            } else if kind.is_file() {
                libc::DT_REG
            } else {
                libc::DT_UNKNOWN
            };
            names.push(Name {
                name: entry.file_name(),
                inode: entry.ino(),
                kind: kind.into(),
            });
        }
        Ok(self.keep(Handle::Directory(names)))
    }

    pub fn directory(&self, handle: u64) -> Result<&[Name], Errno> {
        match self.handles.get(&handle) {
            Some(Handle::Directory(names)) => Ok(names),
            _ => Err(Errno(libc::EBADF)),
        }
    }

    pub fn read(&self, handle: u64, offset: u64, size: usize) -> Result<Vec<u8>, Errno> {
        let file = self.file(handle)?;
        let mut data = vec![0; size];
        let mut filled = 0;
        while filled < size {
            match file.read_at(&mut data[filled..], offset.saturating_add(filled as u64)) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        data.truncate(filled);
        Ok(data)
    }

    pub fn write(&self, handle: u64, offset: u64, data: &[u8]) -> Result<usize, Errno> {
        self.must_be_writable()?;
        self.file(handle)?.write_all_at(data, offset)?;
        Ok(data.len())
    }

    pub fn sync(&self, handle: u64) -> Result<(), Errno> {
        Ok(self.file(handle)?.sync_all()?)
    }

    pub fn release(&mut self, handle: u64) {
        self.handles.remove(&handle);
    }

    pub fn unlink(&mut self, parent: u64, name: &OsStr) -> Result<(), Errno> {
        let path = self.child_to_change(parent, name)?;
        let (directory, name) = self.split(&path)?;
        fs::remove_file(proc_path(&directory).join(name))?;
        self.nodes.removed(&path);
        Ok(())
    }

    pub fn remove_directory(&mut self, parent: u64, name: &OsStr) -> Result<(), Errno> {
        let path = self.child_to_change(parent, name)?;
        let (directory, name) = self.split(&path)?;
        fs::remove_dir(proc_path(&directory).join(name))?;
        self.nodes.removed(&path);
        Ok(())
    }

    pub fn rename(&mut self, from: u64, name: &OsStr, to: u64, new_name: &OsStr) -> Result<(), Errno> {
        let (old, new) = (self.child_to_change(from, name)?, self.child(to, new_name)?);
        let ((old_directory, old_name), (new_directory, new_name)) = (self.split(&old)?, self.split(&new)?);
        fs::rename(
            proc_path(&old_directory).join(old_name),
            proc_path(&new_directory).join(new_name),
        )?;
        self.nodes.renamed(&old, &new);
        Ok(())
    }

    /// Only ordinary files: devices, sockets and FIFOs have no business on the host.
    pub fn make_node(&mut self, parent: u64, name: &OsStr, mode: u32) -> Result<Entry, Errno> {
        let path = self.child_to_change(parent, name)?;
        if !matches!(mode & libc::S_IFMT, libc::S_IFREG | 0) {
            return Err(Errno(libc::EPERM));
        }
        self.resolve(
            &path,
            libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY,
            mode & 0o7777,
        )?;
        self.entry(path)
    }

    pub fn make_directory(&mut self, parent: u64, name: &OsStr, mode: u32) -> Result<Entry, Errno> {
        let path = self.child_to_change(parent, name)?;
        let (directory, name) = self.split(&path)?;
        fs::DirBuilder::new()
            .mode(mode & 0o7777)
            .create(proc_path(&directory).join(name))?;
        self.entry(path)
    }

    pub fn symlink(&mut self, parent: u64, name: &OsStr, target: &OsStr) -> Result<Entry, Errno> {
        let path = self.child_to_change(parent, name)?;
        let (directory, name) = self.split(&path)?;
        std::os::unix::fs::symlink(target, proc_path(&directory).join(name))?;
        self.entry(path)
    }

    pub fn link(&mut self, existing: u64, parent: u64, name: &OsStr) -> Result<Entry, Errno> {
        let path = self.child_to_change(parent, name)?;
        let (old_directory, old_name) = self.split(self.nodes.path(existing)?)?;
        let (directory, name) = self.split(&path)?;
        fs::hard_link(
            proc_path(&old_directory).join(old_name),
            proc_path(&directory).join(name),
        )?;
        self.entry(path)
    }

    fn must_be_writable(&self) -> Result<(), Errno> {
        if self.writable {
            Ok(())
        } else {
            Err(Errno(libc::EROFS))
        }
    }

    fn child(&self, parent: u64, name: &OsStr) -> Result<PathBuf, Errno> {
        Ok(self.nodes.path(parent)?.join(name))
    }

    fn child_to_change(&self, parent: u64, name: &OsStr) -> Result<PathBuf, Errno> {
        self.must_be_writable()?;
        self.child(parent, name)
    }

    fn entry(&mut self, path: PathBuf) -> Result<Entry, Errno> {
        let meta = File::from(self.look(&path)?).metadata()?;
        Ok(Entry {
            node: self.nodes.found(path),
            attr: self.attr(&meta),
        })
    }

    fn attr(&self, meta: &fs::Metadata) -> Attr {
        Attr {
            inode: meta.ino(),
            size: meta.size(),
            blocks: meta.blocks(),
            times: [
                (meta.atime(), meta.atime_nsec()),
                (meta.mtime(), meta.mtime_nsec()),
                (meta.ctime(), meta.ctime_nsec()),
            ],
            mode: meta.mode(),
            links: u32::try_from(meta.nlink()).unwrap_or(u32::MAX),
            uid: if meta.uid() == self.own_uid { 0 } else { meta.uid() },
            gid: if meta.gid() == self.own_gid { 0 } else { meta.gid() },
        }
    }

    fn file(&self, handle: u64) -> Result<&File, Errno> {
        match self.handles.get(&handle) {
            Some(Handle::File(file)) => Ok(file),
            _ => Err(Errno(libc::EBADF)),
        }
    }

    fn keep(&mut self, handle: Handle) -> u64 {
        let number = self.next_handle;
        self.next_handle += 1;
        self.handles.insert(number, handle);
        number
    }

    /// A descriptor to look at the file, or at the link itself.
    fn look(&self, path: &Path) -> Result<OwnedFd, Errno> {
        self.resolve(path, libc::O_PATH | libc::O_NOFOLLOW, 0)
    }

    /// The directory that a path is in, and its last component.
    fn split<'a>(&self, path: &'a Path) -> Result<(OwnedFd, &'a OsStr), Errno> {
        let (parent, name) = path.parent().zip(path.file_name()).ok_or(Errno(libc::EBUSY))?;
        Ok((self.resolve(parent, libc::O_PATH | libc::O_DIRECTORY, 0)?, name))
    }

    fn resolve(&self, path: &Path, flags: i32, mode: u32) -> Result<OwnedFd, Errno> {
        let path = if path.as_os_str().is_empty() {
            OsStr::new(".")
        } else {
            path.as_os_str()
        };
        let path = CString::new(path.as_bytes()).map_err(|_| Errno(libc::EINVAL))?;
        // SAFETY: open_how is plain data, for which all zeroes is a value.
        let mut how: libc::open_how = unsafe { std::mem::zeroed() };
        how.flags = (flags | libc::O_CLOEXEC) as u64;
        how.mode = if flags & libc::O_CREAT != 0 {
            mode.into()
        } else {
            0
        };
        how.resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS;
        let size = size_of::<libc::open_how>();
        // SAFETY: the path is NUL-terminated and `how` is an open_how of the size given; both outlive the call.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_openat2,
                self.root.as_raw_fd(),
                path.as_ptr(),
                &raw const how,
                size,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error().into());
        }
        // SAFETY: openat2 returned this new descriptor, which nothing else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
    }
}

fn proc_path(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}
