//! Model-specific registers as a firmware would leave them for the kernel: the few whose value at reset does not serve.
//!
//! The builder sets them on every vCPU with `KVM_SET_MSRS` before the guest runs.

use kvm_bindings::kvm_msr_entry;

/// The time-stamp counter (IA32_TIME_STAMP_COUNTER).
pub const TSC: u32 = 0x10;
/// When the local APIC's timer fires, by that counter (IA32_TSC_DEADLINE).
pub const TSC_DEADLINE: u32 = 0x6e0;

const MSR_IA32_SYSENTER_CS: u32 = 0x174;
const MSR_IA32_SYSENTER_ESP: u32 = 0x175;
const MSR_IA32_SYSENTER_EIP: u32 = 0x176;
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MSR_IA32_CR_PAT: u32 = 0x277;
const MSR_IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_CSTAR: u32 = 0xc000_0083;
const MSR_SFMASK: u32 = 0xc000_0084;
const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;

/// Fast `rep movs` and `rep stos` (SDM vol. 4, table 2-2).
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// The table at power-up (SDM vol. 3, 13.12.4): WB, WT, UC-, UC, and again.
const PAT_DEFAULT: u64 = 0x0007_0406_0007_0406;
/// MTRRs on, and write-back where none says otherwise: without it a guest's RAM would be uncached by the letter of the
/// SDM (vol. 3, 13.11.2.1), and Linux says so.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// What to set, in order. All of these exist on every CPU with long mode that KVM shows; KVM stops at the first that it refuses, so
/// the one that a guest can do without comes last.
pub fn at_reset() -> Vec<kvm_msr_entry> {
    [
        (MSR_IA32_SYSENTER_CS, 0),
        (MSR_IA32_SYSENTER_ESP, 0),
        (MSR_IA32_SYSENTER_EIP, 0),
        (MSR_STAR, 0),
        (MSR_LSTAR, 0),
        (MSR_CSTAR, 0),
        (MSR_SFMASK, 0),
        (MSR_KERNEL_GS_BASE, 0),
        (MSR_IA32_CR_PAT, PAT_DEFAULT),
        (MSR_IA32_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
        (MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
    ]
    .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() })
    .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_is_set_once() {
        let list = at_reset();
        let mut indices: Vec<u32> = list.iter().map(|entry| entry.index).collect();
        indices.sort_unstable();
        indices.dedup();
        assert_eq!(indices.len(), list.len());
        let value = |index| list.iter().find(|entry| entry.index == index).unwrap().data;
        assert_eq!((value(0x1a0), value(0x2ff), value(0x277)), (1, 0x806, 0x0007_0406_0007_0406));
    }
}
