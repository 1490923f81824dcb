//! Walks the guest's page tables, as the processor would (Intel SDM vol. 3, 4.5; AMD APM vol. 2, 5.3).
//!
//! Pure over guest memory. The guest may change its tables meanwhile: the answer is one that some table said, and every
//! address is checked against guest memory when it is used.

use devices::GuestMemory;
use kvm_bindings::kvm_sregs;
use vm_memory::{Bytes, GuestAddress};

const PRESENT: u64 = 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const NO_EXECUTE: u64 = 1 << 63;
const CR4_LA57: u64 = 1 << 12;
const EFER_NXE: u64 = 1 << 11;

/// Who reads, and so what can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The kernel: everything that is mapped.
    Kernel,
    /// User mode, for its next instruction.
    UserFetch,
}

/// A page of the guest's address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// Where the virtual address lies in guest-physical memory.
    pub physical: GuestAddress,
    /// Whether user mode may reach it.
    pub user: bool,
    /// Whether code may run from it.
    pub execute: bool,
}

/// Translates a virtual address under long-mode paging; `None` where nothing is mapped.
pub fn translate(memory: &GuestMemory, sregs: &kvm_sregs, address: u64) -> Option<Mapping> {
    let levels = if sregs.cr4 & CR4_LA57 == 0 { 4 } else { 5 };
    let mut table = sregs.cr3 & ADDRESS;
    let (mut user, mut execute) = (true, true);
    // All bits above those that are translated must be copies of the highest of them.
    let unused = 64 - (12 + 9 * levels);
    if (address << unused).cast_signed() >> unused != address.cast_signed() {
        return None;
    }
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let entry: u64 = memory.read_obj(GuestAddress(table + (address >> shift & 511) * 8)).ok()?;
        if entry & PRESENT == 0 {
            return None;
        }
        user &= entry & USER != 0;
        execute &= entry & NO_EXECUTE == 0 || sregs.efer & EFER_NXE == 0;
        let leaf = level == 0 || (matches!(level, 1 | 2) && entry & LARGE != 0);
        if leaf {
            let offset = (1u64 << shift) - 1;
            return Some(Mapping {
                physical: GuestAddress(entry & ADDRESS & !offset | address & offset),
                user,
                execute,
            });
        }
        table = entry & ADDRESS;
    }
    None
}

/// Reads `N` bytes at a virtual address, across a page boundary too.
pub fn read<const N: usize>(
    memory: &GuestMemory,
    sregs: &kvm_sregs,
    address: u64,
    access: Access,
) -> Option<[u8; N]> {
    let mut data = [0; N];
    for (i, byte) in (0u64..).zip(data.iter_mut()) {
        let at = translate(memory, sregs, address.checked_add(i)?)?;
        if access == Access::UserFetch && !(at.user && at.execute) {
            return None;
        }
        *byte = memory.read_obj(at.physical).ok()?;
    }
    Some(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest() -> (GuestMemory, kvm_sregs) {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        for (at, entry) in [
            (0x1000, 0x2000 | PRESENT | USER),              // PML4[0]
            (0x2000, 0x3000 | PRESENT | USER),              // PDPT[0]
            (0x2008, 0x4000_0000 | PRESENT | LARGE),        // PDPT[1]: 1 GiB, supervisor
            (0x3000, 0x4000 | PRESENT | USER),              // PD[0]
            (0x3008, 0x0020_0000 | PRESENT | USER | LARGE), // PD[1]: 2 MiB
            (0x4000, 0x5000 | PRESENT | USER | 1 << 63),    // PT[0]
            (0x4008, 0x6000 | PRESENT),                     // PT[1]: supervisor
        ] {
            memory.write_obj::<u64>(entry, GuestAddress(at)).unwrap();
        }
        (memory, kvm_sregs { cr3: 0x1000, ..Default::default() })
    }

    #[test]
    fn finds_pages_of_every_size() {
        let (memory, sregs) = guest();
        assert_eq!(translate(&memory, &sregs, 1 << 47 | 0x123), None, "not canonical");
        assert_eq!(translate(&memory, &sregs, 0xffff << 48 | 0x123), None, "not canonical");
        let found = |a| translate(&memory, &sregs, a).map(|m| (m.physical.0, m.user));
        assert_eq!(found(0x123), Some((0x5123, true)));
        assert_eq!(found(0x1123), Some((0x6123, false)));
        assert_eq!(found(0x0020_1234), Some((0x0020_1234, true)));
        assert_eq!(found(0x4000_5678), Some((0x4000_5678, false)));
        assert_eq!(found(0x2000), None);
        assert_eq!(found(0x8000_0000), None);
    }

    #[test]
    fn tables_outside_memory_map_nothing() {
        let (memory, mut sregs) = guest();
        sregs.cr3 = 0xf_ffff_f000;
        assert_eq!(translate(&memory, &sregs, 0), None);
        let (memory, mut sregs) = guest();
        sregs.cr4 = CR4_LA57;
        assert_eq!(translate(&memory, &sregs, 0x1123), None, "one level deeper there is nothing");
    }

    #[test]
    fn user_reads_stop_at_supervisor_pages() {
        let (memory, sregs) = guest();
        memory.write_slice(&[1, 2], GuestAddress(0x5ffe)).unwrap();
        memory.write_slice(&[3, 4], GuestAddress(0x6000)).unwrap();
        assert_eq!(read::<4>(&memory, &sregs, 0xffe, Access::Kernel), Some([1, 2, 3, 4]));
        assert_eq!(read::<4>(&memory, &sregs, 0xffe, Access::UserFetch), None);
        assert_eq!(read::<2>(&memory, &sregs, 0xffe, Access::UserFetch), Some([1, 2]));
        assert_eq!(read::<2>(&memory, &sregs, u64::MAX, Access::Kernel), None);
        let sregs = kvm_sregs { efer: EFER_NXE, ..sregs };
        assert_eq!(read::<2>(&memory, &sregs, 0xffe, Access::UserFetch), None, "data is not code");
        assert_eq!(read::<2>(&memory, &sregs, 0xffe, Access::Kernel), Some([1, 2]));
    }
}
