//! Keeps the container off vsock, on which the host listens for the agent.
//!
//! Sockets of the family are made by `socket` and, past any filter, by io_uring, which is therefore refused as a whole (so does Docker's
//! profile). System calls of other architectures (32-bit, x32) are refused too: they number the calls in another way.
//!
//! When a filter is installed the kernel evaluates it for each of its some 460 system calls, and where kernel mode is emulated that is what a
//! filter costs: so this one comes to its answer for nearly all of them in six instructions.

use libc::{
    AF_VSOCK, BPF_ABS, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, EAFNOSUPPORT, ENOSYS, EPERM,
    SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SYS_io_uring_setup, SYS_socket, SYS_socketpair, sock_filter,
};

/// `AUDIT_ARCH_X86_64` (linux/audit.h): EM_X86_64, 64-bit, little endian.
const ARCH_X86_64: u32 = 0xc000_003e;

/// `__X32_SYSCALL_BIT` (asm/unistd.h).
const X32: u32 = 0x4000_0000;

/// Offsets in `struct seccomp_data` (linux/seccomp.h). An address family is an `int`: its low half is the argument.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const FIRST_ARGUMENT: u32 = 16;

/// The filter. Jumps are relative to the next instruction: first for true, then for false.
pub const NO_VSOCK: [sock_filter; 16] = [
    /*  0 */ load(ARCH),
    /*  1 */ jump(BPF_JEQ, ARCH_X86_64, 0, 7),
    /*  2 */ load(NUMBER),
    /*  3 */ jump(BPF_JGE, SYS_io_uring_setup as u32, 3, 0),
    /*  4 */ jump(BPF_JGE, SYS_socketpair as u32 + 1, 6, 0),
    /*  5 */ jump(BPF_JEQ, SYS_socket as u32, 6, 0),
    /*  6 */ jump(BPF_JEQ, SYS_socketpair as u32, 5, 4),
    /*  7 */ jump(BPF_JEQ, SYS_io_uring_setup as u32, 2, 0),
    /*  8 */ jump(BPF_JGE, X32, 0, 2),
    /*  9 */ answer(SECCOMP_RET_ERRNO | ENOSYS as u32),
    /* 10 */ answer(SECCOMP_RET_ERRNO | EPERM as u32),
    /* 11 */ answer(SECCOMP_RET_ALLOW),
    /* 12 */ load(FIRST_ARGUMENT),
    /* 13 */ jump(BPF_JEQ, AF_VSOCK as u32, 0, 1),
    /* 14 */ answer(SECCOMP_RET_ERRNO | EAFNOSUPPORT as u32),
    /* 15 */ answer(SECCOMP_RET_ALLOW),
];

// What the order of the comparisons above builds on.
const _: () = assert!(SYS_socket < SYS_socketpair && SYS_socketpair < SYS_io_uring_setup);

const fn load(offset: u32) -> sock_filter {
    sock_filter { code: (BPF_LD | BPF_W | BPF_ABS) as u16, jt: 0, jf: 0, k: offset }
}

const fn jump(test: u32, operand: u32, yes: u8, no: u8) -> sock_filter {
    sock_filter { code: (BPF_JMP | test | BPF_K) as u16, jt: yes, jf: no, k: operand }
}

const fn answer(action: u32) -> sock_filter {
    sock_filter { code: (BPF_RET | BPF_K) as u16, jt: 0, jf: 0, k: action }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;
    use rustix::net::{AddressFamily, SocketType, socket};

    use super::*;

    /// Runs the filter as the kernel does.
    fn verdict(arch: u32, number: u32, argument: u32) -> u32 {
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = NO_VSOCK[at];
            at += 1;
            match u32::from(code) & 0x07 {
                BPF_LD => {
                    accumulator = match k {
                        NUMBER => number,
                        ARCH => arch,
                        FIRST_ARGUMENT => argument,
                        _ => panic!(),
                    }
                }
                BPF_JMP => {
                    let yes = match u32::from(code) & 0xf0 {
                        BPF_JEQ => accumulator == k,
                        _ => accumulator >= k,
                    };
                    at += usize::from(if yes { jt } else { jf });
                }
                _ => return k,
            }
        }
    }

    fn refused(errno: i32) -> u32 {
        SECCOMP_RET_ERRNO | errno as u32
    }

    #[test]
    fn verdicts() {
        let vsock = AF_VSOCK as u32;
        for number in [SYS_socket as u32, SYS_socketpair as u32] {
            assert_eq!(verdict(ARCH_X86_64, number, vsock), refused(EAFNOSUPPORT));
            assert_eq!(verdict(ARCH_X86_64, number, libc::AF_UNIX as u32), SECCOMP_RET_ALLOW);
            assert_eq!(verdict(ARCH_X86_64, number | X32, vsock), refused(ENOSYS));
        }
        for number in (0..600).filter(|&n| ![41, 53, 425].contains(&n)) {
            assert_eq!(verdict(ARCH_X86_64, number, vsock), SECCOMP_RET_ALLOW, "{number}");
        }
        assert_eq!(verdict(ARCH_X86_64, SYS_io_uring_setup as u32, 0), refused(EPERM));
        // 32-bit: socketcall is 102, socket 359.
        for number in [102, 359, 0] {
            assert_eq!(verdict(0x4000_0003, number, vsock), refused(ENOSYS));
        }
        assert_eq!(verdict(ARCH_X86_64, u32::MAX, 0), refused(ENOSYS));
    }

    #[test]
    fn the_kernel_takes_it() {
        let mut seen = None;
        let mut child = || {
            let open = |family| socket(family, SocketType::STREAM, None).map(drop);
            seen = Some((
                crate::sys::install_filter(&NO_VSOCK),
                open(AddressFamily::VSOCK),
                open(AddressFamily::UNIX),
            ));
        };
        let pid = crate::sys::vfork(0, None, &mut child).unwrap();
        rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()).unwrap();
        match seen.unwrap() {
            (Err(Errno::ACCESS), ..) => eprintln!("skipped: needs CAP_SYS_ADMIN"),
            other => assert_eq!(other, (Ok(()), Err(Errno::AFNOSUPPORT), Ok(()))),
        }
    }
}
