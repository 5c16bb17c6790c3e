//! Sockets.

use super::{Attempt, Facts, Outcome, Stops, call, refused};

fn socket(family: i32, kind: i32, protocol: usize) -> Result<usize, i32> {
    call(libc::SYS_socket, &[family as usize, kind as usize, protocol])
}

/// Connects to a Unix address: an abstract one when it begins with a zero byte.
fn connect_unix(address: &[u8]) -> Outcome {
    let mut bytes = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    bytes.extend(address);
    match socket(libc::AF_UNIX, libc::SOCK_STREAM, 0) {
        Ok(fd) => refused(call(
            libc::SYS_connect,
            &[fd, bytes.as_ptr() as usize, bytes.len()],
        )),
        Err(errno) => Outcome::Refused(errno),
    }
}

const fn seccomp_only(name: &'static str, what: &'static str, run: fn(&Facts) -> Outcome) -> Attempt {
    Attempt {
        name,
        what,
        layer: "seccomp",
        stops: Stops::SeccompOnly,
        errors: &[],
        needs: &[],
        run,
    }
}

/// The attempts.
pub const ATTEMPTS: &[Attempt] = &[
    Attempt {
        name: "connect-tcp",
        what: "connect to a TCP service of the host",
        layer: "network namespace",
        stops: Stops::Twice,
        // Landlock, where it knows TCP, comes first.
        errors: &[libc::ENETUNREACH, libc::EACCES],
        needs: &["tcp"],
        run: |facts| {
            let port = facts.number("tcp") as u16;
            let mut address = [0_u8; 16];
            address[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            address[2..4].copy_from_slice(&port.to_be_bytes());
            address[4..8].copy_from_slice(&[127, 0, 0, 1]);
            match socket(libc::AF_INET, libc::SOCK_STREAM, 0) {
                Ok(fd) => refused(call(
                    libc::SYS_connect,
                    &[fd, address.as_ptr() as usize, address.len()],
                )),
                Err(errno) => Outcome::Refused(errno),
            }
        },
    },
    Attempt {
        name: "connect-abstract",
        what: "connect to an abstract socket of the daemon",
        layer: "network namespace",
        stops: Stops::Twice,
        errors: &[libc::ECONNREFUSED, libc::EPERM],
        needs: &["abstract"],
        run: |facts| connect_unix(format!("\0{}", facts.text("abstract")).as_bytes()),
    },
    Attempt {
        name: "connect-neighbour",
        what: "connect to an abstract socket of another guest's VMM",
        layer: "landlock or own network namespace",
        stops: Stops::Twice,
        errors: &[libc::EPERM, libc::ECONNREFUSED],
        needs: &["neighbour-abstract"],
        run: |facts| connect_unix(format!("\0{}", facts.text("neighbour-abstract")).as_bytes()),
    },
    Attempt {
        name: "connect-socket",
        what: "connect to the daemon's socket by its path",
        layer: "closed root",
        stops: Stops::Twice,
        errors: &[libc::EACCES],
        needs: &["socket"],
        run: |facts| connect_unix(format!("{}\0", facts.text("socket")).as_bytes()),
    },
    Attempt {
        name: "raw-socket",
        what: "make a raw socket",
        layer: "capabilities",
        stops: Stops::Twice,
        errors: &[libc::EPERM],
        needs: &[],
        run: |_| refused(socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP as usize)),
    },
    Attempt {
        name: "packet-socket",
        what: "make a packet socket",
        layer: "capabilities",
        stops: Stops::Twice,
        errors: &[libc::EPERM, libc::EAFNOSUPPORT],
        needs: &[],
        run: |_| refused(socket(libc::AF_PACKET, libc::SOCK_RAW, 0x0300)),
    },
    Attempt {
        name: "netlink",
        what: "turn an interface on by netlink",
        layer: "capabilities",
        stops: Stops::Twice,
        errors: &[libc::EPERM],
        needs: &[],
        run: netlink,
    },
    seccomp_only(
        "vsock",
        "make a vsock socket, which no namespace confines",
        |_| refused(socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)),
    ),
    seccomp_only("unix-socket", "make a Unix socket", |_| {
        refused(socket(libc::AF_UNIX, libc::SOCK_STREAM, 0))
    }),
    seccomp_only("crypto-socket", "reach the kernel's crypto code (AF_ALG)", |_| {
        refused(socket(libc::AF_ALG, libc::SOCK_SEQPACKET, 0))
    }),
];

/// RTM_NEWLINK for interface 1 (lo) with IFF_UP, with NLM_F_REQUEST | NLM_F_ACK; the answer holds the error.
fn netlink(_: &Facts) -> Outcome {
    let fd = match socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE as usize) {
        Ok(fd) => fd,
        Err(errno) => return Outcome::Refused(errno),
    };
    let header = u32::from(libc::RTM_NEWLINK) | 5 << 16;
    let message: [u32; 8] = [32, header, 1, 0, 0, 1, 1, 1];
    if let Err(errno) = call(libc::SYS_sendto, &[fd, message.as_ptr() as usize, 32, 0, 0, 0]) {
        return Outcome::Refused(errno);
    }
    let mut answer = [0_i32; 64];
    match call(
        libc::SYS_recvfrom,
        &[fd, answer.as_mut_ptr() as usize, 256, 0, 0, 0],
    ) {
        Ok(length) if length >= 20 && answer[4] < 0 => Outcome::Refused(-answer[4]),
        other => Outcome::Escaped(format!("the answer is {other:?}, {}", answer[4])),
    }
}
