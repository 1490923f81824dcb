//! The file that says what a snapshot is. Pure, but for [`HostKind::here`].

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{SnapshotId, disks::SavedDisk};
use crate::config::{DeviceConfig, MachineConfig};
use crate::host::{Host, KernelMode};

/// The format that this vmm writes, and the only one that it reads.
pub const VERSION: u32 = 1;
/// How the file begins.
pub(super) const MAGIC: &str = "vmm-snapshot";
/// Longest file that is read.
pub const MAX_BYTES: u64 = 4 << 20;

/// What a snapshot is, what it needs, and what belongs to it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Its name.
    pub id: SnapshotId,
    /// What its memory is the difference to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Parent>,
    /// When it was taken: seconds since 1970.
    pub created: u64,
    /// The vmm that took it.
    pub vmm: String,
    /// Where it was taken, and can be restored.
    pub host: HostKind,
    /// What goes on in the guest.
    pub guest: GuestStage,
    /// The machine's description.
    pub config: MachineConfig,
    /// Its memory.
    pub memory: MemoryFile,
    /// Its state.
    pub state: StateFile,
    /// Its disks.
    pub disks: Vec<SavedDisk>,
}

/// Another snapshot that must be there too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parent {
    /// Which one.
    pub id: SnapshotId,
    /// Where it was.
    pub directory: std::path::PathBuf,
}

/// What a snapshot's host had to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostKind {
    /// The architecture: `x86_64`.
    pub arch: String,
    /// Whether guest kernels run on the CPU. What a guest kernel did to itself to run on one kind does not run on the other.
    pub kernel_mode: KernelMode,
    /// The boot of the host (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
}

/// What goes on in the guest, as far as whoever drives it from outside must know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestStage {
    /// The agent waits for its first message: a template.
    Greeted,
    /// The agent runs a container, which was frozen.
    Frozen,
    /// The agent runs a container. No snapshot is taken before it is frozen.
    Running,
    /// An ordinary virtual machine, or one that nobody drives.
    Own,
}

/// The file `memory`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryFile {
    /// Bytes of the guest's memory.
    pub size: u64,
    /// Bytes that were written.
    pub bytes: u64,
    /// CRC-32 over the pages that are not zero, each with its number in front.
    pub crc: u32,
}

/// The file `state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateFile {
    /// Its length.
    pub bytes: u64,
    /// CRC-32 of all of it.
    pub crc: u32,
}

impl HostKind {
    /// This host's.
    pub fn here(host: &Host) -> Self {
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        HostKind {
            arch: std::env::consts::ARCH.into(),
            kernel_mode: host.kernel_mode(),
            boot_id: boot_id.trim().into(),
        }
    }

    /// Why what was saved on `self` cannot be restored on `here`.
    pub fn unfit(&self, here: &HostKind) -> Option<String> {
        if self.arch != here.arch {
            return Some(format!("it was taken on {}, this host is {}", self.arch, here.arch));
        }
        if self.kernel_mode != here.kernel_mode {
            let kind = |mode| match mode {
                KernelMode::Hardware => "runs guest kernels on the CPU",
                KernelMode::Emulated => "emulates guest kernels",
            };
            let (there, here) = (kind(self.kernel_mode), kind(here.kernel_mode));
            return Some(format!(
                "it was taken on a host that {there}, this host {here}: boot the guest afresh"
            ));
        }
        // There the guest reads the host's own counter, which begins anew with each boot.
        if self.kernel_mode == KernelMode::Emulated && self.boot_id != here.boot_id {
            return Some(
                "the host was booted since, and this kind of host cannot mend the guest's clock: boot the guest afresh".into(),
            );
        }
        None
    }
}

/// Why a file is no manifest.
#[derive(Debug, PartialEq, Eq)]
pub enum Fault {
    /// Another version's.
    Version(u32),
    /// Damaged, or something else altogether.
    Damaged(String),
}

impl Manifest {
    /// The file's content.
    pub fn encode(&self) -> Vec<u8> {
        // Plain data with text keys: cannot fail.
        let json = serde_json::to_string_pretty(self).unwrap_or_default();
        format!("{}\n{json}", first_line(json.as_bytes())).into_bytes()
    }

    /// Reads the file's content.
    pub fn decode(bytes: &[u8]) -> Result<Self, Fault> {
        let damaged = |what: &str| Fault::Damaged(what.into());
        let end = bytes.iter().take(100).position(|b| *b == b'\n').ok_or_else(|| damaged("no first line"))?;
        let (line, json) = bytes.split_at(end);
        let json = json.get(1..).unwrap_or_default();
        let line = std::str::from_utf8(line).map_err(|_| damaged("the first line is not text"))?;
        let mut words = line.split(' ');
        if words.next() != Some(MAGIC) {
            return Err(damaged("it does not begin as one"));
        }
        match words.next().and_then(|word| word.parse().ok()) {
            Some(VERSION) => {}
            Some(other) => return Err(Fault::Version(other)),
            None => return Err(damaged("no version")),
        }
        if line != first_line(json) {
            return Err(damaged("its length or checksum is not what it says"));
        }
        let manifest: Manifest = serde_json::from_slice(json).map_err(|e| Fault::Damaged(e.to_string()))?;
        manifest.check().map_err(damaged)?;
        Ok(manifest)
    }

    /// What is wrong with it although its checksum is right.
    fn check(&self) -> Result<(), &'static str> {
        // They are shown to people, on terminals.
        let plain = |text: &str| text.len() <= 100 && text.bytes().all(|b| (b' '..=b'~').contains(&b));
        if ![&self.vmm, &self.host.arch, &self.host.boot_id].into_iter().all(|text| plain(text)) {
            return Err("what it says of vmm or host is not text");
        }
        let mut saved = BTreeSet::new();
        for disk in &self.disks {
            match self.config.devices.get(disk.slot) {
                Some(DeviceConfig::Block(block)) if block.read_only == disk.read_only => {}
                _ => return Err("a disk is not in a slot for such disks"),
            }
            if !saved.insert(disk.slot) {
                return Err("two disks are in one slot");
            }
        }
        // What it does not bring along would be opened by its name, whatever stands there.
        let missing = self.config.devices.iter().enumerate().any(|(slot, device)| {
            matches!(device, DeviceConfig::Block(block) if block.path.is_some()) && !saved.contains(&slot)
        });
        if missing { Err("a disk is missing") } else { Ok(()) }
    }
}

fn first_line(json: &[u8]) -> String {
    format!("{MAGIC} {VERSION} {} {:08x}", json.len(), crc32fast::hash(json))
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
pub(super) mod tests;
