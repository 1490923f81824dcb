//! The keyboard controller of a PC, of which only the reset line is there: how a guest says "reboot" without ACPI.
//!
//! Put on the port bus at [`PORTS`]; called on vCPU threads.

use crate::bus::BusDevice;

/// First port and number of ports.
pub const PORTS: (u64, u64) = (0x60, 5);

const DATA: u64 = 0;
const COMMAND: u64 = 4;
/// Command: pulse output line 0, which is wired to the CPU's reset.
const PULSE_RESET: u8 = 0xfe;
/// Status: a byte waits to be read. It always does, so that a driver that looks for a keyboard gives up after draining a
/// few bytes, instead of waiting half a second for the answer to a self-test (`i8042_flush` in Linux). The other bits are
/// clear: a command may be written, which is all that a reboot looks at (`kb_wait`).
const OUTPUT_FULL: u8 = 0x01;

/// The controller. `reset` is called on the vCPU's thread that asked for it, each time it asks.
pub struct I8042<F> {
    reset: F,
}

impl<F: Fn() + Send + Sync> I8042<F> {
    /// A controller whose reset line calls `reset`, which must not block.
    pub fn new(reset: F) -> Self {
        I8042 { reset }
    }
}

impl<F: Fn() + Send + Sync> BusDevice for I8042<F> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = match at {
                DATA => 0,
                COMMAND => OUTPUT_FULL,
                // Port 0x61 is the timer's gate. Nobody is there: a kernel that waits for its output bit must see ones.
                _ => 0xff,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data.first() == Some(&PULSE_RESET) {
            (self.reset)();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        let count = AtomicU32::new(0);
        let controller = I8042::new(|| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        for (offset, data) in [(0, &[0xfe][..]), (4, &[0xff]), (4, &[0xfd]), (4, &[]), (3, &[0, 0xfe])] {
            controller.write(offset, data);
        }
        assert_eq!(count.load(Ordering::Relaxed), 0);
        controller.write(4, &[0xfe]);
        assert_eq!(count.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_reboot_may_be_written_and_a_keyboard_is_not_found() {
        let controller = I8042::new(|| {});
        let mut ports = [0xaa; 5];
        controller.read(0, &mut ports);
        assert_eq!(ports, [0, 0xff, 0xff, 0xff, 0x01]);
    }
}
