//! vCPUs before they have threads: as at reset, at a kernel's entry, or as a snapshot has them. Called by [`super::build`] and
//! [`super::restore`].

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs};
use kvm_ioctls::VcpuFd;

use super::{BuildError, Builder, kvm};
use crate::arch::x86_64::{cpuid, lapic, msrs};
use crate::snapshot::vcpu::{Registers, VcpuState};

impl Builder<'_> {
    pub(super) fn vcpu(&self, id: u8, count: u8) -> Result<VcpuFd, BuildError> {
        self.timeline.in_kvm(|| {
            let fd = self.vm.create_vcpu(id.into()).map_err(kvm("create a vCPU"))?;
            fd.set_cpuid2(&self.shown(id, count)?).map_err(kvm("set what a vCPU shows"))?;
            let reset =
                Msrs::from_entries(&msrs::at_reset()).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG));
            let set =
                reset.and_then(|reset| fd.set_msrs(&reset).map(|count| count == reset.as_slice().len()));
            if !set.map_err(kvm("set a vCPU's registers"))? {
                log::warn!("vcpu {id}: KVM refused a register that firmware sets");
            }
            let mut lapic = fd.get_lapic().map_err(kvm("read a vCPU's interrupt controller"))?;
            lapic::connect_local_interrupts(&mut lapic);
            fd.set_lapic(&lapic).map_err(kvm("set a vCPU's interrupt controller"))?;
            Ok(fd)
        })
    }

    pub(super) fn restored_vcpu(
        &self,
        id: u8,
        state: &VcpuState,
        registers: &Registers,
    ) -> Result<VcpuFd, BuildError> {
        self.timeline.in_kvm(|| {
            let fd = self.vm.create_vcpu(id.into()).map_err(kvm("create a vCPU"))?;
            state.restore(&fd, registers)?;
            Ok(fd)
        })
    }

    fn shown(&self, id: u8, count: u8) -> Result<CpuId, BuildError> {
        let supported = self.host.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        let supported = supported.map_err(kvm("say what its vCPUs can do"))?;
        let mut entries = cpuid::for_vcpu(supported.as_slice(), id, count);
        if self.emulated {
            cpuid::mask_for_emulated_kernel(&mut entries);
        }
        let too_many = |_| BuildError::Kvm {
            what: "show more than 256 CPUID leaves",
            source: kvm_ioctls::Error::new(libc::E2BIG),
        };
        CpuId::from_entries(&entries).map_err(too_many)
    }

    pub(super) fn enter(
        &self,
        vcpu: &VcpuFd,
        entry: &crate::arch::x86_64::EntryPoint,
    ) -> Result<(), BuildError> {
        self.timeline.in_kvm(|| {
            let mut sregs = vcpu.get_sregs().map_err(kvm("read the boot vCPU's state"))?;
            entry.apply(&mut sregs);
            vcpu.set_sregs(&sregs).map_err(kvm("set the boot vCPU's state"))?;
            vcpu.set_regs(&entry.regs()).map_err(kvm("set the boot vCPU's registers"))
        })
    }
}
