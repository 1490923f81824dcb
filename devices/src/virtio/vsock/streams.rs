//! The host's sockets and the connections that they are the ends of: moves bytes, keeps turns, deadlines and what is
//! watched. Device loop only.
//!
//! Decisions are the connections' own (see [`super::connection`]); here they are carried out.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use event_manager::EventSet;

use super::backend::Backend;
use super::client::{Client, Progress};
use super::connection::{Action, Connection};
use super::device::BUFFER_BUDGET;
use super::packet::{HEADER_SIZE, HOST_CID, Header, Op, PORT_ANY, Ports, STREAM};
use super::stream::{Answer, Stream};
use crate::device_loop::{Source, Watch};
use crate::virtio::{Chain, DeviceError};

/// The first [`Source`] of a socket; the device's own come before it.
pub const FIRST_SOURCE: Source = 16;
const LAST_SOURCE: Source = Source::MAX / 2;
/// The first port given to a connection from the host. Lower ones are those that somebody chose.
pub const FIRST_HOST_PORT: u32 = 1 << 30;
/// How long a program may take to say where it wants to go.
const LINE_PATIENCE: Duration = Duration::from_secs(10);
/// Replies that may wait for the guest's buffers before the device stops to take packets.
pub const MAX_REPLIES: usize = 128;

/// All connections, and the programs that have yet to say which they want.
pub struct Streams {
    cid: u64,
    limit: usize,
    streams: BTreeMap<Source, Stream>,
    clients: BTreeMap<Source, Client>,
    by_ports: HashMap<Ports, Source>,
    /// Connections with something to send to the guest, each once, in the order in which they are served.
    turns: VecDeque<Source>,
    /// Resets for connections that do not exist (any more).
    replies: VecDeque<Header>,
    /// Connections to look at before the loop sleeps.
    touched: Vec<Source>,
    /// Sockets that are not needed any more, with whether they are watched.
    closed: Vec<(Source, UnixStream, bool)>,
    /// Bytes in all buffers.
    buffered: usize,
    /// Whether a deadline came or went.
    deadline_changed: bool,
    /// Since when nothing is watched, but for what a reset left to flush.
    paused: Option<Instant>,
    next_source: Source,
    next_port: u32,
}

impl Streams {
    /// None yet, and never more than `limit`, for a guest with address `cid`.
    pub fn new(cid: u64, limit: usize) -> Self {
        Streams {
            cid,
            limit,
            streams: BTreeMap::new(),
            clients: BTreeMap::new(),
            by_ports: HashMap::new(),
            turns: VecDeque::new(),
            replies: VecDeque::new(),
            touched: Vec::new(),
            closed: Vec::new(),
            buffered: 0,
            deadline_changed: false,
            paused: None,
            next_source: FIRST_SOURCE,
            next_port: FIRST_HOST_PORT,
        }
    }

    fn is_full(&self) -> bool {
        self.streams.len() + self.clients.len() >= self.limit
    }

    fn free_source(&mut self) -> Source {
        loop {
            let source = self.next_source;
            self.next_source = if source >= LAST_SOURCE { FIRST_SOURCE } else { source + 1 };
            if !self.streams.contains_key(&source) && !self.clients.contains_key(&source) {
                return source;
            }
        }
    }

    /// Whether the books agree: buffers, what connections know of them, and their sum.
    #[cfg(test)]
    pub fn is_consistent(&self) -> bool {
        let sum: usize = self.streams.values().map(Stream::buffered).sum();
        sum == self.buffered
            && self.streams.len() + self.clients.len() <= self.limit
            && self
                .by_ports
                .iter()
                .all(|(p, s)| self.streams.get(s).is_some_and(|s| s.connection.ports() == *p))
            && self.streams.iter().all(|(s, stream)| stream.queued == self.turns.contains(s))
    }

    /// Whether the guest owes buffers for so many replies that its packets have to wait.
    pub fn is_congested(&self) -> bool {
        self.replies.len() >= MAX_REPLIES
    }

    /// Whether there may be something to send to the guest.
    pub fn has_packets(&self) -> bool {
        !self.replies.is_empty() || !self.turns.is_empty()
    }

    /// Serves a packet from the guest.
    ///
    /// # Errors
    /// When the chain is too short for a header.
    pub fn packet(&mut self, chain: &mut Chain, backend: &Backend) -> Result<(), DeviceError> {
        let mut raw = [0; HEADER_SIZE];
        chain.reader.read_exact(&mut raw)?;
        let header = Header::parse(&raw);
        if header.src_cid != self.cid || header.dst_cid != HOST_CID {
            // As in Linux's `vhost_vsock_handle_tx_kick`: a guest speaks only for itself, and only to the host.
            return Ok(());
        }
        let known = self.by_ports.get(&Ports::of(&header)).copied().filter(|_| header.kind == STREAM);
        let Some(source) = known else {
            if header.kind == STREAM && header.op == Op::Request {
                self.accept(&header, backend);
            } else {
                self.replies.extend(header.refusal());
            }
            return Ok(());
        };
        let Some(stream) = self.streams.get_mut(&source) else { return Ok(()) };
        stream.packet(&header, &mut chain.reader, BUFFER_BUDGET.saturating_sub(self.buffered));
        self.settle(source);
        Ok(())
    }

    /// The guest asks for a connection.
    fn accept(&mut self, request: &Header, backend: &Backend) {
        let Ports { guest, host } = Ports::of(request);
        let socket = match () {
            () if self.is_full() => Err(io::ErrorKind::QuotaExceeded.into()),
            () if guest == PORT_ANY || host == PORT_ANY => Err(io::ErrorKind::InvalidInput.into()),
            () => backend.connect(host, guest),
        };
        match socket {
            Ok(socket) => {
                let mut stream = Stream::new(socket, Connection::from_guest(request));
                stream.survives = backend.listens(host);
                self.insert(None, stream);
            }
            Err(error) => {
                log::debug!("vsock: port {} of the host: {error}", request.dst_port);
                self.replies.extend(request.refusal());
            }
        }
    }

    /// The host asks for a connection to `port` of the guest.
    pub fn request(&mut self, port: u32, socket: UnixStream, answer: Answer) {
        // Without an answer the one who asked knows.
        if !self.is_full() {
            self.connect(None, port, socket, answer);
        }
    }

    fn connect(&mut self, watched: Option<Source>, port: u32, socket: UnixStream, answer: Answer) {
        let ports = loop {
            let ports = Ports { guest: port, host: self.next_port };
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if !self.by_ports.contains_key(&ports) {
                break ports;
            }
        };
        let mut stream = Stream::new(socket, Connection::from_host(self.cid, ports));
        stream.answer = Some(answer);
        stream.watched = watched.map(|_| EventSet::IN);
        self.insert(watched, stream);
    }

    fn insert(&mut self, source: Option<Source>, stream: Stream) {
        let source = source.unwrap_or_else(|| self.free_source());
        self.by_ports.insert(stream.connection.ports(), source);
        self.streams.insert(source, stream);
        self.settle(source);
    }

    /// A program has connected to the device's socket.
    pub fn greet(&mut self, socket: UnixStream, now: Instant, watch: &mut Watch) {
        if self.is_full() || socket.set_nonblocking(true).is_err() {
            return;
        }
        let source = self.free_source();
        watch.add(&socket, source, EventSet::IN);
        self.clients.insert(source, Client::new(socket, now + LINE_PATIENCE));
        self.deadline_changed = true;
    }

    /// A socket is ready.
    pub fn ready(&mut self, source: Source) {
        if let Some(stream) = self.streams.get_mut(&source) {
            stream.ready();
            self.settle(source);
            return;
        }
        let progress = self.clients.get_mut(&source).map_or(Progress::Waiting, Client::progress);
        if progress == Progress::Waiting {
            return;
        }
        if let Some(client) = self.clients.remove(&source) {
            match progress {
                Progress::Wants(port) => self.connect(Some(source), port, client.socket, Answer::Line),
                Progress::Waiting | Progress::Hopeless => self.closed.push((source, client.socket, true)),
            }
        }
    }

    /// Puts the next packet into `chain`. `false` when there is none after all, and the chain is untouched.
    ///
    /// # Errors
    /// When the chain is too short for a packet.
    pub fn fill(&mut self, chain: &mut Chain) -> Result<bool, DeviceError> {
        let mut body = chain.writer.split_off(HEADER_SIZE)?;
        if body.remaining() == 0 {
            return Err(DeviceError::Protocol("a receive buffer has no room for data".into()));
        }
        let mut packet = self.replies.pop_front();
        while packet.is_none() {
            let Some(source) = self.turns.pop_front() else { return Ok(false) };
            let Some(stream) = self.streams.get_mut(&source) else { continue };
            stream.queued = false;
            packet = stream.next_packet(&mut body);
            self.settle(source);
        }
        if let Some(header) = packet {
            chain.writer.write_all(&header.to_bytes())?;
            chain.writer.rejoin(&body);
        }
        Ok(true)
    }

    /// Carries out what a connection wants after something happened to it.
    fn settle(&mut self, source: Source) {
        let Some(stream) = self.streams.get_mut(&source) else { return };
        let mut over = false;
        while let Some(action) = stream.next_action() {
            match action {
                Action::Forget { reset } => {
                    self.by_ports.remove(&stream.connection.ports());
                    if reset {
                        self.replies.push_back(stream.connection.reset());
                    }
                }
                Action::Close => over = true,
                Action::Announce | Action::ShutRead | Action::ShutWrite => {}
            }
        }
        self.buffered = self.buffered.saturating_add_signed(stream.growth());
        self.deadline_changed |= stream.mind_patience();
        if over {
            if let Some(stream) = self.streams.remove(&source) {
                self.closed.push((source, stream.socket, stream.watched.is_some()));
            }
            return;
        }
        if !stream.queued && stream.connection.next_packet().is_some() {
            stream.queued = true;
            self.turns.push_back(source);
        }
        if !stream.touched {
            stream.touched = true;
            self.touched.push(source);
        }
    }

    /// Brings what is watched up to date. Comes last in each call of the device, so that a socket that was busy meanwhile
    /// costs nothing.
    pub fn watch(&mut self, watch: &mut Watch) {
        for (source, socket, watched) in self.closed.drain(..) {
            if watched {
                watch.retire(socket, source);
            }
        }
        for source in std::mem::take(&mut self.touched) {
            if let Some(stream) = self.streams.get_mut(&source) {
                stream.watch(source, watch);
            }
        }
    }

    /// Ends what has waited too long.
    pub fn expire(&mut self, now: Instant) {
        let late = |deadline: Instant| deadline <= now;
        let streams: Vec<Source> =
            self.streams.iter().filter(|(_, s)| s.deadline.is_some_and(late)).map(|(&s, _)| s).collect();
        for source in streams {
            if let Some(stream) = self.streams.get_mut(&source) {
                stream.connection.timed_out();
            }
            self.settle(source);
        }
        for (source, client) in self.clients.extract_if(.., |_, client| late(client.deadline)) {
            self.closed.push((source, client.socket, true));
        }
        self.deadline_changed = true;
    }

    /// Whether [`deadline`](Self::deadline) may have changed since the last question.
    pub fn deadline_changed(&mut self) -> bool {
        std::mem::take(&mut self.deadline_changed)
    }

    /// When [`expire`](Self::expire) is to be called.
    pub fn deadline(&self) -> Option<Instant> {
        let streams = self.streams.values().filter_map(|s| s.deadline);
        streams.chain(self.clients.values().map(|c| c.deadline)).min()
    }

    /// The driver has reset the device, which is paused: every connection ends. What it sent and the host has not taken yet is still
    /// delivered.
    pub fn transport_reset(&mut self) {
        self.turns.clear();
        let sources: Vec<Source> = self.streams.keys().copied().collect();
        for source in sources {
            if let Some(stream) = self.streams.get_mut(&source) {
                stream.connection.transport_reset();
            }
            self.settle(source);
        }
        self.closed.extend(
            std::mem::take(&mut self.clients)
                .into_iter()
                .map(|(source, client)| (source, client.socket, self.paused.is_none())),
        );
        self.replies.clear();
        self.turns.clear();
    }
}

mod saved;
