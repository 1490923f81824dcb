//! Virtio 1.2: the queue, the chain of buffers, the transport, and a module for each device.
//!
//! Who owns what: the *transport* owns registers, feature words and the interrupt. From activation to reset the *device* owns
//! its queues, and with them the right to touch guest memory. No queue is ever in both places.
//! Section numbers refer to "Virtual I/O Device (VIRTIO) Version 1.2" (OASIS, 2022).

pub mod block;
pub mod chain;
pub mod device;
pub mod interrupt;
pub mod metrics;
pub mod net;
pub mod queue;
pub mod rng;
pub mod transport;
pub mod vectored;
pub mod vsock;

pub use block::Block;
pub use chain::{Chain, ChainError, Reader, Writer};
pub use device::{DeviceError, DeviceKind, Profile, VirtioDevice};
pub use interrupt::Interrupt;
pub use metrics::DeviceMetrics;
pub use net::Net;
pub use queue::{Queue, QueueError};
pub use rng::Rng;

#[cfg(test)]
mod saved_tests;
