//! CPUID where KVM emulates kernel mode: which features a guest's kernel must not find, since the emulator lacks their
//! instructions.
//!
//! Hiding is only half of it. Such a KVM shows a guest what user mode can see of the CPU whatever was set, so after
//! `KVM_SET_CPUID2` the builder reads back what is really shown (`KVM_GET_CPUID2`) and has the kernel's command line
//! turn off the rest: [`unsupported_features_still_visible`] and [`shows_xsave`].

use kvm_bindings::kvm_cpuid_entry2;

/// A bit of CPUID.
#[derive(Debug, Clone, Copy)]
struct Bit {
    function: u32,
    index: u32,
    register: Register,
    bit: u32,
}

#[derive(Debug, Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

const fn bit(function: u32, index: u32, register: Register, bit: u32) -> Bit {
    Bit { function, index, register, bit }
}

const XSAVE: Bit = bit(1, 0, Register::Ecx, 26);

/// What Linux's `clearcpuid=` calls the features that the emulator lacks (arch/x86/include/asm/cpufeatures.h). FSRS has no
/// name there before 6.19 and goes by its number, word 12 bit 11.
///
/// FSGSBASE is there for `lsl`: with it the kernel finds its per-CPU data by that instruction when an NMI or a debug exception
/// comes, and a kick can bring one on such hosts.
const UNSUPPORTED: [(&str, Bit); 11] = [
    ("fsgsbase", bit(7, 0, Register::Ebx, 0)),
    ("smap", bit(7, 0, Register::Ebx, 20)),
    ("erms", bit(7, 0, Register::Ebx, 9)),
    ("fsrm", bit(7, 0, Register::Edx, 4)),
    ("cx16", bit(1, 0, Register::Ecx, 13)),
    ("invpcid", bit(7, 0, Register::Ebx, 10)),
    ("bmi1", bit(7, 0, Register::Ebx, 3)),
    ("bmi2", bit(7, 0, Register::Ebx, 8)),
    ("popcnt", bit(1, 0, Register::Ecx, 23)),
    ("umip", bit(7, 0, Register::Ecx, 2)),
    ("395", bit(7, 1, Register::Eax, 11)),
];

/// Leaf 1, ECX: MONITOR, FMA, CX16, PCID, MOVBE, POPCNT, AES, XSAVE, OSXSAVE, AVX, F16C, RDRAND.
const LEAF_1_ECX: u32 = 1 << 3
    | 1 << 12
    | 1 << 13
    | 1 << 17
    | 1 << 22
    | 1 << 23
    | 1 << 25
    | 1 << 26
    | 1 << 27
    | 1 << 28
    | 1 << 29
    | 1 << 30;
/// Leaf 0x8000_0001, ECX: LZCNT.
const LZCNT: u32 = 1 << 5;
/// Leaf 0x8000_0001, EDX: pages of 1 GiB.
const PAGES_1G: u32 = 1 << 26;

/// Leaf 0x8000_0008, EBX: FXSAVE and XSAVE always keep the x87 error pointers. Without it Linux believes that an AMD CPU
/// leaks them from task to task and clears them at each switch by `fnclex; emms; fildl`, which the emulator lacks.
const XSAVEERPTR: u32 = 1 << 2;

/// Hides what the emulator lacks, and the performance counters. Pages of 1 GiB are hidden too: a guest of 2 GiB or more,
/// which would map its memory with them, hangs on `kvm_pvm` before its first message.
pub fn mask_for_emulated_kernel(entries: &mut [kvm_cpuid_entry2]) {
    for entry in entries {
        match (entry.function, entry.index) {
            (1, _) => entry.ecx &= !LEAF_1_ECX,
            (7, index) => {
                // EAX of subleaf 0 is the number of the last subleaf.
                let last = if index == 0 { entry.eax } else { 0 };
                clear(entry);
                entry.eax = last;
            }
            (0xa | 0xd, _) => clear(entry),
            (0x8000_0001, _) => {
                entry.ecx &= !LZCNT;
                entry.edx &= !PAGES_1G;
            }
            (0x8000_0008, _) => entry.ebx &= XSAVEERPTR,
            _ => {}
        }
    }
}

/// Names, as `clearcpuid=` takes them, of the features that a kernel would use and the emulator lacks, in what
/// `KVM_GET_CPUID2` reports after setting.
pub fn unsupported_features_still_visible(entries: &[kvm_cpuid_entry2]) -> Vec<&'static str> {
    UNSUPPORTED.iter().filter(|(_, bit)| is_set(entries, *bit)).map(|(name, _)| *name).collect()
}

/// Whether XSAVE is shown: then the kernel needs `noxsave`, which turns off everything that depends on it too.
pub fn shows_xsave(entries: &[kvm_cpuid_entry2]) -> bool {
    is_set(entries, XSAVE)
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

fn is_set(entries: &[kvm_cpuid_entry2], wanted: Bit) -> bool {
    entries.iter().filter(|entry| (entry.function, entry.index) == (wanted.function, wanted.index)).any(
        |entry| {
            let value = match wanted.register {
                Register::Eax => entry.eax,
                Register::Ebx => entry.ebx,
                Register::Ecx => entry.ecx,
                Register::Edx => entry.edx,
            };
            value & (1 << wanted.bit) != 0
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_ones() -> Vec<kvm_cpuid_entry2> {
        [(1, 0), (7, 0), (7, 1), (0xa, 0), (0xd, 0), (0xd, 2), (0x8000_0001, 0), (0x8000_0008, 0), (6, 0)]
            .map(|(function, index)| kvm_cpuid_entry2 {
                function,
                index,
                eax: u32::MAX,
                ebx: u32::MAX,
                ecx: u32::MAX,
                edx: u32::MAX,
                ..Default::default()
            })
            .to_vec()
    }

    #[test]
    fn a_full_cpu_shows_everything_and_a_masked_one_nothing() {
        let mut entries = all_ones();
        let names: Vec<_> = UNSUPPORTED.iter().map(|(name, _)| *name).collect();
        assert_eq!(unsupported_features_still_visible(&entries), names);
        assert!(shows_xsave(&entries));
        mask_for_emulated_kernel(&mut entries);
        assert!(unsupported_features_still_visible(&entries).is_empty());
        assert!(!shows_xsave(&entries));
        assert!(unsupported_features_still_visible(&[]).is_empty());
    }

    #[test]
    fn only_what_is_lacking_is_masked() {
        let mut entries = all_ones();
        mask_for_emulated_kernel(&mut entries);
        let find = |function, index| {
            *entries.iter().find(|entry| (entry.function, entry.index) == (function, index)).unwrap()
        };
        assert_eq!(find(1, 0).ecx, !0x7ec2_3008);
        assert_eq!((find(1, 0).edx, find(7, 0).eax, find(7, 1).eax), (u32::MAX, u32::MAX, 0));
        assert_eq!((find(0xd, 2).eax, find(0xa, 0).edx, find(0x8000_0008, 0).ebx), (0, 0, XSAVEERPTR));
        let extended = find(0x8000_0001, 0);
        assert_eq!((extended.ecx, extended.edx), (!(1 << 5), !(1 << 26)));
        assert_eq!(find(0x8000_0008, 0).eax, u32::MAX);
        assert_eq!(find(6, 0).eax, u32::MAX);
    }

    #[test]
    fn features_are_found_one_by_one() {
        for (name, bit) in UNSUPPORTED {
            let mut entry =
                kvm_cpuid_entry2 { function: bit.function, index: bit.index, ..Default::default() };
            *match bit.register {
                Register::Eax => &mut entry.eax,
                Register::Ebx => &mut entry.ebx,
                Register::Ecx => &mut entry.ecx,
                Register::Edx => &mut entry.edx,
            } = 1 << bit.bit;
            assert_eq!(unsupported_features_still_visible(&[entry]), [name]);
        }
    }
}
