//! Measure 1: words for the kernel's command line on such hosts.

use kvm_bindings::kvm_cpuid_entry2;

use crate::arch::x86_64::cpuid;
use crate::boot::{Cmdline, CmdlineError};

/// Words for kernels that were not made for such hosts (`images/kernel/README.md` has the figures). To ours they mean nothing.
const OTHER_KERNELS: &[&str] = &[
    // Some mitigations are instructions that the emulator lacks (`verw`), and none protects code that does not run on the CPU.
    "mitigations=off",
    // Keeps the lock prefixes: patching them in and out costs more than they do.
    "noreplace-smp",
    // Leaves kernel text writable instead of splitting its large pages.
    "rodata=off",
    // The guest reads the host's time-stamp counter, which does not stand still while a machine is saved: in its copies time would jump,
    // and each tick that was missed cost instructions. KVM's clock stands still.
    "clocksource=kvm-clock",
    // A quarter of the boot goes into files in sysfs that nobody reads.
    "initcall_blacklist=param_sysfs_builtin_init,slab_late_init,irq_sysfs_init",
    // The BPF compiler's output would itself run in the emulator: for filters that run a few times it never pays.
    "sysctl.net.core.bpf_jit_enable=0",
];

/// Adds what a kernel needs where vCPUs show `shown`: features that the emulator lacks are turned off by name, and what only costs
/// there is left out.
///
/// # Errors
/// When the line gets too long.
pub fn add(cmdline: &mut Cmdline, shown: &[kvm_cpuid_entry2]) -> Result<(), CmdlineError> {
    if cpuid::shows_xsave(shown) {
        cmdline.push("noxsave")?;
    }
    cmdline.clear_features(cpuid::unsupported_features_still_visible(shown))?;
    OTHER_KERNELS.iter().try_for_each(|word| cmdline.push(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_turned_off() {
        // Leaf 1: XSAVE and CMPXCHG16B; leaf 7: SMAP.
        let shown = [
            kvm_cpuid_entry2 { function: 1, ecx: 1 << 26 | 1 << 13, ..Default::default() },
            kvm_cpuid_entry2 { function: 7, ebx: 1 << 20, ..Default::default() },
        ];
        let mut cmdline = Cmdline::new();
        add(&mut cmdline, &shown).unwrap();
        assert!(cmdline.text().starts_with("noxsave "), "{}", cmdline.text());
        let cleared =
            cmdline.text().split(' ').find_map(|w| w.strip_prefix("clearcpuid=").map(str::to_owned));
        let mut cleared: Vec<_> = cleared.unwrap().split(',').map(str::to_owned).collect();
        cleared.sort();
        assert_eq!(cleared, ["cx16", "smap"]);
    }
}
