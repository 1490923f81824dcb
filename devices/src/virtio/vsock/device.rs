//! The device: three queues, and the event loop's side of it. Device loop only.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use event_manager::EventSet;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use vmm_sys_util::eventfd::EventFd;

use super::backend::{Backend, Connector, Request};
use super::state::{VsockState, is_guest_cid};
use super::stream::Answer;
use super::streams::{FIRST_SOURCE, Streams};
use crate::device_loop::{Source, Watch};
use crate::virtio::device::{DeviceState, StateError};
use crate::virtio::queue::Served;
use crate::virtio::{DeviceError, DeviceKind, Profile, Queue, VirtioDevice};

/// The most connections at a time, with those that are being opened or still being flushed. More are refused.
pub const MAX_CONNECTIONS: usize = 1023;
/// The most bytes from the guest that wait for slow readers, over all connections. A connection that exceeds it is reset.
pub const BUFFER_BUDGET: usize = 64 << 20;

/// Entries of the receive, transmit and event queue (section 5.10.2). Linux fills the receive queue with 4 KiB buffers
/// when it probes the device: on a host that emulates kernel mode, 64 of them are time that a boot still has.
const QUEUE_SIZES: [u16; 3] = [64, 64, 8];
/// Section 5.10.3.
const F_STREAM: u64 = 1 << 0;

/// Index of the transmit queue.
const TX: usize = 1;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (section 5.10.6.7): connections are gone, and the address is to be read again.
const EVENT_TRANSPORT_RESET: u32 = 0;

const LISTENER: Source = 0;
const WAKE: Source = 1;
const TIMER: Source = 2;

/// Programs accepted before others get their turn.
const ROUND: u32 = 64;
/// How long not to accept when the host is out of descriptors or memory.
const RESPITE: Duration = Duration::from_secs(1);

struct Queues {
    rx: Queue,
    tx: Queue,
    /// For transport resets: a guest that was restored with another address hears of it here.
    event: Queue,
}

/// A virtio socket device.
pub struct Vsock {
    cid: u64,
    backend: Backend,
    streams: Streams,
    queues: Option<Queues>,
    /// The guest's packets wait until it has taken the replies to earlier ones.
    tx_waits: bool,
    /// The guest has yet to hear that its connections are gone.
    reset_owed: bool,
    requests: Receiver<Request>,
    /// Rung by connectors.
    wake: Arc<EventFd>,
    timer: OwnedFd,
    /// When to accept programs again.
    accept_again: Option<Instant>,
}

impl Vsock {
    /// A device for a guest with address `cid` (3 to 2³²−2), and the way into it for other threads.
    ///
    /// Data goes to sockets by `writev`: the process must ignore `SIGPIPE`, as Rust programs do.
    ///
    /// # Errors
    /// `InvalidInput` for an address that a guest cannot have; those of `eventfd(2)` and `timerfd_create(2)`.
    pub fn new(cid: u32, backend: Backend) -> io::Result<(Self, Connector)> {
        if !is_guest_cid(cid.into()) {
            let message = format!("vsock address {cid} is reserved: take one from 3 to 4294967294");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let (connector, requests) = Connector::new(wake.clone());
        let cid = u64::from(cid);
        let streams = Streams::new(cid, MAX_CONNECTIONS);
        let device = Vsock {
            cid,
            backend,
            streams,
            queues: None,
            tx_waits: false,
            reset_owed: false,
            requests,
            wake,
            timer,
            accept_again: None,
        };
        Ok((device, connector))
    }

    /// Takes the guest's packets if `rung`, or if they waited, and gives it others; then says what to wait for.
    fn serve(&mut self, rung: bool, watch: &mut Watch) -> Result<(), DeviceError> {
        if let Some(queues) = &mut self.queues {
            if self.reset_owed && tell_reset(&mut queues.event)? {
                self.reset_owed = false;
            }
            if rung || self.tx_waits {
                self.tx_waits = false;
                queues.tx.drain(|chain| {
                    if self.streams.is_congested() {
                        self.tx_waits = true;
                        return Ok::<_, DeviceError>(Served::Later);
                    }
                    self.streams.packet(chain, &self.backend)?;
                    Ok(Served::Done)
                })?;
            }
            give_packets(&mut queues.rx, &mut self.streams)?;
            if self.tx_waits && !self.streams.is_congested() {
                queues.tx.come_again();
            }
        }
        self.streams.watch(watch);
        self.arm()
    }

    #[cfg(test)]
    pub(super) fn streams_mut(&mut self) -> &mut Streams {
        &mut self.streams
    }

    fn accept(&mut self, watch: &mut Watch) {
        let Some(listener) = self.backend.inbound() else { return };
        let now = Instant::now();
        for _ in 0..ROUND {
            match listener.accept() {
                Ok((socket, _)) => self.streams.greet(socket, now, watch),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                    ) => {}
                Err(error) => {
                    log::warn!("vsock: cannot accept: {error}; trying again in {RESPITE:?}");
                    watch.remove(listener, LISTENER);
                    self.accept_again = Some(now + RESPITE);
                    return;
                }
            }
        }
    }

    fn timer_rang(&mut self, watch: &mut Watch) {
        let mut count = [0; 8];
        // Somebody else's ring is no reason to wait: it is non-blocking.
        let _ = rustix::io::read(&self.timer, &mut count);
        let now = Instant::now();
        self.streams.expire(now);
        if self.accept_again.is_some_and(|at| at <= now) {
            self.accept_again = None;
            if let Some(listener) = self.backend.inbound() {
                watch.add(listener, LISTENER, EventSet::IN);
            }
        }
    }

    /// Sets the timer to the next deadline.
    fn arm(&mut self) -> Result<(), DeviceError> {
        if !self.streams.deadline_changed() && self.accept_again.is_none() {
            return Ok(());
        }
        let deadline = self.streams.deadline().into_iter().chain(self.accept_again).min();
        // Zero would disarm it; a millisecond late is early enough.
        let after = deadline
            .map(|at| at.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)))
            .unwrap_or_default();
        let off = Timespec { tv_sec: 0, tv_nsec: 0 };
        let it_value = Timespec::try_from(after).unwrap_or(off);
        let setting = Itimerspec { it_interval: off, it_value };
        rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &setting)
            .map_err(|error| DeviceError::Host { what: "vsock: set a timer", source: error.into() })?;
        Ok(())
    }
}

/// Tells the guest that its connections are gone. `false` when it has no buffer for that yet.
fn tell_reset(event: &mut Queue) -> Result<bool, DeviceError> {
    loop {
        if let Some(mut chain) = event.pop()? {
            chain.writer.write_all(&EVENT_TRANSPORT_RESET.to_le_bytes())?;
            event.push(chain)?;
            event.notify()?;
            return Ok(true);
        }
        if !event.rearm()? {
            return Ok(false);
        }
    }
}

/// Sends what there is to send, or as much as the queue has buffers for.
fn give_packets(rx: &mut Queue, streams: &mut Streams) -> Result<(), DeviceError> {
    let mut turn = QUEUE_SIZES[0];
    while streams.has_packets() {
        if turn == 0 {
            rx.come_again();
            break;
        }
        let Some(mut chain) = rx.pop()? else {
            // The driver's doorbell stays off until it is needed: each costs the guest an exit.
            if rx.rearm()? {
                continue;
            }
            break;
        };
        if streams.fill(&mut chain)? {
            rx.push(chain)?;
        } else {
            rx.unpop(chain);
        }
        turn = turn.saturating_sub(1);
    }
    Ok(rx.notify()?)
}

impl VirtioDevice for Vsock {
    fn profile(&self) -> Profile {
        Profile {
            kind: DeviceKind::Vsock,
            features: F_STREAM,
            queue_sizes: QUEUE_SIZES.to_vec(),
            config: self.cid.to_le_bytes().to_vec(),
        }
    }

    fn activate(&mut self, _: u64, queues: Vec<Queue>, watch: &mut Watch) -> Result<(), DeviceError> {
        let [rx, tx, event] = <[Queue; 3]>::try_from(queues)
            .map_err(|queues| DeviceError::Protocol(format!("{} queues instead of 3", queues.len())))?;
        self.queues = Some(Queues { rx, tx, event });
        watch.add(&*self.wake, WAKE, EventSet::IN);
        watch.add(&self.timer, TIMER, EventSet::IN);
        if let Some(listener) = self.backend.inbound() {
            watch.add(listener, LISTENER, EventSet::IN);
        }
        self.streams.resume(Instant::now(), watch);
        self.arm()
    }

    fn kicked(&mut self, queue: usize, watch: &mut Watch) -> Result<(), DeviceError> {
        self.serve(queue == TX, watch)
    }

    fn ready(&mut self, source: Source, watch: &mut Watch) -> Result<(), DeviceError> {
        match source {
            LISTENER => self.accept(watch),
            TIMER => self.timer_rang(watch),
            WAKE => {
                let _ = self.wake.read();
                while let Ok(Request { port, socket, accepted }) = self.requests.try_recv() {
                    self.streams.request(port, socket, Answer::Message(accepted));
                }
            }
            source if source >= FIRST_SOURCE => self.streams.ready(source),
            _ => {}
        }
        self.serve(false, watch)
    }

    fn quiesce(&mut self, watch: &mut Watch) -> Vec<Queue> {
        let Some(Queues { rx, tx, event }) = self.queues.take() else { return Vec::new() };
        watch.remove(&*self.wake, WAKE);
        watch.remove(&self.timer, TIMER);
        if let Some(listener) = self.backend.inbound().filter(|_| self.accept_again.is_none()) {
            watch.remove(listener, LISTENER);
        }
        self.accept_again = None;
        self.streams.pause(Instant::now(), watch);
        vec![rx, tx, event]
    }

    fn reset(&mut self, watch: &mut Watch) {
        self.tx_waits = false;
        self.reset_owed = false;
        // A guest that powers off may have sent its last words just now: sockets with bytes to flush are watched until
        // those are taken. That touches no guest memory.
        self.streams.transport_reset();
        self.streams.watch(watch);
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock(VsockState { reset_owed: self.reset_owed, ..self.streams.save() })
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        let DeviceState::Vsock(state) = state else {
            return Err(StateError::Mismatch("not a socket device's".into()));
        };
        state.check().map_err(StateError::Mismatch)?;
        self.reset_owed = state.reset_owed;
        if state.cid != self.cid {
            // Its connections are of an address that is no more.
            self.reset_owed = true;
            return Ok(());
        }
        self.streams
            .restore(state, &self.backend)
            .map_err(|source| StateError::Host { what: "vsock: make a socket for a connection", source })
    }
}
