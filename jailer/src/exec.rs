//! The program to execute, copied once into sealed memory.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use crate::error::JailError;
use crate::path::open_plain;
use crate::sys;

/// A static program, as a sealed memory file that all guests execute.
///
/// - No guest can change it for the others, whatever it gets hold of (`/proc/self/exe`, the runc escape
///   CVE-2019-5736): the seals forbid every change, even to root.
/// - Its mode is 0111. A process that may not read the file it executes is made non-dumpable by the kernel's exec
///   itself (`would_dump` in fs/exec.c): from its first instruction on there is no ptrace by the same user, no core
///   dump, and its `/proc` files are root's.
/// - It lies on no mount: neither noexec of the jail's root nor landlock has to make an exception for it.
#[derive(Debug)]
pub struct Executable {
    file: OwnedFd,
}

impl Executable {
    /// The largest program taken, in bytes.
    pub const MAX: u64 = 256 << 20;

    /// Copies the program at an absolute path that contains no symbolic link.
    ///
    /// # Errors
    /// [`JailError::File`] when it cannot be opened or is no regular file that begins like an ELF program.
    pub fn from_path(path: &Path) -> Result<Executable, JailError> {
        let file = open_plain(path, libc::O_RDONLY | libc::O_NONBLOCK, "opening the program")?;
        Executable::from_file(&mut File::from(file), path)
    }

    /// Copies the program from an open file; `name` is for messages.
    ///
    /// # Errors
    /// As [`Executable::from_path`].
    pub fn from_file(source: &mut File, name: &Path) -> Result<Executable, JailError> {
        let refuse = |source: io::Error, advice: &'static str| JailError::File {
            attempt: "reading the program",
            path: name.to_owned(),
            source,
            advice,
        };
        let metadata = source.metadata().map_err(|e| refuse(e, "check the path"))?;
        if !metadata.is_file() || metadata.len() > Self::MAX {
            let odd = io::Error::from_raw_os_error(libc::EINVAL);
            return Err(refuse(odd, "it must be a regular file of at most 256 MiB"));
        }
        let mut content = Vec::with_capacity(metadata.len() as usize);
        source
            .take(Self::MAX)
            .read_to_end(&mut content)
            .map_err(|e| refuse(e, "the file could not be read to its end"))?;
        if !content.starts_with(b"\x7fELF") {
            let odd = io::Error::from_raw_os_error(libc::ENOEXEC);
            return Err(refuse(odd, "it must be a static ELF program"));
        }
        Executable::from_bytes(&content)
    }

    /// Makes an executable of a program in memory.
    ///
    /// # Errors
    /// [`JailError::System`] when the kernel gives no executable memory file.
    pub fn from_bytes(program: &[u8]) -> Result<Executable, JailError> {
        const ADVICE: &str =
            "executable memory files are needed: check that sysctl vm.memfd_noexec is not 2, and free memory";
        let fail = |source| JailError::System {
            attempt: "copying the program into sealed memory (memfd_create)",
            source,
            advice: ADVICE,
        };
        let mut file = File::from(memfd(c"shoal-vmm").map_err(fail)?);
        file.write_all(program).map_err(fail)?;
        let seals = libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
        // SAFETY: an open descriptor and numbers.
        if unsafe { libc::fchmod(file.as_raw_fd(), 0o111) } < 0
            // SAFETY: as above.
            || unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0
        {
            return Err(fail(io::Error::last_os_error()));
        }
        Ok(Executable { file: file.into() })
    }

    /// The descriptor to execute.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A memory file that may be sealed and executed.
fn memfd(name: &CStr) -> io::Result<OwnedFd> {
    const MFD_EXEC: u32 = 0x10;
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: a C string and numbers.
    let make = |flags: u32| unsafe {
        sys::raw(
            libc::SYS_memfd_create,
            [name.as_ptr() as usize, flags as usize, 0, 0, 0, 0],
        )
    };
    // Linux before 6.3 does not know MFD_EXEC and makes every memory file executable.
    let made = match make(flags | MFD_EXEC) {
        Err(libc::EINVAL) => make(flags),
        other => other,
    };
    match made {
        // SAFETY: memfd_create made this descriptor for us alone.
        Ok(fd) => Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) }),
        Err(errno) => Err(io::Error::from_raw_os_error(errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_directories_scripts_and_missing_files_are_refused() {
        let dir = std::env::temp_dir().join(format!("shoal-exec-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        let dir = dir.canonicalize().unwrap();
        std::fs::write(dir.join("script"), "#!/bin/sh\n").unwrap();
        std::fs::write(dir.join("elf"), b"\x7fELF and no more").unwrap();
        std::os::unix::fs::symlink(dir.join("elf"), dir.join("link")).unwrap();
        let open = |name: &str| Executable::from_path(&dir.join(name));
        assert!(open("elf").is_ok());
        let text = open("link").unwrap_err().to_string();
        assert!(text.contains("symbolic link"), "{text}");
        assert!(open("script").unwrap_err().to_string().contains("ELF"));
        assert!(
            open("missing")
                .unwrap_err()
                .to_string()
                .contains("does not exist")
        );
        assert!(open("").is_err());
        assert!(open("../elf").is_err());
        assert!(Executable::from_path(Path::new("relative")).is_err());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn the_copy_cannot_be_changed() {
        let exe = Executable::from_bytes(b"\x7fELF").unwrap();
        // SAFETY: an open descriptor, a valid buffer of one byte.
        let written = unsafe { libc::pwrite(exe.fd().as_raw_fd(), b"x".as_ptr().cast(), 1, 0) };
        assert_eq!(
            (written, io::Error::last_os_error().raw_os_error()),
            (-1, Some(libc::EPERM))
        );
        // SAFETY: an open descriptor and a number.
        assert_eq!(unsafe { libc::ftruncate(exe.fd().as_raw_fd(), 0) }, -1);
    }
}
