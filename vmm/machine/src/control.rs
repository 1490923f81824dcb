//! Everything that a machine can be asked while it lives: one enum of questions, one of answers, one of refusals.
//!
//! The API's threads ask ([`crate::api`]); whoever holds the machine answers, by [`Control`]. Plain data: nothing here knows
//! of HTTP or of KVM. What a program sees of it (field names, the words of enums) is held against `api/openapi.json` by a test.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::MachineConfig;
pub use crate::metrics::{DeviceMetrics, Histogram, Metrics, VcpuMetrics};

/// What the machine is asked.
#[derive(Debug)]
pub enum Request {
    /// What it is made of, and what it is doing.
    Describe,
    /// Begin: from [`State::Created`] only.
    Start,
    /// Stop vCPUs and devices, between two instructions and two requests.
    Pause,
    /// Go on after a pause.
    Resume,
    /// End. Orderly: the guest is asked first, and has `timeout` to do it. With `force` it is not asked.
    Shutdown {
        /// At once.
        force: bool,
        /// How long the guest may take before it is ended all the same.
        timeout: Duration,
    },
    /// Save it all to a directory. The machine is as before afterwards: running, or paused.
    Snapshot(SnapshotRequest),
    /// Give a device another back end.
    Attach {
        /// The device's slot, as [`Description::devices`] counts.
        slot: usize,
        /// What it becomes the front of.
        backend: AttachBackend,
    },
    /// What it has counted so far.
    Metrics,
}

/// What is to be saved, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotRequest {
    /// A directory that does not exist yet, or an older snapshot, which is replaced as a whole. Absolute.
    pub directory: PathBuf,
    /// Only the memory that changed since the last snapshot, or since the one that the machine was restored from.
    pub diff: bool,
}

/// A back end that somebody opened for the machine. What it is has not been looked at yet.
#[derive(Debug)]
pub enum AttachBackend {
    /// A disk.
    Disk {
        /// A regular file or a block device, locked by whoever opened it: the lock goes with it.
        file: File,
        /// Whether the guest may only read.
        read_only: bool,
    },
    /// A TAP, attached to its interface with the header that [`crate::host::tap`] sets.
    Tap(OwnedFd),
}

/// What the machine answers.
#[derive(Debug, PartialEq)]
pub enum Reply {
    /// It is done, and there is nothing to tell.
    Done,
    /// The answer to [`Request::Describe`].
    Description(Box<Description>),
    /// The answer to [`Request::Snapshot`].
    Snapshot(SnapshotReport),
    /// The answer to [`Request::Metrics`].
    Metrics(Metrics),
}

/// Why the machine does not do it. Nothing has changed then, unless the message says so.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// Not in this state.
    #[error("the machine is {now}: for this it must be {wanted}")]
    State {
        /// What it is.
        now: State,
        /// What it would have to be, for a person.
        wanted: &'static str,
    },
    /// Not with these parameters.
    #[error("{0}")]
    Invalid(String),
    /// It was tried.
    #[error("{0}")]
    Failed(String),
    /// There is no machine any more.
    #[error("the machine is gone")]
    Gone,
}

/// The way to a machine, from any thread.
pub trait Control: Send + Sync {
    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// [`Refusal`]. A machine that ends while it is asked answers [`Refusal::Gone`]; nobody waits for ever.
    fn ask(&self, request: Request) -> Result<Reply, Refusal>;
}

/// What a machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Built, or restored, and not started.
    Created,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still, and its devices have handed their queues back.
    Paused,
    /// It will not run again.
    Ended,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            State::Created => "created",
            State::Running => "running",
            State::Paused => "paused",
            State::Ended => "ended",
        })
    }
}

/// What a machine is made of, and what it is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// What it is doing.
    pub state: State,
    /// The version of the vmm that runs it.
    pub vmm_version: String,
    /// The process that it lives in.
    pub pid: u32,
    /// Since it was built or restored.
    pub uptime_ms: u64,
    /// What it was asked to be, with what was left open chosen.
    pub config: MachineConfig,
    /// Its devices in slot order, as they are now.
    pub devices: Vec<DeviceDescription>,
}

/// A device as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceDescription {
    /// Where it is.
    pub slot: usize,
    /// `block`, `net`, `vsock` or `rng`.
    pub kind: DeviceKind,
    /// What it is the front of: a file, an interface; `null` in a spare slot, and where there is nothing to name.
    pub backend: Option<String>,
    /// Whether the guest may only read; `null` where that means nothing.
    pub read_only: Option<bool>,
}

/// Kinds of devices, by the names that they have everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// A disk.
    Block,
    /// A network card.
    Net,
    /// Sockets between guest and host.
    Vsock,
    /// Random numbers.
    Rng,
}

impl From<devices::virtio::DeviceKind> for DeviceKind {
    fn from(kind: devices::virtio::DeviceKind) -> Self {
        use devices::virtio::DeviceKind as Kind;
        match kind {
            Kind::Block => DeviceKind::Block,
            Kind::Net => DeviceKind::Net,
            Kind::Vsock => DeviceKind::Vsock,
            Kind::Rng => DeviceKind::Rng,
        }
    }
}

impl std::fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            DeviceKind::Block => "block",
            DeviceKind::Net => "net",
            DeviceKind::Vsock => "vsock",
            DeviceKind::Rng => "rng",
        })
    }
}

/// What a snapshot cost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotReport {
    /// Where it lies.
    pub directory: PathBuf,
    /// Whether it needs an older one beneath it.
    pub diff: bool,
    /// How long the guest stood still.
    pub pause_us: u64,
    /// The guest's memory.
    pub memory_bytes: u64,
    /// What of it had to be written.
    pub file_bytes: u64,
    /// What became of the disks.
    pub disks: Vec<SavedDisk>,
    /// Whether the container was frozen first, so that a copy's identity can be repaired before it runs.
    pub frozen: bool,
}

/// What became of a disk in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedDisk {
    /// The device's slot.
    pub slot: usize,
    /// How it was saved, for a person: `reflink`, `overlay`, `sparse copy`, `read-only: not copied` …
    pub how: String,
}
