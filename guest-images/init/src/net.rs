//! Loopback, and eth0 as the command line says, by the classic interface ioctls: no program and no netlink is needed.

use crate::cmdline::{Address, Config};
use crate::console::report;
use crate::sys;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;

const ETH0: &str = "eth0";

/// Brings up what was asked for. What fails is told and left.
pub fn configure(config: &Config) {
    let Ok(socket) = sys::datagram_socket(libc::AF_INET) else {
        return;
    };
    report("bring up lo", up(&socket, "lo"));
    if !config.addresses.is_empty() {
        if config.addresses.iter().any(|a| a.ip.is_ipv6()) {
            // The host gave the address and knows that it is the only one: no second of waiting for duplicates.
            report(
                "switch off duplicate detection",
                std::fs::write("/proc/sys/net/ipv6/conf/eth0/accept_dad", "0"),
            );
        }
        for address in &config.addresses {
            let what = format!("give {ETH0} the address {}/{}", address.ip, address.prefix);
            report(&what, add_address(&socket, address));
        }
        report("bring up eth0 (is there a network device?)", up(&socket, ETH0));
    }
    for gateway in &config.gateways {
        report(
            &format!("add the default route by {gateway}"),
            add_default_route(&socket, *gateway),
        );
    }
    if !config.nameservers.is_empty() {
        let text: String = config
            .nameservers
            .iter()
            .map(|n| format!("nameserver {n}\n"))
            .collect();
        report("write /etc/resolv.conf", std::fs::write("/etc/resolv.conf", text));
    }
}

fn up(socket: &OwnedFd, name: &str) -> io::Result<()> {
    let mut request = sys::ifreq(name);
    sys::ioctl(socket, libc::SIOCGIFFLAGS as _, &mut request)?;
    sys::add_interface_flags(&mut request, libc::IFF_UP);
    sys::ioctl(socket, libc::SIOCSIFFLAGS as _, &mut request)
}

fn netmask(prefix: u8) -> Ipv4Addr {
    Ipv4Addr::from_bits(u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0))
}

fn add_address(socket: &OwnedFd, address: &Address) -> io::Result<()> {
    match address.ip {
        IpAddr::V4(ip) => {
            let mut request = sys::ifreq(ETH0);
            request.ifr_ifru.ifru_addr = sys::sockaddr(ip);
            sys::ioctl(socket, libc::SIOCSIFADDR as _, &mut request)?;
            request.ifr_ifru.ifru_netmask = sys::sockaddr(netmask(address.prefix));
            sys::ioctl(socket, libc::SIOCSIFNETMASK as _, &mut request)
        }
        IpAddr::V6(ip) => {
            let mut request: libc::in6_ifreq = sys::zeroed();
            request.ifr6_addr.s6_addr = ip.octets();
            request.ifr6_prefixlen = address.prefix.into();
            request.ifr6_ifindex = index(socket)?;
            sys::ioctl(
                &sys::datagram_socket(libc::AF_INET6)?,
                libc::SIOCSIFADDR as _,
                &mut request,
            )
        }
    }
}

fn index(socket: &OwnedFd) -> io::Result<libc::c_int> {
    let mut request = sys::ifreq(ETH0);
    sys::ioctl(socket, libc::SIOCGIFINDEX as _, &mut request)?;
    Ok(sys::interface_index(&request))
}

fn add_default_route(socket: &OwnedFd, gateway: IpAddr) -> io::Result<()> {
    match gateway {
        IpAddr::V4(ip) => {
            let mut route: libc::rtentry = sys::zeroed();
            route.rt_dst = sys::sockaddr(Ipv4Addr::UNSPECIFIED);
            route.rt_genmask = sys::sockaddr(Ipv4Addr::UNSPECIFIED);
            route.rt_gateway = sys::sockaddr(ip);
            route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
            sys::ioctl(socket, libc::SIOCADDRT as _, &mut route)
        }
        IpAddr::V6(ip) => {
            let mut route: sys::Route6 = sys::zeroed();
            route.gateway = ip.octets();
            route.metric = 1;
            route.flags = u32::from(libc::RTF_UP | libc::RTF_GATEWAY);
            route.index = index(socket)?;
            sys::ioctl(
                &sys::datagram_socket(libc::AF_INET6)?,
                libc::SIOCADDRT as _,
                &mut route,
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn netmasks() {
        for (prefix, mask) in [
            (0, "0.0.0.0"),
            (8, "255.0.0.0"),
            (30, "255.255.255.252"),
            (32, "255.255.255.255"),
        ] {
            assert_eq!(netmask(prefix).to_string(), mask);
        }
    }
}
