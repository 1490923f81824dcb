use super::*;

fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = registers;
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

/// Four cores with two threads on a Xeon, as far as it matters.
fn intel() -> Vec<kvm_cpuid_entry2> {
    vec![
        entry(0, 0, [0x1f, 0, 0, 0]),
        entry(1, 0, [0x50654, 0x0710_0800, 0x0000_0001, 0x178b_fbff]),
        entry(4, 0, [0x1c00_4121, 0x01c0_003f, 0x3f, 0]),
        entry(4, 2, [0x1c00_4143, 0x03c0_003f, 0x3ff, 0]),
        entry(4, 3, [0x1c03_c163, 0x0280_003f, 0x8fff, 4]),
        entry(4, 4, [0, 0, 0, 0]),
        entry(0xb, 0, [1, 2, 0x100, 7]),
        entry(0xb, 1, [4, 8, 0x201, 7]),
        entry(0x1f, 0, [1, 2, 0x100, 7]),
        entry(0x8000_0001, 0, [0, 0, 0x121, 0x2c10_0800]),
        entry(0x8000_0008, 0, [0x3027, 0, 0, 0]),
    ]
}

/// As KVM offers it on the project's EPYC machines.
fn amd() -> Vec<kvm_cpuid_entry2> {
    vec![
        entry(0, 0, [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        entry(1, 0, [0x00a1_0f11, 0x0002_0800, 0x8120_2000, 0x078b_fbff]),
        entry(0xb, 0, [0, 0, 0, 0]),
        entry(0x8000_0001, 0, [0x00a1_0f11, 0x4000_0000, 0x0040_0393, 0x23d3_fbff]),
        entry(0x8000_0008, 0, [0x3030, 0x5002_0005, 0x7001, 0]),
        entry(0x8000_001d, 0, [0x0000_4121, 0, 0, 0]),
        entry(0x8000_001d, 3, [0x0000_c163, 0, 0, 0]),
        entry(0x8000_001e, 0, [5, 0x102, 0x300, 0]),
        entry(0x8000_0026, 0, [1, 2, 0x100, 0]),
    ]
}

fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
    let mut found = entries.iter().filter(|entry| (entry.function, entry.index) == (function, index));
    let first = *found.next().unwrap();
    assert!(found.next().is_none(), "leaf {function:#x}.{index} twice");
    first
}

#[test]
fn ids_counts_and_flags_of_every_size() {
    for supported in [intel(), amd()] {
        for count in 1..=64u8 {
            for id in [0, count / 2, count - 1] {
                let entries = for_vcpu(&supported, id, count);
                let leaf = find(&entries, 1, 0);
                assert_eq!(leaf.ebx, u32::from(id) << 24 | u32::from(count) << 16 | 0x800);
                assert_eq!(leaf.ecx & 0x8120_0000, 0x8120_0000);
                assert_eq!(leaf.edx & HTT != 0, count > 1);
                let (thread, core, end) =
                    (find(&entries, 0xb, 0), find(&entries, 0xb, 1), find(&entries, 0xb, 2));
                assert_eq!((thread.eax, thread.ebx, thread.ecx), (0, 1, 0x100));
                assert_eq!((core.ebx, core.ecx), (count.into(), 0x201));
                assert_eq!((end.eax, end.ebx, end.ecx), (0, 0, 2));
                assert!([thread, core, end].iter().all(|level| level.edx == u32::from(id)));
                // All IDs differ in the bits of the core level, and only in them.
                assert!(u32::from(count - 1) >> core.eax == 0);
                assert!(core.eax == 0 || u32::from(count - 1) >> (core.eax - 1) != 0);
            }
        }
    }
}

#[test]
fn intel_caches_are_shared_from_the_third_level_on() {
    let entries = for_vcpu(&intel(), 63, 64);
    let sharing = |index| {
        let eax = find(&entries, 4, index).eax;
        ((eax >> 14) & 0xfff, eax >> 26, eax & 0x3fff)
    };
    assert_eq!(sharing(0), (0, 63, 0x121));
    assert_eq!(sharing(2), (0, 63, 0x143));
    assert_eq!(sharing(3), (63, 63, 0x163));
    assert_eq!(find(&entries, 4, 4).eax, 0);
    assert_eq!(find(&entries, 0x1f, 1).eax, 6);
    assert_eq!(find(&entries, 0x8000_0001, 0).ecx, 0x121);
    assert_eq!(find(&entries, 0x8000_0008, 0).ecx, 0);
}

#[test]
fn amd_leaves_tell_the_same() {
    let entries = for_vcpu(&amd(), 5, 6);
    assert_eq!(find(&entries, 0x8000_0008, 0).ecx, 0x3005);
    assert_eq!(find(&entries, 0x8000_0001, 0).ecx & CMP_LEGACY, CMP_LEGACY);
    let leaf = find(&entries, 0x8000_001e, 0);
    assert_eq!((leaf.eax, leaf.ebx, leaf.ecx), (5, 5, 0));
    assert_eq!(find(&entries, 0x8000_001d, 0).eax, 0x121);
    assert_eq!(find(&entries, 0x8000_001d, 3).eax, 7 << 14 | 0x163);
    assert!(entries.iter().all(|entry| entry.function != 0x1f && entry.function != 0x8000_0026));
    assert_eq!(find(&for_vcpu(&amd(), 0, 1), 0x8000_0001, 0).ecx & CMP_LEGACY, 0);
}

#[test]
fn old_cpus_get_no_leaf_beyond_their_last() {
    let old = [entry(0, 0, [7, 0, 0, 0]), entry(1, 0, [0; 4])];
    assert!(for_vcpu(&old, 0, 2).iter().all(|entry| entry.function <= 7));
    assert!(for_vcpu(&[], 255, 0).is_empty());
}
