//! `/init` of the guest: PID 1, the only thread of the only process that the kernel starts.
//!
//! Built for the guest (musl, panic = abort) there is no `std` in it: this file brings what the language then lacks, a heap and a last
//! word. Any other build, such as a check of the whole workspace, is an ordinary program that refuses to run.
#![cfg_attr(all(target_env = "musl", panic = "abort"), no_std, no_main)]

#[cfg(all(target_env = "musl", panic = "abort"))]
mod bare {
    use core::ffi::{c_char, c_int};
    use core::fmt::{self, Write};
    use core::panic::PanicInfo;

    // The C library, which `std` would otherwise bring.
    #[link(name = "c")]
    unsafe extern "C" {}

    /// Named, as the next, by the precompiled `core` and `alloc` for unwinding. Never called: a panic ends the process.
    #[unsafe(no_mangle)]
    extern "C" fn rust_eh_personality() {}

    #[unsafe(no_mangle)]
    extern "C" fn _Unwind_Resume() -> ! {
        // SAFETY: ends the process; nothing is left to be in order.
        unsafe { libc::_exit(101) }
    }

    #[unsafe(no_mangle)]
    extern "C" fn main(_argc: c_int, _argv: *const *const c_char) -> c_int {
        agent::boot()
    }

    #[global_allocator]
    static HEAP: agent::heap::Heap = agent::heap::Heap::new();

    /// The console that the kernel opened for PID 1.
    struct Console;

    impl Write for Console {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            agent::log(text);
            Ok(())
        }
    }

    /// Says where, on the console, and ends PID 1: the kernel then panics, which ends the VM and tells the host.
    #[panic_handler]
    fn panic(info: &PanicInfo<'_>) -> ! {
        let _ = match info.location() {
            Some(at) => writeln!(Console, "vmm-agent: panicked at {}:{}", at.file(), at.line()),
            None => writeln!(Console, "vmm-agent: panicked"),
        };
        // SAFETY: ends the process; nothing is left to be in order.
        unsafe { libc::_exit(101) }
    }
}

#[cfg(not(all(target_env = "musl", panic = "abort")))]
fn main() {
    eprintln!("this is PID 1 of a guest: build it with --profile agent --target x86_64-unknown-linux-musl");
    std::process::exit(125);
}
