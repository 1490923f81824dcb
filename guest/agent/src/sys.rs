//! The system calls that rustix lacks, each in as little `unsafe` as it takes.

use alloc::borrow::ToOwned;
use alloc::ffi::CString;
use alloc::vec::Vec;
use core::ffi::{CStr, c_char, c_int, c_void};
use core::mem;

use protocol::{CONTROL_PORT, HOST_CID, STREAM_PORT};
use rustix::fd::{AsRawFd, FromRawFd, OwnedFd};
use rustix::io::{Errno, Result, fcntl_dupfd_cloexec};
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};
use rustix::process::Pid;
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// A port of the host on vsock.
pub struct HostPort(pub u32);

// SAFETY: `address` is a whole sockaddr_vm that outlives the call, and the length is its size.
unsafe impl SocketAddrArg for HostPort {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        // SAFETY: zeroes are a valid value of this structure of integers.
        let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_port = self.0;
        address.svm_cid = HOST_CID;
        f((&raw const address).cast(), size_of::<libc::sockaddr_vm>() as SocketAddrLen)
    }
}

/// The control connection, established. Descriptors 0 to 2 are never given away: they belong to the container's stdio.
pub fn connect_control() -> Result<OwnedFd> {
    let mut control = socket_with(AddressFamily::VSOCK, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    connect(&control, &HostPort(CONTROL_PORT))?;
    // Without a console the kernel starts us with no descriptor open. Then the first three are filled, for good.
    while control.as_raw_fd() < 3 {
        let higher = fcntl_dupfd_cloexec(&control, 0)?;
        mem::forget(mem::replace(&mut control, higher));
    }
    Ok(control)
}

/// A connection for a stream: non-blocking, and perhaps not established yet.
pub fn connect_stream() -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let stream = socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
    match connect(&stream, &HostPort(STREAM_PORT)) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(stream),
        Err(errno) => Err(errno),
    }
}

/// Takes this process to a mount namespace of its own.
pub fn unshare_mounts() -> Result<()> {
    // SAFETY: only CLONE_FILES could harm others, by giving them another descriptor table than they believe to have.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }
}

/// The value of an environment variable.
pub fn environment(name: &CStr) -> Option<CString> {
    // SAFETY: `name` ends with a zero; nothing changes the environment while the value is copied, since there is one thread.
    unsafe {
        let value = libc::getenv(name.as_ptr());
        if value.is_null() { None } else { Some(CStr::from_ptr(value).to_owned()) }
    }
}

/// Runs `child` in a new process in new namespaces, as `vfork` does: it shares this process's memory, and this process waits until it
/// executes a file or ends. What `child` writes is there afterwards. If it returns, the process ends with code 127.
///
/// `namespaces` are `CLONE_NEW…` flags.
pub fn vfork<F: FnMut()>(namespaces: c_int, child: &mut F) -> Result<Pid> {
    extern "C" fn run<F: FnMut()>(child: *mut c_void) -> c_int {
        // SAFETY: this is the `child` that `vfork` passed to clone, and `vfork` waits, so nobody else uses it.
        unsafe { (*child.cast::<F>())() };
        127
    }
    // The deepest path is a formatted error; no buffer of size is on the stack.
    const STACK: usize = 64 << 10;
    let mut stack: Vec<u128> = Vec::with_capacity(STACK / size_of::<u128>());
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD | namespaces;
    // SAFETY: the stack is 64 KiB of memory of our own, 16-byte aligned, of which the end is passed; it lives until the call returns, which
    // by CLONE_VFORK is after the child's last use. `child` is borrowed for as long. The child shares the thread pointer, as after vfork:
    // it starts no threads.
    let pid = unsafe {
        let top = stack.as_mut_ptr().byte_add(STACK);
        libc::clone(run::<F>, top.cast(), flags, (&raw mut *child).cast())
    };
    Pid::from_raw(pid).filter(|_| pid > 0).ok_or_else(last_error)
}

/// Replaces the program of this process. Returns the reason if it cannot.
pub fn execute(path: &CStr, arguments: &[CString], environment: &[CString]) -> Errno {
    let pointers = |strings: &[CString]| -> Vec<*const c_char> {
        strings.iter().map(|string| string.as_ptr()).chain([core::ptr::null()]).collect()
    };
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    // SAFETY: both lists end with a null pointer and point to strings that live in the caller.
    unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    last_error()
}

/// Sends any signal, also a real-time one, to `pid`.
pub fn kill(pid: Pid, signal: i32) -> Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::kill(pid.as_raw_nonzero().get(), signal) }).map(drop)
}

/// Keeps SIGCHLD pending, and makes a descriptor that is readable when a child has ended. Non-blocking.
pub fn child_signals() -> Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before use; the descriptor is new and nobody else's.
    unsafe {
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        check(libc::sigprocmask(libc::SIG_BLOCK, &raw const set, core::ptr::null_mut()))?;
        let fd = check(libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Puts this process and its descendants under a seccomp filter. Needs CAP_SYS_ADMIN, and does not set no_new_privs.
pub fn install_filter(program: &[libc::sock_filter]) -> Result<()> {
    let length = program.len().try_into().map_err(|_| Errno::INVAL)?;
    let program = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel copies the program, whose length is right, and does not write to it.
    let result = unsafe {
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER as libc::c_ulong, &raw const program)
    };
    check(result).map(drop)
}

/// One of the `SIOC…` requests that take an `ifreq`.
pub fn interface_request(socket: &OwnedFd, request: u32, argument: &mut libc::ifreq) -> Result<()> {
    // SAFETY: requests of this family read and write one ifreq at most.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), request as _, &raw mut *argument) }).map(drop)
}

/// `SIOCADDRT`: adds a route.
pub fn add_route(socket: &OwnedFd, route: &libc::rtentry) -> Result<()> {
    // SAFETY: the request reads one rtentry; its device pointer is null.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT as _, &raw const *route) }).map(drop)
}

/// The C library's text for `errno`.
pub fn error_text(errno: Errno, buffer: &mut [u8]) -> Option<&CStr> {
    // SAFETY: the length is the buffer's.
    let result = unsafe { libc::strerror_r(errno.raw_os_error(), buffer.as_mut_ptr().cast(), buffer.len()) };
    if result == 0 { CStr::from_bytes_until_nul(buffer).ok() } else { None }
}

fn check(result: c_int) -> Result<c_int> {
    if result < 0 { Err(last_error()) } else { Ok(result) }
}

fn last_error() -> Errno {
    // SAFETY: the pointer is to this thread's errno, which lives as long as the thread.
    Errno::from_raw_os_error(unsafe { *libc::__errno_location() })
}
