//! From a [`Plan`] to a [`Machine`]: the only place where KVM, memory, devices and the kernel meet.
//!
//! Runs on the main thread. The order is KVM's (interrupt controller before vCPUs, vCPUs before the command line that depends
//! on what they show) and the project's law: a machine is always built paused.

mod vcpus;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Instant;

use devices::GuestMemory;
use devices::bus::{BusBuilder, BusError};
use devices::console::Console;
use devices::device_loop::{DeviceLoop, LoopError};
use devices::i8042::{self, I8042};
use devices::serial::{self, SerialPort};
use devices::virtio::VirtioDevice;
use devices::virtio::block::{Block, DiskError};
use devices::virtio::net::{Net, TapError};
use devices::virtio::rng::Rng;
use devices::virtio::transport::TransportState;
use devices::virtio::transport::mmio::{DOORBELL, Held, MMIO_SIZE, MmioTransport};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{IoEventAddress, VcpuFd, VmFd};
use thiserror::Error;

use crate::boot::{self, BootError, Cmdline, CmdlineError};
use crate::channels::Channels;
use crate::config::{ConsoleConfig, MachineConfig, irq_for_slot};
use crate::control::State;
use crate::controller::{Event, Handle};
use crate::host::pvm::{self, Pvm, PvmState, PvmVcpu};
use crate::host::{Host, KernelMode};
use crate::kvm::memory;
use crate::kvm::stats::VcpuStats;
use crate::layout::{self, LayoutError};
use crate::machine::{Attached, Machine};
use crate::plan::{Boot, ConsoleOutput, Plan, PlannedDevice, Slot};
use crate::snapshot::Loaded;
use crate::snapshot::manifest::{HostKind, Parent};
use crate::snapshot::vcpu::{Registers, VcpuStateError};
use crate::timeline::Timeline;
use crate::vcpu::exit::Buses;
use crate::vcpu::{Vcpu, VcpuThread};

/// Why a machine that was planned cannot be built: the host is short of something, or KVM refuses.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the message says it")]
pub enum BuildError {
    #[error("KVM refused to {what}: {source}")]
    Kvm { what: &'static str, source: kvm_ioctls::Error },
    #[error("cannot {what}: {source}")]
    Host { what: &'static str, source: io::Error },
    #[error("no {size} bytes of guest memory to be had from the host: {cause}: give --memory less")]
    Memory { size: u64, cause: String },
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error(transparent)]
    Loop(#[from] LoopError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
    #[error("the snapshot's state of {slot} cannot be used: {cause}")]
    State { slot: String, cause: String },
}

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> BuildError {
    move |source| BuildError::Kvm { what, source }
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> BuildError {
    move |source| BuildError::Host { what, source }
}

/// Words for every kernel: where its console is, and how it asks for a reset, which is also how a panic ends.
const COMMON_WORDS: &str = "console=ttyS0 reboot=t panic=1";

/// What the steps of the build share.
struct Builder<'a> {
    host: &'a Host,
    timeline: &'a Timeline,
    vm: VmFd,
    memory: Arc<GuestMemory>,
    emulated: bool,
}

/// Builds the machine. Nothing runs yet. Connections of the guest to the vsock `ports` of the host come to this process, through
/// the [`Channels`]; others go to the plan's unix sockets.
///
/// # Errors
/// [`BuildError`]; everything that was made is unmade again.
pub fn build(
    plan: Plan,
    boot: Boot,
    host: &Host,
    ports: &[u32],
    timeline: &Arc<Timeline>,
) -> Result<(Machine, Channels), BuildError> {
    assemble(plan, Some(boot), None, host, ports, timeline)
}

/// Makes the machine of a snapshot, with the back ends of `plan`. Nothing runs yet.
///
/// # Errors
/// [`BuildError`]; everything that was made is unmade again.
pub fn restore(
    plan: Plan,
    snapshot: Loaded,
    host: &Host,
    ports: &[u32],
    timeline: &Arc<Timeline>,
) -> Result<(Machine, Channels), BuildError> {
    assemble(plan, None, Some(snapshot), host, ports, timeline)
}

/// The guest begins with `boot`, at a kernel's first instruction, or where it was when `snapshot` was taken.
fn assemble(
    plan: Plan,
    boot: Option<Boot>,
    snapshot: Option<Loaded>,
    host: &Host,
    ports: &[u32],
    timeline: &Arc<Timeline>,
) -> Result<(Machine, Channels), BuildError> {
    let Plan { config, devices, console: output, .. } = plan;
    let builder =
        Builder::new(host, timeline, guest_memory(&config, snapshot.as_ref())?, config.memory.track_dirty)?;
    let saved = snapshot.as_ref().map(|snapshot| &snapshot.state);
    let pvm = builder.enable_measures(saved.and_then(|state| state.vm.pvm.clone()))?;

    let (sender, events) = channel();
    let handle = Handle::new(sender.clone());
    let (console, serial) = builder.console(output, &handle)?;
    let mut pio = BusBuilder::default();
    pio.insert(serial::PORTS.0, serial::PORTS.1, serial.clone())?;
    let reset = handle.clone();
    pio.insert(i8042::PORTS.0, i8042::PORTS.1, Arc::new(I8042::new(move || reset.send(Event::Reset))))?;

    let mut device_loop = DeviceLoop::new()?;
    let mut mmio = BusBuilder::default();
    let mut channels = Channels::new(ports);
    let mut attached = Vec::with_capacity(devices.len());
    for (index, slot) in devices.into_iter().enumerate() {
        let device = builder.attach(slot, index, &mut device_loop, &mut channels)?;
        mmio.insert(mmio_base(index), MMIO_SIZE, device.transport.clone())?;
        attached.push(device);
    }

    let buses = Buses { pio: pio.freeze(), mmio: mmio.freeze() };
    if let Some(state) = saved {
        timeline
            .in_kvm(|| state.vm.restore_chips(&builder.vm))
            .map_err(kvm("take saved interrupt controllers"))?;
    }
    let registers = timeline.in_kvm(|| Registers::of_host(&host.kvm, builder.emulated))?;
    let mut vcpus = Vec::with_capacity(config.vcpus.into());
    for id in 0..config.vcpus {
        let state = saved.and_then(|state| state.vcpus.get(usize::from(id)));
        let mut fd = match state {
            Some(state) => builder.restored_vcpu(id, state, &registers)?,
            None => builder.vcpu(id, config.vcpus)?,
        };
        if let Ok(stats) = VcpuStats::open(&fd) {
            timeline.count(stats);
        }
        let entry = state.and_then(|state| state.entry);
        let pvm = pvm.as_ref().map(|pvm| PvmVcpu::new(pvm.clone(), &mut fd, entry));
        let (buses, events, timeline) = (buses.clone(), sender.clone(), timeline.clone());
        vcpus.push(Vcpu { id, fd, buses, pvm, events, timeline });
    }
    if let (Some(fd), Some(boot)) = (vcpus.first().map(|vcpu| &vcpu.fd), boot) {
        let cmdline = builder.command_line(&config, &attached, fd)?;
        let entry =
            boot::install(&builder.memory, &boot.kernel, boot.initramfs.as_deref(), &cmdline, config.vcpus)?;
        builder.enter(fd, &entry)?;
    }
    let running = device_loop.spawn()?;
    let mut held = None;
    let mut parent = None;
    if let Some(Loaded { state, manifest, directory, .. }) = snapshot {
        timeline.in_kvm(|| state.vm.restore_clock(&builder.vm)).map_err(kvm("set the guest's clock"))?;
        serial
            .restore(state.serial)
            .map_err(|e| BuildError::State { slot: "the serial port".into(), cause: e.to_string() })?;
        held = Some(restore_devices(&attached, state.devices)?);
        // A diff says where its parent is, to whoever restores it from wherever.
        let directory = std::path::absolute(&directory).unwrap_or(directory);
        parent = Some(Parent { id: manifest.id, directory });
    }
    let vcpus: io::Result<Vec<VcpuThread>> = vcpus.into_iter().map(Vcpu::spawn).collect();
    let vcpus = vcpus.map_err(self::host("start a vCPU's thread"))?;
    let Builder { vm, memory, .. } = builder;
    let machine = Machine {
        vcpus,
        config,
        console,
        serial,
        handle,
        events,
        timeline: timeline.clone(),
        devices: attached,
        held,
        state: State::Created,
        built: Instant::now(),
        host: HostKind::here(host),
        registers,
        pvm,
        parent,
        _devices: running,
        vm,
        memory,
    };
    Ok((machine, channels))
}

fn mmio_base(index: usize) -> u64 {
    layout::virtio_mmio(index).map_or(u64::MAX, |address| address.0)
}

/// Fresh memory, or that of a snapshot: mapped copy-on-write from its file, so that a page costs something when it is touched.
fn guest_memory(config: &MachineConfig, snapshot: Option<&Loaded>) -> Result<GuestMemory, BuildError> {
    let size = config.memory.size.bytes();
    let failed = |cause: String| BuildError::Memory { size, cause };
    let regions = layout::memory_regions(size)?;
    let track = config.memory.track_dirty;
    let Some((first, rest)) = snapshot.and_then(|snapshot| snapshot.memory.split_first()) else {
        let memory = devices::memory::anonymous(&regions, track).map_err(|e| failed(e.to_string()))?;
        memory::prefer_huge_pages(&memory);
        return Ok(memory);
    };
    let memory =
        crate::snapshot::memory::map(&first.file, &regions, track).map_err(|e| failed(e.to_string()))?;
    for layer in rest {
        let pages = layer.pages.as_deref().unwrap_or_default();
        crate::snapshot::memory::apply_diff(&memory, &layer.file, pages)
            .map_err(|e| failed(e.to_string()))?;
    }
    Ok(memory)
}

fn restore_devices(attached: &[Attached], states: Vec<TransportState>) -> Result<Vec<Held>, BuildError> {
    let pairs = attached.iter().zip(states).enumerate();
    let restored = pairs.map(|(slot, (device, state))| {
        let held = device.transport.restore(state);
        held.map_err(|e| BuildError::State { slot: format!("slot {slot}"), cause: e.to_string() })
    });
    restored.collect()
}

impl<'a> Builder<'a> {
    fn new(
        host: &'a Host,
        timeline: &'a Timeline,
        memory: GuestMemory,
        track: bool,
    ) -> Result<Self, BuildError> {
        let memory = Arc::new(memory);
        let emulated = host.kernel_mode() == KernelMode::Emulated;
        let vm = timeline.in_kvm(|| {
            let vm = host.kvm.create_vm().map_err(kvm("create a VM"))?;
            // Pages that older Intel processors need to run real mode.
            let tss = usize::try_from(layout::KVM_TSS.0).unwrap_or(usize::MAX);
            vm.set_tss_address(tss).map_err(kvm("place its task state segment"))?;
            vm.set_identity_map_address(layout::KVM_IDENTITY_MAP.0).map_err(kvm("place its identity map"))?;
            vm.create_irq_chip().map_err(kvm("create an interrupt controller"))?;
            if !emulated {
                // A kernel without TSC deadline timers calibrates by it. Where kernel mode is emulated Linux does without, and
                // ports that the host serves by itself are out of our reach when user mode touches them.
                let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
                vm.create_pit2(pit).map_err(kvm("create a timer"))?;
            }
            memory::register(&vm, &memory, track).map_err(kvm("take the guest's memory"))?;
            Ok::<_, BuildError>(vm)
        })?;
        Ok(Builder { host, timeline, vm, memory, emulated })
    }

    fn enable_measures(&self, state: Option<PvmState>) -> Result<Option<Arc<Pvm>>, BuildError> {
        if !self.emulated {
            return Ok(None);
        }
        let pvm = self.timeline.in_kvm(|| Pvm::enable(&self.vm, self.memory.clone(), state));
        pvm.map(Some).map_err(kvm("report what its emulator lacks"))
    }

    /// What the kernel is told: where its devices are, and what it can do without on this host.
    fn command_line(
        &self,
        config: &MachineConfig,
        devices: &[Attached],
        vcpu: &VcpuFd,
    ) -> Result<Cmdline, BuildError> {
        let mut cmdline = Cmdline::new();
        cmdline.push(COMMON_WORDS)?;
        if config.console == ConsoleConfig::None {
            cmdline.push("quiet")?;
        }
        for index in 0..devices.len() {
            let (base, irq) = (mmio_base(index), irq_for_slot(index).unwrap_or_default());
            cmdline.push(&format!("virtio_mmio.device={MMIO_SIZE}@{base:#x}:{irq}"))?;
        }
        self.kernel_words(vcpu, &mut cmdline)?;
        cmdline.push(&config.boot.cmdline)?;
        log::info!("kernel command line: {}", cmdline.text());
        Ok(cmdline)
    }

    fn console(
        &self,
        output: ConsoleOutput,
        handle: &Handle,
    ) -> Result<(Console, Arc<SerialPort>), BuildError> {
        let console = Console::new();
        let forwarded = match output {
            ConsoleOutput::None => Ok(()),
            ConsoleOutput::Stdio => console.forward_to(Box::new(io::stdout())),
            ConsoleOutput::Stderr => console.forward_to(Box::new(io::stderr())),
            ConsoleOutput::File(file) => console.forward_to(Box::new(file)),
        };
        forwarded.map_err(host("start the console's thread"))?;
        let panicked = handle.clone();
        console.on_panic(move || panicked.send(Event::Panicked));
        let serial = SerialPort::new(console.clone()).map_err(host("make the serial port's interrupt"))?;
        let irqfd = self.timeline.in_kvm(|| self.vm.register_irqfd(serial.line(), serial::IRQ));
        irqfd.map_err(kvm("connect the serial port's interrupt"))?;
        Ok((console, Arc::new(serial)))
    }

    /// Puts a device on the loop, its registers in front of it, and its interrupt and doorbells into KVM.
    fn attach(
        &self,
        slot: Slot,
        index: usize,
        device_loop: &mut DeviceLoop,
        channels: &mut Channels,
    ) -> Result<Attached, BuildError> {
        let mut backend = None;
        let mut kept = None;
        let device: Box<dyn VirtioDevice> = match slot.device {
            PlannedDevice::Block { medium: None, read_only } => Box::new(Block::empty(read_only, "")),
            PlannedDevice::Block { medium: Some(disk), read_only } => {
                let id = disk.path.as_deref().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
                backend =
                    Some(disk.path.as_ref().map_or("unnamed".into(), |path| path.display().to_string()));
                let medium = disk.medium.try_clone().map_err(host("open a disk twice"))?;
                let device = Box::new(Block::with(medium, read_only, &id)?);
                kept = Some(disk);
                device
            }
            PlannedDevice::Net { tap: None, mac } => Box::new(Net::unplugged(mac.bytes())?),
            PlannedDevice::Net { tap: Some((name, tap)), mac } => {
                backend = Some(name);
                Box::new(Net::new(tap.into_file().into(), mac.bytes())?)
            }
            PlannedDevice::Vsock { cid, socket } => {
                backend = socket.as_ref().map(|socket| socket.path().display().to_string());
                Box::new(channels.open(cid, socket).map_err(host("open the vsock device's sockets"))?)
            }
            PlannedDevice::Rng => Box::new(Rng::new()),
        };
        let transport = MmioTransport::new(device, self.memory.clone(), device_loop)
            .map_err(host("make a device's doorbells"))?;
        let gsi = u32::from(slot.irq);
        self.timeline.in_kvm(|| {
            self.vm
                .register_irqfd(transport.interrupt().line(), gsi)
                .map_err(kvm("connect a device's interrupt"))?;
            let doorbell = IoEventAddress::Mmio(mmio_base(index) + DOORBELL);
            for (queue, kick) in (0u32..).zip(transport.kicks()) {
                self.vm
                    .register_ioevent(kick, &doorbell, queue)
                    .map_err(kvm("connect a device's doorbell"))?;
            }
            Ok::<_, BuildError>(())
        })?;
        Ok(Attached { transport: Arc::new(transport), backend, disk: kept })
    }

    /// Words that depend on the host: what the vCPUs show all the same, and what a kernel can do without there.
    fn kernel_words(&self, vcpu: &VcpuFd, cmdline: &mut Cmdline) -> Result<(), BuildError> {
        if !self.emulated {
            return Ok(());
        }
        let shown = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(kvm("say what its vCPUs show"))?;
        Ok(pvm::cmdline::add(cmdline, shown.as_slice())?)
    }
}
