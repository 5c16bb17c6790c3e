//! The system calls that the standard library has no words for; all of init's unsafe code is here.

use std::ffi::CString;
use std::io::{self, Error};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// CID of the host (virtio 1.2 §5.10.4).
pub const VSOCK_HOST: u32 = 2;
/// One record of `/dev/input/event*` (`struct input_event`).
pub const INPUT_EVENT_SIZE: usize = size_of::<libc::input_event>();

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn c_string(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(|_| Error::from_raw_os_error(libc::EINVAL))
}

/// mount(2). `data` may be empty.
pub fn mount(source: &str, target: &str, fstype: &str, flags: libc::c_ulong, data: &str) -> io::Result<()> {
    let (source, target, fstype, data) = (
        c_string(source)?,
        c_string(target)?,
        c_string(fstype)?,
        c_string(data)?,
    );
    // SAFETY: four NUL-terminated strings that live during the call.
    check(unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            fstype.as_ptr(),
            flags,
            data.as_ptr().cast(),
        )
    })?;
    Ok(())
}

/// umount2(2), detaching when the file system is busy.
pub fn unmount_detach(target: &str) -> io::Result<()> {
    let target = c_string(target)?;
    // SAFETY: a NUL-terminated string that lives during the call.
    check(unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) })?;
    Ok(())
}

/// Whether the root file system is mounted read-only.
pub fn root_is_read_only() -> bool {
    // SAFETY: an all-zero statvfs is a valid value; the path is NUL-terminated; the structure is written by the call.
    unsafe {
        let mut s: libc::statvfs = std::mem::zeroed();
        libc::statvfs(c"/".as_ptr(), &mut s) == 0 && s.f_flag & libc::ST_RDONLY != 0
    }
}

/// Makes the mount at `directory` the root of everything.
pub fn switch_root(directory: &str) -> io::Result<()> {
    std::env::set_current_dir(directory)?;
    mount(".", "/", "", libc::MS_MOVE, "")?;
    std::os::unix::fs::chroot(".")?;
    std::env::set_current_dir("/")
}

/// sethostname(2).
pub fn set_hostname(name: &str) -> io::Result<()> {
    // SAFETY: pointer and length are of one live slice.
    check(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) })?;
    Ok(())
}

/// Nanoseconds since the machine started, as the guest counts them.
pub fn uptime_ns() -> u64 {
    let mut t = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `t` is a live timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut t) };
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// A socket for interface ioctls of `family` (`AF_INET`, `AF_INET6`).
pub fn datagram_socket(family: libc::c_int) -> io::Result<OwnedFd> {
    socket(family, libc::SOCK_DGRAM)
}

fn socket(family: libc::c_int, kind: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = check(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A structure that is an argument of an interface ioctl.
///
/// # Safety
/// The type must be the plain C structure that the kernel expects for each request that it is used with.
pub unsafe trait IoctlArgument {}
// SAFETY: the kernel's argument of SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCGIFINDEX, SIOCSIFADDR and SIOCSIFNETMASK.
unsafe impl IoctlArgument for libc::ifreq {}
// SAFETY: the kernel's argument of SIOCADDRT on an AF_INET socket.
unsafe impl IoctlArgument for libc::rtentry {}
// SAFETY: the kernel's argument of SIOCSIFADDR on an AF_INET6 socket.
unsafe impl IoctlArgument for libc::in6_ifreq {}
// SAFETY: the kernel's argument of SIOCADDRT on an AF_INET6 socket.
unsafe impl IoctlArgument for Route6 {}

/// `struct in6_rtmsg` of `linux/ipv6_route.h` (libc's has private fields).
#[repr(C)]
pub struct Route6 {
    /// Where the route leads.
    pub destination: [u8; 16],
    /// From where.
    pub source: [u8; 16],
    /// By which router.
    pub gateway: [u8; 16],
    kind: u32,
    /// Length of the destination's prefix, in bits.
    pub destination_length: u16,
    /// Length of the source's prefix, in bits.
    pub source_length: u16,
    /// Lower is preferred.
    pub metric: u32,
    info: libc::c_ulong,
    /// `RTF_UP` and others.
    pub flags: u32,
    /// The interface.
    pub index: libc::c_int,
}

/// ioctl(2) with a structure.
pub fn ioctl<T: IoctlArgument>(fd: &OwnedFd, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: `T` is the structure that the request reads or writes, by the trait's contract, and it is live.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, argument as *mut T) })?;
    Ok(())
}

/// An all-zero plain C structure.
pub fn zeroed<T: IoctlArgument>() -> T {
    // SAFETY: the implementors are C structures of integers, arrays, unions of those, and pointers: zero is valid.
    unsafe { std::mem::zeroed() }
}

/// `address` as the `sockaddr` of an `ifreq` or `rtentry`.
pub fn sockaddr(address: std::net::Ipv4Addr) -> libc::sockaddr {
    let mut s = libc::sockaddr {
        sa_family: libc::AF_INET as libc::sa_family_t,
        sa_data: [0; 14],
    };
    for (to, from) in s.sa_data[2..6].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    s
}

/// An `ifreq` that names an interface.
pub fn ifreq(name: &str) -> libc::ifreq {
    let mut request: libc::ifreq = zeroed();
    for (to, from) in request.ifr_name[..libc::IFNAMSIZ - 1]
        .iter_mut()
        .zip(name.bytes())
    {
        *to = from as libc::c_char;
    }
    request
}

/// The index that SIOCGIFINDEX wrote.
pub fn interface_index(request: &libc::ifreq) -> libc::c_int {
    // SAFETY: every member of the union is plain data, and all of it was initialised by `zeroed`.
    unsafe { request.ifr_ifru.ifru_ifindex }
}

/// Adds flags to those that SIOCGIFFLAGS wrote.
pub fn add_interface_flags(request: &mut libc::ifreq, flags: libc::c_int) {
    // SAFETY: as in `interface_index`.
    let present = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = present | flags as libc::c_short;
}

/// A connection to the host that is made in the background: the descriptor becomes writable when it is there or failed.
pub fn vsock_connect(port: u32) -> io::Result<OwnedFd> {
    let fd = socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_NONBLOCK)?;
    // SAFETY: an all-zero sockaddr_vm is valid; the pointer and length are of one live structure.
    let result = unsafe {
        let mut address: libc::sockaddr_vm = std::mem::zeroed();
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_cid = VSOCK_HOST;
        address.svm_port = port;
        libc::connect(
            fd.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    };
    match check(result) {
        Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) => Err(e),
        _ => Ok(fd),
    }
}

/// Whether a background connect succeeded (SO_ERROR).
pub fn connect_result(fd: &OwnedFd) -> io::Result<()> {
    let (mut error, mut length): (libc::c_int, _) = (0, size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: the option's value is an int, and both pointers are to live locals.
    check(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ERROR,
            (&raw mut error).cast(),
            &mut length,
        )
    })?;
    if error == 0 {
        Ok(())
    } else {
        Err(Error::from_raw_os_error(error))
    }
}

/// Says on a stream socket that nothing more will be sent.
pub fn shutdown_write(fd: &OwnedFd) {
    // SAFETY: no pointers.
    unsafe { libc::shutdown(fd.as_raw_fd(), libc::SHUT_WR) };
}

/// poll(2): which of the descriptors have news (or hung up) within `timeout` ms; -1 waits for ever.
pub fn poll(fds: &mut [libc::pollfd], timeout: libc::c_int) -> io::Result<()> {
    // SAFETY: pointer and length are of one live slice.
    match check(unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) }) {
        Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(()),
        other => other.map(drop),
    }
}

fn signal_set(signals: &[libc::c_int]) -> libc::sigset_t {
    // SAFETY: the set is initialised by sigemptyset before it is used.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in signals {
            libc::sigaddset(&mut set, *signal);
        }
        set
    }
}

/// Blocks `signals` and gives a descriptor that they are read from; SIGPIPE is ignored.
pub fn signal_fd(signals: &[libc::c_int]) -> io::Result<OwnedFd> {
    let set = signal_set(signals);
    // SAFETY: `set` is live and initialised; SIG_IGN is a valid disposition; signalfd makes a new descriptor.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        let fd = check(libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// The next signal that arrived, if any.
pub fn read_signal(fd: &OwnedFd) -> Option<libc::c_int> {
    let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
    // SAFETY: pointer and length are of one live array.
    let n = unsafe { libc::read(fd.as_raw_fd(), info.as_mut_ptr().cast(), info.len()) };
    (n == info.len() as isize).then(|| i32::from_ne_bytes([info[0], info[1], info[2], info[3]]))
}

/// Reads what is there now; 0 is the end, `WouldBlock` nothing yet.
pub fn read_now(fd: RawFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: pointer and length are of one live slice.
    let n = unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_DONTWAIT) };
    if n < 0 {
        Err(Error::last_os_error())
    } else {
        Ok(n as usize)
    }
}

/// Sends what fits now.
pub fn send_now(fd: RawFd, data: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: pointer and length are of one live slice.
    let n = unsafe { libc::send(fd, data.as_ptr().cast(), data.len(), flags) };
    if n < 0 {
        Err(Error::last_os_error())
    } else {
        Ok(n as usize)
    }
}

/// Lets the program start in a session of its own, with no signal blocked, and `tty` as its controlling terminal.
pub fn own_session(command: &mut Command, tty: bool) {
    let start = move || {
        // SAFETY: only calls that are safe between fork and exec; the set is initialised by sigemptyset.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigprocmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            libc::setsid();
            if tty {
                libc::ioctl(0, libc::TIOCSCTTY as _, 0);
            }
        }
        Ok(())
    };
    // SAFETY: `start` calls only async-signal-safe functions and allocates nothing.
    unsafe { command.pre_exec(start) };
}

/// A process that has ended, and its wait status.
pub fn reap() -> Reaped {
    let mut status = 0;
    // SAFETY: `status` is live.
    match unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) } {
        0 => Reaped::NoneYet,
        pid if pid > 0 => Reaped::Ended {
            pid,
            code: exit_code(status),
        },
        _ => Reaped::NoChildren,
    }
}

/// What [`reap`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Reaped {
    /// This child ended with this code.
    Ended {
        /// Its process id.
        pid: i32,
        /// Its exit code, or 128 and the signal that killed it.
        code: i32,
    },
    /// There are children, and none has ended.
    NoneYet,
    /// There are no children at all.
    NoChildren,
}

fn exit_code(status: libc::c_int) -> i32 {
    if libc::WIFEXITED(status) {
        libc::WEXITSTATUS(status)
    } else {
        128 + libc::WTERMSIG(status)
    }
}

/// kill(2); -1 is everybody but init. That a process is gone is no news.
pub fn kill(pid: i32, signal: libc::c_int) {
    // SAFETY: no pointers.
    unsafe { libc::kill(pid, signal) };
}

/// Lets Ctrl-Alt-Del come to init as SIGINT.
pub fn take_ctrl_alt_del() {
    // SAFETY: no pointers.
    unsafe { libc::reboot(libc::RB_DISABLE_CAD) };
}

/// sync(2).
pub fn sync() {
    // SAFETY: no arguments.
    unsafe { libc::sync() };
}

/// Ends the machine; `RB_POWER_OFF` or `RB_AUTOBOOT`.
pub fn reboot(how: libc::c_int) {
    // SAFETY: no pointers.
    unsafe { libc::reboot(how) };
}

/// Writes one byte to an I/O port, when the kernel lets init have it.
pub fn write_port(port: u16, value: u8) -> bool {
    // SAFETY: ioperm allows this one port, or the instruction is not reached. The callers' ports are known to be
    // registers of Shoal's machine, or nothing at all.
    unsafe {
        if libc::ioperm(port.into(), 1, 1) != 0 {
            return false;
        }
        std::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags));
    }
    true
}

/// Opens `/dev/console` for the standard descriptors that are closed.
pub fn repair_standard_descriptors() {
    for fd in 0..3 {
        // SAFETY: no pointers but a NUL-terminated string; descriptor numbers are only compared and duplicated.
        unsafe {
            if libc::fcntl(fd, libc::F_GETFD) >= 0 {
                continue;
            }
            let console = libc::open(c"/dev/console".as_ptr(), libc::O_RDWR | libc::O_NOCTTY);
            if console >= 0 && console != fd {
                libc::dup2(console, fd);
                libc::close(console);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_code_or_a_signal() {
        assert_eq!(exit_code(3 << 8), 3);
        assert_eq!(exit_code(9), 137);
    }

    #[test]
    fn an_address_lies_where_the_kernel_looks() {
        let s = sockaddr("192.0.2.7".parse().unwrap());
        assert_eq!(
            s.sa_data[2..6].iter().map(|b| *b as u8).collect::<Vec<_>>(),
            [192, 0, 2, 7]
        );
        let long = ifreq("a-name-that-is-too-long-for-it");
        assert_eq!(long.ifr_name[libc::IFNAMSIZ - 1], 0);
    }

    #[test]
    fn a_name_with_a_nul_is_refused() {
        assert_eq!(
            mount("a\0b", "/", "", 0, "").unwrap_err().raw_os_error(),
            Some(libc::EINVAL)
        );
    }
}
