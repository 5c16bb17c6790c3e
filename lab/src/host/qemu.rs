//! QEMU's command line, and the process that ends with us.

use super::LabError;
use crate::job::port;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// The CPU: AMD's SVM with nested paging, and without what the software CPU lacks (QEMU would warn of each).
const CPU: &str =
    "EPYC,+svm,+npt,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,-3dnowprefetch,-osvw,-topoext,-nrip-save,-xsavec";

/// What the machine is like.
#[derive(Debug)]
pub struct Machine<'a> {
    pub qemu: &'a Path,
    pub kernel: &'a Path,
    pub initramfs: &'a [u8],
    /// MiB.
    pub memory: u32,
    /// Time counted in instructions, everything random from a fixed seed.
    pub icount: bool,
    /// All of the kernel's messages, not only warnings.
    pub verbose_kernel: bool,
    pub shares: usize,
}

/// A running QEMU with our ends of its channels. Dropping it kills it.
#[derive(Debug)]
pub struct Running {
    pub child: Child,
    pub kernel_log: UnixStream,
    pub control: UnixStream,
    pub stdout: UnixStream,
    pub stderr: UnixStream,
    pub stdin: UnixStream,
    /// None where time is counted in instructions.
    pub heartbeat: Option<UnixStream>,
    pub shares: Vec<UnixStream>,
}

impl Running {
    /// Waits for the end of a QEMU that is ending by itself, and kills it when that takes longer than `limit`.
    pub fn reap(&mut self, limit: Duration) -> io::Result<ExitStatus> {
        // SAFETY: pidfd_open has no pointer arguments.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, self.child.id(), 0) };
        if fd >= 0 {
            // SAFETY: the call above returned this new descriptor, which nothing else owns.
            let fd = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
            let mut poll = libc::pollfd {
                fd: fd.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: the one pollfd is valid for the call.
            unsafe { libc::poll(&raw mut poll, 1, limit.as_millis() as libc::c_int) };
        }
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        self.child.kill()?;
        self.child.wait()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts QEMU. Its channels are socket pairs and its initramfs is in memory, so there is nothing to clean up after it.
pub fn start(machine: &Machine<'_>) -> Result<Running, LabError> {
    let mut command = Command::new(machine.qemu);
    let mut channels = Channels::default();
    let initramfs = memfd(machine.initramfs).map_err(LabError::system("put the initramfs into memory"))?;
    channels.theirs.push(initramfs.into());
    let initramfs_fd = channels.theirs[0].as_raw_fd();

    command
        .args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-monitor",
            "none",
        ])
        .args([
            "-machine",
            "q35,hpet=off",
            "-accel",
            "tcg",
            "-cpu",
            CPU,
            "-smp",
            "1",
        ])
        .args(["-m", &machine.memory.to_string()])
        .arg("-kernel")
        .arg(machine.kernel)
        .args(["-initrd", &format!("/proc/self/fd/{initramfs_fd}")])
        .args(["-append", &kernel_arguments(machine)]);
    if machine.icount {
        command.args([
            "-icount",
            "shift=0,sleep=off",
            "-seed",
            "1",
            "-rtc",
            "base=2024-01-01T00:00:00,clock=vm",
        ]);
    }
    let kernel_log = channels.open(&mut command, "kernel")?;
    command.args(["-serial", "chardev:kernel"]);
    // Without ioeventfd the device does its work at the very instruction that asks for it: one thing less that varies.
    command.args(["-device", "virtio-serial-pci,max_ports=31,ioeventfd=off"]);
    let control = channels.port(&mut command, port::CONTROL)?;
    let stdout = channels.port(&mut command, port::STDOUT)?;
    let stderr = channels.port(&mut command, port::STDERR)?;
    let stdin = channels.port(&mut command, port::STDIN)?;
    let heartbeat = match machine.icount {
        true => None,
        false => Some(channels.port(&mut command, port::HEARTBEAT)?),
    };
    let shares = (port::FIRST_SHARE..)
        .take(machine.shares)
        .map(|number| channels.port(&mut command, number))
        .collect::<Result<_, _>>()?;
    let child = spawn(command, &channels.theirs)?;
    Ok(Running {
        child,
        kernel_log,
        control,
        stdout,
        stderr,
        stdin,
        heartbeat,
        shares,
    })
}

fn kernel_arguments(machine: &Machine<'_>) -> String {
    let level = if machine.verbose_kernel {
        "loglevel=7"
    } else {
        "quiet"
    };
    // To calibrate the local APIC's timer the kernel reads the TSC for 0.1 s without a pause. Counting instructions, QEMU
    // takes seconds for that; the PIT needs no calibration.
    let timer = if machine.icount { " nolapic_timer" } else { "" };
    // panic=-1 with -no-reboot: QEMU ends when the kernel does. The self-tests of the kernel's cryptography are a third
    // of its boot.
    format!(
        "console=ttyS0 panic=-1 {level} nokaslr tsc=reliable no_timer_check random.trust_cpu=on cryptomgr.notests=1{timer}"
    )
}

fn spawn(mut command: Command, inherited: &[OwnedFd]) -> Result<Child, LabError> {
    let fds: Vec<RawFd> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
    let parent = std::process::id();
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    // SAFETY: the closure runs between fork and exec and calls only async-signal-safe functions; it allocates nothing.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // Our parent may have died before the line above.
            if libc::getppid() as u32 != parent {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            for fd in &fds {
                if libc::fcntl(*fd, libc::F_SETFD, 0) != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    command
        .spawn()
        .map_err(LabError::system("start qemu-system-x86_64"))
}

/// QEMU's ends of the channels, kept open until it has inherited them.
#[derive(Default)]
struct Channels {
    theirs: Vec<OwnedFd>,
}

impl Channels {
    /// A character device `id` for QEMU, and our end of it.
    fn open(&mut self, command: &mut Command, id: &str) -> Result<UnixStream, LabError> {
        let (ours, theirs) = UnixStream::pair().map_err(LabError::system("make a socket pair"))?;
        command.args(["-chardev", &format!("socket,id={id},fd={}", theirs.as_raw_fd())]);
        self.theirs.push(theirs.into());
        Ok(ours)
    }

    fn port(&mut self, command: &mut Command, number: u32) -> Result<UnixStream, LabError> {
        let id = format!("port{number}");
        let ours = self.open(command, &id)?;
        command.args(["-device", &format!("virtserialport,nr={number},chardev={id}")]);
        Ok(ours)
    }
}

fn memfd(contents: &[u8]) -> io::Result<File> {
    // SAFETY: the name is a NUL-terminated string that outlives the call.
    let fd = unsafe { libc::memfd_create(c"shoal-lab-initramfs".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: memfd_create returned this new descriptor, which nothing else owns.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(contents)?;
    Ok(file)
}
