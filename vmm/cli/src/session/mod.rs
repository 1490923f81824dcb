//! The host's side of a container: greets the agent, says what to run, carries stdio and signals, and learns how it ended.
//!
//! Runs on threads of its own beside the machine's controller: `session` (this file) speaks the control protocol, and each
//! stream has a thread ([`streams`]). Everything that comes from the agent is hostile input: bounded, and checked by
//! [`protocol::Dialogue`].

pub mod image;
pub mod streams;

use std::io::{self, BufReader};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use devices::virtio::vsock::Listener;
use machine::controller::Handle;
use machine::timeline::{Phase, Timeline};
use protocol::{
    ByteString, CONTROL_PORT, Dialogue, FromAgent, Network, STREAM_PORT, Start, ToAgent, Token, WindowSize,
    printable, read_message, write_message,
};

use crate::{exit_code, terminal};
use image::ImageConfig;

/// vsock ports of the host that a session listens on.
pub const PORTS: [u32; 2] = [CONTROL_PORT, STREAM_PORT];
/// How long the guest may leave a message of ours unread.
const WRITE_PATIENCE: Duration = Duration::from_secs(5);
/// Longest text of the agent that is shown.
const LONGEST_MESSAGE: usize = 1000;

/// What to run, as far as the command line says it. The rest is the image's.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Command and arguments; empty for the image's own.
    pub command: Vec<ByteString>,
    /// `NAME=value` words that come after the image's.
    pub env: Vec<ByteString>,
    /// Directory to start in.
    pub workdir: Option<ByteString>,
    /// `user[:group]`.
    pub user: Option<String>,
    /// Host name.
    pub hostname: Option<String>,
    /// Pass standard input.
    pub interactive: bool,
    /// A terminal of this size.
    pub terminal: Option<WindowSize>,
    /// Block devices that the container may use.
    pub disks: Vec<String>,
    /// Its network interface.
    pub network: Option<Network>,
    /// Whether it may use vsock itself.
    pub vsock: bool,
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The container ran; its exit code.
    Exited(u8),
    /// The container did not run: exit code, and one line for a person.
    Failed(u8, String),
}

/// A way to the container from other threads, from the moment that it is there.
#[derive(Clone, Default)]
pub struct Remote(Arc<Mutex<Option<UnixStream>>>);

impl Remote {
    /// Sends `message`; `false` when there is no container yet, or it is out of reach.
    pub fn send(&self, message: &ToAgent) -> bool {
        let mut control = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        control.as_mut().is_some_and(|socket| write_message(socket, message).is_ok())
    }

    fn set(&self, socket: UnixStream) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(socket);
    }
}

/// A session that waits for its agent.
pub struct Session {
    verdict: Receiver<Verdict>,
    /// The container has ended; its output may still be on its way to whoever reads it.
    exited: Arc<AtomicBool>,
}

/// What a session needs of the machine.
pub struct Links {
    /// Where the agent connects first.
    pub control: Listener,
    /// Where its streams connect.
    pub streams: Listener,
    /// To end the machine when the container ended.
    pub machine: Handle,
    /// When things happened.
    pub timeline: Arc<Timeline>,
}

impl Session {
    /// Starts to wait for the agent.
    ///
    /// # Errors
    /// When the host refuses a thread.
    pub fn start(links: Links, request: Request, remote: Remote) -> io::Result<Self> {
        let (sender, verdict) = channel();
        let exited = Arc::new(AtomicBool::new(false));
        let (machine, heard) = (links.machine.clone(), exited.clone());
        std::thread::Builder::new().name("session".into()).spawn(move || {
            if let Some(verdict) = run(links, request, &remote, &heard) {
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

/// `None` when the connection was lost.
fn run(links: Links, request: Request, remote: &Remote, exited: &AtomicBool) -> Option<Verdict> {
    let Links { control, streams: listener, timeline, .. } = links;
    let mut listener = Some(listener);
    // Only the first connection: the agent makes it before it starts anybody else.
    let socket = control.accept();
    drop(control);
    let control = socket?;
    let ours = |what: &str| Some(Verdict::Failed(exit_code::VMM, what.to_owned()));
    let Ok(mut writer) = control.try_clone() else {
        return ours("too many open files: raise the limit (ulimit -n)");
    };
    let _ = writer.set_write_timeout(Some(WRITE_PATIENCE));
    let mut reader = BufReader::new(control);
    let mut dialogue = Dialogue::default();
    let mut output: Option<streams::Streams> = None;
    loop {
        let message: FromAgent = match read_message(&mut reader) {
            Ok(Some(message)) => message,
            Ok(None) => return None,
            Err(error) => return ours(&format!("the agent in the guest: {error}")),
        };
        if let Err(violation) = dialogue.heard(&message) {
            return ours(&format!("the agent in the guest: {violation}"));
        }
        match message {
            FromAgent::Hello { image_config, .. } => {
                timeline.mark(Phase::AgentUp);
                let start = match compose(&request, image_config.as_ref()) {
                    Ok(start) => start,
                    Err(what) => return ours(&what),
                };
                dialogue.start();
                let expected = streams::Expected::of(&start);
                let listener = listener.take()?;
                match streams::Streams::serve(listener, expected, timeline.clone()) {
                    Ok(streams) => output = Some(streams),
                    Err(error) => return ours(&format!("cannot carry the container's output: {error}")),
                }
                if let Err(error) = write_message(&mut writer, &ToAgent::Start(Box::new(start))) {
                    return ours(&format!("cannot reach the agent in the guest: {error}"));
                }
                if let Ok(control) = writer.try_clone() {
                    remote.set(control);
                }
                if request.terminal.is_some() {
                    // It may have changed while the guest started.
                    remote.send(&ToAgent::Resize(terminal::size()));
                }
            }
            FromAgent::Started { pid } => log::debug!("the container runs, as process {pid} of the guest"),
            FromAgent::Failed { reason, message } => {
                return Some(Verdict::Failed(reason.exit_code(), printable(&message, LONGEST_MESSAGE)));
            }
            FromAgent::Exited(status) => {
                exited.store(true, Ordering::Release);
                if let Some(output) = output.take() {
                    output.finish();
                }
                return Some(Verdict::Exited(status.exit_code()));
            }
        }
    }
}

/// The name in `NAME=value`.
fn variable(word: &ByteString) -> Vec<u8> {
    word.as_bytes().split(|b| *b == b'=').next().unwrap_or_default().to_vec()
}

/// What to run: the image's own configuration, and over it what was asked for (as `docker run` combines them).
fn compose(request: &Request, image: Option<&ByteString>) -> Result<Start, String> {
    let image = match image {
        Some(bytes) => {
            ImageConfig::parse(bytes.as_bytes()).map_err(|e| format!("the image's /.vmm/image.json: {e}"))?
        }
        None => ImageConfig::default(),
    };
    let mut token = [0; 16];
    rustix::rand::getrandom(&mut token, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| format!("no random numbers from the host: {e}"))?;
    let args = image.command(&request.command);
    if args.is_empty() {
        return Err("the image names no command of its own: say what to run after --".into());
    }
    let mut env: Vec<ByteString> = image.env.iter().map(|word| word.as_str().into()).collect();
    for word in &request.env {
        // The first of a name is the one that counts, for libc and for the agent.
        let name = variable(word);
        env.retain(|other| variable(other) != name);
        env.push(word.clone());
    }
    Ok(Start {
        token: Token(token),
        args,
        env,
        cwd: request.workdir.clone().unwrap_or_else(|| image.working_dir.as_str().into()),
        user: request.user.clone().unwrap_or(image.user),
        hostname: request.hostname.clone().unwrap_or_default(),
        terminal: request.terminal,
        stdin: request.interactive,
        disks: request.disks.clone(),
        network: request.network.clone(),
        vsock: request.vsock,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_for_comes_over_the_image() {
        let image: ByteString =
            r#"{"Cmd":["a"],"Env":["PATH=/image","A=1"],"WorkingDir":"/w","User":"1"}"#.into();
        let request = Request { env: vec!["PATH=/mine".into(), "B=2".into()], ..Request::default() };
        let start = compose(&request, Some(&image)).unwrap();
        assert_eq!(start.env, ["A=1".into(), "PATH=/mine".into(), "B=2".into()] as [ByteString; 3]);
        assert_eq!((start.cwd, start.user.as_str()), ("/w".into(), "1"));
        assert_ne!(start.token, Token::default());
    }

    #[test]
    fn an_image_without_a_command_needs_one() {
        assert!(compose(&Request::default(), None).unwrap_err().contains("after --"));
        let request = Request { command: vec!["sh".into()], ..Request::default() };
        assert_eq!(compose(&request, None).unwrap().args, [ByteString::from("sh")]);
    }
}
