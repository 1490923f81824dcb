//! The VM's network, by the old ioctls: netlink costs 0.1 s where kernel mode is emulated.

use alloc::format;
use core::mem;
use core::net::Ipv4Addr;

use protocol::Network;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::error::{Error, at};
use crate::sys;

/// Brings up loopback, which the kernel gives 127.0.0.1. A kernel without IPv4 has none.
pub fn start() -> Result<(), Error> {
    match open_socket() {
        Err(Errno::AFNOSUPPORT) => Ok(()),
        Err(errno) => Err(at("network socket")(errno)),
        Ok(socket) => bring_up(&socket, "lo"),
    }
}

fn open_socket() -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
}

/// Gives the interface of `network` its addresses and brings it up. What it had before it loses, as far as there is another: an address takes
/// its routes with it.
pub fn configure(network: &Network) -> Result<(), Error> {
    let socket = open_socket().map_err(at("network socket"))?;
    let name = network.interface.as_str();
    if let Some(mac) = network.mac {
        set_mac(&socket, name, mac)?;
    }
    if let Some(cidr) = network.address {
        let set = |request: u32, address| {
            let mut argument = interface(name)?;
            argument.ifr_ifru.ifru_addr = socket_address(address);
            sys::interface_request(&socket, request, &mut argument)
                .map_err(failed("set the address of", name))
        };
        set(libc::SIOCSIFADDR as u32, cidr.address)?;
        set(libc::SIOCSIFNETMASK as u32, cidr.netmask())?;
    }
    bring_up(&socket, name)?;
    if let Some(gateway) = network.gateway {
        // SAFETY: zeroes are a valid value: addresses of no family, and no device.
        let mut route: libc::rtentry = unsafe { mem::zeroed() };
        route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = socket_address(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        match sys::add_route(&socket, &route) {
            // A copy that keeps its address keeps its route.
            Ok(()) | Err(Errno::EXIST) => (),
            Err(errno) => return Err(at(format!("add the default route by {gateway}"))(errno)),
        }
    }
    Ok(())
}

/// Sets the hardware address, if it is another. virtio-net takes it while it is up.
fn set_mac(socket: &OwnedFd, name: &str, mac: [u8; 6]) -> Result<(), Error> {
    let mut argument = interface(name)?;
    sys::interface_request(socket, libc::SIOCGIFHWADDR as u32, &mut argument)
        .map_err(failed("find the hardware address of", name))?;
    // SAFETY: the request has filled in this member; it is integers in any case.
    let mut address = unsafe { argument.ifr_ifru.ifru_hwaddr };
    let mac = mac.map(|byte| byte as libc::c_char);
    if address.sa_data.starts_with(&mac) {
        return Ok(());
    }
    for (to, from) in address.sa_data.iter_mut().zip(mac) {
        *to = from;
    }
    // Of the same family as the old one.
    argument.ifr_ifru.ifru_hwaddr = address;
    sys::interface_request(socket, libc::SIOCSIFHWADDR as u32, &mut argument)
        .map_err(failed("set the hardware address of", name))
}

fn bring_up(socket: &OwnedFd, name: &str) -> Result<(), Error> {
    let mut argument = interface(name)?;
    argument.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    sys::interface_request(socket, libc::SIOCSIFFLAGS as u32, &mut argument).map_err(failed("bring up", name))
}

fn failed(what: &str, name: &str) -> impl FnOnce(Errno) -> Error {
    at(format!("{what} the network interface {name}"))
}

/// A request about the interface `name`.
fn interface(name: &str) -> Result<libc::ifreq, Error> {
    // SAFETY: zeroes are a valid value of this structure of integers.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // The kernel wants a zero at the end.
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        return Err(Error::Request(format!("{name:?} is not the name of a network interface")));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

/// A `sockaddr_in` without a port, as the `sockaddr` that the structures want.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let [a, b, c, d] = address.octets().map(|octet| octet as libc::c_char);
    // Two bytes of port, four of address, eight of nothing.
    let sa_data = [0, 0, a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0];
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_do_not_fit() {
        for name in ["", "sixteen-bytes-xx", "much-too-long-for-an-interface"] {
            assert!(interface(name).is_err(), "{name}");
        }
        assert_eq!(interface("eth0").unwrap().ifr_name[..5], [101, 116, 104, 48, 0]);
        assert!(interface("fifteen-bytes-x").is_ok());
    }

    #[test]
    fn addresses() {
        let address = socket_address(Ipv4Addr::new(10, 0, 200, 1));
        assert_eq!(i32::from(address.sa_family), libc::AF_INET);
        assert_eq!(address.sa_data.map(|b| b as u8)[..6], [0, 0, 10, 0, 200, 1]);
    }
}
