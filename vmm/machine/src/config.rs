//! What a virtual machine is made of: the one description that flags, `--config FILE.json`, the API and snapshots share.
//!
//! Plain data with limits. Nothing here opens a file or asks the kernel anything: [`MachineConfig::validate`] compares the
//! description with facts that were collected before, and [`crate::plan::Plan`] opens what it names. Used on the main
//! thread, before the machine exists.

mod net;
mod size;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use net::{Ipv4Cidr, MacAddress};
pub use size::{ByteSize, ParseSizeError};

use crate::host::HostFacts;

/// Most vCPUs of one machine, whatever the host could do.
pub const MAX_VCPUS: u8 = 64;
/// Least memory of a machine: a small kernel and the agent's initramfs fit, with some room for the container.
pub const MIN_MEMORY: ByteSize = ByteSize::mib(32);
/// Most devices of one machine: one interrupt line each, see [`irq_for_slot`].
pub const MAX_DEVICES: usize = IRQ_LINES.len();
/// Longest text that may be added to the kernel's command line, in bytes. x86 kernels keep 2047 (`COMMAND_LINE_SIZE`),
/// and half of that is left to the words that vmm itself adds.
pub const MAX_CMDLINE: usize = 1024;
/// A configuration file larger than this is refused before it is parsed.
const MAX_CONFIG_FILE: u64 = 1 << 20;

/// The IOAPIC's pins that no legacy device needs: not the timer (0, 2), the keyboard (1), the serial ports (3, 4) and the
/// clock (8).
const IRQ_LINES: [u8; 18] = [5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

/// The interrupt line (GSI) of the device in `slot`, or `None` beyond the last slot. Lines are never shared, so that a
/// device's interrupt can be an edge without a status register to look at.
pub fn irq_for_slot(slot: usize) -> Option<u8> {
    IRQ_LINES.get(slot).copied()
}

/// The complete description of one machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MachineConfig {
    /// Number of virtual CPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Guest memory.
    pub memory: MemoryConfig,
    /// What the guest starts with.
    pub boot: BootConfig,
    /// virtio devices in slot order. Block devices become `/dev/vda`, `/dev/vdb` … in this order.
    pub devices: Vec<DeviceConfig>,
    /// Where the guest's serial port goes.
    pub console: ConsoleConfig,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpus: 1,
            memory: MemoryConfig::default(),
            boot: BootConfig::default(),
            devices: Vec::new(),
            console: ConsoleConfig::default(),
        }
    }
}

/// Guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// Bytes of RAM: a multiple of 1 MiB, at least [`MIN_MEMORY`].
    pub size: ByteSize,
    /// Record which pages change, so that a snapshot can be taken as the difference to the one before. Costs the guest a little.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub track_dirty: bool,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self { size: ByteSize::mib(256), track_dirty: false }
    }
}

/// What the guest starts with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BootConfig {
    /// Linux kernel: a bzImage or an ELF `vmlinux`. Required; empty stands for "not given yet", so that a file may hold
    /// everything but the kernel.
    pub kernel: PathBuf,
    /// First user space.
    pub initramfs: Initramfs,
    /// Words added to the end of the kernel's command line; printable ASCII, at most [`MAX_CMDLINE`] bytes.
    pub cmdline: String,
    /// How the kernel is entered.
    pub protocol: BootProtocol,
}

/// First user space of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Initramfs {
    /// The agent's, carried inside the vmm binary.
    #[default]
    BuiltIn,
    /// None: the kernel mounts its root itself.
    None,
    /// A cpio archive, compressed or not as the kernel can read it.
    File(PathBuf),
}

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BootProtocol {
    /// What the file is made for: the 64-bit Linux entry, PVH for an ELF file that has only that.
    #[default]
    Auto,
    /// The 64-bit Linux boot protocol (Documentation/arch/x86/boot.rst).
    Linux,
    /// The PVH entry that an ELF note (`XEN_ELFNOTE_PHYS32_ENTRY`) names.
    Pvh,
}

/// One virtio device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceConfig {
    /// A disk.
    Block(BlockConfig),
    /// A network card on a TAP.
    Net(NetConfig),
    /// Sockets between guest and host; at most one.
    Vsock(VsockConfig),
    /// Random numbers from the host; at most one.
    Rng(RngConfig),
}

/// A disk: a raw image file or a block device. The format is never guessed from the content, which a guest may write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockConfig {
    /// The image, or the block device. Absent: a spare slot, whose medium comes later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Refuse the guest's writes and share the file with other readers. Otherwise this machine has it alone.
    #[serde(default)]
    pub read_only: bool,
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Name of an existing TAP interface. Absent: a spare card, which is plugged in later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// The guest's hardware address; a random, locally administered one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// The guest's IPv4 address with its prefix length, such as `10.0.0.2/24`; the interface stays down when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Cidr>,
    /// The guest's default route, inside `address`'s network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<std::net::Ipv4Addr>,
}

/// Sockets between guest and host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id: 3 to 0xffff_fffe. It only has a meaning inside this machine.
    #[serde(default = "VsockConfig::default_cid")]
    pub cid: u32,
    /// Unix socket on which the host connects into the guest (`CONNECT port`); `PATH_port` is where the guest's own
    /// connections arrive. Without it only vmm itself speaks with the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uds_path: Option<PathBuf>,
}

impl VsockConfig {
    /// The context id of a machine that does not say which: the lowest that a guest can have.
    pub fn default_cid() -> u32 {
        3
    }
}

impl Default for VsockConfig {
    fn default() -> Self {
        Self { cid: Self::default_cid(), uds_path: None }
    }
}

/// Random numbers from the host: nothing to set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngConfig {}

/// Where the guest's serial port goes. The last lines are always kept in memory, for the message of a guest that dies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConsoleConfig {
    /// Nowhere else.
    #[default]
    None,
    /// vmm's own standard input and output.
    Stdio,
    /// vmm's own standard error: where standard output is the container's.
    Stderr,
    /// Written to a file, which is created or emptied.
    File(PathBuf),
}

/// Why a description is refused. Each message is one line: what, where, and what to do.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the message says it")]
pub enum ConfigError {
    #[error("cannot read the configuration {path:?}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("the configuration {path:?} is larger than 1 MiB: that is not a machine's description")]
    TooLarge { path: PathBuf },
    #[error("{}:{line}:{column}: {message}", path.display())]
    Parse { path: PathBuf, line: usize, column: usize, message: String },
    #[error("{given} vCPUs: choose 1 to {limit}{}", if *limit < u32::from(MAX_VCPUS) { ", which is this host's limit" } else { "" })]
    Vcpus { given: u8, limit: u32 },
    #[error("{0} of memory is too little: give the guest {MIN_MEMORY} or more")]
    MemoryTooSmall(ByteSize),
    #[error("{0} of memory is not a multiple of 1M: give it in whole mebibytes")]
    MemoryUnaligned(ByteSize),
    #[error(
        "{size} of memory is more than this host has ({} MiB, {} MiB of it available now): give the guest less",
        total.whole_mib(), available.whole_mib()
    )]
    MemoryTooLarge { size: ByteSize, total: ByteSize, available: ByteSize },
    #[error("no kernel given: name one with --kernel FILE or in boot.kernel")]
    NoKernel,
    #[error("boot.cmdline is {0} bytes long: the kernel takes {MAX_CMDLINE} beyond vmm's own words")]
    CmdlineTooLong(usize),
    #[error("boot.cmdline has the byte {byte:#04x} at {at}: only printable ASCII reaches the kernel")]
    CmdlineByte { byte: u8, at: usize },
    #[error("{0} devices: a machine has interrupt lines for {MAX_DEVICES}")]
    TooManyDevices(usize),
    #[error("devices[{at}]: a second {kind} device: one is all that a machine can have")]
    Second { at: usize, kind: &'static str },
    #[error("devices[{at}]: the block device has an empty path: name a raw image or a block device")]
    NoDiskPath { at: usize },
    #[error(
        "devices[{at}]: {name:?} cannot be an interface's name: 1 to 15 characters, no space, '/', ':' or '%'"
    )]
    TapName { at: usize, name: String },
    #[error("devices[{at}]: the TAP {name:?} is used twice: give each network card its own")]
    TapTwice { at: usize, name: String },
    #[error(
        "devices[{at}]: {mac} is a group address or zero: the first byte of a card's address must be even, such as 02:…"
    )]
    Mac { at: usize, mac: MacAddress },
    #[error("devices[{at}]: the address {mac} is used twice: give each network card its own")]
    MacTwice { at: usize, mac: MacAddress },
    #[error("devices[{at}]: a gateway needs an address: add \"address\": \"A.B.C.D/PREFIX\"")]
    GatewayAlone { at: usize },
    #[error("devices[{at}]: the gateway {gateway} is not another host of {address}'s network")]
    GatewayOutside { at: usize, gateway: std::net::Ipv4Addr, address: Ipv4Cidr },
    #[error("devices[{at}]: vsock's cid {cid} is reserved: choose 3 to 4294967294")]
    Cid { at: usize, cid: u32 },
}

impl MachineConfig {
    /// Reads a JSON description. It is not validated yet: flags may still change it.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read { path: path.into(), source };
        let file = std::fs::File::open(path).map_err(read)?;
        let mut text = Vec::new();
        std::io::Read::read_to_end(&mut std::io::Read::take(file, MAX_CONFIG_FILE + 1), &mut text)
            .map_err(read)?;
        if text.len() as u64 > MAX_CONFIG_FILE {
            return Err(ConfigError::TooLarge { path: path.into() });
        }
        Self::from_json(path, &text)
    }

    /// Parses a JSON description; `path` only names it in errors.
    pub fn from_json(path: &Path, text: &[u8]) -> Result<Self, ConfigError> {
        serde_json::from_slice(text).map_err(|e| {
            let whole = e.to_string();
            let position = format!(" at line {} column {}", e.line(), e.column());
            ConfigError::Parse {
                path: path.into(),
                line: e.line(),
                column: e.column(),
                message: whole.strip_suffix(&position).unwrap_or(&whole).to_string(),
            }
        })
    }

    /// Compares the description with its own limits and with the host's. Nothing is opened.
    pub fn validate(&self, host: &HostFacts) -> Result<(), ConfigError> {
        let limit = host.kvm.max_vcpus.min(MAX_VCPUS.into());
        if self.vcpus == 0 || u32::from(self.vcpus) > limit {
            return Err(ConfigError::Vcpus { given: self.vcpus, limit });
        }
        let size = self.memory.size;
        if size < MIN_MEMORY {
            return Err(ConfigError::MemoryTooSmall(size));
        }
        if !size.bytes().is_multiple_of(1 << 20) {
            return Err(ConfigError::MemoryUnaligned(size));
        }
        let (total, available) = (host.system.memory_total, host.system.memory_available);
        if size > total {
            return Err(ConfigError::MemoryTooLarge { size, total, available });
        }
        self.boot.validate()?;
        validate_devices(&self.devices)
    }
}

impl BootConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        if self.kernel.as_os_str().is_empty() {
            return Err(ConfigError::NoKernel);
        }
        if self.cmdline.len() > MAX_CMDLINE {
            return Err(ConfigError::CmdlineTooLong(self.cmdline.len()));
        }
        match self.cmdline.bytes().enumerate().find(|(_, b)| !(b' '..=b'~').contains(b)) {
            Some((at, byte)) => Err(ConfigError::CmdlineByte { byte, at }),
            None => Ok(()),
        }
    }
}

fn validate_devices(devices: &[DeviceConfig]) -> Result<(), ConfigError> {
    if devices.len() > MAX_DEVICES {
        return Err(ConfigError::TooManyDevices(devices.len()));
    }
    let (mut vsocks, mut rngs) = (0, 0);
    let (mut taps, mut macs) = (HashSet::new(), HashSet::new());
    for (at, device) in devices.iter().enumerate() {
        match device {
            DeviceConfig::Block(block) if block.path.as_ref().is_some_and(|p| p.as_os_str().is_empty()) => {
                return Err(ConfigError::NoDiskPath { at });
            }
            DeviceConfig::Block(_) => {}
            DeviceConfig::Net(net) => {
                net.validate(at)?;
                if let Some(tap) = net.tap.as_ref().filter(|tap| !taps.insert(*tap)) {
                    return Err(ConfigError::TapTwice { at, name: tap.clone() });
                }
                if let Some(mac) = net.mac.filter(|mac| !macs.insert(*mac)) {
                    return Err(ConfigError::MacTwice { at, mac });
                }
            }
            DeviceConfig::Vsock(vsock) => {
                vsocks += 1;
                if vsocks > 1 {
                    return Err(ConfigError::Second { at, kind: "vsock" });
                }
                if vsock.cid < 3 || vsock.cid == u32::MAX {
                    return Err(ConfigError::Cid { at, cid: vsock.cid });
                }
            }
            DeviceConfig::Rng(RngConfig {}) => {
                rngs += 1;
                if rngs > 1 {
                    return Err(ConfigError::Second { at, kind: "rng" });
                }
            }
        }
    }
    Ok(())
}

impl NetConfig {
    fn validate(&self, at: usize) -> Result<(), ConfigError> {
        if let Some(tap) = self.tap.as_ref().filter(|tap| !net::is_interface_name(tap)) {
            return Err(ConfigError::TapName { at, name: tap.clone() });
        }
        if let Some(mac) = self.mac.filter(|mac| !mac.is_unicast()) {
            return Err(ConfigError::Mac { at, mac });
        }
        match (self.gateway, self.address) {
            (Some(_), None) => Err(ConfigError::GatewayAlone { at }),
            (Some(gateway), Some(address)) if !address.reaches(gateway) => {
                Err(ConfigError::GatewayOutside { at, gateway, address })
            }
            _ => Ok(()),
        }
    }
}
