//! Directories of the host: FUSE mounts whose requests go to the host over a port, and whose answers come back.

use super::{Attempt, GuestError, init, ports};
use crate::host::fuse::opcode;
use crate::job::{Share, port};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::thread;

/// The longest request: a write of 1 MiB; the kernel wants room for it and its headers.
const MAX_REQUEST: usize = (1 << 20) + 4096;

/// Mounts all shares.
pub fn mount_all(shares: &[Share]) -> Result<(), GuestError> {
    let mut order: Vec<(u32, &Share)> = (port::FIRST_SHARE..).zip(shares).collect();
    // A directory comes before what is in it.
    order.sort_by_key(|(_, share)| &share.guest_dir);
    order
        .into_iter()
        .try_for_each(|(number, share)| mount(number, share))
}

fn mount(number: u32, share: &Share) -> Result<(), GuestError> {
    let host = ports::open_for_both(number)?;
    let kernel = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .attempt(|| "open /dev/fuse".into())?;
    let dir = &share.guest_dir;
    fs::create_dir_all(dir).attempt(|| format!("make the directory {dir}"))?;
    let fd = kernel.as_raw_fd();
    let options = format!(
        "fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read={}",
        1 << 20
    );
    let flags = libc::MS_NOSUID | libc::MS_NODEV | if share.writable { 0 } else { libc::MS_RDONLY };
    init::mount("shoal-lab", dir, "fuse", flags, &options)?;
    let dir = dir.clone();
    thread::spawn(move || {
        // Unmounting ends it without an error that matters; without the thread every access to the share fails.
        if let Err(error) = carry(kernel, host) {
            eprintln!("shoal-lab: the share {dir} is gone: {error}");
        }
    });
    Ok(())
}

/// One request after another: with one CPU there is nothing to be won by more at a time.
fn carry(mut kernel: File, mut host: File) -> io::Result<()> {
    let mut buffer = vec![0; MAX_REQUEST];
    loop {
        let length = match kernel.read(&mut buffer) {
            // ENODEV: unmounted. ENOENT: the request was taken back before it was read.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
            other => other?,
        };
        let kind = number(&buffer, 4);
        if kind == opcode::INTERRUPT {
            continue;
        }
        host.write_all(&buffer[..length])?;
        if matches!(kind, opcode::FORGET | opcode::BATCH_FORGET) {
            continue;
        }
        host.read_exact(&mut buffer[..4])?;
        let length = number(&buffer, 0) as usize;
        if !(16..=buffer.len()).contains(&length) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the host's answer has no sensible length",
            ));
        }
        host.read_exact(&mut buffer[4..length])?;
        match kernel.write(&buffer[..length]) {
            // Nobody waits for it any more.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            other => drop(other?),
        }
    }
}

fn number(buffer: &[u8], offset: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&buffer[offset..offset + 4]);
    u32::from_le_bytes(bytes)
}
