//! Model-specific registers as a firmware would leave them for the kernel: the few whose value at reset does not serve.
//!
//! The builder sets them on every vCPU with `KVM_SET_MSRS` before the guest runs. A snapshot has them all, and more: [`to_save`].

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

/// Registers that `KVM_GET_MSR_INDEX_LIST` leaves out, since it lists only what differs between processors or is KVM's own
/// (arch/x86/kvm/x86.c): memory types (MTRRs, SDM vol. 3, 13.11) and the banks of machine checks (17.3.2).
const NOT_LISTED: [std::ops::RangeInclusive<u32>; 6] = [
    // Variable ranges; fixed ranges of 64, 16 and 4 KiB; what holds elsewhere.
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    MSR_IA32_MTRR_DEF_TYPE..=MSR_IA32_MTRR_DEF_TYPE,
    // Control, status, address and more of each of the 32 banks that KVM gives a vCPU.
    0x400..=0x47f,
];
/// Hyper-V's. KVM lists them for every vCPU; no machine of ours shows its guest that it has them, and to write them, zeros even, has KVM
/// make room for all of that.
const HYPER_V: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_10ff;

/// What a snapshot has of a vCPU whose KVM lists `listed`.
pub fn to_save(listed: &[u32]) -> Vec<u32> {
    let more = NOT_LISTED.into_iter().flatten().filter(|index| !listed.contains(index));
    listed.iter().copied().filter(|index| !HYPER_V.contains(index)).chain(more).collect()
}

/// Whether a snapshot can do without `entry`: a fresh vCPU has zeros in what KVM does not list.
pub fn is_at_reset(entry: &kvm_msr_entry) -> bool {
    entry.data == 0 && NOT_LISTED.iter().any(|range| range.contains(&entry.index))
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

    #[test]
    fn a_snapshot_has_what_kvm_lists_and_leaves_out() {
        let saved = to_save(&[TSC, MSR_IA32_CR_PAT, 0x4000_0020, 0x4b56_4d00, 0x401]);
        for index in [TSC, MSR_IA32_CR_PAT, 0x4b56_4d00, 0x200, 0x20f, 0x250, 0x26f, 0x2ff, 0x400, 0x47f] {
            assert!(saved.contains(&index), "{index:#x}");
        }
        assert!(!saved.contains(&0x4000_0020));
        let mut once = saved.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(once.len(), saved.len());
        // What a firmware sets comes back too.
        assert!(at_reset().iter().all(|entry| !is_at_reset(entry)));
        assert!(is_at_reset(&kvm_msr_entry { index: 0x401, ..Default::default() }));
        assert!(!is_at_reset(&kvm_msr_entry { index: TSC, ..Default::default() }));
    }
}
