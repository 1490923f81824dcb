//! Standard input and output of the container: a thread for each stream, which copies bytes and nothing else.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::virtio::vsock::Listener;
use machine::timeline::{Phase, Timeline};
use protocol::{Start, StreamHeader, StreamKind, Token};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// How long a connection may take to say which stream it is. The agent starts the container between the two, which takes seconds
/// where kernel mode is emulated and the host is busy.
const HEADER_PATIENCE: Duration = Duration::from_secs(120);
const BUFFER: usize = 64 << 10;
const STACK: usize = 256 << 10;
/// How many connections of others are looked at.
const STRANGERS: usize = 16;

/// Which streams the agent is going to open.
#[derive(Debug, Clone)]
pub struct Expected {
    token: Token,
    kinds: Vec<StreamKind>,
    stdin: bool,
}

impl Expected {
    /// Those that belong to `start`.
    pub fn of(start: &Start) -> Self {
        let mut kinds = match start.terminal {
            Some(_) => vec![StreamKind::Terminal],
            None => vec![StreamKind::Stdout, StreamKind::Stderr],
        };
        if start.terminal.is_none() && start.stdin {
            kinds.push(StreamKind::Stdin);
        }
        Expected { token: start.token, kinds, stdin: start.stdin }
    }

    /// Whether `header` opens a stream that is still missing; then it no longer is.
    fn takes(&mut self, header: StreamHeader) -> bool {
        if header.token != self.token {
            return false;
        }
        let found = self.kinds.iter().position(|k| *k == header.kind);
        found.map(|i| self.kinds.swap_remove(i)).is_some()
    }
}

/// The streams of one container.
pub struct Streams {
    /// Hears of each output that was written out to its end.
    done: Receiver<()>,
    outputs: usize,
}

/// What the threads of the streams share.
struct Shared {
    expected: Mutex<Expected>,
    timeline: Arc<Timeline>,
}

impl Streams {
    /// Accepts the expected streams on a thread of its own, and carries each on another. Nobody is let in after them.
    ///
    /// # Errors
    /// When the host refuses a thread.
    pub fn serve(listener: Listener, expected: Expected, timeline: Arc<Timeline>) -> io::Result<Self> {
        let outputs = expected.kinds.iter().filter(|k| **k != StreamKind::Stdin).count();
        let most = expected.kinds.len() + STRANGERS;
        let shared = Arc::new(Shared { expected: Mutex::new(expected), timeline });
        let (sender, done) = channel();
        spawn("streams", move || {
            // Each says on its own thread which stream it is: one that says nothing holds up no other.
            for _ in 0..most {
                if shared.expected().kinds.is_empty() {
                    break;
                }
                let Some(socket) = listener.accept() else { break };
                let (shared, sender) = (shared.clone(), sender.clone());
                if let Err(error) = spawn("stream", move || carry(socket, &shared, &sender)) {
                    log::error!("cannot carry the container's output: {error}");
                }
            }
        })?;
        Ok(Streams { done, outputs })
    }

    /// Goes on with the streams of a container that has lived on in a copy of its machine: `streams` are what the agent has, each with its
    /// port in the guest. The listener has those whose connection still stands, and nobody else is let in. Output of the others was
    /// delivered before.
    ///
    /// # Errors
    /// When the host refuses a thread.
    pub fn resume(
        listener: &Listener,
        streams: &[(StreamKind, u32)],
        stdin: bool,
        timeline: Arc<Timeline>,
    ) -> io::Result<Self> {
        let (sender, done) = channel();
        let mut outputs = 0;
        let mut missing = streams.to_vec();
        // They were handed over before the guest ran.
        while !missing.is_empty()
            && let Ok((socket, port)) = listener.accept_timeout_from(Duration::ZERO)
        {
            let Some(kind) = claim(&mut missing, port) else { continue };
            if kind != StreamKind::Stdin {
                outputs += 1;
            }
            let (sender, timeline) = (sender.clone(), timeline.clone());
            spawn("stream", move || relay(kind, socket, stdin, &timeline, &sender))?;
        }
        Ok(Streams { done, outputs })
    }

    /// Waits until all output of a container that ended was written out.
    pub fn finish(self) {
        for _ in 0..self.outputs {
            if self.done.recv().is_err() {
                return;
            }
        }
    }
}

impl Shared {
    fn expected(&self) -> MutexGuard<'_, Expected> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.into()).stack_size(STACK).spawn(work)
}

/// Carries one stream to its end.
fn carry(mut socket: UnixStream, shared: &Shared, done: &Sender<()>) {
    // A connection that does not know the token is not the agent's: it is dropped, and with it closed.
    let Some(header) = header(&mut socket) else { return };
    let (known, stdin) = {
        let mut expected = shared.expected();
        (expected.takes(header), expected.stdin)
    };
    if !known {
        return;
    }
    relay(header.kind, socket, stdin, &shared.timeline, done);
}

/// Copies one stream to its end.
fn relay(kind: StreamKind, socket: UnixStream, stdin: bool, timeline: &Timeline, done: &Sender<()>) {
    match kind {
        // Without input of ours, the container's ends.
        StreamKind::Stdin if !stdin => return,
        StreamKind::Stdin => return input(&socket),
        StreamKind::Stdout => output(socket, rustix::stdio::stdout(), timeline),
        StreamKind::Stderr => output(socket, rustix::stdio::stderr(), timeline),
        StreamKind::Terminal => {
            let keys = if stdin { socket.try_clone().ok() } else { None };
            if let Some(keys) = keys
                && let Err(error) = spawn("stdin", move || input(&keys))
            {
                log::error!("cannot pass on what is typed: {error}");
            }
            output(socket, rustix::stdio::stdout(), timeline);
        }
    }
    let _ = done.send(());
}

/// The stream whose port in the guest this is, if it is still missing; then it no longer is.
fn claim(missing: &mut Vec<(StreamKind, u32)>, port: u32) -> Option<StreamKind> {
    let found = missing.iter().position(|(_, theirs)| *theirs == port);
    found.map(|index| missing.swap_remove(index).0)
}

fn header(socket: &mut UnixStream) -> Option<StreamHeader> {
    let mut bytes = [0; StreamHeader::SIZE];
    socket.set_read_timeout(Some(HEADER_PATIENCE)).ok()?;
    socket.read_exact(&mut bytes).ok()?;
    socket.set_read_timeout(None).ok()?;
    StreamHeader::decode(&bytes).ok()
}

fn output(mut from: UnixStream, to: BorrowedFd<'static>, timeline: &Timeline) {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                timeline.mark(Phase::FirstByte);
                let data = buffer.get(..count).unwrap_or_default();
                if write_all(to, data).is_err() {
                    // Nobody reads any more: the container hears of it by SIGPIPE, as it would without us.
                    let _ = from.shutdown(Shutdown::Both);
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Writes to one of our own standard streams, which somebody else may have made non-blocking.
fn write_all(to: BorrowedFd<'_>, mut data: &[u8]) -> Result<(), Errno> {
    while !data.is_empty() {
        match rustix::io::write(to, data) {
            Ok(count) => data = data.get(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait_for(to, PollFlags::OUT)?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn input(mut to: &UnixStream) {
    let from = rustix::stdio::stdin();
    let mut buffer = vec![0; BUFFER];
    loop {
        match rustix::io::read(from, &mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                if to.write_all(buffer.get(..count).unwrap_or_default()).is_err() {
                    return;
                }
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if wait_for(from, PollFlags::IN).is_ok() => {}
            Err(_) => break,
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

fn wait_for(fd: BorrowedFd<'_>, flags: PollFlags) -> Result<(), Errno> {
    match poll(&mut [PollFd::from_borrowed_fd(fd, flags)], None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use devices::virtio::vsock::Backend;

    use super::*;

    #[test]
    fn each_stream_opens_once_and_only_with_the_token() {
        let token = Token([7; 16]);
        let start = Start { token, stdin: true, ..Start::default() };
        let mut expected = Expected::of(&start);
        let header = |token, kind| StreamHeader { token, kind };
        assert!(!expected.takes(header(Token([8; 16]), StreamKind::Stdout)));
        assert!(!expected.takes(header(token, StreamKind::Terminal)));
        for kind in [StreamKind::Stdin, StreamKind::Stdout, StreamKind::Stderr] {
            assert!(expected.takes(header(token, kind)), "{kind:?}");
            assert!(!expected.takes(header(token, kind)), "{kind:?}");
        }
        assert!(expected.kinds.is_empty());
    }

    #[test]
    fn survivors_are_known_by_their_port() {
        let mut missing = vec![(StreamKind::Stdin, 6), (StreamKind::Stdout, 7), (StreamKind::Stderr, 8)];
        assert_eq!(claim(&mut missing, 9), None, "a connection of somebody else");
        assert_eq!(claim(&mut missing, 8), Some(StreamKind::Stderr));
        assert_eq!(claim(&mut missing, 8), None);
        assert_eq!(claim(&mut missing, 6), Some(StreamKind::Stdin));
        assert_eq!(missing, [(StreamKind::Stdout, 7)]);
    }

    #[test]
    fn those_that_are_gone_are_not_waited_for() {
        let listener = Backend::new().listen(protocol::STREAM_PORT).unwrap();
        let streams = [(StreamKind::Stdout, 7), (StreamKind::Stderr, 8)];
        let streams = Streams::resume(&listener, &streams, false, Arc::new(Timeline::default())).unwrap();
        assert_eq!(streams.outputs, 0);
        streams.finish();
    }

    #[test]
    fn a_terminal_is_the_only_stream() {
        let size = protocol::WindowSize { rows: 1, columns: 1 };
        let start = Start { terminal: Some(size), stdin: true, ..Start::default() };
        assert_eq!(Expected::of(&start).kinds, [StreamKind::Terminal]);
        let start = Start { stdin: false, ..Start::default() };
        assert_eq!(Expected::of(&start).kinds, [StreamKind::Stdout, StreamKind::Stderr]);
    }
}
