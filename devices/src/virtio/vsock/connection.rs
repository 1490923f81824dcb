//! One connection between a port of the guest and a socket of the host, as a state machine over plain data.
//!
//! No socket, queue or clock is touched here. The device feeds in what happened (a packet, a socket that became readable,
//! an end of file) and then asks three questions until each says no more: [`next_action`](Connection::next_action), what
//! to do on the host's side; [`next_packet`](Connection::next_packet), what to send to the guest;
//! [`interest`](Connection::interest), what to wait for.
//!
//! ```text
//! guest asks ───────────────► Open ──(reset | both halves closed and flushed)──► Leaving ► Flushing ► Over
//! host asks ► Requested ──────┘│                                                 ▲
//!                 └────────────┴──── refused, rules broken, patience ran out ────┘
//! ```
//!
//! How many bytes may be on their way is counted by [`Credit`].

use std::time::Duration;

use super::credit::{BUF_ALLOC, Credit};
use super::packet::{HOST_CID, Header, MAX_PAYLOAD, Op, Ports, STREAM, shutdown};

/// How long the guest may take to answer a request. A guest on a host that emulates kernel mode is slow, not dead.
const REQUEST_PATIENCE: Duration = Duration::from_secs(20);
/// How long it may take to confirm that both halves are closed. Linux gives its peers 8 s (`VSOCK_CLOSE_TIMEOUT`).
const CLOSE_PATIENCE: Duration = Duration::from_secs(10);

/// Who still has to hear that the connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Announce {
    Guest,
    Host,
    Nobody,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The host wants a connection.
    Requested { sent: bool },
    /// Both sides know of it.
    Open { announce: Announce },
    /// It has ended for the guest, which is told if `reset`.
    Leaving { reset: bool },
    /// The guest has forgotten it; the host still takes what the guest sent.
    Flushing,
    /// Nothing is left.
    Over,
}

/// What to do with a packet's payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Payload {
    /// There is none, or it is not to be looked at.
    None,
    /// All of it goes to the host's socket. Report what the socket takes with [`Connection::forwarded`].
    Take,
    /// The host does not listen any more.
    Discard,
}

/// What to do on the host's side. Each is asked for once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Tell the one on the host who asked for the connection that it stands.
    Announce,
    /// The guest reads no more: shut the socket for reading, so that the host's writers learn of it.
    ShutRead,
    /// The guest writes no more, and all it wrote was taken: shut the socket for writing.
    ShutWrite,
    /// The guest may use the ports again. Send it a reset, if it is to hear of it.
    Forget {
        /// Whether it is.
        reset: bool,
    },
    /// Close the socket and forget the connection.
    Close,
}

/// A packet for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outgoing {
    /// Asks for a connection.
    Request,
    /// Accepts one.
    Response,
    /// Closes what the host has closed.
    Shutdown,
    /// Says how much room there is.
    CreditUpdate,
    /// Carries up to that many bytes from the host's socket.
    Data(u32),
}

/// What to wait for on the host's socket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Interest {
    /// Something to read, or its end.
    pub readable: bool,
    /// Room to write.
    pub writable: bool,
    /// That its other end closes.
    pub hangup: bool,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    cid: u64,
    ports: Ports,
    phase: Phase,
    /// What the guest will not do any more: flags of [`shutdown`].
    guest_shut: u32,
    /// Which of them the host's socket has been shut for.
    carried_out: u32,
    /// What the host will not do any more.
    host_shut: u32,
    /// What the guest knows of that.
    told: u32,
    /// There may be something to read.
    readable: bool,
    /// The guest asked how much room there is.
    asked: bool,
    credit: Credit,
}

impl Connection {
    fn new(cid: u64, ports: Ports, phase: Phase) -> Self {
        Connection {
            cid,
            ports,
            phase,
            guest_shut: 0,
            carried_out: 0,
            host_shut: 0,
            told: 0,
            readable: false,
            asked: false,
            credit: Credit::default(),
        }
    }

    /// The guest asked with `request`, and the host's socket stands.
    pub fn from_guest(request: &Header) -> Self {
        let mut new =
            Self::new(request.src_cid, Ports::of(request), Phase::Open { announce: Announce::Guest });
        new.credit.heard(request);
        new
    }

    /// A socket of the host wants to reach a port of the guest with address `cid`.
    pub fn from_host(cid: u64, ports: Ports) -> Self {
        Self::new(cid, ports, Phase::Requested { sent: false })
    }

    /// Which ports it joins.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Bytes from the guest that the host's socket has not taken yet: never more than [`BUF_ALLOC`].
    pub fn buffered(&self) -> u32 {
        self.credit.buffered()
    }

    fn is_open(&self) -> bool {
        matches!(self.phase, Phase::Open { .. })
    }

    /// The guest broke the rules, or sent a packet whose length is wrong: it gets a reset.
    pub fn violated(&mut self) {
        self.leave(true);
    }

    fn leave(&mut self, reset: bool) {
        if matches!(self.phase, Phase::Open { .. } | Phase::Requested { .. }) {
            self.phase = Phase::Leaving { reset };
        }
    }

    /// A packet came from the guest.
    pub fn packet(&mut self, header: &Header) -> Payload {
        self.credit.heard(header);
        match (self.phase, header.op) {
            (Phase::Leaving { .. } | Phase::Flushing | Phase::Over, _) => {}
            (_, Op::Reset) => self.leave(false),
            (Phase::Requested { sent: true }, Op::Response) => {
                self.phase = Phase::Open { announce: Announce::Host };
            }
            (Phase::Requested { .. }, _) => self.violated(),
            (Phase::Open { .. }, Op::Data) => return self.payload(header.len),
            (Phase::Open { .. }, Op::Shutdown) => self.guest_shut |= header.flags & shutdown::BOTH,
            (Phase::Open { .. }, Op::CreditRequest) => self.asked = true,
            // The guest has lost its end and wants a new connection; it asks again after the reset.
            (Phase::Open { .. }, Op::Request) => self.violated(),
            // Linux drops these (`virtio_transport_recv_connected`).
            (Phase::Open { .. }, Op::CreditUpdate | Op::Response | Op::Unknown(_)) => {}
        }
        Payload::None
    }

    fn payload(&mut self, len: u32) -> Payload {
        if len == 0 {
            return Payload::None;
        }
        if self.guest_shut & shutdown::SEND != 0 || !self.credit.receive(len) {
            self.violated();
            return Payload::None;
        }
        if self.host_shut & shutdown::RECEIVE != 0 {
            self.credit.forward_all();
            return Payload::Discard;
        }
        Payload::Take
    }

    /// The host's socket took `count` of the buffered bytes.
    pub fn forwarded(&mut self, count: u32) {
        self.credit.forward(count);
    }

    /// There may be something to read from the host's socket.
    pub fn readable(&mut self) {
        self.readable = true;
    }

    /// There is nothing more to read for now.
    pub fn would_block(&mut self) {
        self.readable = false;
    }

    /// The host's socket is at its end: the host sends nothing more.
    pub fn end_of_file(&mut self) {
        self.host_shut |= shutdown::SEND;
        self.readable = false;
    }

    /// The host's socket takes nothing more; what is buffered is lost, and so is what still comes.
    pub fn write_closed(&mut self) {
        self.host_shut |= shutdown::RECEIVE;
        self.credit.forward_all();
    }

    /// The other end of the host's socket is closed. What it wrote before can still be read.
    pub fn hung_up(&mut self) {
        match self.phase {
            Phase::Requested { sent } => self.leave(sent),
            _ => self.write_closed(),
        }
    }

    /// The driver reset the device: the guest knows nothing any more.
    pub fn transport_reset(&mut self) {
        self.leave(false);
    }

    /// How long to wait for the guest from now on, if at all.
    pub fn patience(&self) -> Option<Duration> {
        match self.phase {
            Phase::Requested { .. } => Some(REQUEST_PATIENCE),
            Phase::Open { .. } if self.told == shutdown::BOTH => Some(CLOSE_PATIENCE),
            _ => None,
        }
    }

    /// The time that [`patience`](Self::patience) gave is over.
    pub fn timed_out(&mut self) {
        match self.phase {
            Phase::Requested { sent } => self.leave(sent),
            Phase::Open { .. } if self.told == shutdown::BOTH => self.leave(true),
            _ => {}
        }
    }

    /// What to do on the host's side next. Ask until there is nothing.
    pub fn next_action(&mut self) -> Option<Action> {
        let drained = self.buffered() == 0;
        match self.phase {
            Phase::Requested { .. } | Phase::Over => None,
            Phase::Open { announce: Announce::Host } => {
                self.phase = Phase::Open { announce: Announce::Nobody };
                Some(Action::Announce)
            }
            Phase::Open { .. } if self.guest_shut == shutdown::BOTH && drained => {
                // The guest waits for a reset as the sign that everything arrived.
                self.phase = Phase::Flushing;
                Some(Action::Forget { reset: true })
            }
            Phase::Open { .. } => {
                let due = self.guest_shut & !self.carried_out;
                if due & shutdown::RECEIVE != 0 {
                    self.carried_out |= shutdown::RECEIVE;
                    Some(Action::ShutRead)
                } else if due & shutdown::SEND != 0 && drained {
                    self.carried_out |= shutdown::SEND;
                    Some(Action::ShutWrite)
                } else {
                    None
                }
            }
            Phase::Leaving { reset } => {
                self.phase = Phase::Flushing;
                Some(Action::Forget { reset })
            }
            Phase::Flushing if drained => {
                self.phase = Phase::Over;
                Some(Action::Close)
            }
            Phase::Flushing => None,
        }
    }

    fn wants_data(&self) -> bool {
        self.is_open()
            && self.host_shut & shutdown::SEND == 0
            && self.guest_shut & shutdown::RECEIVE == 0
            && self.credit.room() > 0
    }

    /// The packet to send next. When it is sent, say so with [`sending`](Self::sending).
    pub fn next_packet(&self) -> Option<Outgoing> {
        match self.phase {
            Phase::Requested { sent: false } => Some(Outgoing::Request),
            Phase::Open { announce: Announce::Guest } => Some(Outgoing::Response),
            Phase::Open { announce: Announce::Nobody } if self.guest_shut != shutdown::BOTH => {
                if self.host_shut & !self.told != 0 {
                    Some(Outgoing::Shutdown)
                } else if self.readable && self.wants_data() {
                    Some(Outgoing::Data(self.credit.room().min(MAX_PAYLOAD)))
                } else if self.asked || self.credit.is_worth_telling() {
                    Some(Outgoing::CreditUpdate)
                } else {
                    None
                }
            }
            _ => None,
        }
    }

    /// The header of a packet that goes to the guest now. For [`Outgoing::Data`], the count is what was read from the
    /// socket.
    pub fn sending(&mut self, packet: Outgoing) -> Header {
        let (op, flags, len) = match packet {
            Outgoing::Request => {
                self.phase = Phase::Requested { sent: true };
                (Op::Request, 0, 0)
            }
            Outgoing::Response => {
                self.phase = Phase::Open { announce: Announce::Nobody };
                (Op::Response, 0, 0)
            }
            Outgoing::Shutdown => {
                self.told = self.host_shut;
                (Op::Shutdown, self.host_shut, 0)
            }
            Outgoing::CreditUpdate => (Op::CreditUpdate, 0, 0),
            Outgoing::Data(count) => {
                self.credit.send(count);
                (Op::Data, 0, count)
            }
        };
        self.asked = false;
        self.credit.told();
        Header { len, flags, ..self.header(op) }
    }

    /// The reset that ends this connection for the guest.
    pub fn reset(&self) -> Header {
        self.header(Op::Reset)
    }

    fn header(&self, op: Op) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len: 0,
            kind: STREAM,
            op,
            flags: 0,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.credit.forwarded(),
        }
    }

    /// What to wait for on the host's socket. Nothing at all means: do not even watch for a hang-up, which would wake
    /// without end.
    pub fn interest(&self) -> Interest {
        Interest {
            readable: !self.readable && self.wants_data(),
            writable: self.buffered() > 0,
            hangup: matches!(self.phase, Phase::Requested { .. })
                || (self.is_open() && self.host_shut == shutdown::SEND),
        }
    }
}

mod saved;
#[cfg(test)]
mod tests;
