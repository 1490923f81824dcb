//! Which ports user mode may touch, as the processor would decide (Intel SDM vol. 1, 19.5): by IOPL, then by the bitmap in
//! the task state segment. Where kernel mode is emulated, the host has been seen to let port accesses through unchecked.

use devices::GuestMemory;
use kvm_bindings::{kvm_regs, kvm_sregs};

use crate::vcpu::paging::{self, Access};

/// Offset of the I/O map's own offset in a 64-bit TSS.
const IO_MAP_BASE: u64 = 102;

/// Whether code at CPL 3 may access `width` bytes at `port`.
pub fn allowed(memory: &GuestMemory, regs: &kvm_regs, sregs: &kvm_sregs, port: u16, width: usize) -> bool {
    if regs.rflags >> 12 & 3 == 3 {
        return true;
    }
    let tss = &sregs.tr;
    if tss.present == 0 || tss.unusable != 0 {
        return false;
    }
    // The processor reads two bytes, so that an access may straddle them; both must lie within the segment.
    let bits = || {
        let map: [u8; 2] = paging::read(memory, sregs, tss.base.checked_add(IO_MAP_BASE)?, Access::Kernel)?;
        let offset = u64::from(u16::from_le_bytes(map)) + u64::from(port / 8);
        if offset + 1 > u64::from(tss.limit) {
            return None;
        }
        paging::read(memory, sregs, tss.base.checked_add(offset)?, Access::Kernel).map(u16::from_le_bytes)
    };
    let mask = (1u16 << width.clamp(1, 4)) - 1;
    bits().is_some_and(|bits| bits >> (port % 8) & mask == 0)
}

/// Where the output instruction that ends at `rip` begins. A guess by its last bytes, good enough to name the culprit: the
/// process is to die, and where exactly is of no consequence to anybody else.
pub fn start_of_output(memory: &GuestMemory, sregs: &kvm_sregs, rip: u64) -> u64 {
    let before = rip.wrapping_sub(2);
    match paging::read::<2>(memory, sregs, before, Access::Kernel) {
        // out dx, outs
        Some([_, 0xee | 0xef | 0x6e | 0x6f]) => rip.wrapping_sub(1),
        _ => before,
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    /// A guest with its first MiB mapped one to one, and a TSS at 0x8000 whose I/O map begins at 104.
    fn guest(limit: u32) -> (GuestMemory, kvm_regs, kvm_sregs) {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        for (at, entry) in [(0x1000u64, 0x2003u64), (0x2000, 0x3003), (0x3000, 0x83)] {
            memory.write_obj(entry, GuestAddress(at)).unwrap();
        }
        memory.write_obj(104u16, GuestAddress(0x8000 + IO_MAP_BASE)).unwrap();
        memory.write_slice(&[0xff; 0x100], GuestAddress(0x8000 + 104)).unwrap();
        let mut sregs = kvm_sregs { cr3: 0x1000, ..Default::default() };
        sregs.tr.base = 0x8000;
        sregs.tr.limit = limit;
        sregs.tr.present = 1;
        (memory, kvm_regs::default(), sregs)
    }

    #[test]
    fn iopl_gives_all_ports() {
        let (memory, mut regs, mut sregs) = guest(103);
        assert!(!allowed(&memory, &regs, &sregs, 0x3f8, 1));
        regs.rflags = 3 << 12;
        assert!(allowed(&memory, &regs, &sregs, 0x3f8, 1));
        regs.rflags = 2 << 12;
        sregs.tr.unusable = 1;
        assert!(!allowed(&memory, &regs, &sregs, 0x3f8, 1));
    }

    #[test]
    fn the_bitmap_gives_single_ports_and_all_bytes_count() {
        let (memory, regs, sregs) = guest(104 + 0x100);
        assert!(!allowed(&memory, &regs, &sregs, 0x87, 1));
        memory.write_obj(0x7fu8, GuestAddress(0x8000 + 104 + 0x10)).unwrap();
        assert!(allowed(&memory, &regs, &sregs, 0x87, 1), "its bit is clear");
        assert!(!allowed(&memory, &regs, &sregs, 0x87, 2), "that of the next is not");
        memory.write_obj(0xfeu8, GuestAddress(0x8000 + 104 + 0x11)).unwrap();
        assert!(allowed(&memory, &regs, &sregs, 0x87, 2));
        assert!(!allowed(&memory, &regs, &sregs, 0x87, 4));
    }

    #[test]
    fn beyond_the_segment_nothing_is_given() {
        let (memory, regs, sregs) = guest(104 + 1);
        memory.write_slice(&[0; 0x100], GuestAddress(0x8000 + 104)).unwrap();
        assert!(allowed(&memory, &regs, &sregs, 7, 1));
        assert!(!allowed(&memory, &regs, &sregs, 8, 1));
        assert!(!allowed(&memory, &regs, &sregs, u16::MAX, 4));
    }

    #[test]
    fn output_instructions_begin_one_or_two_bytes_back() {
        let (memory, _, sregs) = guest(103);
        memory.write_slice(&[0x90, 0xee, 0xe6, 0x7e], GuestAddress(0x5000)).unwrap();
        assert_eq!(start_of_output(&memory, &sregs, 0x5002), 0x5001);
        assert_eq!(start_of_output(&memory, &sregs, 0x5004), 0x5002);
    }
}
