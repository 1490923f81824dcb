//! Who is behind a port on the host's side: listeners of this process, and unix sockets by path.
//!
//! Built on the main thread before the machine runs, then moved to the device loop. [`Listener`] and [`Connector`] are the
//! ends that stay with other threads. A restored device delivers the connections that it was saved with to the same
//! listeners.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender, TrySendError};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vmm_sys_util::eventfd::EventFd;

/// Connections that may wait for a [`Listener`] to accept them, or for the device to look at them.
const BACKLOG: usize = 32;

/// Where connections from the guest go, and where those into it come from.
#[derive(Default)]
pub struct Backend {
    listeners: BTreeMap<u32, Door>,
    path: Option<PathBuf>,
    inbound: Option<UnixListener>,
}

/// The device's end of a [`Listener`].
struct Door {
    /// A socket, and the guest's port.
    sender: Sender<(UnixStream, u32)>,
    /// How many of them nobody has taken yet.
    waiting: Arc<AtomicUsize>,
}

impl Door {
    /// Hands the listener one end of a fresh connection with `guest`, and returns the other, non-blocking.
    fn pass(&self, guest: u32) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        self.waiting.fetch_add(1, Ordering::Relaxed);
        self.sender.send((theirs, guest)).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(ours)
    }
}

impl Backend {
    /// Nobody is behind any port.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes connections to `port` of the host. They come before a unix socket of that port.
    ///
    /// # Errors
    /// `AddrInUse` when somebody listens there already.
    pub fn listen(&mut self, port: u32) -> io::Result<Listener> {
        if self.listeners.contains_key(&port) {
            let taken = format!("vsock port {port} has a listener already");
            return Err(io::Error::new(io::ErrorKind::AddrInUse, taken));
        }
        // Bounded by the count of who waits: only what a snapshot brings may exceed it.
        let (sender, incoming) = mpsc::channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        self.listeners.insert(port, Door { sender, waiting: waiting.clone() });
        Ok(Listener { incoming, waiting })
    }

    /// Serves unix sockets: a connection from the guest to port P goes to the socket `path` + `_P`.
    pub fn serve_path(&mut self, path: impl Into<PathBuf>) {
        self.path = Some(path.into());
    }

    /// Takes connections into the guest from `listener`. Each begins with a line `CONNECT <port>`; the answer is `OK
    /// <port>` once the guest has accepted, or the socket is closed.
    ///
    /// # Errors
    /// That of making `listener` non-blocking.
    pub fn accept_from(&mut self, listener: UnixListener) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        self.inbound = Some(listener);
        Ok(())
    }

    /// The socket on which programs of the host ask for connections into the guest.
    pub(super) fn inbound(&self) -> Option<&UnixListener> {
        self.inbound.as_ref()
    }

    /// Whether `port` of the host is a listener's.
    pub(super) fn listens(&self, port: u32) -> bool {
        self.listeners.contains_key(&port)
    }

    /// Gives the listener of `port` a connection that stands already, however many wait: a non-blocking socket.
    /// `ConnectionRefused` when nobody listens there.
    pub(super) fn deliver(&self, port: u32, guest: u32) -> io::Result<UnixStream> {
        let listener = self.listeners.get(&port).ok_or(io::ErrorKind::ConnectionRefused)?;
        listener.pass(guest)
    }

    /// Connects port `guest` of the guest to `port` of the host, without waiting: a non-blocking socket.
    pub(super) fn connect(&self, port: u32, guest: u32) -> io::Result<UnixStream> {
        if let Some(listener) = self.listeners.get(&port) {
            if listener.waiting.load(Ordering::Relaxed) >= BACKLOG {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            return listener.pass(guest);
        }
        let Some(path) = &self.path else { return Err(io::ErrorKind::ConnectionRefused.into()) };
        let mut path = OsString::from(path);
        path.push(format!("_{port}"));
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // A unix socket connects at once or, when its backlog is full, says EAGAIN: there is nothing to wait for.
        rustix::net::connect(&socket, &SocketAddrUnix::new(&path)?)?;
        Ok(socket.into())
    }
}

/// Takes the guest's connections to one port of the host, on any thread.
///
/// While nobody takes them a few wait; more are refused. When the listener is dropped, all are.
pub struct Listener {
    incoming: Receiver<(UnixStream, u32)>,
    waiting: Arc<AtomicUsize>,
}

impl Listener {
    /// Waits for the next connection. `None` when the device is gone.
    pub fn accept(&self) -> Option<UnixStream> {
        self.accept_from().map(|(socket, _)| socket)
    }

    /// Waits for the next connection, and tells which port of the guest it is from: whoever takes over a restored guest
    /// knows its connections by that. `None` when the device is gone.
    pub fn accept_from(&self) -> Option<(UnixStream, u32)> {
        self.incoming.recv().ok().map(|connection| self.taken(connection))
    }

    fn taken(&self, connection: (UnixStream, u32)) -> (UnixStream, u32) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        connection
    }

    /// Waits for the next connection for at most `patience`.
    ///
    /// # Errors
    /// `TimedOut` when none comes, `NotConnected` when the device is gone.
    pub fn accept_timeout(&self, patience: Duration) -> io::Result<UnixStream> {
        self.accept_timeout_from(patience).map(|(socket, _)| socket)
    }

    /// The same, with the port of the guest that it is from.
    ///
    /// # Errors
    /// As for [`accept_timeout`](Self::accept_timeout).
    pub fn accept_timeout_from(&self, patience: Duration) -> io::Result<(UnixStream, u32)> {
        match self.incoming.recv_timeout(patience) {
            Ok(connection) => Ok(self.taken(connection)),
            Err(RecvTimeoutError::Timeout) => Err(io::ErrorKind::TimedOut.into()),
            Err(RecvTimeoutError::Disconnected) => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

/// A wish for a connection into the guest.
pub(super) struct Request {
    pub(super) port: u32,
    /// The device's end, non-blocking.
    pub(super) socket: UnixStream,
    /// Hears of success; dropped unheard on failure.
    pub(super) accepted: SyncSender<()>,
}

/// Opens connections into the guest, from any thread but the device loop's.
#[derive(Clone)]
pub struct Connector {
    requests: SyncSender<Request>,
    // Shared, not duplicated: a descriptor that the loop watches must not outlive its registration.
    wake: Arc<EventFd>,
}

impl Connector {
    /// A connector, and the device's end of it; `wake` rings when there is something.
    pub(super) fn new(wake: Arc<EventFd>) -> (Self, Receiver<Request>) {
        let (requests, wanted) = mpsc::sync_channel(BACKLOG);
        (Connector { requests, wake }, wanted)
    }

    /// Connects to `port` of the guest and waits until it has accepted. Before the guest's driver is up, that is part of
    /// the wait.
    ///
    /// # Errors
    /// `ConnectionRefused` when nobody listens there, when the guest takes too long to answer, or when the device is gone;
    /// `TimedOut` after `patience`; `WouldBlock` when too many ask at once.
    pub fn connect(&self, port: u32, patience: Duration) -> io::Result<UnixStream> {
        let (ours, socket) = UnixStream::pair()?;
        socket.set_nonblocking(true)?;
        let (accepted, answer) = mpsc::sync_channel(1);
        self.requests.try_send(Request { port, socket, accepted }).map_err(|error| match error {
            TrySendError::Full(_) => io::ErrorKind::WouldBlock,
            TrySendError::Disconnected(_) => io::ErrorKind::ConnectionRefused,
        })?;
        self.wake.write(1)?;
        match answer.recv_timeout(patience) {
            Ok(()) => Ok(ours),
            Err(RecvTimeoutError::Timeout) => Err(io::ErrorKind::TimedOut.into()),
            Err(RecvTimeoutError::Disconnected) => Err(io::ErrorKind::ConnectionRefused.into()),
        }
    }
}
