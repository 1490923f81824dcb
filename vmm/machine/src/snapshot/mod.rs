//! Snapshots: a machine that stands still, in a directory; and the way back.
//!
//! ```text
//! DIR/manifest   one line with magic, version, length and checksum, then JSON: what it is, what it needs, what belongs to it
//! DIR/state      vCPUs, interrupt controllers, clock, devices, in the order of the machine's description (postcard)
//! DIR/memory     guest memory, sparse; the last page says whose it is
//! DIR/disk-N     what slot N's writable disk held
//! ```
//!
//! * [`manifest`]: the first file; [`directory`]: the whole, written so that it is there or not, and opened again; [`trust`]: by whom
//!   it may have been written.
//! * [`vcpu`], [`vm`]: KVM's state. The devices' own is in crate `devices`.
//! * [`memory`]: guest memory. [`disks`]: what becomes of the disks. [`chain`]: what a diff needs beneath it.
//!
//! The controller's thread saves, with vCPUs at rest and devices quiesced; the builder restores. **A snapshot may come from
//! anybody**: whatever is wrong with one is refused with its reason, or is the guest's own harm.

pub mod chain;
pub mod changes;
pub mod directory;
pub mod disks;
pub mod manifest;
pub mod memory;
mod place;
mod trust;
pub mod vcpu;
pub mod vm;

use std::fmt;
use std::path::PathBuf;

use devices::bounded;
use devices::serial::SerialState;
use devices::virtio::transport::TransportState;
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::{MAX_DEVICES, MAX_VCPUS};

pub use directory::{Draft, Loaded};
pub use manifest::Manifest;

/// Names a snapshot: new and random for each.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct SnapshotId(pub [u8; 16]);

impl SnapshotId {
    /// A new one.
    ///
    /// # Errors
    /// That of `getrandom(2)`.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        getrandom(&mut bytes, GetRandomFlags::empty())?;
        Ok(SnapshotId(bytes))
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl From<SnapshotId> for String {
    fn from(id: SnapshotId) -> String {
        id.to_string()
    }
}

impl TryFrom<String> for SnapshotId {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let mut bytes = [0; 16];
        let digits = text.as_bytes().as_chunks::<2>();
        if digits.0.len() != bytes.len() || !digits.1.is_empty() {
            return Err("a snapshot's id has 32 hexadecimal digits");
        }
        for (to, pair) in bytes.iter_mut().zip(digits.0) {
            let pair = std::str::from_utf8(pair).ok().filter(|p| !p.starts_with('+'));
            let byte = pair.and_then(|pair| u8::from_str_radix(pair, 16).ok());
            *to = byte.ok_or("a snapshot's id has 32 hexadecimal digits")?;
        }
        Ok(SnapshotId(bytes))
    }
}

/// Most runs of pages in a diff: enough for every other page of 64 GiB.
const MOST_RUNS: usize = 8 << 20;

/// Everything of a machine but its memory and its disks.
#[derive(Clone, Serialize, Deserialize)]
pub struct MachineState {
    /// KVM's state of the VM.
    pub vm: vm::VmState,
    /// Of each vCPU, by number.
    #[serde(deserialize_with = "bounded::list::<_, _, { MAX_VCPUS as usize }>")]
    pub vcpus: Vec<vcpu::VcpuState>,
    /// Of each device, by slot.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_DEVICES>")]
    pub devices: Vec<TransportState>,
    /// Of the serial port.
    pub serial: SerialState,
    /// The pages in a diff; `None` for a memory file that has them all.
    #[serde(deserialize_with = "bounded::optional_list::<_, _, MOST_RUNS>")]
    pub changed: Option<Vec<memory::Run>>,
}

/// Why a snapshot was not taken, or is not one that can be restored here. Each message is one line.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the message says it")]
pub enum SnapshotError {
    #[error("snapshot {}: {what}: {source}", path.display())]
    Io { path: PathBuf, what: &'static str, source: std::io::Error },
    #[error("{} is no snapshot: it has no file called manifest", path.display())]
    None { path: PathBuf },
    #[error("snapshot {}: it exists already and is something else: name another directory", path.display())]
    Occupied { path: PathBuf },
    #[error("snapshot {}: {file} is damaged: {fault}", path.display())]
    Damaged { path: PathBuf, file: &'static str, fault: String },
    #[error("snapshot {}: its format is version {found}, this vmm reads {}: use the vmm that wrote it", path.display(), manifest::VERSION)]
    Version { path: PathBuf, found: u32 },
    #[error("snapshot {}: {reason}", path.display())]
    Unfit { path: PathBuf, reason: String },
    #[error("snapshot {}: {fault}", path.display())]
    Untrusted { path: PathBuf, fault: trust::Untrusted },
    #[error("snapshot {}: {source}", path.display())]
    Disk { path: PathBuf, source: disks::DiskError },
    #[error(transparent)]
    Vcpu(#[from] vcpu::VcpuStateError),
    #[error("KVM refused to {what}: {source}")]
    Kvm { what: &'static str, source: kvm_ioctls::Error },
    #[error("{0}")]
    Device(String),
    #[error("the machine is {now}: {wanted}")]
    State { now: &'static str, wanted: &'static str },
}

#[cfg(test)]
mod hostile_tests;
