//! The control API of one machine: HTTP/1.1 with JSON on a unix socket. `openapi.json` is its reference.
//!
//! Whoever runs a machine starts a [`Server`] with a socket and a [`Control`], and drops it when the machine has ended. One thread
//! accepts, and each connection has its own: so a client that is slow, or waits for a snapshot, holds up nobody. Everything a
//! client can use up is bounded by [`Limits`]. No guest is touched from here: every question goes to [`Control::ask`].
//!
//! From the socket inwards: [`connection`] (bytes, deadlines, file descriptors), [`http`] (what a head says), [`routes`] (which
//! question it is, and what the answer looks like).

pub mod client;
pub mod connection;
pub mod http;
#[cfg(test)]
mod openapi_tests;
pub mod prometheus;
pub mod routes;
#[cfg(test)]
mod schema;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, SocketFlags, accept_with, send, sockopt};

use crate::control::Control;
use crate::plan::ListeningSocket;
use connection::Connection;
use http::Response;

/// The most file descriptors that may come with one request.
pub const MAX_FILES: usize = 4;
/// How long the last answers may take to be written when the server ends.
const LAST_ANSWERS: Duration = Duration::from_millis(500);
/// How long nobody is accepted where the process has no file descriptor left.
const BREATH: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// What clients may use up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a request's head.
    pub head: usize,
    /// Bytes of its body.
    pub body: usize,
    /// Connections at once.
    pub connections: usize,
    /// For a whole request, counted from when the connection is ready for it.
    pub read: Duration,
    /// For a whole answer to be taken.
    pub write: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            head: 8 << 10,
            body: 64 << 10,
            connections: 16,
            read: Duration::from_secs(5),
            write: Duration::from_secs(5),
        }
    }
}

/// The running server. Dropping it ends all connections, after their last answers, and removes the socket.
pub struct Server {
    stop: Arc<OwnedFd>,
    open: Arc<Open>,
    acceptor: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `socket` from threads of its own.
    ///
    /// # Errors
    /// Those of thread creation, and of `eventfd`.
    pub fn start(socket: ListeningSocket, control: Arc<dyn Control>, limits: Limits) -> io::Result<Self> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let open = Arc::new(Open::default());
        let acceptor = Acceptor { socket, control, limits, stop: stop.clone(), open: open.clone() };
        let acceptor = std::thread::Builder::new().name("api".into()).spawn(move || acceptor.run())?;
        Ok(Server { stop, open, acceptor: Some(acceptor) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Never read: from now on it is ready for everybody who looks.
        let _ = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes());
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        self.open.wait_for_none(LAST_ANSWERS);
    }
}

/// How many connections there are.
#[derive(Default)]
struct Open {
    count: Mutex<usize>,
    changed: Condvar,
}

impl Open {
    fn lock(&self) -> MutexGuard<'_, usize> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for_none(&self, patience: Duration) {
        let wait = self.changed.wait_timeout_while(self.lock(), patience, |count| *count > 0);
        drop(wait.unwrap_or_else(PoisonError::into_inner));
    }
}

/// A connection's place among those that there may be.
struct Place(Arc<Open>);

impl Place {
    fn take(open: &Arc<Open>, limit: usize) -> Option<Self> {
        let mut count = open.lock();
        (*count < limit).then(|| {
            *count += 1;
            Place(open.clone())
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut count = self.0.lock();
        *count = count.saturating_sub(1);
        self.0.changed.notify_all();
    }
}

/// The thread that accepts connections.
struct Acceptor {
    socket: ListeningSocket,
    control: Arc<dyn Control>,
    limits: Limits,
    stop: Arc<OwnedFd>,
    open: Arc<Open>,
}

impl Acceptor {
    fn run(self) {
        loop {
            let (ready, ended) = wait(self.socket.listener(), PollFlags::IN, &self.stop, None);
            if ended {
                return;
            }
            if !ready {
                continue;
            }
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match accept_with(self.socket.listener(), flags) {
                Ok(socket) => self.take(socket.into()),
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => {
                    log::warn!("the API cannot accept a connection: {error}");
                    // It would be as ready as before.
                    let _ = poll(&mut [PollFd::new(&*self.stop, PollFlags::IN)], Some(&BREATH));
                }
            }
        }
    }

    fn take(&self, socket: UnixStream) {
        if !is_allowed(&socket) {
            return turn_away(&socket, &Response::error(403, "this socket is its owner's and root's"));
        }
        let Some(place) = Place::take(&self.open, self.limits.connections) else {
            let message = format!("{} clients are connected: come back later", self.limits.connections);
            return turn_away(&socket, &Response::error(503, &message));
        };
        let connection = Connection::new(socket, self.stop.clone(), self.limits);
        let control = self.control.clone();
        let thread = std::thread::Builder::new().name("api-client".into()).spawn(move || {
            connection.serve(&*control);
            drop(place);
        });
        if let Err(error) = thread {
            log::warn!("the API cannot serve a connection: {error}");
        }
    }
}

/// The owner of this process, and root. The socket's mode says the same; this also holds for whoever was given a way around it.
fn is_allowed(socket: &UnixStream) -> bool {
    sockopt::socket_peercred(socket)
        .is_ok_and(|peer| peer.uid.is_root() || peer.uid == rustix::process::geteuid())
}

/// Says no without waiting: a new connection has room for that much.
fn turn_away(socket: &UnixStream, response: &Response) {
    let bytes = response.clone().and_close().encode("GET");
    let _ = send(socket, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
}

/// Waits for `socket`, for the server's end or for `timeout`; says which of the first two are there.
fn wait(socket: impl AsFd, flags: PollFlags, stop: &OwnedFd, timeout: Option<Duration>) -> (bool, bool) {
    let timeout = timeout.map(|t| Timespec::try_from(t).unwrap_or(BREATH));
    let mut fds = [PollFd::new(&socket, flags), PollFd::new(stop, PollFlags::IN)];
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) => (!fds[0].revents().is_empty(), !fds[1].revents().is_empty()),
        // A signal: nothing is there, and the caller looks at its clock.
        Err(_) => (false, false),
    }
}
