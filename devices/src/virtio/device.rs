//! What a virtio device is to everybody else.
//!
//! A device is built by whoever opened its back end, described to the transport by its [`Profile`], and then handed to the
//! device loop, on whose thread every other method here is called. The order of calls:
//!
//! ```text
//! [restore] → activate → (kicked | ready)* → quiesce → [save | attach | reset]* → activate → …
//! ```
//!
//! `activate` moves the queues in, `quiesce` gives them back. Between `quiesce` and the next `activate` the device touches no
//! guest memory. A pause is a `quiesce` and an `activate` with the same queues: what the device knows of its driver stays. A
//! driver's reset is a `quiesce` and a `reset`. A device knows no bus, interrupt number, feature word or lock.

use std::io;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::chain::ChainError;
use super::queue::{Queue, QueueError};
use crate::device_loop::{Source, Watch};

/// Virtio device IDs (section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u32)]
pub enum DeviceKind {
    /// Network card (5.1).
    Net = 1,
    /// Block device (5.2).
    Block = 2,
    /// Entropy device (5.4).
    Rng = 4,
    /// Socket device (5.10).
    Vsock = 19,
}

impl std::fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DeviceKind::Net => "net",
            DeviceKind::Block => "block",
            DeviceKind::Rng => "rng",
            DeviceKind::Vsock => "vsock",
        })
    }
}

/// What a driver may read of a device before it is activated. Fixed for the device's life.
#[derive(Debug, Clone)]
pub struct Profile {
    /// Which driver binds to it.
    pub kind: DeviceKind,
    /// Feature bits of this kind of device (0–23 and 50–63). The transport adds those of queues and of virtio 1.
    pub features: u64,
    /// The most entries that each queue may have: powers of two up to 32768.
    pub queue_sizes: Vec<u16>,
    /// The device-specific configuration space, little endian.
    pub config: Vec<u8>,
}

/// Why a device stopped working. The driver sees `DEVICE_NEEDS_RESET`, the log one line.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// The driver broke the rules of a queue.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The driver broke the rules of a buffer chain.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The driver broke the rules of this kind of device.
    #[error("{0}")]
    Protocol(String),
    /// A file descriptor of the host failed in a way that the device cannot report to the driver.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// What of a device a snapshot carries beyond its queues and registers. It may come from a file that somebody tampered with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// A disk. Its medium is not in here: whoever restores it attaches one.
    Block(super::block::BlockState),
    /// A network card.
    Net(super::net::NetState),
    /// Random numbers: nothing to remember.
    Rng,
    /// Sockets.
    Vsock(super::vsock::VsockState),
}

/// Why a device does not take saved state.
#[derive(Debug, Error)]
pub enum StateError {
    /// The state is another device's, or was never one.
    #[error("the saved state does not fit the device: {0}")]
    Mismatch(String),
    /// The host refused what the state needs.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// What a device is the front of, where that can be changed while the guest lives.
#[derive(Debug)]
pub enum Backend {
    /// A disk's medium.
    Disk(super::block::Medium),
    /// A network card's TAP, configured as the card needs it.
    Tap(OwnedFd),
}

/// Why a back end was not taken. The device keeps the one that it had.
#[derive(Debug, Error)]
pub enum AttachError {
    /// Disks take media, network cards TAPs, and others nothing.
    #[error("a {0} device has no such back end")]
    Kind(DeviceKind),
    /// The back end itself will not do.
    #[error("{0}")]
    Refused(String),
}

/// A virtio device: a state machine over its queues and its back end. See the module's prose for who calls what when.
pub trait VirtioDevice: Send {
    /// What the driver may know of the device. Called once, before the device moves to the loop.
    fn profile(&self) -> Profile;

    /// The driver is ready. `queues` are in the order of the profile; `features` are those of the profile that the driver
    /// took. File descriptors of the host that the device wants to hear of are added to `watch`.
    ///
    /// # Errors
    /// [`DeviceError`] when the back end cannot be used.
    fn activate(&mut self, features: u64, queues: Vec<Queue>, watch: &mut Watch) -> Result<(), DeviceError>;

    /// The driver rang for queue number `queue`.
    ///
    /// # Errors
    /// [`DeviceError`] when the driver broke a rule; the device is then left alone until it is reset.
    fn kicked(&mut self, queue: usize, watch: &mut Watch) -> Result<(), DeviceError>;

    /// A file descriptor that the device watches is ready.
    ///
    /// # Errors
    /// As for [`kicked`](Self::kicked).
    fn ready(&mut self, source: Source, watch: &mut Watch) -> Result<(), DeviceError>;

    /// Finish what is in flight, stop watching, and give the queues back.
    fn quiesce(&mut self, watch: &mut Watch) -> Vec<Queue>;

    /// The driver reset the device, which is quiesced: what the device knew of it is void.
    fn reset(&mut self, _watch: &mut Watch) {}

    /// What a snapshot must carry of the device, which is quiesced.
    fn save(&self) -> DeviceState;

    /// Becomes the device that `state` was saved from. Called once, before the first `activate`.
    ///
    /// # Errors
    /// [`StateError`] when the state cannot be this device's: it may come from anybody.
    fn restore(&mut self, state: DeviceState) -> Result<(), StateError>;

    /// Takes another back end, while quiesced, and returns the configuration space that the driver sees from now on.
    ///
    /// # Errors
    /// [`AttachError`]; nothing has changed then.
    fn attach(&mut self, _backend: Backend) -> Result<Vec<u8>, AttachError> {
        Err(AttachError::Kind(self.profile().kind))
    }
}
