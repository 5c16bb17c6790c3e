//! System calls and instructions that the standard library does not have, each behind a safe function.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// Cycles of the time stamp counter in one second, which a guest counts in, too.
pub fn tsc_per_second() -> f64 {
    // SAFETY: every x86-64 processor has the instruction.
    let tsc = || unsafe { core::arch::x86_64::_rdtsc() };
    let once = || {
        let (start, cycles) = (Instant::now(), tsc());
        while start.elapsed() < Duration::from_millis(10) {
            std::hint::spin_loop();
        }
        let (elapsed, cycles) = (start.elapsed(), tsc() - cycles);
        cycles as f64 / elapsed.as_secs_f64()
    };
    // One that is interrupted between its two readings is far off; the median is not.
    crate::stats::median(&[(); 9].map(|()| once()))
}

/// Takes this thread into a network namespace of its own. What it starts from now on is in it, too.
pub fn leave_network() -> io::Result<()> {
    // SAFETY: takes a number.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) }.into()).map(drop)
}

/// Makes a TAP with the name `name` that stays when nobody has it open, as long as the namespace is there, and switches
/// it on.
pub fn make_tap(name: &str) -> io::Result<()> {
    let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut request = interface_request(name);
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the kernel reads and writes one request, which lives until the call returns; then takes a number.
    unsafe {
        check(libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request).into())?;
        check(libc::ioctl(tun.as_raw_fd(), libc::TUNSETPERSIST, 1).into())?;
    }
    // SAFETY: numbers; the descriptor that comes is new.
    let socket = unsafe {
        let fd = check(libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0).into())?;
        OwnedFd::from_raw_fd(fd as i32)
    };
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the kernel reads one request.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }.into()).map(drop)
}

/// Gives the interface `name` of this thread's network an address, with a prefix of 24 bits.
pub fn set_address(name: &str, address: Ipv4Addr) -> io::Result<()> {
    // SAFETY: numbers; the descriptor that comes is new.
    let socket = unsafe {
        let fd = check(libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0).into())?;
        OwnedFd::from_raw_fd(fd as i32)
    };
    let mask = Ipv4Addr::new(255, 255, 255, 0);
    for (what, value) in [(libc::SIOCSIFADDR, address), (libc::SIOCSIFNETMASK, mask)] {
        let mut request = interface_request(name);
        // SAFETY: an IPv4 address has the size of any address, and all-zero is one.
        let mut internet: libc::sockaddr_in = unsafe { std::mem::zeroed() };
        internet.sin_family = libc::AF_INET as u16;
        internet.sin_addr.s_addr = u32::from(value).to_be();
        // SAFETY: both are 16 bytes of plain numbers.
        request.ifr_ifru.ifru_addr =
            unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(internet) };
        // SAFETY: the kernel reads one request.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), what, &raw const request) }.into())?;
    }
    Ok(())
}

fn interface_request(name: &str) -> libc::ifreq {
    // SAFETY: all-zero is a valid request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request
        .ifr_name
        .iter_mut()
        .zip(name.bytes().take(libc::IFNAMSIZ - 1))
    {
        *to = from as libc::c_char;
    }
    request
}

/// A socket for the frames of one type on the interface `name`, without those that this machine sends itself. A receiver
/// waits a tenth of a second at most.
pub fn packet_socket(name: &str, frame_type: u16) -> io::Result<OwnedFd> {
    let protocol = frame_type.to_be();
    // SAFETY: numbers; the descriptor that comes is new.
    let socket = unsafe {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        let fd = check(libc::socket(libc::AF_PACKET, kind, protocol.into()).into())?;
        OwnedFd::from_raw_fd(fd as i32)
    };
    let name = std::ffi::CString::new(name)?;
    // SAFETY: the name is zero-terminated; all-zero is a valid address, of which `bind` reads as much as it is long.
    unsafe {
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
        let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        check(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len).into())?;
    }
    set_option(&socket, libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, &1_i32)?;
    let patience = libc::timeval {
        tv_sec: 0,
        tv_usec: 100_000,
    };
    set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &patience)?;
    Ok(socket)
}

/// linux/if_packet.h.
const PACKET_IGNORE_OUTGOING: i32 = 23;

fn set_option<T>(socket: &OwnedFd, level: i32, option: i32, value: &T) -> io::Result<()> {
    let len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes of the value.
    check(
        unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                level,
                option,
                std::ptr::from_ref(value).cast(),
                len,
            )
        }
        .into(),
    )
    .map(drop)
}

/// Receives one frame.
pub fn receive(socket: &OwnedFd, frame: &mut [u8]) -> io::Result<usize> {
    // SAFETY: pointer and length are of one slice.
    check(unsafe { libc::recv(socket.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), 0) } as i64)
}

/// Sends one frame.
pub fn send(socket: &OwnedFd, frame: &[u8]) -> io::Result<usize> {
    // SAFETY: pointer and length are of one slice.
    check(unsafe { libc::send(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) } as i64)
}

/// Sends frames with one system call; how many were sent, at least one.
pub fn send_all(socket: &OwnedFd, frames: &[Vec<u8>]) -> io::Result<usize> {
    let mut pieces: Vec<libc::iovec> = frames
        .iter()
        .map(|f| libc::iovec {
            iov_base: f.as_ptr().cast_mut().cast(),
            iov_len: f.len(),
        })
        .collect();
    let mut messages: Vec<libc::mmsghdr> = pieces
        .iter_mut()
        .map(|piece| {
            // SAFETY: all-zero is a valid message.
            let mut m: libc::mmsghdr = unsafe { std::mem::zeroed() };
            m.msg_hdr.msg_iov = piece;
            m.msg_hdr.msg_iovlen = 1;
            m
        })
        .collect();
    // SAFETY: each message names one piece, each piece one frame; all live until the call returns, which reads them and
    // writes the messages' lengths.
    check(
        unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                messages.as_mut_ptr(),
                messages.len() as u32,
                0,
            )
        }
        .into(),
    )
}

/// A listening seqpacket socket with a name of the kernel's choice.
pub fn seqpacket_listener() -> io::Result<OwnedFd> {
    // SAFETY: numbers; the descriptor that comes is new. An address of nothing but its family is given a name.
    unsafe {
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        let fd = check(libc::socket(libc::AF_UNIX, kind, 0).into())?;
        let socket = OwnedFd::from_raw_fd(fd as i32);
        let family = libc::AF_UNIX as libc::sa_family_t;
        let len = size_of::<libc::sa_family_t>() as libc::socklen_t;
        check(libc::bind(socket.as_raw_fd(), (&raw const family).cast(), len).into())?;
        check(libc::listen(socket.as_raw_fd(), 1).into())?;
        Ok(socket)
    }
}

fn check(result: i64) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
