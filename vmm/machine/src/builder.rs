//! From a [`Plan`] to a [`Machine`]: the only place where KVM, memory, devices and the kernel meet.
//!
//! Runs on the main thread. The order is KVM's (interrupt controller before vCPUs, vCPUs before the command line that depends
//! on what they show) and the project's law: a machine is always built paused.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::channel;

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
use devices::virtio::transport::mmio::{DOORBELL, MMIO_SIZE, MmioTransport};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, Msrs, kvm_pit_config};
use kvm_ioctls::{IoEventAddress, VcpuFd, VmFd};
use thiserror::Error;

use crate::arch::x86_64::{cpuid, lapic, msrs};
use crate::boot::{self, BootError, Cmdline, CmdlineError};
use crate::channels::Channels;
use crate::config::ConsoleConfig;
use crate::controller::{Event, Handle};
use crate::host::pvm::{self, Pvm, PvmVcpu};
use crate::host::{Host, KernelMode};
use crate::kvm::memory;
use crate::kvm::stats::VcpuStats;
use crate::layout::{self, LayoutError};
use crate::machine::Machine;
use crate::plan::{ConsoleOutput, Plan, PlannedDevice, Slot};
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
    host: &Host,
    ports: &[u32],
    timeline: &Arc<Timeline>,
) -> Result<(Machine, Channels), BuildError> {
    let Plan { config, kernel, initramfs, devices, console: output, .. } = plan;
    let builder = Builder::new(host, timeline, config.memory.size.bytes())?;
    let pvm = builder.enable_measures()?;

    let (sender, events) = channel();
    let handle = Handle::new(sender.clone());
    let (console, serial) = builder.console(output, &handle)?;
    let mut pio = BusBuilder::default();
    pio.insert(serial::PORTS.0, serial::PORTS.1, serial.clone())?;
    let reset = handle.clone();
    pio.insert(i8042::PORTS.0, i8042::PORTS.1, Arc::new(I8042::new(move || reset.send(Event::Reset))))?;

    let mut device_loop = DeviceLoop::new()?;
    let mut mmio = BusBuilder::default();
    let mut cmdline = Cmdline::new();
    cmdline.push(COMMON_WORDS)?;
    if config.console == ConsoleConfig::None {
        cmdline.push("quiet")?;
    }
    let mut channels = Channels::new(ports);
    for (index, slot) in devices.into_iter().enumerate() {
        let transport = builder.attach(slot, index, &mut device_loop, &mut cmdline, &mut channels)?;
        let base = layout::virtio_mmio(index).map_or(u64::MAX, |a| a.0);
        mmio.insert(base, MMIO_SIZE, transport)?;
    }

    let buses = Buses { pio: pio.freeze(), mmio: mmio.freeze() };
    let mut vcpus = Vec::with_capacity(config.vcpus.into());
    for id in 0..config.vcpus {
        let mut fd = builder.vcpu(id, config.vcpus)?;
        if let Ok(stats) = VcpuStats::open(&fd) {
            timeline.count(stats);
        }
        let pvm = pvm.as_ref().map(|pvm| PvmVcpu::new(pvm.clone(), &mut fd));
        let (buses, events, timeline) = (buses.clone(), sender.clone(), timeline.clone());
        vcpus.push(Vcpu { id, fd, buses, pvm, events, timeline });
    }
    if let Some(boot) = vcpus.first() {
        builder.kernel_words(&boot.fd, &mut cmdline)?;
        cmdline.push(&config.boot.cmdline)?;
        log::info!("kernel command line: {}", cmdline.text());
        let entry = boot::install(&builder.memory, &kernel, initramfs.as_deref(), &cmdline, config.vcpus)?;
        builder.enter(&boot.fd, &entry)?;
    }
    let running = device_loop.spawn()?;
    let vcpus: io::Result<Vec<VcpuThread>> = vcpus.into_iter().map(Vcpu::spawn).collect();
    let vcpus = vcpus.map_err(host_thread)?;
    let Builder { vm, memory, .. } = builder;
    let machine = Machine {
        vcpus,
        console,
        serial,
        handle,
        events,
        timeline: timeline.clone(),
        _devices: running,
        _vm: vm,
        _memory: memory,
    };
    Ok((machine, channels))
}

fn host_thread(source: io::Error) -> BuildError {
    BuildError::Host { what: "start a vCPU's thread", source }
}

impl<'a> Builder<'a> {
    fn new(host: &'a Host, timeline: &'a Timeline, size: u64) -> Result<Self, BuildError> {
        let regions = layout::memory_regions(size)?;
        let memory = devices::memory::anonymous(&regions, false)
            .map_err(|e| BuildError::Memory { size, cause: e.to_string() })?;
        let memory = Arc::new(memory);
        memory::prefer_huge_pages(&memory);
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
            memory::register(&vm, &memory).map_err(kvm("take the guest's memory"))?;
            Ok::<_, BuildError>(vm)
        })?;
        Ok(Builder { host, timeline, vm, memory, emulated })
    }

    fn enable_measures(&self) -> Result<Option<Arc<Pvm>>, BuildError> {
        if !self.emulated {
            return Ok(None);
        }
        let pvm = self.timeline.in_kvm(|| Pvm::enable(&self.vm, self.memory.clone()));
        pvm.map(Some).map_err(kvm("report what its emulator lacks"))
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
        cmdline: &mut Cmdline,
        channels: &mut Channels,
    ) -> Result<Arc<MmioTransport>, BuildError> {
        let device: Box<dyn VirtioDevice> = match slot.device {
            PlannedDevice::Block(disk) => {
                let id = disk.path.file_name().unwrap_or_default().to_string_lossy();
                Box::new(Block::new(disk.file, disk.read_only, &id)?)
            }
            PlannedDevice::Net { tap, mac } => Box::new(Net::new(tap.into_file().into(), mac.bytes())?),
            PlannedDevice::Vsock { cid, socket } => {
                Box::new(channels.open(cid, socket).map_err(host("open the vsock device's sockets"))?)
            }
            PlannedDevice::Rng => Box::new(Rng::new()),
        };
        let transport = MmioTransport::new(device, self.memory.clone(), device_loop)
            .map_err(host("make a device's doorbells"))?;
        let base = layout::virtio_mmio(index).map_or(u64::MAX, |a| a.0);
        let gsi = u32::from(slot.irq);
        self.timeline.in_kvm(|| {
            self.vm
                .register_irqfd(transport.interrupt().line(), gsi)
                .map_err(kvm("connect a device's interrupt"))?;
            let doorbell = IoEventAddress::Mmio(base + DOORBELL);
            for (queue, kick) in (0u32..).zip(transport.kicks()) {
                self.vm
                    .register_ioevent(kick, &doorbell, queue)
                    .map_err(kvm("connect a device's doorbell"))?;
            }
            Ok::<_, BuildError>(())
        })?;
        cmdline.push(&format!("virtio_mmio.device={MMIO_SIZE}@{base:#x}:{gsi}"))?;
        Ok(Arc::new(transport))
    }

    fn vcpu(&self, id: u8, count: u8) -> Result<VcpuFd, BuildError> {
        self.timeline.in_kvm(|| {
            let fd = self.vm.create_vcpu(id.into()).map_err(kvm("create a vCPU"))?;
            fd.set_cpuid2(&self.shown(id, count)?).map_err(kvm("set what a vCPU shows"))?;
            let reset =
                Msrs::from_entries(&msrs::at_reset()).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG));
            let set =
                reset.and_then(|reset| fd.set_msrs(&reset).map(|count| count == reset.as_slice().len()));
            if !set.map_err(kvm("set a vCPU's registers"))? {
                log::warn!("vcpu {id}: KVM refused a register that firmware sets");
            }
            let mut lapic = fd.get_lapic().map_err(kvm("read a vCPU's interrupt controller"))?;
            lapic::connect_local_interrupts(&mut lapic);
            fd.set_lapic(&lapic).map_err(kvm("set a vCPU's interrupt controller"))?;
            Ok(fd)
        })
    }

    fn shown(&self, id: u8, count: u8) -> Result<CpuId, BuildError> {
        let supported = self.host.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        let supported = supported.map_err(kvm("say what its vCPUs can do"))?;
        let mut entries = cpuid::for_vcpu(supported.as_slice(), id, count);
        if self.emulated {
            cpuid::mask_for_emulated_kernel(&mut entries);
        }
        let too_many = |_| BuildError::Kvm {
            what: "show more than 256 CPUID leaves",
            source: kvm_ioctls::Error::new(libc::E2BIG),
        };
        CpuId::from_entries(&entries).map_err(too_many)
    }

    /// Words that depend on the host: what the vCPUs show all the same, and what a kernel can do without there.
    fn kernel_words(&self, vcpu: &VcpuFd, cmdline: &mut Cmdline) -> Result<(), BuildError> {
        if !self.emulated {
            return Ok(());
        }
        let shown = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(kvm("say what its vCPUs show"))?;
        Ok(pvm::cmdline::add(cmdline, shown.as_slice())?)
    }

    fn enter(&self, vcpu: &VcpuFd, entry: &crate::arch::x86_64::EntryPoint) -> Result<(), BuildError> {
        self.timeline.in_kvm(|| {
            let mut sregs = vcpu.get_sregs().map_err(kvm("read the boot vCPU's state"))?;
            entry.apply(&mut sregs);
            vcpu.set_sregs(&sregs).map_err(kvm("set the boot vCPU's state"))?;
            vcpu.set_regs(&entry.regs()).map_err(kvm("set the boot vCPU's registers"))
        })
    }
}
