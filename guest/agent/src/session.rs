//! A session with the host, from Hello to the last message; and the loop that runs while the container does.

use alloc::boxed::Box;
use alloc::vec::Vec;

use protocol::{ByteString, ExitStatus, FromAgent, PROTOCOL_VERSION, Start, ToAgent};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::{Errno, read};
use rustix::process::{Pid, WaitOptions, wait};
use rustix::time::{ClockId, clock_gettime};

use crate::control::Control;
use crate::error::{Error, at};
use crate::stdio::{Connect, Direction, Stream};
use crate::{container, network, stdio, sys};

/// How long a container has between SIGTERM and SIGKILL when the host wants an end or is gone. The host can end the VM sooner.
const GRACE: Timespec = Timespec { tv_sec: 3, tv_nsec: 0 };

/// How long the host has to read the last message and end the VM, before the VM ends itself.
const FAREWELL: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// Runs one session on an established control connection, and returns when the VM may end. `open_image` mounts the image and reads its
/// configuration; `connect` makes a connection for a stream.
pub fn serve(socket: OwnedFd, connect: Connect<'_>, open_image: fn() -> Result<Option<ByteString>, Error>) {
    let mut control = Control::new(socket);
    let last = match session(&mut control, connect, open_image) {
        Ok(status) => FromAgent::Exited(status),
        Err(Error::Ended) => return,
        Err(error) => {
            crate::log(&alloc::format!("vmm-agent: {error}\n"));
            error.message()
        }
    };
    // What was sent to the host leaves the guest by and by, so the VM must not end before the host has said that it has all.
    if control.send(&last).is_ok() {
        while wait_for(&control, FAREWELL) && control.receive().is_ok() {
            while let Ok(Some(message)) = control.next() {
                if message == ToAgent::Shutdown {
                    return;
                }
            }
        }
    }
}

fn wait_for(control: &Control, timeout: Timespec) -> bool {
    matches!(poll(&mut [PollFd::new(control, PollFlags::IN)], Some(&timeout)), Ok(1))
}

fn session(
    control: &mut Control,
    connect: Connect<'_>,
    open_image: fn() -> Result<Option<ByteString>, Error>,
) -> Result<ExitStatus, Error> {
    let image_config = open_image()?;
    control.send(&FromAgent::Hello { version: PROTOCOL_VERSION, image_config })?;
    let start = wait_for_start(control)?;
    network::configure(start.network.as_ref())?;
    let (ends, streams) = stdio::prepare(&start, connect)?;
    let main = container::spawn(&start, &ends)?;
    let terminal = ends.into_terminal();
    let children = sys::child_signals().map_err(at("make a descriptor for signals"))?;
    let mut running =
        Running { main, status: None, children, streams, terminal, kill_at: None, killed: false };
    control.send(&FromAgent::Started { pid: main.as_raw_nonzero().get().unsigned_abs() })?;
    let status = running.relay(control)?;
    if !start.disks.is_empty() {
        // What the container had mounted is unmounted by its end; what it wrote to a disk without that is not.
        rustix::fs::sync();
    }
    Ok(status)
}

fn wait_for_start(control: &mut Control) -> Result<Box<Start>, Error> {
    loop {
        match control.wait()? {
            ToAgent::Start(start) => return Ok(start),
            ToAgent::Shutdown => return Err(Error::Ended),
            // A person who types early.
            ToAgent::Signal(_) | ToAgent::Resize(_) => (),
        }
    }
}

/// The container while it runs, and until its last byte is delivered.
struct Running {
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
}

/// What a descriptor in the poll belongs to.
#[derive(Clone, Copy)]
enum Waiter {
    Control,
    Children,
    Stream(usize, Direction),
}

impl Running {
    /// Relays until the main process has ended and its output is delivered.
    fn relay(&mut self, control: &mut Control) -> Result<ExitStatus, Error> {
        // A child that ended before its signal was kept has left no trace but itself.
        self.reap()?;
        // Messages that came in one piece with Start.
        self.obey(control)?;
        loop {
            if let Some(status) = self.status
                && !self.streams.iter().any(Stream::owes_output)
            {
                return Ok(status);
            }
            for waiter in self.wait(control)? {
                match waiter {
                    Waiter::Control => self.listen(control)?,
                    Waiter::Children => self.reap()?,
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
            Err(_) => self.stop(),
        }
    }

    /// Does what the host has said.
    fn obey(&mut self, control: &mut Control) -> Result<(), Error> {
        loop {
            match control.next() {
                Ok(Some(ToAgent::Signal(signal))) => self.signal(signal),
                Ok(Some(ToAgent::Resize(size))) => self.streams.iter().for_each(|stream| stream.resize(size)),
                Ok(Some(ToAgent::Start(_))) => (),
                Ok(None) => return Ok(()),
                Ok(Some(ToAgent::Shutdown)) | Err(_) => return self.stop(),
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

    /// Begins the end that the host wants, or that its absence means.
    fn stop(&mut self) -> Result<(), Error> {
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
