use kvm_ioctls::VmFd;

use super::*;

/// A VM with one vCPU; `None` where there is no KVM.
fn vcpu(kvm: &Kvm) -> Option<(VmFd, VcpuFd)> {
    let vm = kvm.create_vm().ok()?;
    vm.create_irq_chip().ok()?;
    let vcpu = vm.create_vcpu(0).ok()?;
    Some((vm, vcpu))
}

#[test]
fn a_vcpu_becomes_another() {
    let Ok(kvm) = Kvm::new() else { return };
    let (Some((_one, from)), Some((_other, to))) = (vcpu(&kvm), vcpu(&kvm)) else { return };
    let registers = Registers::of_host(&kvm, true).unwrap();
    from.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap()).unwrap();
    from.set_msrs(&Msrs::from_entries(&msrs::at_reset()).unwrap()).unwrap();
    let saved = VcpuState::save(&from, &registers, None).unwrap();
    // KVM does not list it.
    assert!(saved.msrs.iter().any(|entry| (entry.index, entry.data) == (0x2ff, 0x806)));
    saved.restore(&to, &registers).unwrap();
    let again = VcpuState::save(&to, &registers, None).unwrap();
    let still = |state: VcpuState| {
        // Time goes on.
        let msrs = state.msrs.iter().filter(|entry| entry.index != TSC).copied().collect();
        VcpuState { msrs, ..state }
    };
    assert_eq!(still(saved), still(again));
}

#[test]
fn a_guest_that_is_a_hypervisor_is_noticed() {
    let sregs = kvm_sregs { cr4: 0x3506f0, efer: 0xd01, ..Default::default() };
    assert!(!is_hypervisor(&sregs));
    assert!(is_hypervisor(&kvm_sregs { cr4: sregs.cr4 | 1 << 13, ..sregs }));
    assert!(is_hypervisor(&kvm_sregs { efer: sregs.efer | 1 << 12, ..sregs }));
}
