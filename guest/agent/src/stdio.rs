//! The container's stdio: pipes or a terminal, and the connections that carry them to the host.
//!
//! Each direction of each stream is a [`Flow`] that waits for exactly one thing at a time: its source to have bytes, or its sink to have room.
//! So a host that does not read one stream holds up only that one, and the container behind it by the full pipe.
//!
//! Pipes are spliced: the kernel moves up to a pipe's 64 KiB without a copy through this process. A terminal has no splice of that kind, and
//! goes through a small buffer.

use alloc::vec::Vec;

use protocol::{Start, StreamHeader, StreamKind, WindowSize};
use rustix::event::PollFlags;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::OFlags;
use rustix::io::{Errno, read, write};
use rustix::net::{SendFlags, Shutdown, send, shutdown};
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::error::{Error, at};
use crate::mounts::Furniture;
use crate::session::Machine;
use crate::sys;

/// As much as a pipe holds.
const PIECE: usize = 64 << 10;

/// Ctrl-D, which a terminal's line discipline hands to its reader as the end of the file.
const END_OF_TYPING: u8 = 4;

/// The container's ends.
pub enum Ends {
    /// One for each stream. Without stdin it is the container's own `/dev/null`.
    Pipes {
        /// To read from.
        stdin: Option<OwnedFd>,
        /// To write to.
        stdout: OwnedFd,
        /// To write to.
        stderr: OwnedFd,
    },
    /// The terminal's. The child opens it by its path instead; this keeps it alive while no process has it open.
    Terminal(OwnedFd),
}

impl Ends {
    /// Closes the pipes' ends, or else they would never end: the container has its own now. A terminal is kept.
    pub fn into_terminal(self) -> Option<OwnedFd> {
        match self {
            Self::Pipes { stdin, stdout, stderr } => {
                drop((stdin, stdout, stderr));
                None
            }
            Self::Terminal(slave) => Some(slave),
        }
    }
}

/// Makes the container's stdio and begins to connect it.
pub fn prepare(
    start: &Start,
    machine: &dyn Machine,
    furniture: &Furniture,
) -> Result<(Ends, Vec<Stream>), Error> {
    let stream = |kind, local| {
        let socket = machine.connect_stream().map_err(at("connect a stream to the host"))?;
        Ok::<_, Error>(Stream::new(StreamHeader { token: start.token, kind }, socket, local))
    };
    if let Some(size) = start.terminal {
        let (master, slave) = open_terminal(furniture, size)?;
        return Ok((Ends::Terminal(slave), Vec::from([stream(StreamKind::Terminal, master)?])));
    }
    let mut streams = Vec::with_capacity(3);
    let make_pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(at("make a pipe"));
    let stdin = if start.stdin {
        let (ours, theirs) = make_pipe().map(|(read, write)| (write, read))?;
        streams.push(stream(StreamKind::Stdin, ours)?);
        Some(theirs)
    } else {
        None
    };
    let (ours, stdout) = make_pipe()?;
    streams.push(stream(StreamKind::Stdout, ours)?);
    let (ours, stderr) = make_pipe()?;
    streams.push(stream(StreamKind::Stderr, ours)?);
    Ok((Ends::Pipes { stdin, stdout, stderr }, streams))
}

/// A terminal in the container's own devpts: master and slave.
fn open_terminal(furniture: &Furniture, size: WindowSize) -> Result<(OwnedFd, OwnedFd), Error> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let master = furniture.open_terminal(flags).map_err(at("open a terminal"))?;
    unlockpt(&master).map_err(at("unlock the terminal"))?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = ioctl_tiocgptpeer(&master, flags).map_err(at("open the terminal's other end"))?;
    resize(&master, size).map_err(at("size the terminal"))?;
    Ok((master, slave))
}

fn resize(terminal: &OwnedFd, size: WindowSize) -> rustix::io::Result<()> {
    tcsetwinsize(terminal, Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 })
}

/// One connection and what it is connected to in the container.
pub struct Stream {
    header: StreamHeader,
    established: bool,
    socket: OwnedFd,
    /// Our end of the pipe, or the terminal's master. Gone when nothing flows any more.
    local: Option<OwnedFd>,
    /// Host to container.
    inward: Option<Flow>,
    /// Container to host.
    outward: Option<Flow>,
}

/// A direction of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Host to container.
    Inward,
    /// Container to host.
    Outward,
}

/// A direction that is open.
struct Flow {
    wants: Side,
    /// Bytes between a terminal and its socket. Unused with pipes.
    buffer: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Sink,
}

/// How a step of a flow ended.
enum Step {
    /// Bytes moved; there may be more.
    Moved,
    /// The side that was ready is so no more: wait for the other.
    Other,
    /// Wait for the same side again.
    Same,
    /// No byte will follow, or nobody takes it.
    Ended,
}

impl Stream {
    fn new(header: StreamHeader, socket: OwnedFd, local: OwnedFd) -> Self {
        let flow = || Some(Flow { wants: Side::Source, buffer: Vec::new() });
        let (inward, outward) = match header.kind {
            StreamKind::Stdin => (flow(), None),
            StreamKind::Stdout | StreamKind::Stderr => (None, flow()),
            StreamKind::Terminal => (flow(), flow()),
        };
        Self { header, established: false, socket, local: Some(local), inward, outward }
    }

    /// Which stream it is, and its port in the guest.
    pub fn address(&self) -> Result<(StreamKind, u32), Error> {
        let port = sys::local_port(&self.socket).map_err(at("find a stream's port"))?;
        Ok((self.header.kind, port))
    }

    /// Whether bytes for the host may still come.
    pub fn owes_output(&self) -> bool {
        self.outward.is_some()
    }

    /// What `direction` waits for, if it is open. While the connection is being made both wait for that.
    pub fn waits(&self, direction: Direction) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let flow = match direction {
            Direction::Inward => self.inward.as_ref()?,
            Direction::Outward => self.outward.as_ref()?,
        };
        if !self.established {
            return Some((self.socket.as_fd(), PollFlags::OUT));
        }
        let socket_side = if direction == Direction::Inward { Side::Source } else { Side::Sink };
        let fd = if flow.wants == socket_side { self.socket.as_fd() } else { self.local.as_ref()?.as_fd() };
        Some((fd, if flow.wants == Side::Source { PollFlags::IN } else { PollFlags::OUT }))
    }

    /// To be called when what `direction` waits for has happened. Moves a bounded number of bytes, and does not wait.
    pub fn advance(&mut self, direction: Direction) -> Result<(), Error> {
        if !self.established {
            return self.establish();
        }
        let terminal = self.header.kind == StreamKind::Terminal;
        let Some(local) = &self.local else { return Ok(()) };
        let (flow, source, sink) = match direction {
            Direction::Inward => (&mut self.inward, self.socket.as_fd(), local.as_fd()),
            Direction::Outward => (&mut self.outward, local.as_fd(), self.socket.as_fd()),
        };
        let Some(open) = flow else { return Ok(()) };
        let step = if terminal { open.copy(source, sink) } else { open.splice(source, sink) };
        match step {
            Step::Moved | Step::Same => (),
            Step::Other => open.wants = if open.wants == Side::Source { Side::Sink } else { Side::Source },
            Step::Ended => self.end(direction),
        }
        Ok(())
    }

    /// Sends the header once the connection stands. A socket buffer without a byte in it takes it whole.
    fn establish(&mut self) -> Result<(), Error> {
        match send(&self.socket, &self.header.encode(), SendFlags::NOSIGNAL) {
            Ok(StreamHeader::SIZE) => self.established = true,
            Ok(_) => return Err(at("begin a stream")(Errno::NOBUFS)),
            Err(Errno::AGAIN | Errno::INTR) => (),
            Err(errno) => return Err(at("connect a stream to the host")(errno)),
        }
        Ok(())
    }

    /// Ends a direction: the host sees the end of what we send, the container the end of its stdin, or a broken pipe.
    pub fn end(&mut self, direction: Direction) {
        // A connection that the host has closed cannot be shut down, and need not be.
        let (flow, how) = match direction {
            Direction::Inward => (&mut self.inward, Shutdown::Read),
            Direction::Outward => (&mut self.outward, Shutdown::Write),
        };
        if flow.take().is_some() {
            if let (Direction::Inward, StreamKind::Terminal, Some(master)) =
                (direction, self.header.kind, &self.local)
            {
                // A terminal has no end of its input but this.
                let _ = write(master, &[END_OF_TYPING]);
            }
            let _ = shutdown(&self.socket, how);
        }
        if self.inward.is_none() && self.outward.is_none() {
            self.local = None;
        }
    }

    /// Gives the terminal a new size. Nothing where there is none.
    pub fn resize(&self, size: WindowSize) {
        if let (StreamKind::Terminal, Some(master)) = (self.header.kind, &self.local) {
            // A terminal that is going away has no size.
            let _ = resize(master, size);
        }
    }
}

impl Flow {
    /// Moves bytes where one side is a pipe.
    fn splice(&self, source: BorrowedFd<'_>, sink: BorrowedFd<'_>) -> Step {
        match splice(source, None, sink, None, PIECE, SpliceFlags::NONBLOCK | SpliceFlags::MOVE) {
            Ok(0) => Step::Ended,
            Ok(_) => Step::Moved,
            Err(Errno::AGAIN) => Step::Other,
            Err(Errno::INTR) => Step::Same,
            Err(_) => Step::Ended,
        }
    }

    /// Moves bytes through the buffer: fills it when it is empty, and then empties it.
    fn copy(&mut self, source: BorrowedFd<'_>, sink: BorrowedFd<'_>) -> Step {
        if self.buffer.is_empty() {
            self.buffer.reserve(4 << 10);
            match read(source, rustix::buffer::spare_capacity(&mut self.buffer)) {
                Ok(0) => return Step::Ended,
                Ok(_) => (),
                Err(Errno::AGAIN | Errno::INTR) => return Step::Same,
                // The master of a terminal that no process has open any more.
                Err(_) => return Step::Ended,
            }
        }
        let waited_for_sink = self.wants == Side::Sink;
        match write(sink, &self.buffer) {
            Ok(written) => {
                self.buffer.drain(..written.min(self.buffer.len()));
                // With the buffer empty the source is next, otherwise the sink.
                if self.buffer.is_empty() == waited_for_sink { Step::Other } else { Step::Moved }
            }
            Err(Errno::AGAIN | Errno::INTR) => {
                if waited_for_sink {
                    Step::Same
                } else {
                    Step::Other
                }
            }
            Err(_) => Step::Ended,
        }
    }
}
