//! A guest whose device runs on no loop: the test calls it, so that everything happens in the order that the test says.

use super::*;
use crate::device_loop::Watch;
use crate::virtio::DeviceError;
use crate::virtio::device::{DeviceState, StateError};

/// A device without a loop: the test calls it.
pub struct Direct {
    pub device: Vsock,
    pub rx: Driver,
    pub tx: Driver,
    rx_buffer: u64,
    tx_buffer: u64,
    posted: bool,
    pub connector: Connector,
}

impl Direct {
    pub fn new(backend: Backend) -> Self {
        let memory = testing::memory(8 << 20);
        let (mut rx, mut tx) =
            (Driver::new(memory.clone(), 0, SLOTS), Driver::new(memory.clone(), TX_RING, SLOTS));
        let interrupt = Interrupt::new().unwrap();
        let event = Driver::new(memory, EVENT_RING, 8);
        let (mut device, connector) = Vsock::new(CID, backend).unwrap();
        let queues = vec![rx.queue(&interrupt), tx.queue(&interrupt), event.queue(&interrupt)];
        device.activate(0, queues, &mut Watch::default()).unwrap();
        let (rx_buffer, tx_buffer) = (rx.buffer(RX_BUFFER), tx.buffer(TX_BUFFER + HEADER_SIZE));
        Direct { device, rx, tx, rx_buffer, tx_buffer, posted: false, connector }
    }

    /// A pause: what the device says of itself meanwhile, and its queues.
    pub fn pause(&mut self) -> (VsockState, Vec<Queue>) {
        let queues = self.device.quiesce(&mut Watch::default());
        let DeviceState::Vsock(state) = self.device.save() else { panic!("another device's state") };
        (state, queues)
    }

    pub fn resume(&mut self, queues: Vec<Queue>) {
        self.device.activate(0, queues, &mut Watch::default()).unwrap();
        // As the loop would for doorbells that rang.
        (0..3).for_each(|queue| self.device.kicked(queue, &mut Watch::default()).unwrap());
    }

    /// Becomes a guest whose device is a fresh one, made of `state`. Returns the old one.
    pub fn move_to(
        &mut self,
        cid: u32,
        backend: Backend,
        state: VsockState,
        queues: Vec<Queue>,
    ) -> Result<Vsock, StateError> {
        let (mut device, connector) = Vsock::new(cid, backend).unwrap();
        device.restore(DeviceState::Vsock(state))?;
        self.connector = connector;
        let old = std::mem::replace(&mut self.device, device);
        self.resume(queues);
        Ok(old)
    }

    /// Lets the device look at all of its sockets, as the loop would for those that are ready.
    pub fn look(&mut self) {
        (16..64).for_each(|source| self.device.streams_mut().ready(source));
    }

    /// Gives one buffer, and takes what the device puts there.
    pub fn take(&mut self) -> Option<(Header, Vec<u8>)> {
        if !std::mem::replace(&mut self.posted, true) {
            self.rx.descriptor(0, self.rx_buffer, RX_BUFFER.try_into().unwrap(), WRITE, 0);
            self.rx.publish(0);
        }
        self.device.kicked(0, &mut Watch::default()).unwrap();
        let (_, used) = self.rx.receive()?;
        self.posted = false;
        assert!(used as usize >= HEADER_SIZE);
        let bytes = self.rx.bytes(self.rx_buffer, used as usize);
        Some((Header::parse(bytes[..HEADER_SIZE].try_into().unwrap()), bytes[HEADER_SIZE..].to_vec()))
    }

    pub fn receive(&mut self) -> Option<Header> {
        self.take().map(|(header, _)| header)
    }

    pub fn send(&mut self, packet: &[u8]) -> Result<(), DeviceError> {
        self.tx.memory.write_slice(packet, GuestAddress(self.tx_buffer)).unwrap();
        self.tx.descriptor(0, self.tx_buffer, packet.len().try_into().unwrap(), 0, 0);
        self.tx.publish(0);
        self.device.kicked(1, &mut Watch::default())
    }

    pub fn op(&mut self) -> Option<Op> {
        self.receive().map(|header| header.op)
    }

    pub fn later(&mut self) {
        self.device.streams_mut().expire(Instant::now() + Duration::from_secs(3600));
    }
}
