//! One socket of the host and the connection that it is the end of: moves bytes between the socket and guest memory.
//! Device loop only.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use event_manager::EventSet;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::RecvFlags;

use super::connection::{Action, Connection, Interest, Outgoing, Payload};
use super::packet::{Header, shutdown};
use super::state::ConnectionState;
use crate::device_loop::{Source, Watch};
use crate::virtio::chain::{Reader, Writer};
use crate::virtio::vectored;

/// How the one who asked for a connection into the guest hears that it stands.
pub enum Answer {
    /// By a line on its socket.
    Line,
    /// By a message.
    Message(SyncSender<()>),
}

/// A socket and its connection.
pub struct Stream {
    /// Non-blocking.
    pub socket: UnixStream,
    /// What the two ends know of each other.
    pub connection: Connection,
    /// What the guest sent and the socket did not take.
    buffer: VecDeque<u8>,
    /// How much of it [`growth`](Self::growth) has told.
    counted: usize,
    /// What the host sent before a snapshot and the guest has not had: it comes before what the socket has.
    unsent: VecDeque<u8>,
    /// The host sends nothing after that, whatever the socket has.
    ended: bool,
    /// Whether the other end is a listener's of this process: a process that restores a snapshot has such a one too.
    pub survives: bool,
    /// Who hears that the connection stands.
    pub answer: Option<Answer>,
    /// What the loop watches the socket for.
    pub watched: Option<EventSet>,
    /// Whether it waits for its turn to send.
    pub queued: bool,
    /// Whether what is watched may have to change.
    pub touched: bool,
    patience: Option<Duration>,
    /// When the connection's patience ends.
    pub deadline: Option<Instant>,
}

/// Whether the socket meets `what`, or its other end is closed for good.
fn meets(socket: &UnixStream, what: PollFlags) -> bool {
    let mut polled = [PollFd::new(socket, what)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(rustix::event::poll(&mut polled, Some(&now)), Ok(1))
}

/// Whether the socket's other end is closed for good.
fn hung_up(socket: &UnixStream) -> bool {
    meets(socket, PollFlags::empty())
}

impl Stream {
    /// A connection that has just begun, with its non-blocking socket.
    pub fn new(socket: UnixStream, connection: Connection) -> Self {
        Stream {
            socket,
            connection,
            buffer: VecDeque::new(),
            counted: 0,
            unsent: VecDeque::new(),
            ended: false,
            survives: false,
            answer: None,
            watched: None,
            queued: false,
            touched: false,
            patience: None,
            deadline: None,
        }
    }

    /// The next packet for the guest, its payload in `body`.
    pub fn next_packet(&mut self, body: &mut Writer) -> Option<Header> {
        loop {
            let packet = self.connection.next_packet()?;
            let Outgoing::Data(room) = packet else { return Some(self.connection.sending(packet)) };
            let room = usize::try_from(room).unwrap_or(usize::MAX).min(body.remaining());
            let fresh = self.unsent.is_empty() && !self.ended;
            match self.read(room, body) {
                Ok(0) => {
                    self.connection.end_of_file();
                    if hung_up(&self.socket) {
                        self.connection.hung_up();
                    }
                }
                Ok(count) => {
                    if fresh && count < room {
                        self.connection.would_block();
                    }
                    let count = u32::try_from(count).unwrap_or(u32::MAX);
                    return Some(self.connection.sending(Outgoing::Data(count)));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.connection.would_block(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.connection.end_of_file();
                    self.connection.write_closed();
                }
            }
        }
    }

    /// Puts up to `room` bytes from the host into `body`; none at the end of what it sends.
    fn read(&mut self, room: usize, body: &mut Writer) -> io::Result<usize> {
        if !self.unsent.is_empty() {
            let bytes: Vec<u8> = self.unsent.drain(..room.min(self.unsent.len())).collect();
            body.write_all(&bytes).map_err(io::Error::other)?;
            return Ok(bytes.len());
        }
        if self.ended {
            return Ok(0);
        }
        body.write_with(room, |slices| vectored::read(&self.socket, slices))
    }

    /// A packet came from the guest, with its payload in `reader`; the buffer may grow by `budget`.
    pub fn packet(&mut self, header: &Header, reader: &mut Reader, budget: usize) {
        if usize::try_from(header.len).is_ok_and(|len| len <= reader.remaining()) {
            match self.connection.packet(header) {
                Payload::Take => self.take(header.len, reader, budget),
                Payload::None | Payload::Discard => {}
            }
        } else {
            self.connection.violated();
        }
    }

    /// Passes `len` bytes of payload on to the socket; what it does not take waits in the buffer, if that may grow by
    /// `budget`.
    fn take(&mut self, len: u32, reader: &mut Reader, budget: usize) {
        let mut left = usize::try_from(len).unwrap_or(usize::MAX);
        if self.buffer.is_empty() {
            match reader.read_with(left, |slices| vectored::write(&self.socket, slices)) {
                Ok(count) => {
                    self.connection.forwarded(u32::try_from(count).unwrap_or(u32::MAX));
                    left = left.saturating_sub(count);
                }
                Err(error) if is_transient(&error) => {}
                Err(_) => return self.connection.write_closed(),
            }
        }
        if left == 0 {
            return;
        }
        let mut rest = vec![0; left];
        if left > budget || reader.read_exact(&mut rest).is_err() {
            self.connection.violated();
            // These bytes are lost, and not to be waited for.
            return self.connection.forwarded(u32::try_from(left).unwrap_or(u32::MAX));
        }
        self.buffer.extend(rest);
    }

    fn flush(&mut self) {
        while !self.buffer.is_empty() {
            let (head, tail) = self.buffer.as_slices();
            match self.socket.write_vectored(&[IoSlice::new(head), IoSlice::new(tail)]) {
                Ok(count) => {
                    self.buffer.drain(..count.min(self.buffer.len()));
                    self.connection.forwarded(u32::try_from(count).unwrap_or(u32::MAX));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_transient(&error) => return,
                Err(_) => return self.connection.write_closed(),
            }
        }
    }

    /// The loop woke us for the socket.
    pub fn ready(&mut self) {
        self.flush();
        let interest = self.connection.interest();
        if interest.hangup && hung_up(&self.socket) {
            self.connection.hung_up();
        }
        if interest.readable {
            self.connection.readable();
        }
    }

    /// The connection's next action, of which what concerns the socket alone is carried out.
    pub fn next_action(&mut self) -> Option<Action> {
        let action = self.connection.next_action();
        match action {
            Some(Action::Announce) => self.announce(),
            // A socket that is not connected any more is shut already.
            Some(Action::ShutRead) => drop(self.socket.shutdown(Shutdown::Read)),
            Some(Action::ShutWrite) => drop(self.socket.shutdown(Shutdown::Write)),
            Some(Action::Forget { .. } | Action::Close) | None => {}
        }
        action
    }

    /// Bytes in the buffer, on which the connection agrees.
    #[cfg(test)]
    pub fn buffered(&self) -> usize {
        assert_eq!(self.buffer.len(), self.connection.buffered() as usize);
        self.buffer.len()
    }

    /// By how many bytes the buffer has grown since the last question.
    pub fn growth(&mut self) -> isize {
        if self.connection.buffered() == 0 {
            // All taken or given up: give the memory back.
            self.buffer = VecDeque::new();
        }
        let before = std::mem::replace(&mut self.counted, self.buffer.len());
        self.counted.cast_signed().wrapping_sub(before.cast_signed())
    }

    /// Sets the deadline that the connection's patience asks for. `true` when it is another one than before.
    pub fn mind_patience(&mut self) -> bool {
        let patience = self.connection.patience();
        let changed = patience != self.patience;
        if changed {
            self.patience = patience;
            self.deadline = patience.map(|patience| Instant::now() + patience);
        }
        changed
    }

    fn announce(&mut self) {
        let told = match self.answer.take() {
            Some(Answer::Line) => {
                // A fresh socket has room for this.
                let line = format!("OK {}\n", self.connection.ports().host);
                self.socket.write(line.as_bytes()).is_ok_and(|count| count == line.len())
            }
            Some(Answer::Message(accepted)) => accepted.try_send(()).is_ok(),
            None => true,
        };
        if !told {
            self.connection.end_of_file();
            self.connection.write_closed();
        }
    }

    /// What a snapshot carries of it, if it can go on in another process. What the host sent and the guest has not had may
    /// take as much as is left of `budget`.
    pub fn save(&self, budget: &mut usize) -> Option<ConnectionState> {
        let mut state = self.connection.save().filter(|_| self.survives)?;
        state.to_host = self.buffer.iter().copied().collect();
        if self.connection.is_heard() {
            state.to_guest = self.unsent.iter().copied().collect();
            // Looked at first: what is written after the end was seen is nothing.
            state.to_guest_ends = self.ended || meets(&self.socket, PollFlags::RDHUP);
            let waiting = match self.ended {
                true => Ok(Vec::new()),
                false => peek(&self.socket, budget.saturating_sub(self.unsent.len())),
            };
            match waiting {
                Ok(waiting) => state.to_guest.extend(waiting),
                Err(error) => {
                    log::warn!("vsock: the snapshot does without connection {:?}: {error}", state.ports());
                    return None;
                }
            }
            *budget = budget.saturating_sub(state.to_guest.len());
        }
        Some(state)
    }

    /// The stream that `state`, which was checked, was saved from, with a fresh non-blocking socket.
    pub fn restore(cid: u64, mut state: ConnectionState, socket: UnixStream) -> Self {
        let mut stream = Stream::new(socket, Connection::restore(cid, &state));
        stream.buffer = std::mem::take(&mut state.to_host).into();
        stream.unsent = std::mem::take(&mut state.to_guest).into();
        stream.ended = state.to_guest_ends;
        stream.survives = true;
        // What the host closed before is closed for whoever is there now. A fresh socket is connected: this works.
        if state.host_shut & shutdown::SEND != 0 || stream.ended {
            drop(stream.socket.shutdown(Shutdown::Read));
        }
        if state.host_shut & shutdown::RECEIVE != 0 {
            drop(stream.socket.shutdown(Shutdown::Write));
        }
        stream
    }

    /// Stops watching the socket, until [`watch`](Self::watch).
    pub fn unwatch(&mut self, source: Source, watch: &mut Watch) {
        if self.watched.take().is_some() {
            watch.remove(&self.socket, source);
        }
    }

    /// Brings what the loop watches the socket for up to date.
    pub fn watch(&mut self, source: Source, watch: &mut Watch) {
        self.touched = false;
        let interest = self.connection.interest();
        let mut events = EventSet::empty();
        events.set(EventSet::IN, interest.readable);
        events.set(EventSet::OUT, interest.writable);
        let wanted = (interest != Interest::default()).then_some(events);
        match (self.watched, wanted) {
            (None, Some(events)) => watch.add(&self.socket, source, events),
            (Some(_), None) => watch.remove(&self.socket, source),
            (Some(before), Some(events)) if before != events => watch.modify(&self.socket, source, events),
            _ => {}
        }
        self.watched = wanted;
    }
}

/// What there is to read from the socket, which keeps it: all, or an error.
fn peek(socket: &UnixStream, budget: usize) -> io::Result<Vec<u8>> {
    let waiting = usize::try_from(rustix::io::ioctl_fionread(socket)?).unwrap_or(usize::MAX);
    if waiting > budget {
        return Err(io::Error::other(format!("{waiting} bytes wait for the guest, {budget} at most")));
    }
    let mut bytes = vec![0; waiting];
    if waiting > 0 {
        let (_, count) = rustix::net::recv(socket, &mut bytes[..], RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
        bytes.truncate(count);
    }
    Ok(bytes)
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
