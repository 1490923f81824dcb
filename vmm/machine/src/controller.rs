//! Runs a machine to its end: hears of vCPUs, devices and whoever started it, and decides when it is over.
//!
//! Lives on the thread that called [`crate::Machine::run`]; everybody else has a [`Handle`].

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use crate::control::{Control, Refusal, Reply, Request};
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
    /// Somebody on the host asks something of the machine.
    Asked(Asked),
}

/// A question, and where its answer goes.
#[derive(Debug)]
pub struct Asked {
    /// The question.
    pub request: Request,
    /// For the answer. Whoever asked may be gone.
    pub answer: SyncSender<Result<Reply, Refusal>>,
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

impl Control for Handle {
    fn ask(&self, request: Request) -> Result<Reply, Refusal> {
        let (answer, reply) = sync_channel(1);
        self.0.send(Event::Asked(Asked { request, answer })).map_err(|_| Refusal::Gone)?;
        // A controller that ends drops the question, and with it our sender.
        reply.recv().unwrap_or(Err(Refusal::Gone))
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

/// What the controller is woken for.
#[derive(Debug)]
pub enum Next {
    /// The machine is over.
    Ended(Ending),
    /// Something is asked of it.
    Asked(Asked),
}

/// The controller's patience: what it has heard so far that bears on the end.
#[derive(Debug)]
pub struct Watch {
    words: PanicWords,
    panicked: Option<Instant>,
    rounds: u32,
    /// What the vCPUs had done when they were last looked at.
    activity: u64,
    /// When a guest that was asked to end is ended.
    deadline: Option<Instant>,
}

impl Watch {
    /// Nothing was heard yet.
    pub fn new(words: PanicWords) -> Self {
        Watch { words, panicked: None, rounds: 0, activity: 0, deadline: None }
    }

    /// The guest was asked to end, and has so much time.
    pub fn end_within(&mut self, patience: Duration) {
        let at = Instant::now() + patience;
        self.deadline = Some(self.deadline.map_or(at, |sooner| sooner.min(at)));
    }

    /// Waits for the end of the machine, or for a question. The vCPUs run unless `paused`.
    pub fn next(&mut self, events: &Receiver<Event>, vcpus: &[VcpuThread], paused: bool) -> Next {
        loop {
            let last_words = self.panicked.filter(|_| self.words == PanicWords::AreTheEnd);
            let mut patience = last_words.map_or(SLEEP_CHECK, |at| LAST_WORDS.saturating_sub(at.elapsed()));
            if let Some(deadline) = self.deadline {
                patience = patience.min(deadline.saturating_duration_since(Instant::now()));
            }
            let ending = match events.recv_timeout(patience) {
                Ok(Event::Asked(asked)) => return Next::Asked(asked),
                Ok(Event::Stop) => Ending::Stopped,
                Ok(Event::Fatal { vcpu, reason }) => Ending::Fatal(format!("vcpu {vcpu}: {reason}")),
                // With `panic=1` a reset is how a panic ends.
                Ok(Event::Reset) if self.panicked.is_some_and(|at| at.elapsed() < PANIC_RESET) => {
                    Ending::Panicked
                }
                Ok(Event::Reset) => Ending::Reset,
                Ok(Event::Panicked) => {
                    self.panicked = Some(Instant::now());
                    continue;
                }
                Err(RecvTimeoutError::Timeout) if self.deadline.is_some_and(|at| at <= Instant::now()) => {
                    Ending::Stopped
                }
                Err(RecvTimeoutError::Timeout) if last_words.is_some() => Ending::Panicked,
                Err(RecvTimeoutError::Timeout) if paused => continue,
                Err(RecvTimeoutError::Timeout) => {
                    // Only a quiet machine is asked: a vCPU that comes back by itself is not asleep, and a kick is no trifle where
                    // kernel mode is emulated: one in thousands has the host deliver an exception twice.
                    let activity = vcpus.iter().fold(0, |sum: u64, vcpu| sum.wrapping_add(vcpu.activity()));
                    if std::mem::replace(&mut self.activity, activity) != activity {
                        self.rounds = 0;
                        continue;
                    }
                    // They answered the last question by now; if not, they run.
                    let asleep = vcpus.iter().all(VcpuThread::is_asleep);
                    self.rounds = if asleep { self.rounds + 1 } else { 0 };
                    if self.rounds < SLEEP_ROUNDS {
                        vcpus.iter().for_each(VcpuThread::ask);
                        continue;
                    }
                    if self.panicked.is_some() { Ending::Panicked } else { Ending::PoweredOff }
                }
                // The machine holds a sender itself.
                Err(RecvTimeoutError::Disconnected) => Ending::Stopped,
            };
            return Next::Ended(ending);
        }
    }
}
