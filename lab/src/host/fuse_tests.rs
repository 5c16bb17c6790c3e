//! Plays the machine's kernel on a real directory.

use super::*;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

struct Machine {
    directory: PathBuf,
    files: ShareFs,
}

impl Machine {
    fn new(writable: bool) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("shoal-lab-fuse-{}-{number}", std::process::id()));
        fs::create_dir_all(directory.join("sub")).unwrap();
        fs::write(directory.join("file"), b"0123456789").unwrap();
        std::os::unix::fs::symlink("/etc", directory.join("out")).unwrap();
        std::os::unix::fs::symlink("file", directory.join("in")).unwrap();
        let files = ShareFs::open_root(&directory, writable).unwrap();
        Self { directory, files }
    }

    /// The reply's data, or its error number.
    fn ask(&mut self, kind: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let reply = answer(&mut self.files, &request(kind, node, body)).expect("a reply");
        let mut fields = Fields(&reply);
        assert_eq!(fields.u32().unwrap() as usize, reply.len());
        let error = fields.u32().unwrap() as i32;
        assert_eq!(fields.u64().unwrap(), 77);
        if error == 0 {
            Ok(reply[16..].to_vec())
        } else {
            Err(-error)
        }
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        self.ask(opcode::LOOKUP, parent, &name_body(&[], name))
            .map(|data| Fields(&data).u64().unwrap())
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let data = self.ask(
            opcode::OPEN,
            node,
            &[flags as u32, 0].map(u32::to_le_bytes).concat(),
        )?;
        Ok(Fields(&data).u64().unwrap())
    }

    fn read(&mut self, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let mut body = Reply::default();
        body.u64(handle).u64(offset).u32(size);
        self.ask(opcode::READ, 0, &body.0)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn request(kind: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut request = Reply::default();
    request
        .u32((HEADER + body.len()) as u32)
        .u32(kind)
        .u64(77)
        .u64(node)
        .u64(0)
        .u64(0);
    request.0.extend_from_slice(body);
    request.0
}

fn name_body(front: &[u32], name: &str) -> Vec<u8> {
    let mut body: Vec<u8> = front.iter().flat_map(|field| field.to_le_bytes()).collect();
    body.extend_from_slice(name.as_bytes());
    body.push(0);
    body
}

#[test]
fn files_are_read_at_offsets() {
    let mut machine = Machine::new(false);
    let node = machine.lookup(1, "file").unwrap();
    let handle = machine.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(machine.read(handle, 3, 4).unwrap(), b"3456");
    assert_eq!(machine.read(handle, 8, 100).unwrap(), b"89");
    assert_eq!(machine.read(handle, u64::MAX, 1), Err(libc::EINVAL));
    machine.ask(opcode::RELEASE, node, &handle.to_le_bytes()).unwrap();
    assert_eq!(machine.read(handle, 0, 1), Err(libc::EBADF));
}

#[test]
fn nothing_outside_is_reached() {
    let mut machine = Machine::new(true);
    let out = machine.lookup(1, "out").unwrap();
    assert_eq!(machine.ask(opcode::READLINK, out, &[]).unwrap(), b"/etc");
    assert_eq!(machine.lookup(out, "passwd"), Err(libc::ELOOP));
    assert_eq!(machine.open(out, libc::O_RDONLY), Err(libc::ELOOP));
    assert_eq!(machine.ask(opcode::OPENDIR, out, &[0; 8]), Err(libc::ELOOP));
    for name in ["..", ".", "", "sub/..", "/etc"] {
        assert_eq!(machine.lookup(1, name), Err(libc::EINVAL), "{name}");
    }
}

#[test]
fn read_only_means_that() {
    let mut machine = Machine::new(false);
    let node = machine.lookup(1, "file").unwrap();
    assert_eq!(machine.open(node, libc::O_RDWR), Err(libc::EROFS));
    assert_eq!(
        machine.open(node, libc::O_RDONLY | libc::O_TRUNC),
        Err(libc::EROFS)
    );
    assert_eq!(
        machine.ask(opcode::UNLINK, 1, &name_body(&[], "file")),
        Err(libc::EROFS)
    );
    assert_eq!(
        machine.ask(opcode::RMDIR, 1, &name_body(&[], "sub")),
        Err(libc::EROFS)
    );
    assert_eq!(
        machine.ask(opcode::MKDIR, 1, &name_body(&[0o755, 0], "new")),
        Err(libc::EROFS)
    );
    assert_eq!(
        machine.ask(opcode::MKNOD, 1, &name_body(&[0o100_644, 0, 0, 0], "new")),
        Err(libc::EROFS)
    );
    assert_eq!(
        machine.ask(opcode::CREATE, 1, &name_body(&[1, 0o644, 0, 0], "new")),
        Err(libc::EROFS)
    );
    assert_eq!(
        machine.ask(opcode::RENAME, 1, &name_body(&[1, 0], "file\0new")),
        Err(libc::EROFS)
    );
    assert_eq!(
        machine.ask(opcode::SYMLINK, 1, &name_body(&[], "new\0x")),
        Err(libc::EROFS)
    );
    assert_eq!(
        machine.ask(opcode::LINK, 1, &name_body(&[node as u32, 0], "new")),
        Err(libc::EROFS)
    );
    assert_eq!(machine.ask(opcode::SETATTR, node, &[0; 88]), Err(libc::EROFS));
    assert_eq!(fs::read(machine.directory.join("file")).unwrap(), b"0123456789");
    assert_eq!(fs::read_dir(&machine.directory).unwrap().count(), 4);
}

#[test]
fn writable_share_is_written() {
    let mut machine = Machine::new(true);
    let flags = (libc::O_WRONLY | libc::O_CREAT) as u32;
    let data = machine
        .ask(opcode::CREATE, 1, &name_body(&[flags, 0o600, 0, 0], "new"))
        .unwrap();
    let handle = Fields(&data[128..]).u64().unwrap();
    let mut body = Reply::default();
    body.u64(handle).u64(2).u32(3).u32(0).u64(0).u64(0);
    body.0.extend_from_slice(b"abc");
    assert_eq!(
        machine.ask(opcode::WRITE, 0, &body.0).unwrap()[..4],
        3_u32.to_le_bytes()
    );
    assert_eq!(fs::read(machine.directory.join("new")).unwrap(), b"\0\0abc");

    let sub = machine.lookup(1, "sub").unwrap();
    machine
        .ask(opcode::RENAME, 1, &name_body(&[sub as u32, 0], "new\0moved"))
        .unwrap();
    let node = machine.lookup(sub, "moved").unwrap();
    machine
        .ask(opcode::RENAME, 1, &name_body(&[1, 0], "sub\0dir"))
        .unwrap();
    let handle = machine.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(
        machine.read(handle, 0, 9).unwrap(),
        b"\0\0abc",
        "the node is known by its new path"
    );
    assert!(machine.directory.join("dir/moved").is_file());
    let node_mode = 0o010_644; // a FIFO
    assert_eq!(
        machine.ask(opcode::MKNOD, 1, &name_body(&[node_mode, 0, 0, 0], "fifo")),
        Err(libc::EPERM)
    );
}

#[test]
fn names_are_listed_in_pieces() {
    let mut machine = Machine::new(false);
    let data = machine.ask(opcode::OPENDIR, 1, &[0; 8]).unwrap();
    let handle = Fields(&data).u64().unwrap();
    let (mut names, mut offset) = (Vec::new(), 0);
    loop {
        let mut body = Reply::default();
        body.u64(handle).u64(offset).u32(40); // room for one
        let data = machine.ask(opcode::READDIR, 1, &body.0).unwrap();
        if data.is_empty() {
            break;
        }
        let mut fields = Fields(&data);
        fields.u64().unwrap();
        offset = fields.u64().unwrap();
        let length = fields.u32().unwrap() as usize;
        fields.u32().unwrap();
        names.push(String::from_utf8(fields.take(length).unwrap().to_vec()).unwrap());
    }
    names.sort();
    assert_eq!(names, ["file", "in", "out", "sub"]);
}

#[test]
fn what_is_not_there_is_remembered_when_read_only() {
    assert_eq!(Machine::new(false).lookup(1, "none"), Ok(0));
    assert_eq!(Machine::new(true).lookup(1, "none"), Err(libc::ENOENT));
}

#[test]
fn forgotten_nodes_are_gone() {
    let mut machine = Machine::new(false);
    let node = machine.lookup(1, "file").unwrap();
    assert_eq!(machine.lookup(1, "file"), Ok(node));
    let forget = request(opcode::FORGET, node, &1_u64.to_le_bytes());
    assert!(answer(&mut machine.files, &forget).is_none());
    assert!(machine.ask(opcode::GETATTR, node, &[0; 16]).is_ok());
    assert!(answer(&mut machine.files, &forget).is_none());
    assert_eq!(machine.ask(opcode::GETATTR, node, &[0; 16]), Err(libc::ESTALE));
}

#[test]
fn no_short_or_odd_request_panics() {
    let mut machine = Machine::new(true);
    for kind in 0..60 {
        for length in 0..96 {
            for byte in [0, 0xff] {
                let body = vec![byte; length];
                let _ = answer(&mut machine.files, &request(kind, 1, &body));
                let _ = answer(&mut machine.files, &request(kind, u64::MAX, &body));
            }
        }
    }
}

#[test]
fn lengths_are_bounded() {
    for length in [0, 39, MAX_REQUEST as u32 + 1, u32::MAX] {
        let mut bytes = request(opcode::INIT, 0, &[]);
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        assert!(read_request(&mut &bytes[..]).is_err(), "{length}");
    }
    assert!(read_request(&mut &request(opcode::INIT, 0, &[1, 2, 3])[..]).is_ok());
}
