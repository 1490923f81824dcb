//! The system calls that rustix lacks, each in as little `unsafe` as it takes.

use alloc::ffi::CString;
use alloc::vec::Vec;
use core::ffi::{CStr, c_char, c_int};
use core::mem;

use protocol::{CONTROL_PORT, HOST_CID, STREAM_PORT, Seed};
use rustix::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
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

/// Takes this process to a host name and to System V and POSIX IPC of its own.
pub fn unshare_names() -> Result<()> {
    // SAFETY: as above.
    unsafe { unshare_unsafe(UnshareFlags::NEWUTS | UnshareFlags::NEWIPC) }
}

/// Makes the cgroup that this process is in the top of all that it can see of them.
pub fn unshare_cgroup() -> Result<()> {
    // SAFETY: as above.
    unsafe { unshare_unsafe(UnshareFlags::NEWCGROUP) }
}

/// Runs `child` in a new process, as `vfork` does: it shares this process's memory, and this process waits until it executes a file or ends.
/// What `child` writes is there afterwards. If it returns, the process ends with code 127.
///
/// `namespaces` are `CLONE_NEW…` flags for new namespaces; the process begins in `cgroup`, if one is given.
pub fn vfork<F: FnMut()>(namespaces: c_int, cgroup: Option<BorrowedFd<'_>>, child: &mut F) -> Result<Pid> {
    extern "C" fn run<F: FnMut()>(child: *mut F) -> ! {
        // SAFETY: this is the `child` that `vfork` passed to clone, and `vfork` waits, so nobody else uses it.
        unsafe { (*child)() };
        // SAFETY: ends the process, which shares everything that might have to be put in order.
        unsafe { libc::_exit(127) }
    }
    // The deepest path is a formatted error; no buffer of size is on the stack.
    const STACK: usize = 64 << 10;
    let mut stack: Vec<u128> = Vec::with_capacity(STACK / size_of::<u128>());
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | namespaces;
    let mut arguments = CloneArguments {
        flags: flags as u64,
        exit_signal: libc::SIGCHLD as u64,
        stack: stack.as_mut_ptr() as u64,
        stack_size: STACK as u64,
        ..CloneArguments::default()
    };
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    let result: isize;
    // SAFETY: the stack is 64 KiB of memory of our own, 16-byte aligned; it lives until the call returns, which by CLONE_VFORK is after
    // the child's last use. `child` is borrowed for as long. The child, in which the result is 0, comes back with all registers but the
    // stack's, and never leaves `run`. It shares the thread pointer, as after vfork: it starts no threads.
    unsafe {
        core::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r8",
            "call r9",
            "ud2",
            "2:",
            inout("rax") libc::SYS_clone3 as isize => result,
            in("rdi") &raw mut arguments,
            in("rsi") size_of::<CloneArguments>(),
            in("r8") &raw mut *child,
            in("r9") run::<F> as extern "C" fn(*mut F) -> !,
            out("rcx") _,
            out("r11") _,
        );
    }
    i32::try_from(result)
        .ok()
        .and_then(Pid::from_raw)
        .filter(|_| result > 0)
        .ok_or_else(|| Errno::from_raw_os_error(-(result as i32)))
}

/// (linux/sched.h); libc's constant has lost its bit.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// `struct clone_args`, as of Linux 5.7 (linux/sched.h).
#[repr(C)]
#[derive(Default)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
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

/// Mixes `seed` into the kernel's random numbers, with full credit, and has all generators start from them at once.
pub fn reseed(pool: &OwnedFd, seed: &Seed) -> Result<()> {
    /// `struct rand_pool_info` with its buffer (linux/random.h).
    #[repr(C)]
    struct Entropy {
        bits: c_int,
        bytes: c_int,
        buffer: [u8; 32],
    }
    const RNDADDENTROPY: u32 = 0x4008_5203;
    const RNDRESEEDCRNG: u32 = 0x5207;
    let entropy = Entropy { bits: 256, bytes: 32, buffer: seed.0 };
    // SAFETY: the first request reads an Entropy, whose sizes are right; the second takes no argument.
    unsafe {
        check(libc::ioctl(pool.as_raw_fd(), RNDADDENTROPY as _, &raw const entropy))?;
        check(libc::ioctl(pool.as_raw_fd(), RNDRESEEDCRNG as _)).map(drop)
    }
}

/// Bytes of a block device.
pub fn capacity(disk: &OwnedFd) -> Result<u64> {
    const BLKGETSIZE64: u32 = 0x8008_1272;
    let mut bytes = 0u64;
    // SAFETY: the request writes one u64.
    check(unsafe { libc::ioctl(disk.as_raw_fd(), BLKGETSIZE64 as _, &raw mut bytes) })?;
    Ok(bytes)
}

/// The port of our end of a vsock connection; 0 of another socket.
pub fn local_port(socket: &OwnedFd) -> Result<u32> {
    // SAFETY: zeroes are a valid value of this structure of integers.
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    let mut length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: the length is the address's.
    check(unsafe { libc::getsockname(socket.as_raw_fd(), (&raw mut address).cast(), &raw mut length) })?;
    Ok(if i32::from(address.svm_family) == libc::AF_VSOCK { address.svm_port } else { 0 })
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
