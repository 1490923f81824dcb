//! The boot vCPU's registers at the kernel's first instruction, and the tables that they point to.
//!
//! Linux's 64-bit protocol wants long mode with what it touches first mapped 1:1, flat segments `__BOOT_CS` (0x10) and
//! `__BOOT_DS` (0x18), interrupts off, and the zero page in RSI (Documentation/arch/x86/boot.rst). PVH wants 32-bit
//! protected mode without paging, flat segments, a TSS, and the start info in EBX (Xen's docs/misc/pvh.pandoc). The other
//! vCPUs wait for their start-up IPI and need nothing.

use devices::GuestMemory;
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError};

use crate::layout::{
    BOOT_STACK, GDT, PAGE_DIRECTORIES, PAGE_DIRECTORY, PAGE_SIZE, PDPT, PML4, PVH_START_INFO, ZERO_PAGE,
};

/// Selectors of the boot GDT; code and data are those that Linux asks for.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TSS: u16 = 0x20;

/// Flat, present, accessed; code with L for long mode, or D for 32 bits (SDM vol. 3, 3.4.5).
const CODE_64: u64 = 0x00af_9b00_0000_ffff;
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
const DATA_32: u64 = 0x00cf_9300_0000_ffff;
/// A busy TSS at 0 with the least limit. Nothing reads it, but VM entry checks it (SDM vol. 3, 28.3.1.2).
const BUSY_TSS: u64 = 0x0000_8b00_0000_0067;

const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_AM: u64 = 1 << 18;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;
const LARGE_PAGE: u64 = 2 << 20;
const ENTRIES: u64 = 512;

/// How, and at which guest-physical address, the boot vCPU enters the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryPoint {
    /// By Linux's 64-bit boot protocol.
    Linux64 {
        /// First instruction.
        rip: GuestAddress,
    },
    /// By the PVH protocol.
    Pvh {
        /// First instruction; below 4 GiB.
        rip: GuestAddress,
    },
}

impl EntryPoint {
    /// The general registers.
    pub fn regs(&self) -> kvm_regs {
        match *self {
            EntryPoint::Linux64 { rip } => kvm_regs {
                rip: rip.0,
                rsi: ZERO_PAGE.0,
                rsp: BOOT_STACK.0,
                rflags: RFLAGS_RESERVED,
                ..Default::default()
            },
            EntryPoint::Pvh { rip } => {
                kvm_regs { rip: rip.0, rbx: PVH_START_INFO.0, rflags: RFLAGS_RESERVED, ..Default::default() }
            }
        }
    }

    /// Changes the special registers from their state at reset, as `KVM_GET_SREGS` gives it, to that of the entry.
    pub fn apply(&self, sregs: &mut kvm_sregs) {
        let gdt = self.gdt();
        let segment = |selector| descriptor_to_segment(&gdt, selector);
        sregs.cs = segment(CODE);
        sregs.ds = segment(DATA);
        sregs.es = segment(DATA);
        sregs.fs = segment(DATA);
        sregs.gs = segment(DATA);
        sregs.ss = segment(DATA);
        sregs.tr = segment(TSS);
        sregs.gdt = kvm_dtable { base: GDT.0, limit: GDT_LIMIT, ..Default::default() };
        // No IDT yet: an exception before the kernel has its own is a triple fault.
        sregs.idt = kvm_dtable::default();
        match self {
            EntryPoint::Linux64 { .. } => {
                sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG;
                sregs.cr3 = PML4.0;
                sregs.cr4 = CR4_PAE;
                sregs.efer = EFER_LME | EFER_LMA;
            }
            EntryPoint::Pvh { .. } => {
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr3 = 0;
                sregs.cr4 = 0;
                sregs.efer = 0;
            }
        }
    }

    /// Writes the GDT and, for long mode, page tables that map the first 4 GiB 1:1 by pages of 2 MiB.
    ///
    /// # Errors
    /// Guest memory lacks the addresses of [`crate::layout`].
    pub fn write_tables(&self, memory: &GuestMemory) -> Result<(), GuestMemoryError> {
        memory.write_slice(&to_bytes(self.gdt()), GDT)?;
        if let EntryPoint::Pvh { .. } = self {
            return Ok(());
        }
        let table = |n: u64| PAGE_DIRECTORY.unchecked_add(n * PAGE_SIZE);
        memory.write_slice(&to_bytes([PDPT.0 | PRESENT_WRITABLE]), PML4)?;
        memory.write_slice(&to_bytes((0..PAGE_DIRECTORIES).map(|n| table(n).0 | PRESENT_WRITABLE)), PDPT)?;
        let pages = (0..PAGE_DIRECTORIES * ENTRIES).map(|n| (n * LARGE_PAGE) | LARGE | PRESENT_WRITABLE);
        memory.write_slice(&to_bytes(pages), PAGE_DIRECTORY)
    }

    fn gdt(&self) -> [u64; GDT_ENTRIES] {
        let code = match self {
            EntryPoint::Linux64 { .. } => CODE_64,
            EntryPoint::Pvh { .. } => CODE_32,
        };
        // In long mode the last two are one TSS descriptor of 16 bytes, with the base's upper half in the second.
        [0, 0, code, DATA_32, BUSY_TSS, 0]
    }
}

const GDT_ENTRIES: usize = 6;
const GDT_LIMIT: u16 = 6 * 8 - 1;

/// The hidden part of a segment register as loading `selector` from `gdt` would set it (SDM vol. 3, 3.4.5).
fn descriptor_to_segment(gdt: &[u64; GDT_ENTRIES], selector: u16) -> kvm_segment {
    let descriptor = gdt.get(usize::from(selector / 8)).copied().unwrap_or_default();
    let bit = |n: u32| u8::from(descriptor & (1 << n) != 0);
    let bits =
        |from: u32, count: u32| u32::try_from((descriptor >> from) & ((1 << count) - 1)).unwrap_or_default();
    let limit = bits(0, 16) | (bits(48, 4) << 16);
    let [kind, dpl] = [bits(40, 4), bits(45, 2)].map(|value| value.to_le_bytes()[0]);
    kvm_segment {
        base: u64::from(bits(16, 24) | (bits(56, 8) << 24)),
        limit: if bit(55) == 1 { (limit << 12) | 0xfff } else { limit },
        selector,
        type_: kind,
        s: bit(44),
        dpl,
        present: bit(47),
        avl: bit(52),
        l: bit(53),
        db: bit(54),
        g: bit(55),
        ..Default::default()
    }
}

fn to_bytes(entries: impl IntoIterator<Item = u64>) -> Vec<u8> {
    entries.into_iter().flat_map(u64::to_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINUX: EntryPoint = EntryPoint::Linux64 { rip: GuestAddress(0x100_0123) };
    const PVH: EntryPoint = EntryPoint::Pvh { rip: GuestAddress(0x100_0000) };

    #[test]
    fn linux_is_entered_in_long_mode() {
        let mut sregs = kvm_sregs::default();
        LINUX.apply(&mut sregs);
        assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db, sregs.cs.type_), (0x10, 1, 0, 11));
        assert_eq!((sregs.ss.selector, sregs.ss.l, sregs.ss.db, sregs.ss.type_), (0x18, 0, 1, 3));
        assert_eq!((sregs.tr.selector, sregs.tr.s, sregs.tr.type_, sregs.tr.limit), (0x20, 0, 11, 0x67));
        assert_eq!((sregs.cs.base, sregs.cs.limit, sregs.cs.g, sregs.cs.present), (0, u32::MAX, 1, 1));
        assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer), (0x8005_0033, 0x9000, 0x20, 0x500));
        let regs = LINUX.regs();
        assert_eq!((regs.rip, regs.rsi, regs.rsp, regs.rflags), (0x100_0123, 0x7000, 0x8ff0, 2));
    }

    #[test]
    fn pvh_is_entered_in_protected_mode() {
        let mut sregs = kvm_sregs { cr4: 0x20, efer: 0x500, ..Default::default() };
        PVH.apply(&mut sregs);
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.limit), (0, 1, u32::MAX));
        assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer), (0x11, 0, 0, 0));
        let regs = PVH.regs();
        assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x100_0000, 0x6000, 2));
    }

    #[test]
    fn page_tables_map_four_gib_one_to_one() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        LINUX.write_tables(&memory).unwrap();
        let read = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
        for address in [0, 0x20_0000, 0x100_0123, 0x3fff_ffff, 0x4000_0000, 0xbfff_f000, 0xffff_ffffu64] {
            let pml4e = read(PML4.0 + (address >> 39) * 8);
            let pdpte = read((pml4e & !0xfff) + ((address >> 30) & 511) * 8);
            let pde = read((pdpte & !0xfff) + ((address >> 21) & 511) * 8);
            assert_eq!((pml4e & 0xfff, pdpte & 0xfff, pde & 0xfff), (3, 3, 0x83));
            assert_eq!(pde & !(LARGE_PAGE - 1), address & !(LARGE_PAGE - 1));
        }
        assert_eq!(read(PDPT.0 + 32), 0);
        assert_eq!(read(GDT.0 + 0x10), CODE_64);
    }

    #[test]
    fn pvh_writes_no_page_tables() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        PVH.write_tables(&memory).unwrap();
        assert_eq!(memory.read_obj::<u64>(PML4).unwrap(), 0);
        assert_eq!(memory.read_obj::<u64>(GuestAddress(GDT.0 + 0x10)).unwrap(), CODE_32);
    }

    #[test]
    fn descriptors_are_taken_apart() {
        // Base 0x12345678, limit 0xabcde bytes, DPL 3, AVL.
        let mut gdt = [0; GDT_ENTRIES];
        gdt[1] = 0x121a_f334_5678_bcde;
        let segment = descriptor_to_segment(&gdt, 8);
        assert_eq!((segment.base, segment.limit), (0x1234_5678, 0xa_bcde));
        assert_eq!((segment.dpl, segment.avl, segment.g, segment.type_, segment.s), (3, 1, 0, 3, 1));
    }
}
