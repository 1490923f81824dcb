//! A machine that was built, from its first instruction to its end.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use devices::GuestMemory;
use devices::console::Console;
use devices::device_loop::RunningLoop;
use devices::serial::SerialPort;
use kvm_ioctls::VmFd;

use crate::controller::{self, Ending, Event, Handle, PanicWords};
use crate::timeline::{Phase, Timeline};
use crate::vcpu::VcpuThread;

/// A paused machine. Fields are dropped in this order: vCPUs stop before devices, devices before the VM, the VM before its memory.
pub struct Machine {
    pub(crate) vcpus: Vec<VcpuThread>,
    pub(crate) console: Console,
    pub(crate) serial: Arc<SerialPort>,
    pub(crate) handle: Handle,
    pub(crate) events: Receiver<Event>,
    pub(crate) timeline: Arc<Timeline>,
    pub(crate) _devices: RunningLoop,
    pub(crate) _vm: VmFd,
    pub(crate) _memory: Arc<GuestMemory>,
}

impl Machine {
    /// A way to end the machine from other threads.
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

    /// Runs the machine to its end, on the calling thread. Devices stay until it is dropped: what the guest sent still gets out.
    pub fn run(&self, words: PanicWords) -> Ending {
        self.vcpus.iter().for_each(VcpuThread::resume);
        let ending = controller::wait(&self.events, &self.vcpus, words);
        self.timeline.mark(Phase::Exit);
        // All at once; dropping them one by one would wait for each in turn.
        self.vcpus.iter().for_each(VcpuThread::stop);
        ending
    }
}
