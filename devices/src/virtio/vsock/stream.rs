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

use super::connection::{Action, Connection, Interest, Outgoing, Payload};
use super::packet::Header;
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

/// Whether the socket's other end is closed for good.
fn hung_up(socket: &UnixStream) -> bool {
    let mut polled = [PollFd::new(socket, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(rustix::event::poll(&mut polled, Some(&now)), Ok(1))
}

impl Stream {
    /// A connection that has just begun, with its non-blocking socket.
    pub fn new(socket: UnixStream, connection: Connection) -> Self {
        Stream {
            socket,
            connection,
            buffer: VecDeque::new(),
            counted: 0,
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
            match body.write_with(room, |slices| vectored::read(&self.socket, slices)) {
                Ok(0) => {
                    self.connection.end_of_file();
                    if hung_up(&self.socket) {
                        self.connection.hung_up();
                    }
                }
                Ok(count) => {
                    if count < room {
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

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
