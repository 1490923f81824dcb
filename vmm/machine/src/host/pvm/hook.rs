//! Measure 4, first half: the kernel's page-fault handler begins with a port write of ours.
//!
//! The handler is found through gate 14 of the IDT, as the processor would. Its first instruction must be one that does nothing
//! on such a host, and is replaced by `out %al, $PORT` and no-ops of the same length; any other prologue is left alone.

use std::sync::{Mutex, Once, PoisonError};

use devices::GuestMemory;
use kvm_bindings::{kvm_regs, kvm_sregs};
use serde::{Deserialize, Serialize};
use vm_memory::Bytes;

use crate::vcpu::paging::{self, Access};

/// The port that the hook writes to. Nothing on a PC answers there.
pub const PORT: u16 = 0x7e;

/// `out %al, $0x7e`
const OUT: [u8; 2] = [0xe6, 0x7e];
const NOP: u8 = 0x90;
/// Vector of the page fault (Intel SDM vol. 3, table 6-1).
const PAGE_FAULT: u64 = 14;

/// Where the hook is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Virtual address of the handler.
    pub handler: u64,
    /// Where its first byte lies in guest memory.
    pub physical: u64,
    /// What stood there before.
    pub original: [u8; 4],
}

/// The hook of one VM. All its vCPUs share the IDT and the kernel's text.
#[derive(Default)]
pub struct Hook(Mutex<Option<Place>>);

impl Hook {
    /// Where the hook is, for a snapshot.
    pub fn place(&self) -> Option<Place> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A hook that is in place already, in memory that was saved with it.
    pub fn restored(place: Option<Place>) -> Self {
        Hook(Mutex::new(place))
    }

    /// Whether the vCPU, having just written to [`PORT`], did so in the hook: in kernel mode, right behind its first instruction.
    pub fn hit(&self, regs: &kvm_regs, sregs: &kvm_sregs) -> bool {
        let place = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        super::syscall::cpl(sregs) == 0
            && place.is_some_and(|p| regs.rip == p.handler.wrapping_add(OUT.len() as u64))
    }

    /// Puts the hook where the IDT says the page-fault handler is, if it is not there already.
    pub fn install(&self, memory: &GuestMemory, sregs: &kvm_sregs) {
        static WARN: Once = Once::new();
        let mut place = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(handler) = handler(memory, sregs) else { return };
        let Some(mapping) = paging::translate(memory, sregs, handler) else { return };
        let physical = mapping.physical;
        let Ok(found) = memory.read_obj::<[u8; 4]>(physical) else { return };
        // A prologue that crosses a page would be odd, and is not worth the trouble.
        if physical.0 & 0xfff > 0xffc {
            return;
        }
        if place.is_none_or(|p| p.handler != handler) && patch(found).is_none() {
            WARN.call_once(|| {
                log::warn!(
                    "the guest's page-fault handler begins with{}, which is not known to do nothing: system calls will fail",
                    crate::vcpu::exit::hex(&found)
                );
            });
        }
        if let Some(patched) = patch(found) {
            log::debug!("page-fault handler at {handler:#x} begins {found:02x?}: hooked");
            // A single write: another vCPU sees the old instruction or the new one.
            if memory.write_obj(u32::from_le_bytes(patched), physical).is_ok() {
                *place = Some(Place { handler, physical: physical.0, original: found });
            }
        }
    }
}

/// The handler that gate 14 of the IDT names (64-bit gates, Intel SDM vol. 3, 6.14.1).
fn handler(memory: &GuestMemory, sregs: &kvm_sregs) -> Option<u64> {
    let gate = PAGE_FAULT * 16;
    if u64::from(sregs.idt.limit) < gate + 15 {
        return None;
    }
    let gate: [u8; 16] = paging::read(memory, sregs, sregs.idt.base.checked_add(gate)?, Access::Kernel)?;
    let gate = u128::from_le_bytes(gate);
    if gate >> 47 & 1 == 0 {
        return None;
    }
    let bits = |from: u32, mask: u128| u64::try_from(gate >> from & mask).unwrap_or(0);
    Some(bits(0, 0xffff) | bits(48, 0xffff) << 16 | bits(64, 0xffff_ffff) << 32)
}

/// What the prologue becomes, if it is one that we may replace.
fn patch(found: [u8; 4]) -> Option<[u8; 4]> {
    match found {
        // endbr64
        [0xf3, 0x0f, 0x1e, 0xfa] => Some([OUT[0], OUT[1], NOP, NOP]),
        // Three bytes that do nothing, or clac before the kernel took it out; then cld.
        [NOP, NOP, NOP, 0xfc] | [0x0f, 0x1f, 0x00, 0xfc] | [0x0f, 0x01, 0xca, 0xfc] => {
            Some([OUT[0], OUT[1], NOP, 0xfc])
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    #[test]
    fn replaces_only_what_it_knows() {
        assert_eq!(patch([0xf3, 0x0f, 0x1e, 0xfa]), Some([0xe6, 0x7e, 0x90, 0x90]));
        assert_eq!(patch([0x90, 0x90, 0x90, 0xfc]), Some([0xe6, 0x7e, 0x90, 0xfc]));
        assert_eq!(patch([0x0f, 0x01, 0xca, 0xfc]), Some([0xe6, 0x7e, 0x90, 0xfc]));
        assert_eq!(patch([0x0f, 0x1f, 0x00, 0xfc]), Some([0xe6, 0x7e, 0x90, 0xfc]));
        for other in [[0xe6, 0x7e, 0x90, 0xfc], [0x55, 0x48, 0x89, 0xe5], [0; 4], [0x90, 0x90, 0x90, 0x90]] {
            assert_eq!(patch(other), None);
        }
    }

    /// A guest with its first MiB mapped one to one, an IDT at 0x8000 and a page-fault handler at 0x9000.
    fn guest() -> (GuestMemory, kvm_sregs) {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        for (at, entry) in [(0x1000u64, 0x2003u64), (0x2000, 0x3003), (0x3000, 0x83)] {
            memory.write_obj(entry, GuestAddress(at)).unwrap();
        }
        let gate = 0x8e00_0010_9000u128 | 0x0010 << 16;
        memory.write_obj(gate.to_le_bytes(), GuestAddress(0x8000 + 14 * 16)).unwrap();
        memory.write_slice(&[0x90, 0x90, 0x90, 0xfc], GuestAddress(0x9000)).unwrap();
        let mut sregs = kvm_sregs { cr3: 0x1000, ..Default::default() };
        sregs.idt.base = 0x8000;
        sregs.idt.limit = 0xfff;
        (memory, sregs)
    }

    #[test]
    fn finds_the_handler_and_comes_back_when_it_was_overwritten() {
        let (memory, sregs) = guest();
        let hook = Hook::default();
        let bytes = || memory.read_obj::<[u8; 4]>(GuestAddress(0x9000)).unwrap();
        hook.install(&memory, &sregs);
        assert_eq!(bytes(), [0xe6, 0x7e, 0x90, 0xfc]);
        memory.write_slice(&[0x0f, 0x1f, 0x00, 0xfc], GuestAddress(0x9000)).unwrap();
        hook.install(&memory, &sregs);
        assert_eq!(bytes(), [0xe6, 0x7e, 0x90, 0xfc]);
    }

    #[test]
    fn is_hit_only_by_the_kernel_at_its_own_address() {
        let (memory, mut sregs) = guest();
        let hook = Hook::default();
        let at = |rip| kvm_regs { rip, ..Default::default() };
        assert!(!hook.hit(&at(0x9002), &sregs), "not installed");
        hook.install(&memory, &sregs);
        assert!(hook.hit(&at(0x9002), &sregs));
        assert!(!hook.hit(&at(0x9003), &sregs));
        sregs.ss.dpl = 3;
        assert!(!hook.hit(&at(0x9002), &sregs), "user mode cannot forge it");
    }

    #[test]
    fn an_idt_that_says_nothing_is_left_alone() {
        let (memory, sregs) = guest();
        let hook = Hook::default();
        for (base, limit) in [(0x8000, 10), (0xffff_ffff_ffff_ff80, 0xfff), (0x20_0000_0000, 0xfff)] {
            let mut sregs = sregs;
            sregs.idt.base = base;
            sregs.idt.limit = limit;
            hook.install(&memory, &sregs);
            assert!(hook.0.lock().unwrap().is_none());
        }
    }
}
