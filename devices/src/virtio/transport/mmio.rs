//! Virtio over MMIO, version 2 (section 4.2): 4 KiB of registers for each device.
//!
//! Registers are served on vCPU threads, under a lock of the device's own. The device itself is on the device loop: a write to
//! the status register that makes or breaks it is a short synchronous call there; a doorbell is an eventfd that KVM signals
//! without asking us.

mod held;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

pub use held::{AttachFailed, Held};

use super::negotiation::{Effect, Negotiation, RingPart, status};
use super::state::ConfigState;
use crate::bus::BusDevice;
use crate::device_loop::{DeviceLoop, LoopError, LoopHandle, NodeId};
use crate::memory::GuestMemory;
use crate::virtio::{DeviceError, DeviceMetrics, Interrupt, Profile, Queue, VirtioDevice};

/// Bytes of address space that one device takes.
pub const MMIO_SIZE: u64 = 0x1000;

/// Registers (section 4.2.2).
mod register {
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// Offset of the doorbell register: where a VM puts the ioeventfd of each queue, told apart by the value written.
pub const DOORBELL: u64 = register::QUEUE_NOTIFY;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// Read by nobody but people: `VMM1`.
const VENDOR: u32 = u32::from_le_bytes(*b"VMM1");

/// The registers of one device.
pub struct MmioTransport {
    profile: Profile,
    memory: Arc<GuestMemory>,
    interrupt: Interrupt,
    kicks: Vec<EventFd>,
    node: NodeId,
    device_loop: LoopHandle,
    negotiation: Mutex<Negotiation>,
    /// What the driver sees of the configuration space. Apart from the negotiation, which is locked for as long as a status
    /// write takes.
    config: Mutex<ConfigState>,
}

impl MmioTransport {
    /// Puts `device` on the loop and a register file in front of it.
    ///
    /// # Errors
    /// Those of `eventfd(2)` and `dup(2)`.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        device_loop: &mut DeviceLoop,
    ) -> io::Result<Self> {
        let profile = device.profile();
        let interrupt = Interrupt::new()?;
        let kicks = profile
            .queue_sizes
            .iter()
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))
            .collect::<io::Result<Vec<_>>>()?;
        let heard = kicks.iter().map(EventFd::try_clone).collect::<io::Result<Vec<_>>>()?;
        let node = device_loop.add(device, profile.kind, interrupt.clone(), heard);
        let negotiation = Mutex::new(Negotiation::new(&profile));
        let config = Mutex::new(ConfigState { bytes: profile.config.clone(), generation: 0 });
        let device_loop = device_loop.handle();
        Ok(MmioTransport { profile, memory, interrupt, kicks, node, device_loop, negotiation, config })
    }

    /// What the device said of itself when it was built.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// The interrupt, whose line a VM connects to a GSI.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// The doorbells, one a queue, for a VM to ring when the guest writes the queue's number to [`DOORBELL`].
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// What the device has done so far. On any thread.
    pub fn metrics(&self) -> DeviceMetrics {
        self.interrupt.counters().metrics(self.profile.kind)
    }

    fn lock(&self) -> MutexGuard<'_, Negotiation> {
        // Nothing here panics with the lock held, and plain data cannot be left half-changed.
        self.negotiation.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn config(&self) -> MutexGuard<'_, ConfigState> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_register(&self, offset: u64) -> u32 {
        use register::*;
        let negotiation = self.lock();
        match offset {
            MAGIC_VALUE => MAGIC,
            VERSION => 2,
            DEVICE_ID => self.profile.kind as u32,
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => negotiation.offered_features(),
            QUEUE_NUM_MAX => negotiation.queue_max_size().into(),
            QUEUE_READY => negotiation.queue_ready().into(),
            INTERRUPT_STATUS => self.interrupt.status(),
            STATUS if self.interrupt.has_failed() => negotiation.status() | status::DEVICE_NEEDS_RESET,
            STATUS => negotiation.status(),
            // There are no shared memory regions: length and base read as all ones (section 4.2.2).
            SHM_LEN_LOW..=SHM_BASE_HIGH => u32::MAX,
            CONFIG_GENERATION => self.config().generation,
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        use register::*;
        if offset == QUEUE_NOTIFY {
            // Reached only where no ioeventfd matched: a queue that does not exist, or a host without ioeventfds.
            if let Some(kick) = usize::try_from(value).ok().and_then(|i| self.kicks.get(i)) {
                let _ = kick.write(1);
            }
            return;
        }
        let mut negotiation = self.lock();
        match offset {
            DEVICE_FEATURES_SEL => negotiation.select_offered(value),
            DRIVER_FEATURES => negotiation.accept_features(value),
            DRIVER_FEATURES_SEL => negotiation.select_accepted(value),
            QUEUE_SEL => negotiation.select_queue(value),
            QUEUE_NUM => negotiation.set_queue_size(value),
            QUEUE_READY => negotiation.set_queue_ready(value == 1),
            QUEUE_DESC_LOW => negotiation.set_ring_address(RingPart::Descriptors, Some(value), None),
            QUEUE_DESC_HIGH => negotiation.set_ring_address(RingPart::Descriptors, None, Some(value)),
            QUEUE_DRIVER_LOW => negotiation.set_ring_address(RingPart::Driver, Some(value), None),
            QUEUE_DRIVER_HIGH => negotiation.set_ring_address(RingPart::Driver, None, Some(value)),
            QUEUE_DEVICE_LOW => negotiation.set_ring_address(RingPart::Device, Some(value), None),
            QUEUE_DEVICE_HIGH => negotiation.set_ring_address(RingPart::Device, None, Some(value)),
            INTERRUPT_ACK => self.interrupt.acknowledge(value),
            STATUS => match negotiation.write_status(value) {
                Effect::None => {}
                Effect::Activate => self.activate(&mut negotiation),
                Effect::Reset => self.reset(&mut negotiation),
            },
            _ => {}
        }
    }

    fn activate(&self, negotiation: &mut Negotiation) {
        let features = negotiation.features();
        let rings = negotiation.take_rings().into_iter().zip(&self.kicks);
        let queues: Result<Vec<_>, _> = rings.map(|(ring, kick)| self.queue(ring, kick)).collect();
        if let Err(error) = queues.and_then(|queues| self.device_loop.activate(self.node, features, queues)) {
            log::error!("virtio-{}: cannot start: {error}", self.profile.kind);
            self.interrupt.device_failed();
        }
    }

    /// What a device gets for `ring`, whose doorbell is `kick`.
    fn queue(&self, ring: virtio_queue::Queue, kick: &EventFd) -> Result<Queue, LoopError> {
        let queue = Queue::new(ring, self.memory.clone(), self.interrupt.clone(), kick.try_clone()?);
        queue.map_err(|error| DeviceError::from(error).into())
    }

    fn reset(&self, negotiation: &mut Negotiation) {
        if let Err(error) = self.device_loop.reset(self.node) {
            log::error!("virtio-{}: cannot be reset: {error}", self.profile.kind);
        }
        self.interrupt.reset();
        negotiation.reset(&self.profile);
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(start) = offset.checked_sub(register::CONFIG) {
            let config = self.config();
            let config = usize::try_from(start).ok().and_then(|s| config.bytes.get(s..));
            for (to, from) in data.iter_mut().zip(config.unwrap_or_default()) {
                *to = *from;
            }
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            // Registers are 32 bits wide and read whole (section 4.2.2.2).
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // No device here has a writable configuration space.
        if let Ok(word) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
