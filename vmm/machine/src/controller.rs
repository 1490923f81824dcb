//! Runs a machine to its end: hears of vCPUs, devices and whoever started it, and decides when it is over.
//!
//! Lives on the thread that called [`crate::Machine::run`]; everybody else has a [`Handle`].

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use crate::vcpu::VcpuThread;

/// How often a machine that says nothing is asked whether it can still wake up.
const SLEEP_CHECK: Duration = Duration::from_secs(1);
/// How many times in a row all vCPUs must say that they cannot. They answer one after the other, and a guest with
/// paravirtual locks halts with interrupts off for a moment while it waits for one.
const SLEEP_ROUNDS: u32 = 3;
/// How long a guest that panicked may go on printing, and how soon after its words a reset is that panic's.
const LAST_WORDS: Duration = Duration::from_millis(1500);
const PANIC_RESET: Duration = Duration::from_secs(10);

/// Something that happened to the machine.
#[derive(Debug)]
pub enum Event {
    /// The guest asked for a reset, or triple-faulted.
    Reset,
    /// The guest's kernel printed that it panicked.
    Panicked,
    /// A vCPU cannot go on.
    Fatal {
        /// Which one.
        vcpu: u8,
        /// Why, for a person.
        reason: String,
    },
    /// Somebody on the host wants the machine gone.
    Stop,
}

/// How a machine came to its end.
#[derive(Debug, PartialEq, Eq)]
pub enum Ending {
    /// Somebody on the host stopped it.
    Stopped,
    /// The guest asked for a reset.
    Reset,
    /// The guest shut down: all vCPUs are halted for good.
    PoweredOff,
    /// The guest's kernel panicked.
    Panicked,
    /// It could not go on; text for a person.
    Fatal(String),
}

/// A way to the controller from any thread.
#[derive(Clone)]
pub struct Handle(Sender<Event>);

impl Handle {
    /// A handle for the controller that listens at the other end of `events`.
    pub fn new(events: Sender<Event>) -> Self {
        Handle(events)
    }

    /// Ends the machine, whatever its guest is doing.
    pub fn stop(&self) {
        // A controller that is gone has stopped already.
        let _ = self.0.send(Event::Stop);
    }

    /// Reports that something happened.
    pub fn send(&self, event: Event) {
        let _ = self.0.send(event);
    }
}

/// What the words of a kernel panic on the console mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PanicWords {
    /// The end: only the kernel and the agent print there.
    AreTheEnd,
    /// Perhaps nothing: anybody in the guest may print there. A reset that follows at once makes them true.
    MayBeAnybodys,
}

/// Waits for the end of a machine whose vCPUs run.
pub fn wait(events: &Receiver<Event>, vcpus: &[VcpuThread], words: PanicWords) -> Ending {
    let mut panicked: Option<Instant> = None;
    let mut rounds = 0;
    loop {
        let last_words = panicked.filter(|_| words == PanicWords::AreTheEnd);
        let patience = last_words.map_or(SLEEP_CHECK, |at| LAST_WORDS.saturating_sub(at.elapsed()));
        match events.recv_timeout(patience) {
            Ok(Event::Stop) => return Ending::Stopped,
            Ok(Event::Fatal { vcpu, reason }) => return Ending::Fatal(format!("vcpu {vcpu}: {reason}")),
            // With `panic=1` a reset is how a panic ends.
            Ok(Event::Reset) if panicked.is_some_and(|at| at.elapsed() < PANIC_RESET) => {
                return Ending::Panicked;
            }
            Ok(Event::Reset) => return Ending::Reset,
            Ok(Event::Panicked) => panicked = Some(Instant::now()),
            Err(RecvTimeoutError::Timeout) if last_words.is_some() => return Ending::Panicked,
            Err(RecvTimeoutError::Timeout) => {
                // They answered the last question by now; if not, they run.
                rounds = if vcpus.iter().all(VcpuThread::is_asleep) { rounds + 1 } else { 0 };
                if rounds == SLEEP_ROUNDS {
                    return if panicked.is_some() { Ending::Panicked } else { Ending::PoweredOff };
                }
                vcpus.iter().for_each(VcpuThread::ask);
            }
            // The machine holds a sender itself.
            Err(RecvTimeoutError::Disconnected) => return Ending::Stopped,
        }
    }
}
