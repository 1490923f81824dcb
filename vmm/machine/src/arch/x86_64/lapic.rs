//! The two local interrupt pins of a local APIC, wired as PC firmware leaves them and as the MP table says: LINT0 takes
//! the 8259's interrupts, LINT1 is NMI (MP specification 1.4, section 3.6.2; SDM vol. 3, 12.5.1).

use kvm_bindings::kvm_lapic_state;

const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
/// Delivery mode, bits 8 to 10.
const MODE_NMI: u8 = 0b100;
const MODE_EXTINT: u8 = 0b111;

/// Sets LINT0 and LINT1 in what `KVM_GET_LAPIC` gave, unmasked.
pub fn connect_local_interrupts(state: &mut kvm_lapic_state) {
    set_mode(state, LVT_LINT0, MODE_EXTINT);
    set_mode(state, LVT_LINT1, MODE_NMI);
}

fn set_mode(state: &mut kvm_lapic_state, register: usize, mode: u8) {
    let bytes = [0, mode, 0, 0];
    for (to, byte) in state.regs.iter_mut().skip(register).zip(bytes) {
        *to = i8::from_le_bytes([byte]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_have_their_modes_and_nothing_else_changes() {
        let mut state = kvm_lapic_state { regs: [0x55; 1024] };
        connect_local_interrupts(&mut state);
        assert_eq!(state.regs[0x350..0x354], [0, 7, 0, 0]);
        assert_eq!(state.regs[0x360..0x364], [0, 4, 0, 0]);
        assert_eq!(state.regs.iter().filter(|byte| **byte == 0x55).count(), 1024 - 8);
    }
}
