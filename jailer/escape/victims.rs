//! What the attempts are after: the daemon's sockets, keys and shared memory, and another guest's VMM.

use std::ffi::CString;
use std::fs::File;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;

use anyhow::{Context, Result};

/// All that the driver, in the role of the daemon, has open; gone when dropped.
pub struct Victims {
    directory: PathBuf,
    shared_memory: Option<i32>,
    queue: Option<CString>,
    /// A terminal of the operator.
    pub terminal: Option<OwnedFd>,
    _tcp: TcpListener,
    _abstract: UnixListener,
    _socket: UnixListener,
    /// As `key=value` for the attempts.
    pub facts: Vec<String>,
    /// What could not be had, and so is not attacked.
    pub missing: Vec<String>,
}

impl Victims {
    /// Makes them.
    pub fn new() -> Result<Victims> {
        let pid = std::process::id();
        let directory = std::env::temp_dir().join(format!("shoal-escape-{pid}"));
        std::fs::create_dir(&directory).with_context(|| format!("making {}", directory.display()))?;
        let socket_path = directory.join("daemon.sock");
        let socket = UnixListener::bind(&socket_path).context("listening on a socket")?;
        let name = format!("shoal-escape-{pid}");
        let address = SocketAddr::from_abstract_name(&name)?;
        let abstract_socket = UnixListener::bind_addr(&address).context("listening on an abstract socket")?;
        let tcp = TcpListener::bind(("127.0.0.1", 0)).context("listening on TCP port of the loopback")?;
        let mut facts = vec![
            format!("daemon={pid}"),
            format!("socket={}", socket_path.display()),
            format!("abstract={name}"),
            format!("tcp={}", tcp.local_addr()?.port()),
            format!(
                "hostname={}",
                std::fs::read_to_string("/proc/sys/kernel/hostname")?.trim()
            ),
        ];
        let mut missing = Vec::new();
        let key = 0x5348_0000 | pid as i32 & 0xffff;
        let mut offer = |fact: Option<String>, what: &str| match fact {
            Some(fact) => facts.push(fact),
            None => missing.push(format!("{what}: {}", std::io::Error::last_os_error())),
        };
        // SAFETY: numbers only.
        let segment = unsafe { libc::shmget(key, 4096, libc::IPC_CREAT | libc::IPC_EXCL | 0o666) };
        let shared_memory = (segment >= 0).then_some(segment);
        offer(shared_memory.map(|_| format!("shm={key}")), "shared memory");
        let queue_name = CString::new(format!("/{name}"))?;
        // SAFETY: a C string, flags, a mode and no attributes.
        let queue = unsafe {
            let none: *const libc::c_void = std::ptr::null();
            libc::mq_open(
                queue_name.as_ptr(),
                libc::O_CREAT | libc::O_RDWR,
                0o666 as libc::mode_t,
                none,
            )
        };
        // The system call takes the name without its slash.
        offer((queue >= 0).then(|| format!("queue={name}")), "message queue");
        offer(
            add_key().then(|| "key=1".to_owned()),
            "key in the session keyring",
        );
        let terminal = File::options()
            .read(true)
            .write(true)
            .open("/dev/ptmx")
            .ok()
            .map(OwnedFd::from);
        Ok(Victims {
            directory,
            shared_memory,
            queue: (queue >= 0).then_some(queue_name),
            terminal,
            _tcp: tcp,
            _abstract: abstract_socket,
            _socket: socket,
            facts,
            missing,
        })
    }
}

impl Drop for Victims {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
        if let Some(segment) = self.shared_memory {
            // SAFETY: a segment that `new` made.
            unsafe { libc::shmctl(segment, libc::IPC_RMID, std::ptr::null_mut()) };
        }
        if let Some(name) = &self.queue {
            // SAFETY: a C string.
            unsafe { libc::mq_unlink(name.as_ptr()) };
        }
    }
}

/// A key in a session keyring of this process's own.
fn add_key() -> bool {
    const JOIN: usize = 1;
    const SESSION: libc::c_long = -3;
    // SAFETY: C strings, a buffer of the length given, and numbers.
    unsafe {
        libc::syscall(libc::SYS_keyctl, JOIN, 0) >= 0
            && libc::syscall(
                libc::SYS_add_key,
                c"user".as_ptr(),
                c"shoal-test-secret".as_ptr(),
                c"secret".as_ptr(),
                6,
                SESSION,
            ) >= 0
    }
}
