//! From a description to a machine that can be built: every file is open, locked and checked, the TAPs are attached, the
//! sockets bound, the kernel unpacked. Whatever is wrong with flags, files or the host is found here, before a VM exists.
//!
//! Made on the main thread; the builder takes it apart. A plan that is dropped closes everything and leaves nothing behind.

mod console;
mod disk;
pub mod rootfs;
mod socket;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use devices::virtio::block::Medium;
use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
use thiserror::Error;

pub use console::{ConsoleError, ConsoleOutput};
pub use disk::{Disk, DiskError, DiskFault, SECTOR};
pub use socket::{ListeningSocket, SocketError};

use crate::boot::{self, BootError, Kernel, KernelError};
use crate::config::{
    BlockConfig, ConfigError, DeviceConfig, Initramfs, MacAddress, MachineConfig, NetConfig, VsockConfig,
    irq_for_slot,
};
use crate::host::tap::{Tap, TapError};
use crate::host::{Host, HostFacts};
use crate::snapshot::disks::LiveDisk;

/// What the vmm binary carries for its guests.
#[derive(Clone, Copy, Debug, Default)]
pub struct Assets {
    /// The agent's initramfs, a cpio archive; empty in a build without one.
    pub initramfs: &'static [u8],
}

/// A machine that can be built.
#[derive(Debug)]
pub struct Plan {
    /// The description with all that was left open chosen, such as hardware addresses.
    pub config: MachineConfig,
    /// The devices in slot order.
    pub devices: Vec<Slot>,
    /// Where the serial port goes.
    pub console: ConsoleOutput,
    /// What a person should know although it is no error; one line each.
    pub warnings: Vec<String>,
}

/// What a guest boots from.
#[derive(Debug)]
pub struct Boot {
    /// The kernel, unpacked and checked.
    pub kernel: Kernel,
    /// The first user space, when there is one.
    pub initramfs: Option<Cow<'static, [u8]>>,
}

/// A device with its interrupt line.
#[derive(Debug)]
pub struct Slot {
    /// The IOAPIC's pin (GSI).
    pub irq: u8,
    /// What is behind it.
    pub device: PlannedDevice,
}

/// A device with everything that it needs of the host.
#[derive(Debug)]
pub enum PlannedDevice {
    /// A disk.
    Block {
        /// What is in it; nothing in a spare slot.
        medium: Option<LiveDisk>,
        /// Whether the guest may only read.
        read_only: bool,
    },
    /// A network card.
    Net {
        /// The host's end and its name; nothing in a spare slot.
        tap: Option<(String, Tap)>,
        /// The guest's hardware address.
        mac: MacAddress,
    },
    /// Sockets between guest and host.
    Vsock {
        /// The guest's context id.
        cid: u32,
        /// Where the host connects; its path is also the stem of the sockets that the guest's connections go to.
        socket: Option<ListeningSocket>,
    },
    /// Random numbers.
    Rng,
}

/// Why a machine cannot be built. Each message is one line: what, where, and what to do.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the message says it")]
pub enum PlanError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error(transparent)]
    Console(#[from] ConsoleError),
    #[error("initramfs {}: {source}: check the path", path.display())]
    Initramfs { path: PathBuf, source: std::io::Error },
    #[error("initramfs {}: {fault}", path.display())]
    InitramfsContent { path: PathBuf, fault: &'static str },
    #[error(
        "this vmm was built without the agent's initramfs: name one with --initrd FILE, or build images/initramfs first"
    )]
    NoAgent,
    #[error("cannot choose a hardware address: {0}")]
    Random(std::io::Error),
}

impl Plan {
    /// Opens all that `config` names. What is cheap comes first, and what leaves a trace (a console's file, a socket) last.
    pub fn new(config: &MachineConfig, host: &Host, assets: &Assets) -> Result<(Self, Boot), PlanError> {
        config.validate(&host.facts)?;
        let initramfs = initramfs(config, assets)?;
        let mut config = config.clone();
        let mut devices = open_devices(&mut config, &mut BTreeMap::new())?;
        let kernel = Kernel::open(&config.boot.kernel, config.boot.protocol)?;
        let initramfs_size = initramfs.as_ref().map_or(0, |archive| archive.len() as u64);
        boot::place(&kernel, initramfs_size, config.memory.size.bytes())?;
        bind_devices(&mut devices, &config)?;
        let console = ConsoleOutput::open(&config.console)?;
        let warnings = warnings(&config, &host.facts);
        Ok((Self { config, devices, console, warnings }, Boot { kernel, initramfs }))
    }

    /// Opens what `config` names but for what a guest boots from: it was booted before a snapshot was taken of it. `media` are
    /// disks, by slot, that are open already and take the place of those that `config` names.
    pub fn for_snapshot(
        config: &MachineConfig,
        host: &Host,
        mut media: BTreeMap<usize, LiveDisk>,
    ) -> Result<Self, PlanError> {
        config.validate(&host.facts)?;
        let mut config = config.clone();
        let mut devices = open_devices(&mut config, &mut media)?;
        bind_devices(&mut devices, &config)?;
        let console = ConsoleOutput::open(&config.console)?;
        let warnings = warnings(&config, &host.facts);
        Ok(Self { config, devices, console, warnings })
    }
}

fn open_devices(
    config: &mut MachineConfig,
    media: &mut BTreeMap<usize, LiveDisk>,
) -> Result<Vec<Slot>, PlanError> {
    let mut devices = Vec::with_capacity(config.devices.len());
    for (slot, device) in config.devices.iter_mut().enumerate() {
        let irq = irq_for_slot(slot).ok_or(ConfigError::TooManyDevices(slot + 1))?;
        let open = match (media.remove(&slot), &device) {
            (Some(disk), DeviceConfig::Block(block)) => {
                PlannedDevice::Block { medium: Some(disk), read_only: block.read_only }
            }
            _ => PlannedDevice::open(slot, device)?,
        };
        devices.push(Slot { irq, device: open });
    }
    Ok(devices)
}

fn bind_devices(devices: &mut [Slot], config: &MachineConfig) -> Result<(), PlanError> {
    devices.iter_mut().zip(&config.devices).try_for_each(|(slot, device)| slot.device.bind(device))
}

impl PlannedDevice {
    /// Opens what is there already, and writes the choices that were left to us into the description.
    fn open(slot: usize, config: &mut DeviceConfig) -> Result<Self, PlanError> {
        Ok(match config {
            DeviceConfig::Block(BlockConfig { path, read_only }) => {
                let medium = match path {
                    Some(path) => {
                        let Disk { file, path, .. } = Disk::open(path, *read_only)?;
                        Some(LiveDisk {
                            slot,
                            // Whoever restores a snapshot that names it does so from wherever.
                            path: Some(std::path::absolute(&path).unwrap_or(path)),
                            read_only: *read_only,
                            medium: Medium::Raw(file),
                            base: None,
                        })
                    }
                    None => None,
                };
                Self::Block { medium, read_only: *read_only }
            }
            DeviceConfig::Net(NetConfig { tap, mac, .. }) => {
                let tap = match tap {
                    Some(name) => Some((name.clone(), Tap::open(name)?)),
                    None => None,
                };
                let mac = *match mac {
                    Some(mac) => mac,
                    None => mac.insert(random_mac()?),
                };
                Self::Net { tap, mac }
            }
            DeviceConfig::Vsock(VsockConfig { cid, .. }) => Self::Vsock { cid: *cid, socket: None },
            DeviceConfig::Rng(_) => Self::Rng,
        })
    }

    /// Makes what was not there.
    fn bind(&mut self, config: &DeviceConfig) -> Result<(), PlanError> {
        if let (Self::Vsock { socket, .. }, DeviceConfig::Vsock(VsockConfig { uds_path: Some(path), .. })) =
            (self, config)
        {
            *socket = Some(ListeningSocket::bind(path)?);
        }
        Ok(())
    }
}

fn random_mac() -> Result<MacAddress, PlanError> {
    let mut bytes = [0; 6];
    // Fewer than 256 bytes are never cut short (getrandom(2)).
    getrandom(&mut bytes, GetRandomFlags::empty()).map_err(|e| PlanError::Random(e.into()))?;
    Ok(MacAddress::local(bytes))
}

/// The archive as the guest will find it in memory. A file is read now: what is checked is what is used.
fn initramfs(config: &MachineConfig, assets: &Assets) -> Result<Option<Cow<'static, [u8]>>, PlanError> {
    match &config.boot.initramfs {
        Initramfs::None => Ok(None),
        Initramfs::BuiltIn if assets.initramfs.is_empty() => Err(PlanError::NoAgent),
        Initramfs::BuiltIn => Ok(Some(Cow::Borrowed(assets.initramfs))),
        Initramfs::File(path) => {
            // The kernel unpacks it beside itself: half of the memory is more than could ever work.
            let limit = config.memory.size.bytes() / 2;
            Ok(Some(Cow::Owned(read_initramfs(path, limit)?)))
        }
    }
}

/// Opens a file without waiting for whatever it may be: a pipe has no other end, a drive no disk. Reading and writing it may
/// wait then, as usual; io_uring would take the flag to mean that a read may fail instead.
pub(crate) fn open_no_wait(path: &Path, flags: OFlags, mode: Mode) -> Result<File, Errno> {
    let file = rustix::fs::open(path, flags | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC, mode)?;
    fcntl_setfl(&file, fcntl_getfl(&file)? & !OFlags::NONBLOCK)?;
    Ok(file.into())
}

fn read_initramfs(path: &Path, limit: u64) -> Result<Vec<u8>, PlanError> {
    let read = |source| PlanError::Initramfs { path: path.into(), source };
    let content = |fault| PlanError::InitramfsContent { path: path.into(), fault };
    let file = open_no_wait(path, OFlags::RDONLY, Mode::empty()).map_err(|e| read(e.into()))?;
    let metadata = file.metadata().map_err(read)?;
    if !metadata.is_file() {
        return Err(content("not a regular file: give a cpio archive"));
    }
    if metadata.len() > limit {
        return Err(content(
            "larger than half of the guest's memory: give the guest more, or make it smaller",
        ));
    }
    // Its length may change under us; the limit may not.
    let mut archive = Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or_default());
    file.take(limit).read_to_end(&mut archive).map_err(read)?;
    if archive.is_empty() {
        return Err(content("the file is empty: build or copy it again"));
    }
    Ok(archive)
}

fn warnings(config: &MachineConfig, host: &HostFacts) -> Vec<String> {
    let mut warnings = Vec::new();
    let (vcpus, cpus) = (config.vcpus, host.system.cpus);
    if u32::from(vcpus) > cpus {
        warnings.push(format!("{vcpus} vCPUs share this host's {cpus} CPUs: they will wait for each other"));
    }
    let (size, available) = (config.memory.size, host.system.memory_available);
    if size > available {
        let mib = available.whole_mib();
        warnings.push(format!(
            "{size} of memory is more than the {mib} MiB available now: the host may swap, or kill"
        ));
    }
    warnings
}
