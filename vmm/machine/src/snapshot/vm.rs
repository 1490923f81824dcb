//! What KVM knows of the VM beside its vCPUs: the interrupt controllers, the timer, the clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::{Error, VmFd};
use serde::{Deserialize, Serialize};

use crate::host::pvm::PvmState;

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// The VM's own state.
#[derive(Clone, Serialize, Deserialize)]
pub struct VmState {
    /// In the order of [`CHIPS`].
    #[serde(deserialize_with = "devices::bounded::list::<_, _, { CHIPS.len() }>")]
    chips: Vec<kvm_irqchip>,
    /// Only where there is one.
    pit: Option<kvm_pit_state2>,
    clock: kvm_clock_data,
    /// The measures, on hosts that emulate kernel mode.
    pub pvm: Option<PvmState>,
}

impl VmState {
    /// Takes the state of a VM whose vCPUs are at rest.
    ///
    /// # Errors
    /// Those of KVM.
    pub fn save(vm: &VmFd, has_pit: bool, pvm: Option<PvmState>) -> Result<Self, Error> {
        let mut chips = Vec::with_capacity(CHIPS.len());
        for chip_id in CHIPS {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip)?;
            chips.push(chip);
        }
        let pit = if has_pit { Some(vm.get_pit2()?) } else { None };
        Ok(VmState { chips, pit, clock: vm.get_clock()?, pvm })
    }

    /// Puts the interrupt controllers and the timer into a fresh VM. Before the vCPUs' state: their local interrupt
    /// controllers may hold what has come from here.
    ///
    /// # Errors
    /// Those of KVM; `EINVAL` for state that is not a PC's.
    pub fn restore_chips(&self, vm: &VmFd) -> Result<(), Error> {
        if !self.chips.iter().map(|chip| chip.chip_id).eq(CHIPS) {
            return Err(Error::new(libc::EINVAL));
        }
        for chip in &self.chips {
            vm.set_irqchip(chip)?;
        }
        self.pit.as_ref().map_or(Ok(()), |pit| vm.set_pit2(pit))
    }

    /// Sets the guest's monotonic clock to where it stood: the guest has not noticed the time between. After the vCPUs' time-stamp
    /// counters, from which KVM interpolates it.
    ///
    /// # Errors
    /// That of `KVM_SET_CLOCK`.
    pub fn restore_clock(&self, vm: &VmFd) -> Result<(), Error> {
        // Without KVM_CLOCK_REALTIME, by which KVM would add the time that has passed.
        vm.set_clock(&kvm_clock_data { clock: self.clock.clock, ..Default::default() })
    }
}

/// One that no VM ever had, for tests.
#[cfg(test)]
pub(super) fn example() -> VmState {
    let chips = CHIPS.map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
    VmState { chips: chips.into(), pit: None, clock: kvm_clock_data::default(), pvm: None }
}
