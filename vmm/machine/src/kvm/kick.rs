//! Makes a vCPU come back from `KVM_RUN`, from any thread.
//!
//! A signal alone would be lost if it arrived just before the vCPU enters the guest. So the kick first sets `immediate_exit`
//! in the shared `kvm_run` page, which KVM looks at on the way in, and then sends the signal, which gets the vCPU out.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Once;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Kicks one vCPU. Made on the vCPU's thread, used on any.
pub struct Kick {
    /// A mapping of our own of the vCPU's `kvm_run`, so that it is there as long as we are.
    page: NonNull<kvm_run>,
    thread: libc::pthread_t,
}

// SAFETY: the page is a shared mapping that lives as long as the value; the only field touched is one byte, atomically.
// A pthread_t is a name that any thread may use.
unsafe impl Send for Kick {}
// SAFETY: as above.
unsafe impl Sync for Kick {}

impl Kick {
    /// A kick for `vcpu`, which the calling thread runs. The thread must outlive the value.
    ///
    /// # Errors
    /// Those of `mmap(2)` and `sigaction(2)`.
    pub fn for_this_thread(vcpu: &VcpuFd) -> io::Result<Self> {
        static HANDLER: Once = Once::new();
        let mut installed = Ok(());
        HANDLER.call_once(|| installed = register_signal_handler(SIGRTMIN(), nothing));
        installed.map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        // SAFETY: a fresh shared mapping of the first page(s) of a vCPU's file descriptor; nothing else uses the address.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<kvm_run>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let page = NonNull::new(page.cast()).ok_or(io::ErrorKind::InvalidData)?;
        // SAFETY: always succeeds.
        let thread = unsafe { libc::pthread_self() };
        Ok(Kick { page, thread })
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte lies within the live mapping, needs no alignment, and the kernel only reads it. kvm-ioctls has no
        // reference to it outside its own calls on the vCPU's thread.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.page.as_ptr()).immediate_exit) }
    }

    /// Gets the vCPU out of the guest, or keeps it from entering. What it is to do then must be known before.
    pub fn kick(&self) {
        self.immediate_exit().store(1, Ordering::SeqCst);
        // SAFETY: the thread is alive as long as the value is (see `for_this_thread`), and the signal has a handler.
        unsafe { libc::pthread_kill(self.thread, SIGRTMIN()) };
    }

    /// The vCPU heard: it may enter the guest again. To be called on its thread, before it looks at what it is to do.
    pub fn heard(&self) {
        self.immediate_exit().store(0, Ordering::SeqCst);
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        // SAFETY: our own mapping, used by nobody else.
        unsafe { libc::munmap(self.page.as_ptr().cast(), size_of::<kvm_run>()) };
    }
}
