//! How far a vCPU's time-stamp counter is from the host's, as KVM sees it (`KVM_VCPU_TSC_CTRL`, Linux 5.16; devices/vcpu.rst, 4).
//!
//! Where kernel mode is emulated the guest reads the host's counter whatever KVM was told, but KVM computes the guest's clock with what it
//! was told. So there a copy of a machine has to have the same offset, or its clock jumps by all the time between.

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr};
use kvm_ioctls::{Error, VcpuFd};
use vmm_sys_util::ioctl::ioctl_with_ref;

#[allow(missing_docs, reason = "the macro makes public functions")]
mod number {
    use kvm_bindings::{KVMIO, kvm_device_attr};
    vmm_sys_util::ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    vmm_sys_util::ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
}

fn attribute(offset: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: offset as u64,
        flags: 0,
    }
}

/// What is added to the host's counter.
///
/// # Errors
/// That of KVM: `ENXIO` or `ENOTTY` where it does not tell.
pub fn offset(vcpu: &VcpuFd) -> Result<u64, Error> {
    let mut offset = 0;
    // SAFETY: KVM writes a u64 to the address, which is that of one that lives past the call.
    let result = unsafe { ioctl_with_ref(vcpu, number::KVM_GET_DEVICE_ATTR(), &attribute(&raw mut offset)) };
    if result < 0 { Err(Error::last()) } else { Ok(offset) }
}

/// Sets what is added to the host's counter.
///
/// # Errors
/// That of KVM.
pub fn set_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<(), Error> {
    // SAFETY: KVM reads a u64 from the address, which is that of one that lives past the call.
    let result = unsafe { ioctl_with_ref(vcpu, number::KVM_SET_DEVICE_ATTR(), &attribute(&raw mut offset)) };
    if result < 0 { Err(Error::last()) } else { Ok(()) }
}
