//! The host's side of a container: says to the agent who it is and what to run, carries stdio and signals, and learns how it ended.
//!
//! Runs on threads of its own beside the machine's controller: `session` (this file) listens to the agent, each stream has a thread
//! ([`streams`]), and whoever has something to say to the agent says it by [`Guest`]. Everything that comes from the agent is hostile
//! input: bounded, and checked by [`protocol::Dialogue`].

pub mod guest;
pub mod image;
pub mod request;
pub mod streams;

use std::io::{self, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use devices::virtio::vsock::Listener;
use machine::controller::Handle;
use machine::timeline::{Phase, Timeline};
use protocol::{
    ByteString, CONTROL_PORT, Dialogue, FromAgent, STREAM_PORT, StreamKind, ToAgent, printable, read_message,
};

pub use guest::Guest;
pub use request::{NewSelf, Request};

use crate::{exit_code, terminal};

/// vsock ports of the host that a session listens on.
pub const PORTS: [u32; 2] = [CONTROL_PORT, STREAM_PORT];
/// How long the guest may leave a message of ours unread.
const WRITE_PATIENCE: Duration = Duration::from_secs(5);
/// Longest text of the agent that is shown.
const LONGEST_MESSAGE: usize = 1000;

/// How a session begins.
#[derive(Debug, Clone)]
pub enum Opening {
    /// The machine boots: its agent will say `Hello`.
    Boot(Request),
    /// The machine is a copy of a template: its agent waits to hear what to be and to run.
    Template(Request),
    /// The machine is a copy of one whose container was frozen: it is to be another, and goes on.
    Snapshot(NewSelf),
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The container ran; its exit code.
    Exited(u8),
    /// The container did not run: exit code, and one line for a person.
    Failed(u8, String),
}

/// A session with an agent.
pub struct Session {
    verdict: Receiver<Verdict>,
    /// The container has ended; its output may still be on its way to whoever reads it.
    exited: Arc<AtomicBool>,
}

/// What a session needs of the machine.
pub struct Links {
    /// Where the agent connects first; in a copy it is connected from the first.
    pub control: Listener,
    /// Where its streams connect.
    pub streams: Listener,
    /// To end the machine when the container ended.
    pub machine: Handle,
    /// When things happened.
    pub timeline: Arc<Timeline>,
    /// Told, with a line, when a copy has become another machine.
    pub ready: Option<Box<dyn Write + Send>>,
}

impl Session {
    /// Starts to wait for the agent. `guest` is the way to it from then on.
    ///
    /// # Errors
    /// When the host refuses a thread.
    pub fn start(links: Links, opening: Opening, guest: Guest) -> io::Result<Self> {
        let (sender, verdict) = channel();
        let exited = Arc::new(AtomicBool::new(false));
        let (machine, heard) = (links.machine.clone(), exited.clone());
        std::thread::Builder::new().name("session".into()).spawn(move || {
            let verdict = run(links, opening, &guest, &heard);
            guest.end();
            if let Some(verdict) = verdict {
                let _ = sender.send(verdict);
                machine.stop();
            }
            // Without a verdict the agent was lost: the machine is about to end by itself, and its console may say why.
        })?;
        Ok(Session { verdict, exited })
    }

    /// How it ended, if it did. To be asked when the machine is over, while its devices are still there: output of a container
    /// that ended may be waiting in them for a slow reader. Then this waits too, until `stopped` says that somebody insists.
    pub fn verdict(&self, stopped: impl Fn() -> bool) -> Option<Verdict> {
        loop {
            // The machine may have been quicker than the thread that tells.
            match self.verdict.recv_timeout(Duration::from_millis(200)) {
                Ok(verdict) => return Some(verdict),
                Err(RecvTimeoutError::Timeout) if self.exited.load(Ordering::Acquire) && !stopped() => {}
                Err(_) => return None,
            }
        }
    }
}

/// Waits until the agent of a machine that is to become a template has said `Hello`. The connection has to stay open until the template is
/// taken: its loss is the machine's end.
///
/// # Errors
/// With a line for a person when it does not within `patience`, or is not the agent of this program.
pub fn greet(control: &Listener, patience: Duration) -> Result<UnixStream, String> {
    let failed = |error: &dyn std::fmt::Display| format!("the agent in the guest: {error}");
    let mut socket = control
        .accept_timeout(patience)
        .map_err(|error| format!("the agent in the guest did not connect: {error}"))?;
    socket.set_read_timeout(Some(patience)).map_err(|error| failed(&error))?;
    let hello = read_message::<FromAgent>(&mut socket).map_err(|error| failed(&error))?;
    let hello = hello.ok_or("the agent in the guest closed its connection")?;
    if let FromAgent::Failed { message, .. } = &hello {
        return Err(printable(message, LONGEST_MESSAGE));
    }
    Dialogue::default().heard(&hello).map_err(|violation| failed(&violation))?;
    Ok(socket)
}

/// `None` when the connection was lost.
fn run(links: Links, opening: Opening, guest: &Guest, exited: &AtomicBool) -> Option<Verdict> {
    let Links { control, streams: listener, timeline, ready, .. } = links;
    // Only the first connection: the agent makes it before it starts anybody else.
    let socket = control.accept();
    drop(control);
    let control = socket?;
    let ours = |what: String| Some(Verdict::Failed(exit_code::VMM, what));
    let Ok(writer) = control.try_clone() else {
        return ours("too many open files: raise the limit (ulimit -n)".into());
    };
    let _ = writer.set_write_timeout(Some(WRITE_PATIENCE));
    guest.connect(
        writer,
        match &opening {
            Opening::Boot(_) => Dialogue::default(),
            Opening::Template(_) => Dialogue::in_template(),
            Opening::Snapshot(_) => Dialogue::in_snapshot(),
        },
    );
    let mut reader = BufReader::new(control);
    let mut conversation =
        Conversation { opening, guest, exited, listener: Some(listener), timeline, ready, output: None };
    if let Err(what) = conversation.open() {
        return ours(what);
    }
    loop {
        let message: FromAgent = match read_message(&mut reader) {
            Ok(Some(message)) => message,
            Ok(None) => return None,
            Err(error) => return ours(format!("the agent in the guest: {error}")),
        };
        if let Err(violation) = guest.heard(&message) {
            return ours(format!("the agent in the guest: {violation}"));
        }
        match conversation.answer(message) {
            Ok(None) => {}
            Ok(verdict) => return verdict,
            Err(what) => return ours(what),
        }
    }
}

/// What the session's thread knows while it listens.
struct Conversation<'a> {
    opening: Opening,
    guest: &'a Guest,
    exited: &'a AtomicBool,
    /// Until the streams have it.
    listener: Option<Listener>,
    timeline: Arc<Timeline>,
    ready: Option<Box<dyn Write + Send>>,
    output: Option<streams::Streams>,
}

impl Conversation<'_> {
    /// Says what is to be said before the agent says anything. An error is a line for a person, here and below.
    fn open(&self) -> Result<(), String> {
        match &self.opening {
            Opening::Boot(_) => Ok(()),
            Opening::Template(request) => self.say(&ToAgent::Begin(Box::new(request.begin()?))),
            Opening::Snapshot(new) => self.say(&ToAgent::Restored(Box::new(new.identity()?))),
        }
    }

    /// Answers a message that came in its turn.
    fn answer(&mut self, message: FromAgent) -> Result<Option<Verdict>, String> {
        match message {
            FromAgent::Hello { .. } => {
                self.timeline.mark(Phase::AgentUp);
                if let Opening::Boot(request) = &self.opening {
                    self.say(&ToAgent::Begin(Box::new(request.begin()?)))?;
                }
            }
            FromAgent::Image { config } => {
                // The first word of a template's copy.
                self.timeline.mark(Phase::AgentUp);
                self.start(config.as_ref())?;
            }
            FromAgent::Started { pid } => log::debug!("the container runs, as process {pid} of the guest"),
            FromAgent::Frozen => log::debug!("the container is frozen"),
            FromAgent::Restored { streams } => {
                self.timeline.mark(Phase::AgentUp);
                self.resume(&streams)?;
                if let Some(mut ready) = self.ready.take() {
                    // Whoever asked to be told may have gone.
                    let _ = writeln!(ready, "ready");
                }
            }
            FromAgent::Failed { reason, message } => {
                let line = printable(&message, LONGEST_MESSAGE);
                return Ok(Some(Verdict::Failed(reason.exit_code(), line)));
            }
            FromAgent::Exited(status) => {
                self.exited.store(true, Ordering::Release);
                if let Some(output) = self.output.take() {
                    output.finish();
                }
                return Ok(Some(Verdict::Exited(status.exit_code())));
            }
        }
        Ok(None)
    }

    /// Says what to run, now that it is known what the image says about it.
    fn start(&mut self, image: Option<&ByteString>) -> Result<(), String> {
        // The dialogue allows `Image` in these two only, and once.
        let (Opening::Boot(request) | Opening::Template(request)) = &self.opening else { return Ok(()) };
        let Some(listener) = self.listener.take() else { return Ok(()) };
        let start = request.start(image)?;
        let expected = streams::Expected::of(&start);
        let streams = streams::Streams::serve(listener, expected, self.timeline.clone());
        self.output = Some(streams.map_err(cannot_carry)?);
        self.say(&ToAgent::Start(Box::new(start)))?;
        if request.terminal.is_some() {
            // It may have changed while the guest started.
            self.guest.send(&ToAgent::Resize(terminal::size()));
        }
        Ok(())
    }

    /// Goes on with the streams of a container that has lived on.
    fn resume(&mut self, streams: &[(StreamKind, u32)]) -> Result<(), String> {
        let Opening::Snapshot(new) = &self.opening else { return Ok(()) };
        let has_terminal = streams.iter().any(|(kind, _)| *kind == StreamKind::Terminal);
        if new.terminal && !has_terminal {
            return Err("the container in the snapshot has no terminal: leave -t away".into());
        }
        let Some(listener) = self.listener.take() else { return Ok(()) };
        let carried = streams::Streams::resume(&listener, streams, new.interactive, self.timeline.clone());
        self.output = Some(carried.map_err(cannot_carry)?);
        if has_terminal {
            self.guest.send(&ToAgent::Resize(terminal::size()));
        }
        Ok(())
    }

    fn say(&self, message: &ToAgent) -> Result<(), String> {
        if self.guest.send(message) { Ok(()) } else { Err("cannot reach the agent in the guest".into()) }
    }
}

fn cannot_carry(error: io::Error) -> String {
    format!("cannot carry the container's output: {error}")
}
