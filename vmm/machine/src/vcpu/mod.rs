//! A vCPU: a file descriptor of KVM, and the thread that runs it.
//!
//! The thread does three things: enter the guest, [`exit::dispatch`] what comes back, and look at its [`Gate`] when it is kicked.
//! It never runs a virtio device's code.

pub mod exit;
pub mod paging;

use std::io;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED};
use kvm_ioctls::VcpuFd;

use crate::controller::Event;
use crate::host::pvm::{PvmVcpu, Trap};
use crate::kvm::kick::Kick;
use crate::kvm::run;
use crate::metrics::{ExitCounters, Reason, VcpuMetrics};
use crate::timeline::{Phase, Timeline};
use exit::{Buses, Flow, dispatch};

const RFLAGS_IF: u64 = 1 << 9;

/// What a vCPU is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Pause,
    Run,
    Stop,
}

/// Where the controller and a vCPU's thread meet.
struct Gate {
    orders: Mutex<Orders>,
    changed: Condvar,
}

struct Orders {
    order: Order,
    /// The vCPU waits here, and KVM holds its whole state: nothing of its last exit is left to be completed.
    at_rest: bool,
    /// To be done by a vCPU at rest.
    job: Option<Job>,
    /// Somebody asks whether the vCPU can ever run again.
    asked: bool,
    /// The answer: it is halted with interrupts off, or was never started.
    asleep: bool,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Work on a vCPU at rest, on its own thread.
type Job = Box<dyn FnOnce(&mut Vcpu) + Send>;

/// A vCPU, with all that its thread needs.
pub struct Vcpu {
    /// Its number, which is also its APIC id.
    pub id: u8,
    /// KVM's side of it.
    pub fd: VcpuFd,
    /// Where its accesses go.
    pub buses: Buses,
    /// The measures for hosts that emulate kernel mode.
    pub pvm: Option<PvmVcpu>,
    /// Where it reports.
    pub events: Sender<Event>,
    /// When things happened.
    pub timeline: Arc<Timeline>,
}

impl Vcpu {
    /// Starts the vCPU's thread, paused.
    ///
    /// # Errors
    /// Those of thread creation, and of [`Kick::for_this_thread`].
    pub fn spawn(self) -> io::Result<VcpuThread> {
        let orders = Orders { order: Order::Pause, at_rest: true, job: None, asked: false, asleep: false };
        let gate = Arc::new(Gate { orders: Mutex::new(orders), changed: Condvar::new() });
        let (ready, kick) = std::sync::mpsc::sync_channel(1);
        let theirs = gate.clone();
        let (id, exits) = (self.id, Arc::new(ExitCounters::default()));
        let counted = exits.clone();
        let thread = std::thread::Builder::new().name(format!("vcpu{}", self.id)).spawn(move || {
            let kick = Kick::for_this_thread(&self.fd).map(Arc::new);
            let failed = kick.is_err();
            let ours = kick.as_ref().ok().cloned();
            if ready.send(kick).is_err() || failed {
                return;
            }
            if let Some(kick) = ours {
                self.run(&theirs, &kick, &counted);
            }
        })?;
        let kick = kick.recv().map_err(|_| io::ErrorKind::BrokenPipe)??;
        Ok(VcpuThread { gate, kick, id, exits, thread: Some(thread) })
    }

    fn run(mut self, gate: &Gate, kick: &Kick, exits: &ExitCounters) {
        let mut first = true;
        loop {
            kick.heard();
            {
                let mut orders = gate.lock();
                if std::mem::take(&mut orders.asked) {
                    orders.asleep = self.is_asleep();
                    gate.changed.notify_all();
                }
                match orders.order {
                    Order::Run => orders.at_rest = false,
                    Order::Stop => return,
                    Order::Pause if orders.at_rest => {
                        match orders.job.take() {
                            Some(job) => {
                                drop(orders);
                                job(&mut self);
                            }
                            None => drop(gate.changed.wait(orders).unwrap_or_else(PoisonError::into_inner)),
                        }
                        continue;
                    }
                    Order::Pause => {
                        drop(orders);
                        self.come_to_rest(exits);
                        // A guest that asked for it hears that it stood still, and does not take that for a lock-up.
                        let _ = self.fd.kvmclock_ctrl();
                        gate.lock().at_rest = true;
                        gate.changed.notify_all();
                        continue;
                    }
                }
            }
            if std::mem::take(&mut first) && self.id == 0 {
                self.timeline.mark(Phase::FirstRun);
            }
            let event = loop {
                match self.step(exits) {
                    Flow::Continue => {}
                    Flow::Interrupted => break None,
                    Flow::Reset => break Some(Event::Reset),
                    Flow::Fatal(reason) => {
                        let reason = format!("{reason} {}", self.whereabouts());
                        break Some(Event::Fatal { vcpu: self.id, reason });
                    }
                }
            };
            if let Some(event) = event {
                let _ = self.events.send(event);
                // Nothing good comes of running on; the controller ends the machine, and may have said so already.
                let mut orders = gate.lock();
                if orders.order == Order::Run {
                    orders.order = Order::Pause;
                }
            }
        }
    }

    /// Has KVM complete the last exit, without entering the guest: the result of a read goes into its register, and what was
    /// changed by way of the shared page into the vCPU. An access in several pieces comes back with the next of them.
    fn come_to_rest(&mut self, exits: &ExitCounters) {
        loop {
            self.fd.set_kvm_immediate_exit(1);
            match self.step(exits) {
                Flow::Continue => {}
                Flow::Interrupted => break,
                Flow::Reset => {
                    let _ = self.events.send(Event::Reset);
                    break;
                }
                Flow::Fatal(reason) => {
                    let _ = self.events.send(Event::Fatal { vcpu: self.id, reason });
                    break;
                }
            }
        }
        self.fd.set_kvm_immediate_exit(0);
    }

    /// Enters the guest once, and serves the exit.
    fn step(&mut self, exits: &ExitCounters) -> Flow {
        let exit = run::run(&mut self.fd);
        let (reason, since) = (Reason::of(&exit), Instant::now());
        if self.id == 0 && !matches!(exit, run::Exit::Interrupted) {
            self.timeline.mark(Phase::KernelEntered);
        }
        let flow = match (&mut self.pvm, Trap::of(&exit)) {
            (Some(pvm), Some(trap)) => {
                let flow: Option<Flow> = pvm.serve(&mut self.fd, trap).into();
                flow.unwrap_or_else(|| dispatch(run::last_exit(&mut self.fd), &self.buses))
            }
            _ => dispatch(exit, &self.buses),
        };
        exits.record(reason, since.elapsed());
        flow
    }

    /// Where the guest is, for whoever has to find out why it cannot go on.
    fn whereabouts(&self) -> String {
        match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(regs), Ok(sregs)) => format!(
                "(rip {:#x} rsp {:#x} rflags {:#x} cs {:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x})",
                regs.rip,
                regs.rsp,
                regs.rflags,
                sregs.cs.selector,
                sregs.cr0,
                sregs.cr2,
                sregs.cr3,
                sregs.cr4,
                sregs.efer
            ),
            _ => "(registers out of reach)".into(),
        }
    }

    /// Whether no interrupt can wake the vCPU: it is halted with interrupts off, as an operating system leaves it that has shut
    /// down where it cannot switch the power off, or it was never started.
    fn is_asleep(&self) -> bool {
        let Ok(state) = self.fd.get_mp_state() else { return false };
        match state.mp_state {
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => self.id != 0,
            KVM_MP_STATE_HALTED => self.fd.get_regs().is_ok_and(|r| r.rflags & RFLAGS_IF == 0),
            _ => false,
        }
    }
}

/// A vCPU's thread, as the controller sees it. Dropping it stops the vCPU.
pub struct VcpuThread {
    gate: Arc<Gate>,
    kick: Arc<Kick>,
    id: u8,
    exits: Arc<ExitCounters>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuThread {
    /// Lets the vCPU run.
    pub fn resume(&self) {
        self.order(Order::Run);
    }

    /// Stops the vCPU between two instructions, without waiting for it: see [`rest`](Self::rest).
    pub fn pause(&self) {
        self.order(Order::Pause);
    }

    /// Waits until the vCPU, which was told to pause, is at rest.
    pub fn rest(&self) {
        let running = |orders: &mut Orders| orders.order == Order::Pause && !orders.at_rest;
        drop(self.gate.changed.wait_while(self.gate.lock(), running));
    }

    /// Does `job` on the thread of a vCPU that is at rest, and returns its result; `None` when the vCPU has stopped for good.
    pub fn call<T: Send + 'static>(&self, job: impl FnOnce(&mut Vcpu) -> T + Send + 'static) -> Option<T> {
        let (sender, result) = std::sync::mpsc::sync_channel(1);
        {
            let mut orders = self.gate.lock();
            if orders.order != Order::Pause {
                return None;
            }
            orders.job = Some(Box::new(move |vcpu| {
                let _ = sender.send(job(vcpu));
            }));
        }
        self.gate.changed.notify_all();
        result.recv().ok()
    }

    /// Asks the vCPU whether it can ever run again. The answer is there when [`is_asleep`](Self::is_asleep) is called later.
    pub fn ask(&self) {
        {
            let mut orders = self.gate.lock();
            orders.asked = true;
            orders.asleep = false;
        }
        self.kick.kick();
    }

    /// The vCPU's last answer to [`ask`](Self::ask).
    pub fn is_asleep(&self) -> bool {
        self.gate.lock().asleep
    }

    /// What the vCPU came back for until now, and how long that took.
    pub fn metrics(&self) -> VcpuMetrics {
        self.exits.read(self.id)
    }

    /// A number that changes whenever the vCPU's guest has done something that needed us.
    pub fn activity(&self) -> u64 {
        self.exits.activity()
    }

    /// Tells the vCPU to stop, without waiting for it.
    pub fn stop(&self) {
        self.order(Order::Stop);
    }

    fn order(&self, order: Order) {
        self.gate.lock().order = order;
        self.gate.changed.notify_all();
        self.kick.kick();
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
