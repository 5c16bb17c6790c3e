//! Serves a directory of the host to the machine in the FUSE protocol: the machine's kernel asks, its process 1 passes
//! the requests on over a virtio-serial port as they are, and here they are answered.
//!
//! Debian's cloud kernel has neither 9p nor a network that this program wants to run, but it has FUSE. Protocol: Linux
//! `include/uapi/linux/fuse.h`, version 7.31; all integers are little-endian, as both sides are x86_64. This file reads
//! requests and writes replies; what happens to files is in [`super::share_fs`].

use super::share_fs::{Attr, Entry, Errno, SetAttr, ShareFs};
use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::thread::{self, JoinHandle};

const MAJOR: u32 = 7;
const MINOR: u32 = 31;
/// Most bytes in one read or write, and pages of 4 KiB in them.
const MAX_DATA: u32 = 1 << 20;
const MAX_PAGES: u16 = 256;
const HEADER: usize = 40;
/// A write with all its data is the longest request.
const MAX_REQUEST: usize = MAX_DATA as usize + 4096;

const ASYNC_READ: u32 = 1;
const ATOMIC_O_TRUNC: u32 = 1 << 3;
const BIG_WRITES: u32 = 1 << 5;
const AUTO_INVAL_DATA: u32 = 1 << 12;
const HAS_MAX_PAGES: u32 = 1 << 22;
const FOPEN_KEEP_CACHE: u32 = 1 << 1;
const GETATTR_FH: u32 = 1;

/// The kinds of requests.
pub mod opcode {
    /// These two have no answer.
    pub const FORGET: u32 = 2;
    /// Several of the above at once.
    pub const BATCH_FORGET: u32 = 42;
    /// Takes back a request; it has no answer either, and every request here is answered soon anyway.
    pub const INTERRUPT: u32 = 36;
    pub(super) const LOOKUP: u32 = 1;
    pub(super) const GETATTR: u32 = 3;
    pub(super) const SETATTR: u32 = 4;
    pub(super) const READLINK: u32 = 5;
    pub(super) const SYMLINK: u32 = 6;
    pub(super) const MKNOD: u32 = 8;
    pub(super) const MKDIR: u32 = 9;
    pub(super) const UNLINK: u32 = 10;
    pub(super) const RMDIR: u32 = 11;
    pub(super) const RENAME: u32 = 12;
    pub(super) const LINK: u32 = 13;
    pub(super) const OPEN: u32 = 14;
    pub(super) const READ: u32 = 15;
    pub(super) const WRITE: u32 = 16;
    pub(super) const STATFS: u32 = 17;
    pub(super) const RELEASE: u32 = 18;
    pub(super) const FSYNC: u32 = 20;
    pub(super) const FLUSH: u32 = 25;
    pub(super) const INIT: u32 = 26;
    pub(super) const OPENDIR: u32 = 27;
    pub(super) const READDIR: u32 = 28;
    pub(super) const RELEASEDIR: u32 = 29;
    pub(super) const FSYNCDIR: u32 = 30;
    pub(super) const CREATE: u32 = 35;
    pub(super) const RENAME2: u32 = 45;
}

/// Answers requests from `port` until it closes or says something that is no request.
pub fn serve(mut port: impl Read + Write + Send + 'static, mut files: ShareFs) -> JoinHandle<()> {
    thread::spawn(move || {
        while let Ok(request) = read_request(&mut port) {
            if let Some(reply) = answer(&mut files, &request)
                && port.write_all(&reply).is_err()
            {
                return;
            }
        }
    })
}

fn read_request(port: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut request = vec![0; HEADER];
    port.read_exact(&mut request)?;
    let length = Fields(&request).u32().unwrap_or(0) as usize;
    if !(HEADER..=MAX_REQUEST).contains(&length) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    request.resize(length, 0);
    port.read_exact(&mut request[HEADER..])?;
    Ok(request)
}

/// The whole reply to a whole request, or `None` for requests that have none.
fn answer(files: &mut ShareFs, request: &[u8]) -> Option<Vec<u8>> {
    let mut fields = Fields(request);
    let mut header = || {
        Some((
            fields.u32().ok()?,
            fields.u32().ok()?,
            fields.u64().ok()?,
            fields.u64().ok()?,
        ))
    };
    let (_, kind, unique, node) = header()?;
    let body = Fields(request.get(HEADER..)?);
    if matches!(kind, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT) {
        // A malformed one forgets nothing, and nobody waits to be told.
        let _ = forget(files, kind, node, body);
        return None;
    }
    let (error, data) = match dispatch(files, kind, node, body) {
        Ok(data) => (0, data.0),
        Err(Errno(number)) => (-number, Vec::new()),
    };
    let mut reply = Reply(Vec::with_capacity(16 + data.len()));
    reply
        .u32(16 + data.len() as u32)
        .u32(error as u32)
        .u64(unique)
        .0
        .extend_from_slice(&data);
    Some(reply.0)
}

fn forget(files: &mut ShareFs, kind: u32, node: u64, mut body: Fields<'_>) -> Result<(), Errno> {
    match kind {
        opcode::FORGET => files.forget(node, body.u64()?),
        opcode::BATCH_FORGET => {
            let count = body.u32()?;
            body.u32()?;
            for _ in 0..count {
                files.forget(body.u64()?, body.u64()?);
            }
        }
        _ => {}
    }
    Ok(())
}

fn dispatch(files: &mut ShareFs, kind: u32, node: u64, mut body: Fields<'_>) -> Result<Reply, Errno> {
    match kind {
        opcode::INIT => init(body),
        opcode::LOOKUP => match files.lookup(node, body.name()?) {
            // Node 0: there is no such file, and that may be remembered.
            Err(Errno(libc::ENOENT)) if files.cache_seconds() > 0 => Ok(Reply::entry(files, None)),
            other => other.map(|entry| Reply::entry(files, Some(&entry))),
        },
        opcode::GETATTR => {
            let flags = body.u32()?;
            body.u32()?;
            let handle = (flags & GETATTR_FH != 0).then_some(body.u64()?);
            files
                .attributes(node, handle)
                .map(|attr| Reply::attributes(files, &attr))
        }
        opcode::SETATTR => {
            let changes = body.changes()?;
            files
                .change(node, &changes)
                .map(|attr| Reply::attributes(files, &attr))
        }
        opcode::STATFS => statfs(files),
        opcode::READLINK => Ok(Reply(files.read_link(node)?)),
        opcode::OPEN => {
            let handle = files.open(node, body.u32()? as i32)?;
            Ok(Reply::opened(files, handle))
        }
        opcode::OPENDIR => files
            .open_directory(node)
            .map(|handle| Reply::opened(files, handle)),
        opcode::READ => {
            let (handle, offset, size) = (body.u64()?, body.u64()?, body.u32()?);
            files.read(handle, offset, size.min(MAX_DATA) as usize).map(Reply)
        }
        opcode::READDIR => {
            let (handle, offset, size) = (body.u64()?, body.u64()?, body.u32()?);
            read_directory(files, handle, offset, size.min(MAX_DATA) as usize)
        }
        opcode::RELEASE | opcode::RELEASEDIR => {
            files.release(body.u64()?);
            Ok(Reply::default())
        }
        // What was written is with the host's kernel already.
        opcode::FLUSH | opcode::FSYNCDIR => Ok(Reply::default()),
        _ => modify(files, kind, node, body),
    }
}

/// The requests that a read-only share refuses.
fn modify(files: &mut ShareFs, kind: u32, node: u64, mut body: Fields<'_>) -> Result<Reply, Errno> {
    match kind {
        opcode::CREATE => {
            let (flags, mode) = (body.u32()? as i32, body.u32()?);
            body.u64()?;
            let (entry, handle) = files.create(node, body.name()?, flags, mode)?;
            let mut reply = Reply::entry(files, Some(&entry));
            reply.0.extend_from_slice(&Reply::opened(files, handle).0);
            return Ok(reply);
        }
        opcode::WRITE => {
            let (handle, offset, size) = (body.u64()?, body.u64()?, body.u32()? as usize);
            body.take(20)?;
            let written = files.write(handle, offset, body.take(size)?)?;
            let mut reply = Reply::default();
            reply.u32(written as u32).u32(0);
            return Ok(reply);
        }
        opcode::FSYNC => files.sync(body.u64()?)?,
        opcode::UNLINK => files.unlink(node, body.name()?)?,
        opcode::RMDIR => files.remove_directory(node, body.name()?)?,
        opcode::RENAME | opcode::RENAME2 => {
            let target = body.u64()?;
            if kind == opcode::RENAME2 && body.u64()? as u32 != 0 {
                return Err(Errno(libc::EINVAL));
            }
            files.rename(node, body.name()?, target, body.name()?)?;
        }
        opcode::MKNOD | opcode::MKDIR | opcode::SYMLINK | opcode::LINK => {
            let entry = make(files, kind, node, body)?;
            return Ok(Reply::entry(files, Some(&entry)));
        }
        // The kernel takes this for an answer once and for all: extended attributes, locks, ioctl, poll, lseek, ….
        _ => return Err(Errno(libc::ENOSYS)),
    }
    Ok(Reply::default())
}

fn make(files: &mut ShareFs, kind: u32, node: u64, mut body: Fields<'_>) -> Result<Entry, Errno> {
    match kind {
        opcode::MKNOD => {
            let mode = body.u32()?;
            body.take(12)?;
            files.make_node(node, body.name()?, mode)
        }
        opcode::MKDIR => {
            let mode = body.u32()?;
            body.u32()?;
            files.make_directory(node, body.name()?, mode)
        }
        opcode::SYMLINK => files.symlink(node, body.name()?, body.text()?),
        _ => {
            let existing = body.u64()?;
            files.link(existing, node, body.name()?)
        }
    }
}

fn init(mut body: Fields<'_>) -> Result<Reply, Errno> {
    let (major, minor, readahead, offered) = (body.u32()?, body.u32()?, body.u32()?, body.u32()?);
    if major != MAJOR || minor < MINOR {
        return Err(Errno(libc::EPROTO));
    }
    let wanted = ASYNC_READ | ATOMIC_O_TRUNC | BIG_WRITES | AUTO_INVAL_DATA | HAS_MAX_PAGES;
    let mut reply = Reply::default();
    reply
        .u32(MAJOR)
        .u32(MINOR)
        .u32(readahead.max(MAX_DATA))
        .u32(offered & wanted);
    // 16 requests in the background, 12 of which are many
    reply
        .u32(12 << 16 | 16)
        .u32(MAX_DATA)
        .u32(1)
        .u32(MAX_PAGES.into());
    reply.0.resize(64, 0);
    Ok(reply)
}

fn statfs(files: &ShareFs) -> Result<Reply, Errno> {
    let numbers = files.statistics()?;
    let mut reply = Reply::default();
    reply
        .u64(numbers.f_blocks)
        .u64(numbers.f_bfree)
        .u64(numbers.f_bavail)
        .u64(numbers.f_files)
        .u64(numbers.f_ffree);
    reply
        .u32(numbers.f_bsize as u32)
        .u32(numbers.f_namemax as u32)
        .u32(numbers.f_frsize as u32);
    reply.0.resize(80, 0);
    Ok(reply)
}

fn read_directory(files: &ShareFs, handle: u64, offset: u64, size: usize) -> Result<Reply, Errno> {
    let mut reply = Reply::default();
    let names = files.directory(handle)?;
    let first = usize::try_from(offset).unwrap_or(usize::MAX);
    for (index, name) in names.iter().enumerate().skip(first) {
        let bytes = name.name.as_bytes();
        let end = (reply.0.len() + 24 + bytes.len()).next_multiple_of(8);
        if end > size {
            break;
        }
        reply
            .u64(name.inode)
            .u64(index as u64 + 1)
            .u32(bytes.len() as u32)
            .u32(name.kind);
        reply.0.extend_from_slice(bytes);
        reply.0.resize(end, 0);
    }
    Ok(reply)
}

/// Takes a request apart; a field that is not there is the requester's fault.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Errno> {
        let (head, tail) = self.0.split_at_checked(count).ok_or(Errno(libc::EINVAL))?;
        self.0 = tail;
        Ok(head)
    }

    fn u32(&mut self) -> Result<u32, Errno> {
        let bytes = self.take(4)?.try_into().map_err(|_| Errno(libc::EINVAL))?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn u64(&mut self) -> Result<u64, Errno> {
        let bytes = self.take(8)?.try_into().map_err(|_| Errno(libc::EINVAL))?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// A string ended by NUL.
    fn text(&mut self) -> Result<&'a OsStr, Errno> {
        let length = self
            .0
            .iter()
            .position(|byte| *byte == 0)
            .ok_or(Errno(libc::EINVAL))?;
        let text = self.take(length)?;
        self.take(1)?;
        Ok(OsStr::from_bytes(text))
    }

    /// A file's name: one component of a path, and not one that leads elsewhere.
    fn name(&mut self) -> Result<&'a OsStr, Errno> {
        let name = self.text()?;
        let bytes = name.as_bytes();
        if matches!(bytes, b"" | b"." | b"..") || bytes.contains(&b'/') {
            return Err(Errno(libc::EINVAL));
        }
        Ok(name)
    }

    /// `struct fuse_setattr_in`.
    fn changes(&mut self) -> Result<SetAttr, Errno> {
        let valid = self.u32()?;
        self.u32()?;
        let (handle, size) = (self.u64()?, self.u64()?);
        self.u64()?;
        let (accessed, modified) = (self.u64()?, self.u64()?);
        self.u64()?;
        let (accessed_ns, modified_ns) = (self.u32()?, self.u32()?);
        self.u32()?;
        let mode = self.u32()?;
        Ok(SetAttr {
            mode: (valid & 1 != 0).then_some(mode & 0o7777),
            size: (valid & 8 != 0).then_some(size),
            accessed: (valid & 16 != 0).then_some((accessed, accessed_ns)),
            modified: (valid & 32 != 0).then_some((modified, modified_ns)),
            handle: (valid & 64 != 0).then_some(handle),
        })
    }
}

/// Puts a reply together.
#[derive(Default)]
struct Reply(Vec<u8>);

impl Reply {
    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// `struct fuse_entry_out`.
    fn entry(files: &ShareFs, entry: Option<&Entry>) -> Self {
        let seconds = files.cache_seconds();
        let mut reply = Self::default();
        reply
            .u64(entry.map_or(0, |entry| entry.node))
            .u64(0)
            .u64(seconds)
            .u64(seconds)
            .u64(0);
        match entry {
            Some(entry) => reply.attr(&entry.attr),
            None => reply.0.resize(128, 0),
        }
        reply
    }

    /// `struct fuse_attr_out`.
    fn attributes(files: &ShareFs, attr: &Attr) -> Self {
        let mut reply = Self::default();
        reply.u64(files.cache_seconds()).u64(0).attr(attr);
        reply
    }

    /// `struct fuse_open_out`.
    fn opened(files: &ShareFs, handle: u64) -> Self {
        let flags = if files.cache_seconds() > 0 {
            FOPEN_KEEP_CACHE
        } else {
            0
        };
        let mut reply = Self::default();
        reply.u64(handle).u32(flags).u32(0);
        reply
    }

    /// `struct fuse_attr`.
    fn attr(&mut self, attr: &Attr) {
        self.u64(attr.inode).u64(attr.size).u64(attr.blocks);
        for (seconds, _) in attr.times {
            self.u64(seconds as u64);
        }
        for (_, nanoseconds) in attr.times {
            self.u32(nanoseconds as u32);
        }
        self.u32(attr.mode)
            .u32(attr.links)
            .u32(attr.uid)
            .u32(attr.gid)
            .u32(0)
            .u32(4096)
            .u32(0);
    }
}

#[cfg(test)]
#[path = "fuse_tests.rs"]
mod tests;
