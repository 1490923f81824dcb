//! Measure 4, second half: telling a `SYSCALL` from any other page fault, and completing it.
//!
//! On such a host `SYSCALL` loads RCX, R11 and RIP as it should, but the privilege level stays 3. The fetch of the first
//! instruction at LSTAR is then user mode's touch of a kernel page: a page fault, whose frame the kernel's handler finds on its
//! stack, and so do we. To complete it we do what the processor would have done (AMD APM vol. 3, SYSCALL).

use devices::GuestMemory;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use crate::vcpu::paging::{self, Access};

/// The registers that say where `SYSCALL` goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Entry {
    /// Selectors (0xC0000081).
    pub star: u64,
    /// Address of the kernel's entry (0xC0000082).
    pub lstar: u64,
    /// Flags that are cleared on the way in (0xC0000084).
    pub sfmask: u64,
}

/// What the processor pushed for the page fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

mod fault {
    pub const PRESENT: u64 = 1;
    pub const USER: u64 = 1 << 2;
    pub const FETCH: u64 = 1 << 4;
}

mod flag {
    pub const FIXED: u64 = 1 << 1;
    pub const INTERRUPT: u64 = 1 << 9;
    pub const RESUME: u64 = 1 << 16;
    /// Everything that user mode can have in its flags: CF PF AF ZF SF TF IF DF OF NT AC ID, and the bit that is always one.
    pub const USER: u64 = 0xcd5 | FIXED | 1 << 8 | INTERRUPT | 1 << 14 | 1 << 18 | 1 << 21;
}

/// The current privilege level: that of the stack segment.
pub fn cpl(sregs: &kvm_sregs) -> u8 {
    sregs.ss.dpl
}

impl Frame {
    /// The frame on the kernel's stack, if it is on pages that user mode cannot reach.
    pub fn read(memory: &GuestMemory, regs: &kvm_regs, sregs: &kvm_sregs) -> Option<Frame> {
        let last = regs.rsp.checked_add(47)?;
        for end in [regs.rsp, last] {
            if paging::translate(memory, sregs, end)?.user {
                return None;
            }
        }
        let words: [u8; 48] = paging::read(memory, sregs, regs.rsp, Access::Kernel)?;
        let (words, _) = words.as_chunks::<8>();
        let [error, rip, cs, rflags, rsp, ss] = *words else { return None };
        let word = u64::from_le_bytes;
        Some(Frame {
            error: word(error),
            rip: word(rip),
            cs: word(cs),
            rflags: word(rflags),
            rsp: word(rsp),
            ss: word(ss),
        })
    }
}

/// Whether the fault is a `SYSCALL` that did not arrive. `regs` are those at the hook: all but RSP and RIP are user mode's.
///
/// A process can jump to LSTAR itself and choose RCX and R11. Both must then be such as a `SYSCALL` at RCX − 2 would leave
/// them; so all that it gains is that system call.
pub fn is_syscall(
    memory: &GuestMemory,
    entry: &Entry,
    frame: &Frame,
    regs: &kvm_regs,
    sregs: &kvm_sregs,
) -> bool {
    let fetch = fault::USER | fault::FETCH;
    entry.lstar != 0
        && frame.rip == entry.lstar
        && frame.cs & 3 == 3
        && frame.error & !fault::PRESENT == fetch
        && regs.r11 & !flag::USER == 0
        && regs.r11 & (flag::FIXED | flag::INTERRUPT) == flag::FIXED | flag::INTERRUPT
        && regs.rcx.checked_sub(2).and_then(|at| paging::read(memory, sregs, at, Access::UserFetch))
            == Some([0x0f, 0x05])
}

/// Puts the vCPU where `SYSCALL` should have brought it.
pub fn complete(entry: &Entry, frame: &Frame, regs: &mut kvm_regs, sregs: &mut kvm_sregs) {
    regs.rip = entry.lstar;
    regs.rsp = frame.rsp;
    regs.rflags = regs.r11 & !entry.sfmask & !flag::RESUME | flag::FIXED;
    let [_, _, _, _, low, high, _, _] = entry.star.to_le_bytes();
    let selector = u16::from_le_bytes([low, high]) & !3;
    let flat =
        kvm_segment { base: 0, limit: 0xffff_ffff, present: 1, dpl: 0, s: 1, g: 1, ..Default::default() };
    // Code: execute, read, accessed, 64-bit. Data: read, write, accessed, 32-bit.
    sregs.cs = kvm_segment { selector, type_: 11, l: 1, db: 0, ..flat };
    sregs.ss = kvm_segment { selector: selector.wrapping_add(8), type_: 3, l: 0, db: 1, ..flat };
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const LSTAR: u64 = 0xffff_ffff_8100_0000;
    const ENTRY: Entry = Entry { star: 0x0023_0010_0000_0000, lstar: LSTAR, sfmask: 0x0025_7fd5 };

    /// User pages at 0–4 KiB with `syscall` at 0x100, a kernel's stack page at 8 KiB.
    fn guest() -> (GuestMemory, kvm_regs, kvm_sregs) {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        for (at, entry) in [(0x1_1000u64, 0x1_2007u64), (0x1_2000, 0x1_3007), (0x1_3000, 0x1_4007)] {
            memory.write_obj(entry, GuestAddress(at)).unwrap();
        }
        for (page, rights) in [(0u64, 7u64), (1, 3), (2, 3)] {
            memory.write_obj(page << 12 | rights, GuestAddress(0x1_4000 + 8 * page)).unwrap();
        }
        memory.write_slice(&[0x0f, 0x05], GuestAddress(0x100)).unwrap();
        // The same bytes where user mode cannot read them.
        memory.write_slice(&[0x0f, 0x05], GuestAddress(0x1100)).unwrap();
        let regs = kvm_regs { rcx: 0x102, r11: 0x246, rsp: 0x2800, rip: 0x9002, ..Default::default() };
        (memory, regs, kvm_sregs { cr3: 0x1_1000, ..Default::default() })
    }

    fn frame() -> Frame {
        Frame { error: 0x15, rip: LSTAR, cs: 0x33, rflags: 0x246, rsp: 0x7fff_0000, ss: 0x2b }
    }

    fn put(memory: &GuestMemory, at: u64, f: &Frame) {
        let words = [f.error, f.rip, f.cs, f.rflags, f.rsp, f.ss];
        for (i, word) in (0u64..).zip(words) {
            memory.write_obj(word, GuestAddress(at + 8 * i)).unwrap();
        }
    }

    #[test]
    fn a_syscall_is_completed() {
        let (memory, mut regs, mut sregs) = guest();
        put(&memory, 0x2800, &frame());
        let found = Frame::read(&memory, &regs, &sregs).unwrap();
        assert_eq!(found, frame());
        assert!(is_syscall(&memory, &ENTRY, &found, &regs, &sregs));
        assert!(
            is_syscall(&memory, &ENTRY, &Frame { error: 0x14, ..found }, &regs, &sregs),
            "page not mapped"
        );
        complete(&ENTRY, &found, &mut regs, &mut sregs);
        assert_eq!((regs.rip, regs.rsp, regs.rflags), (LSTAR, 0x7fff_0000, 0x2));
        assert_eq!((sregs.cs.selector, sregs.ss.selector, cpl(&sregs)), (0x10, 0x18, 0));
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.ss.type_), (1, 0, 3));
    }

    #[test]
    fn other_faults_are_the_kernels() {
        let (memory, regs, sregs) = guest();
        let others = [
            Frame { error: 0x4, ..frame() },
            Frame { error: 0x35, ..frame() },
            Frame { rip: LSTAR + 1, ..frame() },
            Frame { cs: 0x10, ..frame() },
        ];
        for other in others {
            assert!(!is_syscall(&memory, &ENTRY, &other, &regs, &sregs), "{other:?}");
        }
        let none = Entry::default();
        assert!(!is_syscall(&memory, &none, &Frame { rip: 0, ..frame() }, &regs, &sregs));
    }

    #[test]
    fn a_jump_to_the_entry_needs_what_a_syscall_leaves() {
        let (memory, regs, sregs) = guest();
        let cases = [
            ("no syscall at rcx", kvm_regs { rcx: 0x103, ..regs }),
            ("rcx too low", kvm_regs { rcx: 1, ..regs }),
            ("rcx in the kernel", kvm_regs { rcx: 0x1102, ..regs }),
            ("rcx where nothing is", kvm_regs { rcx: 0x5_0000_0000, ..regs }),
            ("interrupts off", kvm_regs { r11: 0x46, ..regs }),
            ("iopl", kvm_regs { r11: 0x3246, ..regs }),
            ("vm86", kvm_regs { r11: 0x2_0246, ..regs }),
            ("reserved", kvm_regs { r11: 0x24e, ..regs }),
            ("high", kvm_regs { r11: 1 << 32 | 0x246, ..regs }),
            ("bit 1 missing", kvm_regs { r11: 0x244, ..regs }),
        ];
        for (what, regs) in cases {
            assert!(!is_syscall(&memory, &ENTRY, &frame(), &regs, &sregs), "{what}");
        }
    }

    #[test]
    fn a_frame_on_a_user_page_is_no_frame() {
        let (memory, regs, sregs) = guest();
        put(&memory, 0x800, &frame());
        for rsp in [0x800, 0xff0, u64::MAX - 8, 0x3000] {
            assert_eq!(Frame::read(&memory, &kvm_regs { rsp, ..regs }, &sregs), None, "{rsp:#x}");
        }
    }
}
