//! Which pages changed since the last snapshot: KVM's log of what the guest wrote, and ours of what devices and the machine did.

use devices::GuestMemory;
use devices::memory::take_dirty_pages;
use kvm_ioctls::{Error, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::memory::{PAGE, Pages, Run};
use crate::kvm::memory::take_dirty_log;

/// Takes both logs: the pages, numbered as in a memory file. `memory` is tracked, and nobody writes to it now.
///
/// # Errors
/// Those of KVM.
pub fn take(vm: &VmFd, memory: &GuestMemory) -> Result<Vec<Run>, Error> {
    let guests = take_dirty_log(vm, memory)?;
    let ours = take_dirty_pages(memory);
    let mut pages = Pages::default();
    let mut first = 0;
    for (slot, region) in memory.iter().enumerate() {
        let count = region.len() / PAGE;
        let guests = guests.get(slot).map(Vec::as_slice).unwrap_or_default();
        let ours = ours.iter().find(|dirty| dirty.start == region.start_addr());
        let ours = ours.map(|dirty| dirty.pages.as_slice()).unwrap_or_default();
        for page in (0..count).filter(|page| bit(guests, *page) || bit(ours, *page)) {
            pages.add(first + page);
        }
        first += count;
    }
    Ok(pages.0)
}

fn bit(words: &[u64], number: u64) -> bool {
    let word = usize::try_from(number / 64).ok().and_then(|index| words.get(index));
    word.is_some_and(|word| word >> (number % 64) & 1 != 0)
}
