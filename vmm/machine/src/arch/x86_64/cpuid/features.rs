//! Whether what one host's vCPUs showed can be had on another. Pure.

use kvm_bindings::kvm_cpuid_entry2;

/// Leaves and indices whose words are feature bits, with the bits of EAX, EBX, ECX and EDX that do not count: they tell of the
/// vCPU's state (OSXSAVE, APIC, OSPKE), of its number, or are KVM's to give whatever it says (x2APIC, TSC deadline, hypervisor).
const FEATURES: [(u32, u32, [u32; 4]); 6] = [
    (0x1, 0, [!0, !0, 1 << 21 | 1 << 24 | 1 << 27 | 1 << 31, 1 << 9 | 1 << 28]),
    (0x7, 0, [!0, 0, 1 << 4, 0]),
    (0x7, 1, [0, 0, 0, 0]),
    (0xd, 1, [0, !0, 0, 0]),
    (0x8000_0001, 0, [!0, !0, 1 << 1, 1 << 9 | 1 << 11]),
    (0x8000_0008, 0, [!0, 0, !0, !0]),
];

fn words(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
    let found = entries.iter().find(|e| e.function == function && e.index == index);
    found.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
}

/// What KVM offers, and what this processor itself has.
pub fn with_processors(offered: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
    let both = FEATURES.iter().map(|&(function, index, _)| {
        let own = std::arch::x86_64::__cpuid_count(function, index);
        let [eax, ebx, ecx, edx] = words(offered, function, index);
        kvm_cpuid_entry2 {
            function,
            index,
            eax: eax | own.eax,
            ebx: ebx | own.ebx,
            ecx: ecx | own.ecx,
            edx: edx | own.edx,
            ..Default::default()
        }
    });
    both.collect()
}

/// The first leaf in which `saved` has a feature that `here` lacks.
pub fn missing(saved: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> Option<u32> {
    FEATURES.iter().find_map(|&(function, index, ignored)| {
        let (had, has) = (words(saved, function, index), words(here, function, index));
        let lacks = had.iter().zip(has).zip(ignored).any(|((had, has), ignored)| had & !has & !ignored != 0);
        lacks.then_some(function)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, words: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = words;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    #[test]
    fn a_feature_too_few_is_told() {
        let saved = [entry(1, 0, [1, 2, 1 << 27 | 1, 1]), entry(7, 0, [2, 1 << 5, 0, 0])];
        assert_eq!(missing(&saved, &saved), None);
        let same_but_state = [entry(1, 0, [9, 9, 1, 1]), entry(7, 0, [0, 1 << 5 | 1, 7, 7])];
        assert_eq!(missing(&saved, &same_but_state), None);
        let lesser = [entry(1, 0, [1, 2, 1, 1]), entry(7, 0, [2, 0, 0, 0])];
        assert_eq!(missing(&saved, &lesser), Some(7));
        assert_eq!(missing(&saved, &[]), Some(1));
        assert_eq!(missing(&[], &lesser), None);
    }
}
