//! All that KVM knows of one vCPU, as plain data: taken from a vCPU at rest, and put into a fresh one.
//!
//! Both happen on the vCPU's own thread or before it has one. The order of the calls is KVM's: what a later call depends on comes
//! first (Documentation/virt/kvm/api.rst names the dependencies; QEMU and Firecracker keep to the same order).

use devices::bounded;
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Error, Kvm, VcpuFd};
use serde::{Deserialize, Serialize};
use thiserror::Error as ThisError;

use crate::arch::x86_64::cpuid::features;
use crate::arch::x86_64::msrs::{self, TSC, TSC_DEADLINE};
use crate::host::pvm::syscall::Entry;
use crate::kvm::tsc;

/// `KVM_GET_MSRS` takes so many at a time (`MAX_IO_MSRS` in arch/x86/kvm/x86.c).
const MOST_MSRS: usize = 256;
/// Far more registers than KVM lists.
const MOST_SAVED_MSRS: usize = 4096;
/// Where the state of the extended features ends at most: far above AMX's, the largest there is.
const MOST_XSAVE: usize = 64 << 10;

/// The state of one vCPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// The XSAVE area: 4 KiB, and what `KVM_CAP_XSAVE2` says is more.
    #[serde(deserialize_with = "bounded::list::<_, _, { MOST_XSAVE / 4 }>")]
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    /// In the order in which KVM lists them.
    #[serde(deserialize_with = "bounded::list::<_, _, MOST_SAVED_MSRS>")]
    msrs: Vec<kvm_msr_entry>,
    /// What CPUID answers.
    #[serde(deserialize_with = "bounded::list::<_, _, KVM_MAX_CPUID_ENTRIES>")]
    cpuid: Vec<kvm_cpuid_entry2>,
    /// Ticks a millisecond of its time-stamp counter.
    tsc_khz: u32,
    /// What KVM added to the host's time-stamp counter, where kernel mode is emulated.
    tsc_offset: Option<u64>,
    /// Where its system calls go, on hosts that emulate kernel mode.
    pub entry: Option<Entry>,
}

/// Why a vCPU's state could not be taken or put.
#[derive(Debug, ThisError)]
#[allow(missing_docs, reason = "the message says it")]
pub enum VcpuStateError {
    #[error("KVM refused to {what}: {source}")]
    Kvm { what: &'static str, source: Error },
    #[error(
        "the vCPU needs register {0:#x}, which this host's KVM does not take: restore where it was saved"
    )]
    Msr(u32),
    #[error(
        "the vCPU needs a processor feature that this host lacks (CPUID {0:#x}): restore on a host that has it"
    )]
    Feature(u32),
    #[error("the vCPU's time-stamp counter runs at {saved} kHz, this host's at {here}, and cannot be scaled")]
    TscRate { saved: u32, here: u32 },
    #[error("the vCPU's state is malformed: {0}")]
    Malformed(&'static str),
    #[error(
        "the guest runs virtual machines itself, whose state cannot be saved: stop them, and unload its hypervisor"
    )]
    Nested,
    #[error("a vCPU has stopped for good")]
    Stopped,
}

fn kvm(what: &'static str) -> impl FnOnce(Error) -> VcpuStateError {
    move |source| VcpuStateError::Kvm { what, source }
}

/// What KVM can tell of any vCPU on this host.
#[derive(Debug, Clone)]
pub struct Registers {
    msrs: Vec<u32>,
    /// The guest reads the host's time-stamp counter.
    host_tsc: bool,
    /// Bytes of the XSAVE area.
    xsave: usize,
    /// What a vCPU can show.
    cpuid: Vec<kvm_cpuid_entry2>,
}

impl Registers {
    /// Asks KVM. Where kernel mode is `emulated`, vCPUs show the processor's own features beside those that KVM offers.
    ///
    /// # Errors
    /// Those of `KVM_GET_MSR_INDEX_LIST` and `KVM_GET_SUPPORTED_CPUID`.
    pub fn of_host(host: &Kvm, emulated: bool) -> Result<Self, VcpuStateError> {
        let list = host.get_msr_index_list().map_err(kvm("list its registers"))?;
        let xsave = usize::try_from(host.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let cpuid =
            host.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm("say what its vCPUs can do"))?;
        Ok(Registers {
            msrs: msrs::to_save(list.as_slice()),
            host_tsc: emulated,
            xsave: xsave.clamp(size_of::<kvm_xsave>(), MOST_XSAVE),
            cpuid: if emulated {
                features::with_processors(cpuid.as_slice())
            } else {
                cpuid.as_slice().to_vec()
            },
        })
    }
}

impl VcpuState {
    /// Takes the state of a vCPU at rest.
    ///
    /// # Errors
    /// Those of KVM.
    pub fn save(vcpu: &VcpuFd, registers: &Registers, entry: Option<Entry>) -> Result<Self, VcpuStateError> {
        // First, since it may make KVM accept events that show in what follows.
        let mp_state = vcpu.get_mp_state().map_err(kvm("tell a vCPU's run state"))?;
        let sregs = vcpu.get_sregs().map_err(kvm("tell a vCPU's system registers"))?;
        if is_hypervisor(&sregs) {
            return Err(VcpuStateError::Nested);
        }
        Ok(VcpuState {
            mp_state,
            regs: vcpu.get_regs().map_err(kvm("tell a vCPU's registers"))?,
            sregs,
            xsave: save_xsave(vcpu, registers.xsave)?,
            xcrs: vcpu.get_xcrs().map_err(kvm("tell a vCPU's extended control registers"))?,
            debug: vcpu.get_debug_regs().map_err(kvm("tell a vCPU's debug registers"))?,
            // Before the interrupt controller: a deadline that passes in between then comes twice, which is harmless, and not
            // never.
            msrs: save_msrs(vcpu, &registers.msrs)?,
            lapic: vcpu.get_lapic().map_err(kvm("tell a vCPU's interrupt controller"))?,
            cpuid: vcpu
                .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
                .map_err(kvm("tell what a vCPU shows"))?
                .as_slice()
                .to_vec(),
            tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
            tsc_offset: if registers.host_tsc { tsc::offset(vcpu).ok() } else { None },
            // Last: reading other state may turn a pending event into another.
            events: vcpu.get_vcpu_events().map_err(kvm("tell a vCPU's events"))?,
            entry,
        })
    }

    /// What CPUID answered where this was saved.
    pub fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }

    /// Puts the state into a fresh vCPU.
    ///
    /// # Errors
    /// Those of KVM, and what this host lacks.
    pub fn restore(&self, vcpu: &VcpuFd, registers: &Registers) -> Result<(), VcpuStateError> {
        if let Some(leaf) = features::missing(&self.cpuid, &registers.cpuid) {
            return Err(VcpuStateError::Feature(leaf));
        }
        let cpuid = CpuId::from_entries(&self.cpuid);
        let cpuid = cpuid.map_err(|_| VcpuStateError::Malformed("more than 256 CPUID leaves"))?;
        vcpu.set_cpuid2(&cpuid).map_err(kvm("show a vCPU's saved features"))?;
        self.restore_tsc_rate(vcpu)?;
        vcpu.set_mp_state(self.mp_state).map_err(kvm("set a vCPU's run state"))?;
        vcpu.set_sregs(&self.sregs).map_err(kvm("set a vCPU's system registers"))?;
        vcpu.set_regs(&self.regs).map_err(kvm("set a vCPU's registers"))?;
        restore_xsave(vcpu, &self.xsave, registers.xsave)?;
        vcpu.set_xcrs(&self.xcrs).map_err(kvm("set a vCPU's extended control registers"))?;
        vcpu.set_debug_regs(&self.debug).map_err(kvm("set a vCPU's debug registers"))?;
        vcpu.set_lapic(&self.lapic).map_err(kvm("set a vCPU's interrupt controller"))?;
        let offset = self.tsc_offset.filter(|_| registers.host_tsc);
        if let Some(offset) = offset {
            tsc::set_offset(vcpu, offset).map_err(kvm("set a vCPU's time-stamp counter"))?;
        }
        restore_msrs(vcpu, &self.msrs, offset.is_none())?;
        vcpu.set_vcpu_events(&self.events).map_err(kvm("set a vCPU's events"))?;
        // A guest that was asked may know that it was stopped, and not take it for a lock-up. Others cannot be told.
        let _ = vcpu.kvmclock_ctrl();
        Ok(())
    }

    fn restore_tsc_rate(&self, vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
        let here = vcpu.get_tsc_khz().unwrap_or(0);
        // As QEMU does: rates within 250 parts in a million are the same clock, measured twice.
        let tolerance = here / 4000;
        if self.tsc_khz == 0 || here == 0 || self.tsc_khz.abs_diff(here) <= tolerance {
            return Ok(());
        }
        vcpu.set_tsc_khz(self.tsc_khz).map_err(|_| VcpuStateError::TscRate { saved: self.tsc_khz, here })
    }
}

/// Whether the vCPU has VMX or SVM switched on (CR4.VMXE, EFER.SVME).
fn is_hypervisor(sregs: &kvm_sregs) -> bool {
    sregs.cr4 & 1 << 13 != 0 || sregs.efer & 1 << 12 != 0
}

fn save_xsave(vcpu: &VcpuFd, size: usize) -> Result<Vec<u32>, VcpuStateError> {
    let refused = kvm("tell a vCPU's floating-point registers");
    if size <= size_of::<kvm_xsave>() {
        return Ok(vcpu.get_xsave().map_err(refused)?.region.to_vec());
    }
    let more = (size - size_of::<kvm_xsave>()).div_ceil(size_of::<u32>());
    let mut xsave = Xsave::new(more).map_err(|_| VcpuStateError::Malformed("XSAVE area too large"))?;
    // SAFETY: `xsave` has room for `size` bytes, which is what KVM said that the area takes at most.
    unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(refused)?;
    let head = xsave.as_fam_struct_ref().xsave.region.to_vec();
    Ok([&head, xsave.as_slice()].concat())
}

fn restore_xsave(vcpu: &VcpuFd, words: &[u32], size: usize) -> Result<(), VcpuStateError> {
    let mut xsave = kvm_xsave::default();
    let head = xsave.region.len();
    let (Some(first), Some(rest)) = (words.get(..head), words.get(head..)) else {
        return Err(VcpuStateError::Malformed("XSAVE area too small"));
    };
    xsave.region.copy_from_slice(first);
    let more = size.saturating_sub(size_of::<kvm_xsave>()).div_ceil(size_of::<u32>());
    // What is beyond this host's area must be empty: else the guest used a feature that is not here.
    if rest.get(more..).is_some_and(|beyond| beyond.iter().any(|word| *word != 0)) {
        return Err(VcpuStateError::Feature(0xd));
    }
    let mut area = Xsave::new(more).map_err(|_| VcpuStateError::Malformed("XSAVE area too large"))?;
    for (to, from) in area.as_mut_slice().iter_mut().zip(rest) {
        *to = *from;
    }
    // SAFETY: only the first member is written, not the length that belongs to the allocation.
    unsafe { area.as_mut_fam_struct() }.xsave = xsave;
    // SAFETY: the area has as many bytes as this host's KVM reads (KVM_CAP_XSAVE2, at least 4 KiB).
    unsafe { vcpu.set_xsave2(&area) }.map_err(kvm("set a vCPU's floating-point registers"))
}

fn save_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, VcpuStateError> {
    let mut saved = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let (now, later) = rest.split_at(rest.len().min(MOST_MSRS));
        let entries: Vec<_> =
            now.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut told =
            Msrs::from_entries(&entries).map_err(|_| VcpuStateError::Malformed("too many registers"))?;
        let count = vcpu.get_msrs(&mut told).map_err(kvm("tell a vCPU's model-specific registers"))?;
        saved.extend(told.as_slice().iter().take(count).filter(|entry| !msrs::is_at_reset(entry)));
        // KVM stops at one that this vCPU does not have: leave that out.
        rest = if count < now.len() { rest.get(count + 1..).unwrap_or_default() } else { later };
    }
    Ok(saved)
}

/// The time-stamp counter comes first, if it is to be `set` at all, and its deadline last: that arms the timer, by what the counter says then.
fn restore_msrs(vcpu: &VcpuFd, saved: &[kvm_msr_entry], set: bool) -> Result<(), VcpuStateError> {
    let rank = |entry: &kvm_msr_entry| match entry.index {
        TSC => 0,
        TSC_DEADLINE => 2,
        _ => 1,
    };
    let mut ordered = saved.to_vec();
    ordered.retain(|entry| set || entry.index != TSC);
    ordered.sort_by_key(rank);
    let mut rest = ordered.as_slice();
    while !rest.is_empty() {
        let (now, later) = rest.split_at(rest.len().min(MOST_MSRS));
        let msrs = Msrs::from_entries(now).map_err(|_| VcpuStateError::Malformed("too many registers"))?;
        let count = vcpu.set_msrs(&msrs).map_err(kvm("set a vCPU's model-specific registers"))?;
        let Some(refused) = now.get(count) else {
            rest = later;
            continue;
        };
        // Some are only told. That is no harm where the fresh vCPU has the same.
        if read_msr(vcpu, refused.index) != Some(refused.data) {
            return Err(VcpuStateError::Msr(refused.index));
        }
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    Ok(())
}

fn read_msr(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).ok()?;
    let count = vcpu.get_msrs(&mut msrs).ok()?;
    msrs.as_slice().first().filter(|_| count == 1).map(|entry| entry.data)
}

/// One that no vCPU ever had, for tests.
#[cfg(test)]
pub(super) fn example() -> VcpuState {
    VcpuState {
        mp_state: kvm_mp_state::default(),
        regs: kvm_regs { rip: 0x10_0000, rflags: 2, ..Default::default() },
        sregs: kvm_sregs::default(),
        xsave: vec![0; 1024],
        xcrs: kvm_xcrs::default(),
        debug: kvm_debugregs::default(),
        lapic: kvm_lapic_state::default(),
        events: kvm_vcpu_events::default(),
        msrs: vec![kvm_msr_entry { index: TSC, data: 5, ..Default::default() }; 3],
        cpuid: vec![kvm_cpuid_entry2::default(); 2],
        tsc_khz: 2_000_000,
        tsc_offset: None,
        entry: None,
    }
}

#[cfg(test)]
#[path = "vcpu_tests.rs"]
mod tests;
