use std::sync::mpsc;

use super::*;
use crate::device_loop::{RunningLoop, Source, Watch};
use crate::testing::{self, Driver};
use crate::virtio::device::{DeviceState, StateError};
use crate::virtio::transport::negotiation::feature;
use crate::virtio::{DeviceError, DeviceKind};

/// Answers each chain with what it read, and fails when it reads "die".
struct Echo {
    queues: Vec<Queue>,
    events: mpsc::Sender<&'static str>,
}

impl VirtioDevice for Echo {
    fn save(&self) -> DeviceState {
        DeviceState::Rng
    }

    fn restore(&mut self, _: DeviceState) -> Result<(), StateError> {
        Ok(())
    }

    fn profile(&self) -> Profile {
        Profile { kind: DeviceKind::Rng, features: 0, queue_sizes: vec![16], config: vec![1, 2, 3, 4, 5] }
    }
    fn activate(&mut self, _: u64, queues: Vec<Queue>, _: &mut Watch) -> Result<(), DeviceError> {
        self.queues = queues;
        self.events.send("activate").unwrap();
        Ok(())
    }
    fn kicked(&mut self, queue: usize, _: &mut Watch) -> Result<(), DeviceError> {
        self.queues[queue].drain(|chain| {
            let mut data = [0; 3];
            chain.reader.read_exact(&mut data)?;
            if &data == b"die" {
                return Err(DeviceError::Protocol("told to die".into()));
            }
            chain.writer.write_all(&data)?;
            Ok(crate::virtio::queue::Served::Done)
        })?;
        self.events.send("served").unwrap();
        Ok(())
    }
    fn ready(&mut self, _: Source, _: &mut Watch) -> Result<(), DeviceError> {
        Ok(())
    }
    fn quiesce(&mut self, _: &mut Watch) -> Vec<Queue> {
        self.events.send("quiesce").unwrap();
        std::mem::take(&mut self.queues)
    }
}

struct Guest {
    transport: MmioTransport,
    driver: Driver,
    events: mpsc::Receiver<&'static str>,
    _running: RunningLoop,
}

impl Guest {
    fn new() -> Self {
        let (sender, events) = mpsc::channel();
        let memory = testing::memory(0x10_0000);
        let mut device_loop = DeviceLoop::new().unwrap();
        let device = Box::new(Echo { queues: vec![], events: sender });
        let transport = MmioTransport::new(device, memory.clone(), &mut device_loop).unwrap();
        Guest {
            transport,
            driver: Driver::new(memory, 0, 16),
            events,
            _running: device_loop.spawn().unwrap(),
        }
    }
    fn get(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(offset, &mut word);
        u32::from_le_bytes(word)
    }
    fn set(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }
    fn start(&mut self) {
        use register::*;
        self.driver = Driver::new(self.driver.memory.clone(), 0, 16);
        self.set(STATUS, 1);
        self.set(STATUS, 3);
        self.set(DRIVER_FEATURES_SEL, 1);
        self.set(DRIVER_FEATURES, u32::try_from(feature::VERSION_1 >> 32).unwrap());
        self.set(STATUS, 11);
        let (table, avail, used) = self.driver.rings();
        for (register, address) in
            [(QUEUE_DESC_LOW, table), (QUEUE_DRIVER_LOW, avail), (QUEUE_DEVICE_LOW, used)]
        {
            self.set(register, u32::try_from(address).unwrap());
        }
        self.set(QUEUE_READY, 1);
        self.set(STATUS, 15);
        assert_eq!(self.get(STATUS), 15);
    }
}

#[test]
fn shows_itself() {
    let guest = Guest::new();
    assert_eq!((guest.get(0), guest.get(4), guest.get(8)), (0x7472_6976, 2, 4));
    let mut bytes = [9; 8];
    guest.transport.read(0x101, &mut bytes);
    assert_eq!(bytes, [2, 3, 4, 5, 0, 0, 0, 0], "past the configuration there are zeros");
    guest.transport.read(0xfff, &mut bytes);
    let mut byte = [9];
    guest.transport.read(0, &mut byte);
    assert_eq!(byte, [0], "registers are read whole");
}

#[test]
fn a_device_lives_dies_and_is_reset() {
    let mut guest = Guest::new();
    guest.start();
    assert_eq!(guest.events.recv().unwrap(), "activate");
    let (_, answers) = guest.driver.send(&[b"hey"], &[3]);
    guest.set(register::QUEUE_NOTIFY, 7);
    guest.set(register::QUEUE_NOTIFY, 0);
    assert_eq!(guest.events.recv().unwrap(), "served");
    assert_eq!(guest.driver.receive(), Some((0, 3)));
    assert_eq!(guest.driver.bytes(answers[0], 3), b"hey");
    assert_eq!(guest.get(register::INTERRUPT_STATUS), 1);
    guest.set(register::INTERRUPT_ACK, 1);
    assert_eq!(guest.get(register::INTERRUPT_STATUS), 0);

    guest.driver.send(&[b"die"], &[3]);
    guest.set(register::QUEUE_NOTIFY, 0);
    assert_eq!(guest.events.recv().unwrap(), "quiesce");
    while guest.get(register::STATUS) & status::DEVICE_NEEDS_RESET == 0 {
        std::thread::yield_now();
    }
    assert_eq!(guest.get(register::INTERRUPT_STATUS), 2);

    guest.set(register::STATUS, 0);
    assert_eq!((guest.get(register::STATUS), guest.get(register::INTERRUPT_STATUS)), (0, 0));
    // What the old driver left in the rings is gone with it.
    vm_memory::Bytes::write_slice(&*guest.driver.memory, &[0; 0x3000], vm_memory::GuestAddress(0)).unwrap();
    guest.start();
    assert_eq!(guest.events.recv().unwrap(), "activate");
    guest.driver.send(&[b"you"], &[3]);
    guest.set(register::QUEUE_NOTIFY, 0);
    assert_eq!(guest.events.recv().unwrap(), "served");
    assert_eq!(guest.driver.receive(), Some((0, 3)));
}

#[test]
fn rings_outside_memory_fail_the_device() {
    let mut guest = Guest::new();
    guest.driver = Driver::new(guest.driver.memory.clone(), 0, 16);
    guest.set(register::STATUS, 1);
    guest.set(register::STATUS, 3);
    guest.set(register::DRIVER_FEATURES_SEL, 1);
    guest.set(register::DRIVER_FEATURES, 1);
    guest.set(register::STATUS, 11);
    guest.set(register::QUEUE_DESC_HIGH, 0xffff_ffff);
    guest.set(register::QUEUE_READY, 1);
    guest.set(register::STATUS, 15);
    assert_eq!(guest.get(register::STATUS), 15 | status::DEVICE_NEEDS_RESET);
    guest.set(register::QUEUE_NOTIFY, 0);
    guest.set(register::STATUS, 0);
    assert_eq!(guest.get(register::STATUS), 0);
}
