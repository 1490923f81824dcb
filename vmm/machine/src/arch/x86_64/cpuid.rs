//! What `CPUID` shows a vCPU: KVM's offer, with a topology of one package whose cores have one thread each.
//!
//! The builder gives [`for_vcpu`] the entries of `KVM_GET_SUPPORTED_CPUID` and sets the result with `KVM_SET_CPUID2`.
//! Everything about identity and features stays as KVM offers it. APIC IDs are vCPU numbers, as in the MP table.
//!
//! Sources: Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E; KVM's Documentation/virt/kvm/x86/cpuid.rst.

mod emulated;
pub mod features;

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

pub use self::emulated::{mask_for_emulated_kernel, shows_xsave, unsupported_features_still_visible};

const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHES_INTEL: u32 = 0x4;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_EXTENDED_FEATURES: u32 = 0x8000_0001;
const LEAF_SIZES: u32 = 0x8000_0008;
const LEAF_CACHES_AMD: u32 = 0x8000_001d;
const LEAF_TOPOLOGY_AMD: u32 = 0x8000_001e;
const LEAF_TOPOLOGY_AMD_V2: u32 = 0x8000_0026;

/// Leaf 1, ECX.
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: more than one logical processor in the package.
const HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX: with HTT, the processors are cores, not threads.
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 1, EBX: lines of 64 bytes, in units of 8.
const CLFLUSH_64: u32 = 8;

/// Level types of leaves 0xb and 0x1f, ECX.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// What vCPU `id` of `count` shows. Neither is taken at its word: an `id` beyond `count` shows its own number all the
/// same, and a `count` of 0 counts as 1.
pub fn for_vcpu(supported: &[kvm_cpuid_entry2], id: u8, count: u8) -> Vec<kvm_cpuid_entry2> {
    let topology = Topology::new(id, count);
    let mut entries: Vec<kvm_cpuid_entry2> =
        supported.iter().filter(|entry| !is_replaced(entry.function)).copied().collect();
    for entry in &mut entries {
        topology.describe(entry);
    }
    // A guest looks at these only if the highest leaf says that they are there.
    let highest = supported.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    for leaf in [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2] {
        if highest >= leaf {
            entries.extend(topology.levels(leaf));
        }
    }
    entries
}

/// Leaves that we write ourselves, or leave out: without 0x8000_0026 a guest falls back to 0xb.
fn is_replaced(function: u32) -> bool {
    matches!(function, LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 | LEAF_TOPOLOGY_AMD_V2)
}

/// One vCPU's place in the package.
struct Topology {
    id: u32,
    count: u32,
    /// Bits of an APIC ID that number the cores.
    bits: u32,
}

impl Topology {
    fn new(id: u8, count: u8) -> Self {
        let count = u32::from(count.max(1));
        Topology { id: id.into(), count, bits: count.next_power_of_two().trailing_zeros() }
    }

    /// Cores that the bits have room for, minus one.
    fn addressable(&self) -> u32 {
        (1 << self.bits) - 1
    }

    fn describe(&self, entry: &mut kvm_cpuid_entry2) {
        match entry.function {
            LEAF_FEATURES => {
                entry.ebx = (entry.ebx & 0xff) | CLFLUSH_64 << 8 | self.count << 16 | self.id << 24;
                entry.ecx |= X2APIC | TSC_DEADLINE | HYPERVISOR;
                set(&mut entry.edx, HTT, self.count > 1);
            }
            // Subleaf of a cache: bits 0 to 4 are its type, 5 to 7 its level, 14 to 25 how many share it.
            LEAF_CACHES_INTEL if entry.eax & 0x1f != 0 => {
                let low = entry.eax & 0x3fff;
                entry.eax = low | self.sharers(entry.eax) << 14 | self.addressable() << 26;
            }
            LEAF_CACHES_AMD if entry.eax & 0x1f != 0 => {
                let low = entry.eax & 0x3fff;
                entry.eax = low | self.sharers(entry.eax) << 14;
            }
            LEAF_EXTENDED_FEATURES => {
                let on = self.count > 1 && is_amd(entry.ecx);
                set(&mut entry.ecx, CMP_LEGACY, on);
            }
            // NC and ApicIdCoreIdSize; Intel has zeros here.
            LEAF_SIZES if entry.ecx != 0 => {
                entry.ecx = (entry.ecx & !0xf0ff) | (self.count - 1) | self.bits << 12;
            }
            LEAF_TOPOLOGY_AMD if entry.eax | entry.ebx | entry.ecx != 0 => {
                // Extended APIC ID; core ID with one thread a core; one node, number 0.
                (entry.eax, entry.ebx, entry.ecx) = (self.id, self.id, 0);
            }
            _ => {}
        }
    }

    /// How many vCPUs share the cache of this subleaf, minus one: its core has the first two levels for itself.
    fn sharers(&self, eax: u32) -> u32 {
        if (eax >> 5) & 0b111 >= 3 { self.addressable() } else { 0 }
    }

    /// Subleaves of 0xb and 0x1f: threads of a core, cores of the package, and the end.
    fn levels(&self, function: u32) -> [kvm_cpuid_entry2; 3] {
        let level = |index, shift, processors, kind: u32| kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: processors,
            ecx: index | kind << 8,
            edx: self.id,
            ..Default::default()
        };
        [level(0, 0, 1, LEVEL_THREAD), level(1, self.bits, self.count, LEVEL_CORE), level(2, 0, 0, 0)]
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on { *register |= bit } else { *register &= !bit }
}

/// Whether leaf 0x8000_0001's ECX is an AMD CPU's: Intel's has LAHF_LM, LZCNT and PREFETCHW alone, and reserves CMP_LEGACY.
fn is_amd(ecx: u32) -> bool {
    const AMD_ONLY: u32 = CMP_LEGACY | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 22;
    ecx & AMD_ONLY != 0
}

#[cfg(test)]
mod tests;
