//! PID 1 of the guest. Runs one container and then ends the VM. One thread; everything waits in one `poll`.
//!
//! The path of a start: [`boot`] → [`session`] says Hello → [`identity`] makes the machine one of its own, [`image`] mounts its disk →
//! [`session`] receives what to run → [`stdio`] makes the pipes and their connections → [`container`] clones a child that builds its
//! world with [`mounts`], takes a user's rights ([`user`], [`seccomp`]) and executes the command ([`process`]) → [`relay`] carries bytes
//! and obeys the host until it ends. In between [`freezer`] may hold it for a snapshot, and in the copy it gets another [`identity`].
//!
//! Templates of machines are taken at Hello: what is done before it is done once, for all machines.
//!
//! **What an instruction costs.** On hosts that emulate the guest's kernel mode a system call is some 0.3 ms and a megabyte of initramfs
//! 0.6 s, while user mode is as fast as ever. Hence no `std`, no second process, no netlink, no `/proc` of our own, and a child that
//! shares our memory until it executes.
//!
//! **Who is trusted.** The host is. The image and the container are not: nothing of theirs is executed or followed outside of the
//! container's own namespaces and root.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod container;
pub mod error;
pub mod file;
pub mod freezer;
pub mod heap;
pub mod identity;
pub mod image;
pub mod mounts;
pub mod network;
pub mod process;
pub mod relay;
pub mod seccomp;
pub mod session;
pub mod stdio;
pub mod sys;
pub mod user;

mod control;

use protocol::{ByteString, Root};
use rustix::fd::OwnedFd;
use rustix::process::getpid;
use rustix::system::{RebootCommand, reboot};

use error::Error;
use session::Machine;

/// The whole life of PID 1. Returns only if the VM cannot be ended, and the kernel panics when PID 1 returns.
pub fn boot() -> i32 {
    // It ends by rebooting the machine, so it must not be anybody's ordinary process.
    if !getpid().is_init() {
        log("vmm-agent: this is PID 1 of a guest and of nothing else\n");
        return 125;
    }
    // The kernel's helper processes (core dumps, key requests) live in the first mount namespace. With ours apart from it they can never
    // execute a file of the image.
    let outcome = sys::unshare_mounts().map_err(error::at("unshare")).and_then(|()| {
        let control = sys::connect_control().map_err(error::at("connect to the host"))?;
        session::serve(control, &Vm);
        Ok(())
    });
    if let Err(error) = outcome {
        log(&alloc::format!("vmm-agent: {error}\n"));
    }
    // The kernel's command line says how (`reboot=`); the VMM takes it as the end.
    let refused = reboot(RebootCommand::Restart);
    log(&alloc::format!("vmm-agent: reboot: {refused:?}\n"));
    1
}

/// The machine in earnest.
struct Vm;

impl Machine for Vm {
    fn prepare(&self) -> Result<(), Error> {
        mounts::cover_initramfs()?;
        mounts::make_directories()
    }

    fn set_clock(&self, nanoseconds: u64) -> Result<(), Error> {
        identity::set_clock(nanoseconds)
    }

    fn open_image(&self, root: &Root) -> Result<Option<ByteString>, Error> {
        image::open(root)
    }

    fn wait_for_disk(&self, device: &str) -> Result<(), Error> {
        image::wait_for_medium(&image::disk_path(device)?)
    }

    fn connect_stream(&self) -> rustix::io::Result<OwnedFd> {
        sys::connect_stream()
    }
}

/// Writes to the console that the kernel gave PID 1. There is nothing to do about a failure.
pub fn log(text: &str) {
    // SAFETY: descriptor 2 is PID 1's console; should it be closed, the write fails.
    let console = unsafe { rustix::fd::BorrowedFd::borrow_raw(2) };
    let _ = rustix::io::write(console, text.as_bytes());
}
