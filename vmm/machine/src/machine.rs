//! A machine that was built or restored, from its first instruction to its end.
//!
//! Everything here happens on the thread that calls [`Machine::run`]: the controller. Others ask it things through a [`Handle`],
//! which is a [`Control`](crate::control::Control).

mod attach;
mod serve;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use devices::GuestMemory;
use devices::console::Console;
use devices::device_loop::RunningLoop;
use devices::serial::SerialPort;
use devices::virtio::transport::mmio::{Held, MmioTransport};
use kvm_ioctls::VmFd;

use crate::config::MachineConfig;
use crate::control::{Refusal, State};
use crate::controller::{Ending, Event, Handle, Next, PanicWords, Watch};
use crate::host::pvm::Pvm;
use crate::snapshot::disks::LiveDisk;
use crate::snapshot::manifest::{GuestStage, HostKind, Parent};
use crate::snapshot::vcpu::Registers;
use crate::timeline::{Phase, Timeline};
use crate::vcpu::VcpuThread;

/// Whoever drives the guest from inside: the agent's session. Called on the controller's thread.
pub trait Guest: Send {
    /// What goes on in the guest.
    fn stage(&self) -> GuestStage;

    /// Stops the container's processes, so that a copy's identity can be repaired before any of them runs.
    ///
    /// # Errors
    /// With a line for a person when they cannot be stopped.
    fn freeze(&mut self, patience: Duration) -> Result<(), String>;

    /// Lets them go on.
    fn thaw(&mut self);

    /// Asks the guest to end; `false` when it cannot be asked.
    fn shutdown(&mut self) -> bool;
}

/// A machine that nobody drives.
pub struct Own;

impl Guest for Own {
    fn stage(&self) -> GuestStage {
        GuestStage::Own
    }

    fn freeze(&mut self, _: Duration) -> Result<(), String> {
        Ok(())
    }

    fn thaw(&mut self) {}

    fn shutdown(&mut self) -> bool {
        false
    }
}

/// A device: what the guest sees of it, and what is behind it.
pub(crate) struct Attached {
    /// Its registers.
    pub transport: Arc<MmioTransport>,
    /// What it is the front of, for people.
    pub backend: Option<String>,
    /// Its disk once more, to be read for a snapshot.
    pub disk: Option<LiveDisk>,
}

/// A paused machine. Fields are dropped in this order: vCPUs stop before devices, devices before the VM, the VM before its memory.
pub struct Machine {
    pub(crate) vcpus: Vec<VcpuThread>,
    pub(crate) config: MachineConfig,
    pub(crate) console: Console,
    pub(crate) serial: Arc<SerialPort>,
    pub(crate) handle: Handle,
    pub(crate) events: Receiver<Event>,
    pub(crate) timeline: Arc<Timeline>,
    pub(crate) devices: Vec<Attached>,
    /// The devices' queues while the machine is paused.
    pub(crate) held: Option<Vec<Held>>,
    pub(crate) state: State,
    pub(crate) built: Instant,
    pub(crate) host: HostKind,
    pub(crate) registers: Registers,
    pub(crate) pvm: Option<Arc<Pvm>>,
    /// The snapshot that this machine's memory differs from by what was written since.
    pub(crate) parent: Option<Parent>,
    pub(crate) _devices: RunningLoop,
    pub(crate) vm: VmFd,
    pub(crate) memory: Arc<GuestMemory>,
}

impl Machine {
    /// A way to the machine from other threads.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// What the guest prints on its serial port.
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// The guest's serial port, for input.
    pub fn serial(&self) -> &Arc<SerialPort> {
        &self.serial
    }

    /// What the machine is, with what was left open chosen.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// Lets the machine run, when it was built or is paused.
    ///
    /// # Errors
    /// [`Refusal`] when a device cannot go on. The machine does, with the others: the device's driver was told.
    pub fn start(&mut self) -> Result<(), Refusal> {
        let held = self.held.take().unwrap_or_default();
        let outcome = resume(&self.devices, held);
        self.state = State::Running;
        self.vcpus.iter().for_each(VcpuThread::resume);
        outcome
    }

    /// Runs the machine to its end, on the calling thread; a machine that was not started waits for somebody to ask that.
    /// Devices stay until the machine is dropped: what the guest sent still gets out.
    pub fn run(&mut self, words: PanicWords, guest: &mut dyn Guest) -> Ending {
        let mut watch = Watch::new(words);
        let ending = loop {
            match watch.next(&self.events, &self.vcpus, self.state != State::Running) {
                Next::Ended(ending) => break ending,
                Next::Asked(asked) => {
                    let answer = self.serve(asked.request, guest, &mut watch);
                    // Whoever asked may have gone.
                    let _ = asked.answer.send(answer);
                }
            }
        };
        self.state = State::Ended;
        self.timeline.mark(Phase::Exit);
        // All at once; dropping them one by one would wait for each in turn.
        self.vcpus.iter().for_each(VcpuThread::stop);
        // Whoever asks from now on hears that there is no machine any more, and so does whoever waits for an answer.
        self.events = channel().1;
        ending
    }

    /// Stops vCPUs between two instructions, and takes the queues out of the devices. The machine runs on when it fails.
    fn pause(&mut self) -> Result<(), Refusal> {
        self.vcpus.iter().for_each(VcpuThread::pause);
        self.vcpus.iter().for_each(VcpuThread::rest);
        let mut held = Vec::with_capacity(self.devices.len());
        for device in &self.devices {
            match device.transport.quiesce() {
                Ok(queues) => held.push(queues),
                Err(error) => {
                    // The refusal says what matters; what fails beside it is in the log.
                    let _ = resume(&self.devices, held);
                    self.vcpus.iter().for_each(VcpuThread::resume);
                    return Err(Refusal::Failed(format!("cannot pause: {error}")));
                }
            }
        }
        self.held = Some(held);
        self.state = State::Paused;
        Ok(())
    }
}

/// Gives the devices the queues back that were taken from them, to every one that takes them.
fn resume(devices: &[Attached], held: Vec<Held>) -> Result<(), Refusal> {
    let mut outcome = Ok(());
    for (slot, (device, held)) in devices.iter().zip(held).enumerate() {
        if let Err(error) = device.transport.resume(held) {
            log::error!("slot {slot} cannot go on: {error}");
            outcome =
                Err(Refusal::Failed(format!("the machine runs, but slot {slot} cannot go on: {error}")));
        }
    }
    outcome
}
