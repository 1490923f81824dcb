//! What an exit means for the devices: pure dispatch, tested without KVM.
//!
//! Called on vCPU threads.

use devices::bus::Bus;

use crate::kvm::run::Exit;

/// The two address spaces of the machine.
#[derive(Clone)]
pub struct Buses {
    /// Ports.
    pub pio: Bus,
    /// Guest-physical memory without RAM behind it.
    pub mmio: Bus,
}

/// What the vCPU does next.
#[derive(Debug, PartialEq, Eq)]
pub enum Flow {
    /// Enters the guest again.
    Continue,
    /// Looks whether somebody wants something, then enters the guest again.
    Interrupted,
    /// The guest wants the machine reset, or has no other way on.
    Reset,
    /// The guest cannot go on; text for a person.
    Fatal(String),
}

/// Serves `exit` from the buses.
pub fn dispatch(exit: Exit<'_>, buses: &Buses) -> Flow {
    match exit {
        Exit::PortRead { port, width, data } => {
            for access in data.chunks_mut(width.max(1)) {
                buses.pio.read(port.into(), access);
            }
        }
        Exit::PortWrite { port, width, data } => {
            for access in data.chunks(width.max(1)) {
                buses.pio.write(port.into(), access);
            }
        }
        Exit::MmioRead { address, data } => {
            buses.mmio.read(address, data);
        }
        Exit::MmioWrite { address, data } => {
            buses.mmio.write(address, data);
        }
        // No filter sends us a register that nobody here knows; if one did, it is as if it did not exist.
        Exit::WriteMsr { error, .. } => *error = 1,
        Exit::Shutdown => return Flow::Reset,
        Exit::Interrupted => return Flow::Interrupted,
        Exit::Halt => return Flow::Fatal("the guest halted where no interrupt can wake it".into()),
        Exit::EmulationFailure { bytes, len } => {
            let bytes = bytes.get(..len).unwrap_or_default();
            return Flow::Fatal(format!("the host cannot emulate the instruction{}", hex(bytes)));
        }
        Exit::Fatal(reason) => return Flow::Fatal(reason),
    }
    Flow::Continue
}

/// Bytes as a person reads them: each after a space.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!(" {b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use devices::bus::{BusBuilder, BusDevice};

    use super::*;

    #[derive(Default)]
    struct Port(Mutex<Vec<Vec<u8>>>);

    impl BusDevice for Port {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&self, _: u64, data: &[u8]) {
            self.0.lock().unwrap().push(data.to_vec());
        }
    }

    fn buses() -> (Buses, Arc<Port>) {
        let port = Arc::new(Port::default());
        let (mut pio, mut mmio) = (BusBuilder::default(), BusBuilder::default());
        pio.insert(0x10, 8, port.clone()).unwrap();
        mmio.insert(0xd000_0000, 0x1000, port.clone()).unwrap();
        (Buses { pio: pio.freeze(), mmio: mmio.freeze() }, port)
    }

    #[test]
    fn a_string_of_port_writes_is_served_one_by_one() {
        let (buses, port) = buses();
        let exit = Exit::PortWrite { port: 0x10, width: 2, data: &[1, 2, 3, 4] };
        assert_eq!(dispatch(exit, &buses), Flow::Continue);
        assert_eq!(*port.0.lock().unwrap(), [[1, 2], [3, 4]]);
    }

    #[test]
    fn reads_come_from_the_device_or_float_high() {
        let (buses, _) = buses();
        let mut data = [0; 2];
        dispatch(Exit::PortRead { port: 0x13, width: 1, data: &mut data }, &buses);
        assert_eq!(data, [3, 3]);
        dispatch(Exit::MmioRead { address: 0xd000_0005, data: &mut data }, &buses);
        assert_eq!(data, [5, 5]);
        dispatch(Exit::MmioRead { address: 0xe000_0000, data: &mut data }, &buses);
        assert_eq!(data, [0xff, 0xff]);
    }

    #[test]
    fn ends() {
        let (buses, _) = buses();
        assert_eq!(dispatch(Exit::Shutdown, &buses), Flow::Reset);
        assert_eq!(dispatch(Exit::Interrupted, &buses), Flow::Interrupted);
        let mut error = 0;
        dispatch(Exit::WriteMsr { index: 1, value: 2, error: &mut error }, &buses);
        assert_eq!(error, 1, "an unknown register is #GP");
        let failure =
            Exit::EmulationFailure { bytes: [0x0f, 0xae, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], len: 2 };
        assert!(matches!(dispatch(failure, &buses), Flow::Fatal(text) if text.ends_with(" 0f ae")));
    }
}
