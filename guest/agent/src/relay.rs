//! The loop that runs while the container does: carries its stdio, obeys the host, and learns of its end.

use alloc::vec::Vec;

use protocol::{ExitStatus, FromAgent, Identity, ToAgent};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::{Errno, read};
use rustix::process::{Pid, WaitOptions, wait};
use rustix::time::{ClockId, clock_gettime};

use crate::control::Control;
use crate::error::{Error, at};
use crate::freezer::{Freezer, Frost};
use crate::session::Machine;
use crate::stdio::{Direction, Stream};
use crate::{identity, network, sys};

/// How long a container has between SIGTERM and SIGKILL when the host wants an end or is gone. The host can end the VM sooner.
const GRACE: Timespec = Timespec { tv_sec: 3, tv_nsec: 0 };

/// The container while it runs, and until its last byte is delivered.
pub struct Running<'a> {
    machine: &'a dyn Machine,
    main: Pid,
    /// Set when the main process has ended.
    status: Option<ExitStatus>,
    /// Readable when a child has ended.
    children: OwnedFd,
    streams: Vec<Stream>,
    /// Keeps the terminal alive while the main process runs.
    terminal: Option<OwnedFd>,
    /// When patience with the main process ends, on the monotonic clock.
    kill_at: Option<Timespec>,
    /// It has ended once already.
    killed: bool,
    /// What holds the container, if this kernel can.
    freezer: Option<Freezer>,
    hold: Hold,
}

/// Whether the container is held for a snapshot.
enum Hold {
    No,
    /// It is about to be; not at all, without the means for it.
    Freezing(Option<Frost>),
    Frozen,
}

/// What a descriptor in the poll belongs to.
#[derive(Clone, Copy)]
enum Waiter {
    Control,
    Children,
    Freezer,
    Stream(usize, Direction),
}

impl<'a> Running<'a> {
    /// A container whose main process is executing.
    pub fn new(
        machine: &'a dyn Machine,
        main: Pid,
        children: OwnedFd,
        streams: Vec<Stream>,
        terminal: Option<OwnedFd>,
        freezer: Option<Freezer>,
    ) -> Self {
        let (status, kill_at, killed, hold) = (None, None, false, Hold::No);
        Self { machine, main, status, children, streams, terminal, kill_at, killed, freezer, hold }
    }

    /// Relays until the main process has ended and its output is delivered.
    pub fn relay(&mut self, control: &mut Control) -> Result<ExitStatus, Error> {
        // A child that ended before its signal was kept has left no trace but itself.
        self.reap()?;
        // Messages that came in one piece with Start.
        self.obey(control)?;
        loop {
            // An end in a machine that is being copied waits until it is known which of the two it is.
            if let Some(status) = self.status
                && !matches!(self.hold, Hold::Frozen)
                && !self.streams.iter().any(Stream::owes_output)
            {
                return Ok(status);
            }
            for waiter in self.wait(control)? {
                match waiter {
                    Waiter::Control => self.listen(control)?,
                    Waiter::Children => self.reap()?,
                    Waiter::Freezer => self.look_whether_frozen(control)?,
                    Waiter::Stream(index, direction) => {
                        if let Some(stream) = self.streams.get_mut(index) {
                            stream.advance(direction)?;
                        }
                    }
                }
            }
        }
    }

    /// Waits for something to happen, and says what did.
    fn wait(&mut self, control: &Control) -> Result<Vec<Waiter>, Error> {
        let mut fds = Vec::with_capacity(8);
        let mut waiters = Vec::with_capacity(8);
        // A host that is gone says nothing more: its end of the connection would only be ready for ever.
        if self.kill_at.is_none() {
            fds.push(PollFd::from_borrowed_fd(control.as_fd(), PollFlags::IN));
            waiters.push(Waiter::Control);
        }
        fds.push(PollFd::new(&self.children, PollFlags::IN));
        waiters.push(Waiter::Children);
        if let Hold::Freezing(Some(frost)) = &self.hold {
            fds.push(PollFd::from_borrowed_fd(frost.as_fd(), PollFlags::PRI));
            waiters.push(Waiter::Freezer);
        }
        for (index, stream) in self.streams.iter().enumerate() {
            for direction in [Direction::Inward, Direction::Outward] {
                if let Some((fd, events)) = stream.waits(direction) {
                    fds.push(PollFd::from_borrowed_fd(fd, events));
                    waiters.push(Waiter::Stream(index, direction));
                }
            }
        }
        let timeout = self.kill_at.map(remaining);
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) => {
                self.give_up()?;
                Ok(Vec::new())
            }
            Ok(_) => Ok(fds
                .iter()
                .zip(waiters)
                .filter(|(fd, _)| !fd.revents().is_empty())
                .map(|(_, w)| w)
                .collect()),
            Err(Errno::INTR) => Ok(Vec::new()),
            Err(errno) => Err(at("poll")(errno)),
        }
    }

    /// Takes in what the host says.
    fn listen(&mut self, control: &mut Control) -> Result<(), Error> {
        match control.receive() {
            Ok(()) => self.obey(control),
            Err(_) => self.stop(control),
        }
    }

    /// Does what the host has said.
    fn obey(&mut self, control: &mut Control) -> Result<(), Error> {
        loop {
            match control.next() {
                Ok(Some(ToAgent::Signal(signal))) => self.signal(signal),
                Ok(Some(ToAgent::Resize(size))) => self.streams.iter().for_each(|stream| stream.resize(size)),
                Ok(Some(ToAgent::Freeze)) => self.freeze(control)?,
                Ok(Some(ToAgent::Thaw)) => self.thaw(control)?,
                Ok(Some(ToAgent::Restored(identity))) => self.be_another(control, &identity)?,
                Ok(Some(ToAgent::Begin(_) | ToAgent::Start(_))) => (),
                Ok(None) => return Ok(()),
                Ok(Some(ToAgent::Shutdown)) | Err(_) => return self.stop(control),
            }
        }
    }

    /// Sends a signal to the main process. After its end the number may be another's.
    fn signal(&self, signal: i32) {
        if self.status.is_none() && (1..=64).contains(&signal) {
            // It may end at this moment: then there is nothing to signal.
            let _ = sys::kill(self.main, signal);
        }
    }

    /// Begins to hold the container. The host is told when every process is held.
    fn freeze(&mut self, control: &Control) -> Result<(), Error> {
        if !matches!(self.hold, Hold::No) {
            return Ok(());
        }
        let frost = match &self.freezer {
            Some(freezer) => Some(freezer.freeze().map_err(at("freeze the container"))?),
            None => {
                crate::log("vmm-agent: this kernel has no cgroups, so the container cannot be frozen\n");
                None
            }
        };
        self.hold = Hold::Freezing(frost);
        self.look_whether_frozen(control)
    }

    fn look_whether_frozen(&mut self, control: &Control) -> Result<(), Error> {
        if let Hold::Freezing(Some(frost)) = &self.hold
            && frost.is_complete().map_err(at("freeze the container"))?
        {
            self.hold = Hold::Frozen;
            control.send(&FromAgent::Frozen)?;
        }
        Ok(())
    }

    /// Lets the container run.
    fn thaw(&mut self, control: &Control) -> Result<(), Error> {
        let held = core::mem::replace(&mut self.hold, Hold::No);
        if matches!(held, Hold::No) {
            return Ok(());
        }
        if let Some(freezer) = &self.freezer {
            freezer.thaw().map_err(at("thaw the container"))?;
        }
        // Each `Freeze` has one answer.
        if let Hold::Freezing(_) = held { control.send(&FromAgent::Frozen) } else { Ok(()) }
    }

    /// In a copy of the machine: becomes another, before the container runs again.
    fn be_another(&mut self, control: &Control, identity: &Identity) -> Result<(), Error> {
        identity::reseed(&identity.seed)?;
        self.machine.set_clock(identity.clock)?;
        if self.status.is_none() {
            identity::rename(identity)?;
        }
        if let Some(network) = &identity.network {
            network::configure(network)?;
        }
        self.thaw(control)?;
        let streams = self.streams.iter().map(Stream::address).collect::<Result<Vec<_>, Error>>()?;
        control.send(&FromAgent::Restored { streams })
    }

    /// Begins the end that the host wants, or that its absence means.
    fn stop(&mut self, control: &Control) -> Result<(), Error> {
        // A host that is gone need not hear of it.
        match self.thaw(control) {
            Ok(()) | Err(Error::Ended) => (),
            Err(error) => return Err(error),
        }
        if self.status.is_some() {
            // Nobody waits for the rest of the output.
            return Err(Error::Ended);
        }
        self.signal(libc::SIGTERM);
        let now = clock_gettime(ClockId::Monotonic);
        self.kill_at = Some(now + GRACE);
        Ok(())
    }

    /// The grace is over: SIGKILL, and no output is waited for. If even that has no effect, the VM ends as it is.
    fn give_up(&mut self) -> Result<(), Error> {
        if self.killed {
            return Err(Error::Ended);
        }
        self.killed = true;
        self.signal(libc::SIGKILL);
        for stream in &mut self.streams {
            stream.end(Direction::Outward);
        }
        self.kill_at = Some(clock_gettime(ClockId::Monotonic) + GRACE);
        Ok(())
    }

    /// Takes in the ends of children: the main process, and orphans that the kernel has made ours.
    fn reap(&mut self) -> Result<(), Error> {
        let mut signals = [0u8; 128];
        // One signal may stand for many ends, so it says nothing but to look.
        let _ = read(&self.children, &mut signals);
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid == self.main => {
                    let signal = status.terminating_signal().map(|n| ExitStatus::Signal(byte(n)));
                    let code =
                        status.exit_status().map_or(ExitStatus::Code(u8::MAX), |n| ExitStatus::Code(byte(n)));
                    self.status = Some(signal.unwrap_or(code));
                    // With PID 1 of its namespace every process of the container is gone. Nobody reads stdin any more, and the
                    // terminal ends when its last byte is read.
                    self.terminal = None;
                    self.streams.iter_mut().for_each(|stream| stream.end(Direction::Inward));
                }
                Ok(Some(_)) | Err(Errno::INTR) => (),
                Ok(None) | Err(Errno::CHILD) => return Ok(()),
                Err(errno) => return Err(at("wait for children")(errno)),
            }
        }
    }
}

fn byte(number: i32) -> u8 {
    u8::try_from(number).unwrap_or(u8::MAX)
}

/// The time until `deadline`; zero if it has passed.
fn remaining(deadline: Timespec) -> Timespec {
    let now = clock_gettime(ClockId::Monotonic);
    if now >= deadline { Timespec { tv_sec: 0, tv_nsec: 0 } } else { deadline - now }
}
