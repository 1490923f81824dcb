//! What a snapshot carries of a device's transport: plain data, and why it may be refused.
//!
//! It may come from a file that somebody tampered with. [`Negotiation::restore`](super::negotiation::Negotiation::restore) and
//! [`MmioTransport::restore`](super::MmioTransport::restore) believe nothing in it.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_queue::{Queue as Ring, QueueT};

use crate::device_loop::LoopError;
use crate::virtio::device::{DeviceKind, DeviceState, StateError};

/// Far more than any device has.
const MOST_QUEUES: usize = 64;

/// Everything about one device and the registers in front of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Which driver binds to the device.
    pub kind: DeviceKind,
    /// How far the driver has come with it.
    pub negotiation: NegotiationState,
    /// Interrupt bits that the driver has not acknowledged.
    pub interrupt_status: u32,
    /// The device waits for its driver to reset it (`DEVICE_NEEDS_RESET`).
    pub failed: bool,
    /// The configuration space.
    pub config: ConfigState,
    /// What the device itself remembers.
    pub device: DeviceState,
}

/// The conversation between driver and device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NegotiationState {
    /// Feature bits that the device has, with those of queues and transport.
    pub offered: u64,
    /// Feature bits that the driver took.
    pub accepted: u64,
    /// Which 32 of the offered bits are read.
    pub offered_page: u32,
    /// Which 32 of the accepted bits are written.
    pub accepted_page: u32,
    /// The status register, without `DEVICE_NEEDS_RESET`.
    pub status: u32,
    /// The queue that the queue registers mean.
    pub selected: u32,
    /// All queues. A device that failed has none: its rings were lost with it.
    #[serde(deserialize_with = "crate::bounded::list::<_, _, MOST_QUEUES>")]
    pub queues: Vec<QueueState>,
}

/// One queue. Whether it uses event indices follows from the features.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// The most entries that it may have.
    pub max_size: u16,
    /// How many entries the driver chose.
    pub size: u16,
    /// Whether the driver enabled it.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// That of the available ring.
    pub driver: u64,
    /// That of the used ring.
    pub device: u64,
    /// Index in the available ring of the next chain to take.
    pub next_avail: u16,
    /// Index in the used ring of the next chain to give back.
    pub next_used: u16,
}

/// The configuration space (section 2.5), as the driver saw it last.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Changes whenever they do (section 2.5.1).
    pub generation: u32,
}

impl From<&Ring> for QueueState {
    fn from(ring: &Ring) -> Self {
        QueueState {
            max_size: ring.max_size(),
            size: ring.size(),
            ready: ring.ready(),
            descriptors: ring.desc_table(),
            driver: ring.avail_ring(),
            device: ring.used_ring(),
            next_avail: ring.next_avail(),
            next_used: ring.next_used(),
        }
    }
}

impl QueueState {
    /// The queue as virtio-queue has it. Where its rings lie is checked for alignment only.
    pub(super) fn ring(&self, event_idx: bool) -> Result<Ring, virtio_queue::Error> {
        Ring::try_from(virtio_queue::QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: self.ready,
            desc_table: self.descriptors,
            avail_ring: self.driver,
            used_ring: self.device,
        })
    }
}

/// Why saved state was refused. The transport is of no use after it: the machine that it was built for is given up.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The driver has spoken to this transport.
    #[error("the device is in use already")]
    NotFresh,
    /// The state is another kind of device's.
    #[error("the saved device is a {saved} device, this one a {here} device")]
    Kind {
        /// The state's.
        saved: DeviceKind,
        /// The transport's.
        here: DeviceKind,
    },
    /// The driver was offered other features than this device has.
    #[error("the saved device has features {saved:#x}, this one {here:#x}: {:#x} differ", saved ^ here)]
    Offered {
        /// The state's.
        saved: u64,
        /// The device's.
        here: u64,
    },
    /// The driver cannot have agreed to these.
    #[error("the driver cannot have agreed to features {0:#x}")]
    Accepted(u64),
    /// No sequence of steps leads there.
    #[error("status {0:#x} is not one that a driver can reach")]
    Status(u32),
    /// Only a device that was started can have failed.
    #[error("the device has failed and never started")]
    Failed,
    /// There are no such bits.
    #[error("interrupt status {0:#x} has bits that do not exist")]
    Interrupt(u32),
    /// Another number of queues.
    #[error("the saved device has {saved} queues, this one {here}")]
    QueueCount {
        /// The state's.
        saved: usize,
        /// How many there should be.
        here: usize,
    },
    /// A queue cannot be as the state says.
    #[error("queue {index}: {problem}")]
    Queue {
        /// Number of the queue.
        index: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// The device does not take its own part of the state.
    #[error(transparent)]
    Device(#[from] StateError),
    /// The device loop has ended.
    #[error(transparent)]
    Loop(#[from] LoopError),
}
