//! From checked files to a guest that is ready to run its first instruction.
//!
//! The planner, on the controller thread and before any VM exists, opens the [`Kernel`], builds the [`Cmdline`] and asks
//! [`place`] whether everything fits. The builder then calls [`install`] on fresh guest memory, still on that thread,
//! and gives the [`EntryPoint`] that it returns to the boot vCPU.
//!
//! * [`kernel`](self::kernel): recognises, checks, unpacks and copies kernels.
//! * `linux`: what the Linux 64-bit protocol wants: zero page and `setup_data`.
//! * `pvh`: what the PVH protocol wants: `hvm_start_info` and its lists.
//!
//! All addresses come from [`layout`]. Structures are linux-loader's; its loaders and configurators are not
//! used, for the reasons given in `kernel/elf.rs` and `kernel/bzimage.rs`.

pub mod cmdline;
pub mod kernel;
mod linux;
mod pvh;

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

pub use self::cmdline::{Cmdline, CmdlineError};
pub use self::kernel::{Compression, Format, Kernel, KernelError, KernelFault};
use crate::arch::x86_64::EntryPoint;
use crate::arch::x86_64::mptable;
use crate::layout::{self, LayoutError, PAGE_SIZE};
use devices::GuestMemory;

/// Highest address an initramfs may touch when the kernel does not say: the value of every x86-64 bzImage.
const INITRAMFS_MAX: u64 = 0x7fff_ffff;

/// Why a guest cannot be made ready.
#[derive(Debug, Error)]
pub enum BootError {
    /// The kernel cannot be used or does not fit.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The size of the memory is impossible.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The initramfs would overlap the kernel.
    #[error(
        "initramfs of {} KiB does not fit between the kernel's end at {kernel_end:#x} and {top:#x}: give --memory {needed}M",
        size.div_ceil(1024)
    )]
    Initramfs {
        /// Bytes of the initramfs.
        size: u64,
        /// Where the kernel ends.
        kernel_end: u64,
        /// Where the initramfs has to end.
        top: u64,
        /// MiB of memory that would do.
        needed: u64,
    },
    /// The initramfs is too large for this kernel with any memory.
    #[error("initramfs of {} MiB is larger than this kernel can take: make it smaller", size.div_ceil(1 << 20))]
    InitramfsTooLarge {
        /// Bytes of the initramfs.
        size: u64,
    },
    /// The command line is longer than this kernel reads.
    #[error(
        "kernel command line: {length} characters are too many for this kernel: shorten --cmdline to make it {max}"
    )]
    Cmdline {
        /// Characters.
        length: usize,
        /// The most that this kernel reads.
        max: usize,
    },
    /// More or fewer CPUs than an MP table can describe here.
    #[error("{0} vCPUs: a machine has 1 to 64")]
    Cpus(u8),
    /// The host's random numbers are not to be had.
    #[error("cannot get random numbers from the host to seed the guest's: {0}")]
    Random(std::io::Error),
    /// Guest memory lacks an address that the layout promises.
    #[error("cannot write {what} to guest memory: {cause}")]
    Memory {
        /// What was to be written.
        what: &'static str,
        /// vm-memory's error.
        cause: GuestMemoryError,
    },
}

/// Wraps an error of guest memory with what was being written.
fn writing(what: &'static str) -> impl FnOnce(GuestMemoryError) -> BootError {
    move |cause| BootError::Memory { what, cause }
}

/// Finds the place of an initramfs of `size` bytes in a guest with `memory` bytes of RAM: page-aligned, as high as the
/// kernel can take it, so that it does not stand in the way of a kernel that unpacks or moves itself. Checks on the way
/// that the kernel fits; a `size` of 0 asks for that only.
///
/// # Errors
/// Kernel or initramfs do not fit; the message says which `--memory` would do.
pub fn place(kernel: &Kernel, size: u64, memory: u64) -> Result<GuestAddress, BootError> {
    kernel.check_fits(memory)?;
    let limit = kernel.setup_header().map_or(INITRAMFS_MAX, |header| header.initrd_addr_max.into()) + 1;
    let limit = limit.min(layout::LOW_MEMORY_END);
    let kernel_end = kernel.end().next_multiple_of(PAGE_SIZE);
    if kernel_end.saturating_add(size) > limit {
        return Err(BootError::InitramfsTooLarge { size });
    }
    let top = limit.min(layout::low_memory(memory));
    match top.checked_sub(size).map(|at| at & !(PAGE_SIZE - 1)) {
        Some(at) if at >= kernel_end || size == 0 => Ok(GuestAddress(at)),
        _ => {
            // Unpacked, the files take memory again.
            let needed = (kernel_end + 2 * size).div_ceil(1 << 20).saturating_add(16).next_multiple_of(16);
            Err(BootError::Initramfs { size, kernel_end, top, needed })
        }
    }
}

/// Fills fresh guest memory with everything that the kernel finds there: itself, the initramfs, the command line, the
/// parameters of its boot protocol, the MP table, and the tables that the boot vCPU starts with.
///
/// # Errors
/// Something does not fit, or guest memory is not laid out as [`layout::memory_regions`] says.
pub fn install(
    memory: &GuestMemory,
    kernel: &Kernel,
    initramfs: Option<&[u8]>,
    cmdline: &Cmdline,
    vcpus: u8,
) -> Result<EntryPoint, BootError> {
    let initramfs = initramfs.unwrap_or_default();
    let size = memory_size(memory);
    let initramfs_size = initramfs.len() as u64;
    let initramfs_at = place(kernel, initramfs_size, size)?;
    let map = layout::e820(size)?;
    let text = cmdline.text();
    check_cmdline(kernel, &text)?;

    kernel.load(memory)?;
    memory.write_slice(initramfs, initramfs_at).map_err(writing("the initramfs"))?;
    let mut line = text.into_bytes();
    line.push(0);
    memory.write_slice(&line, layout::COMMAND_LINE).map_err(writing("the command line"))?;
    let table = mptable::build(vcpus).ok_or(BootError::Cpus(vcpus))?;
    memory.write_slice(&table, layout::MP_TABLE).map_err(writing("the MP table"))?;

    let module = (initramfs_size > 0).then_some((initramfs_at, initramfs_size));
    let rip = kernel.entry();
    let entry = if kernel.is_pvh() {
        pvh::write_start_info(memory, module, &map)?;
        EntryPoint::Pvh { rip }
    } else {
        linux::write_zero_page(memory, kernel.setup_header(), module, &map)?;
        EntryPoint::Linux64 { rip }
    };
    entry.write_tables(memory).map_err(writing("the boot vCPU's tables"))?;
    Ok(entry)
}

/// Older kernels read shorter lines than [`Cmdline`] allows.
fn check_cmdline(kernel: &Kernel, text: &str) -> Result<(), BootError> {
    let Some(header) = kernel.setup_header() else { return Ok(()) };
    let max = usize::try_from(header.cmdline_size).unwrap_or(usize::MAX);
    if text.len() > max {
        return Err(BootError::Cmdline { length: text.len(), max });
    }
    Ok(())
}

/// Bytes of RAM in all regions.
fn memory_size(memory: &GuestMemory) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

#[cfg(test)]
mod tests;
