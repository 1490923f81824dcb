//! Gives a VM its RAM.

use std::os::raw::c_int;

use devices::GuestMemory;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{Error, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// Makes every region of `memory` a memory slot of `vm`; with `track`, KVM logs which pages the guest writes to. The memory must outlive the VM: whoever owns both drops the VM first.
///
/// # Errors
/// Those of `KVM_SET_USER_MEMORY_REGION`.
pub fn register(vm: &VmFd, memory: &GuestMemory, track: bool) -> Result<(), Error> {
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let host = region
            .get_host_address(vm_memory::MemoryRegionAddress(0))
            .map_err(|_| Error::new(libc::EFAULT as c_int))?;
        let slot = kvm_userspace_memory_region {
            slot,
            flags: if track { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: the slot is exactly one live mapping of `memory`, and slots do not overlap since regions do not. The machine
        // keeps the memory for as long as the VM lives.
        unsafe { vm.set_user_memory_region(slot)? };
    }
    Ok(())
}

/// The pages of each slot that the guest wrote to since the last call, a bit each, lowest first.
///
/// # Errors
/// Those of `KVM_GET_DIRTY_LOG`.
pub fn take_dirty_log(vm: &VmFd, memory: &GuestMemory) -> Result<Vec<Vec<u64>>, Error> {
    let log = (0u32..).zip(memory.iter()).map(|(slot, region)| {
        let size = usize::try_from(region.len()).map_err(|_| Error::new(libc::E2BIG as c_int))?;
        vm.get_dirty_log(slot, size)
    });
    log.collect()
}

/// Asks the host to back `memory` with huge pages where it can: fewer faults while the kernel is loaded, and fewer and shorter
/// walks while the guest runs. A host that does not want to says so by doing nothing.
pub fn prefer_huge_pages(memory: &GuestMemory) {
    for region in memory.iter() {
        let Ok(length) = usize::try_from(region.len()) else { continue };
        // SAFETY: the range is one live mapping of `memory`, and the advice changes neither its content nor its rights.
        unsafe { libc::madvise(region.as_ptr().cast(), length, libc::MADV_HUGEPAGE) };
    }
}
