//! The guest's end of vsock connections.

use std::fs::File;
use std::io::Error;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::Outcome;

/// The host.
const HOST: u32 = 2;

fn check(result: libc::c_int) -> std::io::Result<libc::c_int> {
    if result < 0 { Err(Error::last_os_error()) } else { Ok(result) }
}

fn socket() -> std::io::Result<OwnedFd> {
    // SAFETY: takes no pointers.
    let fd = check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) })?;
    // SAFETY: it was just made, and is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address(cid: u32, port: u64) -> Result<libc::sockaddr_vm, std::num::TryFromIntError> {
    // SAFETY: all fields are integers, for which zero is a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK)?;
    address.svm_cid = cid;
    address.svm_port = u32::try_from(port)?;
    Ok(address)
}

type Call = unsafe extern "C" fn(libc::c_int, *const libc::sockaddr, libc::socklen_t) -> libc::c_int;

fn with_address(call: Call, socket: &OwnedFd, address: &libc::sockaddr_vm) -> std::io::Result<()> {
    let size = libc::socklen_t::try_from(size_of_val(address)).map_err(Error::other)?;
    // SAFETY: `bind` or `connect`, with an address that lives and is of that size.
    check(unsafe { call(socket.as_raw_fd(), std::ptr::from_ref(address).cast(), size) })?;
    Ok(())
}

/// Whether a socket can be had.
pub fn open() -> String {
    match socket() {
        Ok(_) => "vsock: open".into(),
        Err(error) => format!("vsock: errno {}", error.raw_os_error().unwrap_or(0)),
    }
}

/// Serves one connection: sends back what comes.
pub fn serve(port: u64) -> Outcome {
    let listener = socket()?;
    with_address(libc::bind, &listener, &address(libc::VMADDR_CID_ANY, port)?)?;
    // SAFETY: takes no pointers.
    check(unsafe { libc::listen(listener.as_raw_fd(), 1) })?;
    println!("listening: {port}");
    // SAFETY: the peer's address is not asked for.
    let fd =
        check(unsafe { libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) })?;
    // SAFETY: it was just made, and is nobody else's.
    crate::stream::echo(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Sends that many bytes of the pattern to the host, and prints what it answers.
pub fn send(port: u64, bytes: u64) -> Outcome {
    let socket = socket()?;
    with_address(libc::connect, &socket, &address(HOST, port)?)?;
    crate::stream::ask(File::from(socket), bytes, |connection| {
        // SAFETY: takes no pointers.
        check(unsafe { libc::shutdown(connection.as_raw_fd(), libc::SHUT_WR) }).map(drop)
    })
}
