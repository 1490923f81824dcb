//! Every guest-physical address that this program chooses, and which stretches of the address space are RAM.
//!
//! Pure arithmetic: the builder calls it on the controller thread before a VM exists, the boot code while it fills
//! guest memory, the device table when it places virtio-mmio windows. Nothing here touches memory or KVM.
//!
//! ```text
//! 0x0000_0500              GDT of the boot vCPU (boot parameters' own, the kernel soon loads another)
//! 0x0000_6000              PVH: hvm_start_info; 0x6100 module list; 0x6200 memory map
//! 0x0000_7000              Linux: the zero page (struct boot_params)
//! 0x0000_8ff0              top of the boot stack, which grows down to 0x8000
//! 0x0000_9000              PML4, 0xa000 PDPT, 0xb000..0xf000 four page directories: 4 GiB mapped 1:1
//! 0x0002_0000              the kernel's command line, at most 2048 bytes with its NUL
//! 0x0009_fc00              end of the low RAM that the guest is told of (where a PC has its EBDA); what follows it:
//!                          Linux: setup_data with the seed of the guest's random numbers
//! 0x000f_0000..0x0010_0000 MP table: 64 CPUs need 1.6 KiB, more than the EBDA's 1 KiB
//! 0x0010_0000              RAM for kernel, initramfs and everything else, up to 3 GiB
//! 0xc000_0000              hole: no RAM up to 4 GiB
//! 0xd000_0000              virtio-mmio: 4 KiB for each device, in order
//! 0xfec0_0000              IOAPIC           0xfee0_0000 local APIC (both emulated by KVM)
//! 0xfffb_c000              KVM's identity-map page, 0xfffb_d000 its three TSS pages (used on older Intel CPUs)
//! 0x1_0000_0000            the rest of the RAM
//! ```

use thiserror::Error;
use vm_memory::GuestAddress;

/// A page: what KVM's memory slots and ours are multiples of.
pub const PAGE_SIZE: u64 = 4096;

/// GDT of the boot vCPU.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// PVH: `hvm_start_info`.
pub const PVH_START_INFO: GuestAddress = GuestAddress(0x6000);
/// PVH: module list (at most one module, the initramfs).
pub const PVH_MODULES: GuestAddress = GuestAddress(0x6100);
/// PVH: memory map.
pub const PVH_MEMORY_MAP: GuestAddress = GuestAddress(0x6200);
/// Linux: the zero page, one page long.
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Initial stack pointer; the kernel sets its own with its first instructions.
pub const BOOT_STACK: GuestAddress = GuestAddress(0x8ff0);
/// Top level of the boot page tables.
pub const PML4: GuestAddress = GuestAddress(0x9000);
/// Second level.
pub const PDPT: GuestAddress = GuestAddress(0xa000);
/// Third level: [`PAGE_DIRECTORIES`] consecutive tables of 2 MiB pages.
pub const PAGE_DIRECTORY: GuestAddress = GuestAddress(0xb000);
/// How many GiB the boot page tables map 1:1.
pub const PAGE_DIRECTORIES: u64 = 4;
/// The command line.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Longest command line, with its NUL: `COMMAND_LINE_SIZE` in Linux's arch/x86/include/asm/setup.h.
pub const COMMAND_LINE_MAX: usize = 2048;
/// End of the conventional memory that the guest may use.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// Linux: `setup_data` list. Not in RAM by the map: there the kernel would split the map around it, which costs 340,000
/// instructions, most of them to print it.
pub const SETUP_DATA: GuestAddress = GuestAddress(LOW_RAM_END);
/// MP floating pointer and configuration table (MP specification 1.4, section 4: the BIOS ROM area).
pub const MP_TABLE: GuestAddress = GuestAddress(0xf_0000);
/// Room for the MP table.
pub const MP_TABLE_SIZE: u64 = 0x1_0000;
/// Where kernels and initramfs may lie; everything below is ours.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// End of the RAM below the hole.
pub const LOW_MEMORY_END: u64 = 0xc000_0000;
/// First virtio-mmio window.
pub const VIRTIO_MMIO: GuestAddress = GuestAddress(0xd000_0000);
/// Size of one virtio-mmio window.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// IOAPIC.
pub const IOAPIC: GuestAddress = GuestAddress(0xfec0_0000);
/// Local APIC.
pub const LOCAL_APIC: GuestAddress = GuestAddress(0xfee0_0000);
/// One page for `KVM_SET_IDENTITY_MAP_ADDR`.
pub const KVM_IDENTITY_MAP: GuestAddress = GuestAddress(0xfffb_c000);
/// Three pages for `KVM_SET_TSS_ADDR`.
pub const KVM_TSS: GuestAddress = GuestAddress(0xfffb_d000);
/// Start of the RAM above the hole.
pub const HIGH_MEMORY_START: u64 = 0x1_0000_0000;

/// Least RAM a guest may have: less does not hold Linux and an initramfs.
pub const MEMORY_MIN: u64 = 32 << 20;
/// Most RAM a guest may have. Not a host's limit (that is checked where the host is known) but one that keeps every
/// sum here far from the 52 bits of a physical address.
pub const MEMORY_MAX: u64 = 1 << 40;

/// Why a memory size cannot be laid out.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LayoutError {
    /// Not a multiple of [`PAGE_SIZE`].
    #[error("memory of {0} bytes is not a multiple of 4 KiB: give whole MiB, like --memory 256M")]
    NotPages(u64),
    /// Under [`MEMORY_MIN`].
    #[error("memory of {0} bytes is too little: a guest needs at least --memory 32M")]
    TooSmall(u64),
    /// Over [`MEMORY_MAX`].
    #[error("memory of {0} bytes is too much: a guest can have at most --memory 1024G")]
    TooLarge(u64),
}

/// One line of the memory map that the guest is given: RAM. Nothing else is listed, since a guest takes for RAM only what
/// the map says, and each line costs it instructions (130,000 for one that reserves the area below 1 MiB).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct E820Entry {
    /// First guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub size: u64,
}

/// Where `size` bytes of RAM go: one region, or two when they do not fit below the hole.
///
/// # Errors
/// `size` is not whole pages, or outside [`MEMORY_MIN`]..=[`MEMORY_MAX`].
pub fn memory_regions(size: u64) -> Result<Vec<(GuestAddress, usize)>, LayoutError> {
    check(size)?;
    let bytes = |n: u64| usize::try_from(n).map_err(|_| LayoutError::TooLarge(size));
    let low = low_memory(size);
    let mut regions = vec![(GuestAddress(0), bytes(low)?)];
    if size > low {
        regions.push((GuestAddress(HIGH_MEMORY_START), bytes(size - low)?));
    }
    Ok(regions)
}

/// The memory map for a guest with `size` bytes of RAM, sorted and without overlaps.
///
/// # Errors
/// As [`memory_regions`].
pub fn e820(size: u64) -> Result<Vec<E820Entry>, LayoutError> {
    check(size)?;
    let low = low_memory(size);
    let entry = |start: u64, end: u64| E820Entry { addr: start, size: end - start };
    let mut map = vec![entry(0, LOW_RAM_END), entry(HIGH_RAM_START, low)];
    if size > low {
        map.push(entry(HIGH_MEMORY_START, HIGH_MEMORY_START + (size - low)));
    }
    Ok(map)
}

/// How much of `size` bytes of RAM lies below the hole; also the address at which low memory ends.
pub fn low_memory(size: u64) -> u64 {
    size.min(LOW_MEMORY_END)
}

/// Window of the `n`-th virtio-mmio device, or `None` when it would reach the IOAPIC. (Interrupt lines end long before:
/// see [`crate::config::irq_for_slot`].)
pub fn virtio_mmio(n: usize) -> Option<GuestAddress> {
    let start = u64::try_from(n).ok()?.checked_mul(VIRTIO_MMIO_SIZE)?.checked_add(VIRTIO_MMIO.0)?;
    (start < IOAPIC.0).then_some(GuestAddress(start))
}

fn check(size: u64) -> Result<(), LayoutError> {
    if size < MEMORY_MIN {
        return Err(LayoutError::TooSmall(size));
    }
    if size > MEMORY_MAX {
        return Err(LayoutError::TooLarge(size));
    }
    if !size.is_multiple_of(PAGE_SIZE) {
        return Err(LayoutError::NotPages(size));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
