//! One client: its bytes, its file descriptors, and how long all of that may take.
//!
//! Runs on the connection's own thread. A client that sends too little, too much or something else than HTTP costs that thread
//! a few seconds and nobody anything else.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, Shutdown, recv, recvmsg,
    send, shutdown,
};

use super::http::{self, Response};
use super::routes::{self, Incoming};
use super::{Limits, MAX_FILES, wait};
use crate::control::Control;

/// Bytes taken from the socket at once.
const CHUNK: usize = 8 << 10;
/// How long, and how much, a client that was refused may go on sending before it hears that nobody listens. It reads its
/// answer first then.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_CHUNKS: usize = 256;

/// A connection that was accepted.
pub struct Connection {
    socket: UnixStream,
    stop: Arc<OwnedFd>,
    limits: Limits,
    /// What was received and belongs to no request yet.
    buffer: Vec<u8>,
    files: Vec<OwnedFd>,
}

/// Why there is no further request.
enum End {
    /// The client went away, has nothing to say, or the server ends.
    Silent,
    /// What it sent cannot be understood.
    Refused(Response),
}

impl From<Response> for End {
    fn from(response: Response) -> Self {
        End::Refused(response)
    }
}

impl Connection {
    /// A connection whose `socket` never blocks; it ends when `stop` can be read.
    pub fn new(socket: UnixStream, stop: Arc<OwnedFd>, limits: Limits) -> Self {
        Connection { socket, stop, limits, buffer: Vec::new(), files: Vec::new() }
    }

    /// Serves requests one after the other until the client goes away or misbehaves.
    pub fn serve(mut self, control: &dyn Control) {
        loop {
            let incoming = match self.read() {
                Ok(incoming) => incoming,
                Err(End::Silent) => return,
                Err(End::Refused(response)) => {
                    if self.write(&response.encode("GET")).is_ok() {
                        self.linger();
                    }
                    return;
                }
            };
            let (method, keep_alive) = (incoming.head.method.clone(), incoming.head.keep_alive);
            let mut response = routes::answer(incoming, control);
            response.close |= !keep_alive;
            if self.write(&response.encode(&method)).is_err() || response.close {
                return;
            }
        }
    }

    /// Reads one request, within its time.
    fn read(&mut self) -> Result<Incoming, End> {
        let deadline = Instant::now() + self.limits.read;
        let head = loop {
            if let Some(head) = http::parse(&self.buffer, &self.limits)? {
                break head;
            }
            self.receive(deadline)?;
        };
        let end = head.len.saturating_add(head.content_length);
        if head.expects_continue && self.buffer.len() < end {
            self.write(http::CONTINUE).map_err(|_| End::Silent)?;
        }
        while self.buffer.len() < end {
            self.receive(deadline)?;
        }
        let rest = self.buffer.split_off(end);
        let mut request = std::mem::replace(&mut self.buffer, rest);
        let body = request.split_off(head.len);
        Ok(Incoming { head, body, files: std::mem::take(&mut self.files) })
    }

    /// Takes what has come, or waits for it.
    fn receive(&mut self, deadline: Instant) -> Result<(), End> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() && self.buffer.is_empty() {
                return Err(End::Silent);
            }
            if left.is_zero() {
                let message = format!("the request took more than {:?}", self.limits.read);
                return Err(Response::error(408, &message).and_close().into());
            }
            let (ready, ended) = wait(&self.socket, PollFlags::IN, &self.stop, Some(left));
            if ended {
                return Err(End::Silent);
            }
            if !ready {
                continue;
            }
            match self.take() {
                Ok(0) => return Err(End::Silent),
                Ok(_) => break,
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(Errno::TOOBIG) => {
                    let message = format!("a request comes with {MAX_FILES} file descriptors at most");
                    return Err(Response::error(400, &message).and_close().into());
                }
                Err(_) => return Err(End::Silent),
            }
        }
        Ok(())
    }

    /// One `recvmsg`. Too many file descriptors are `E2BIG`; those that arrived are closed with the connection.
    fn take(&mut self) -> Result<usize, Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut chunk = [0; CHUNK];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let message = recvmsg(&self.socket, &mut [IoSliceMut::new(&mut chunk)], &mut control, flags)?;
        for rights in control.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = rights {
                self.files.extend(files);
            }
        }
        if message.flags.contains(ReturnFlags::CTRUNC) || self.files.len() > MAX_FILES {
            return Err(Errno::TOOBIG);
        }
        self.buffer.extend_from_slice(chunk.get(..message.bytes).unwrap_or_default());
        Ok(message.bytes)
    }

    /// Writes it all within its time. The server's end does not keep an answer back.
    fn write(&self, mut bytes: &[u8]) -> Result<(), Errno> {
        let deadline = Instant::now() + self.limits.write;
        while !bytes.is_empty() {
            match send(&self.socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait_for_room(deadline)?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn wait_for_room(&self, deadline: Instant) -> Result<(), Errno> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Errno::TIMEDOUT);
        }
        let timeout = rustix::event::Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
        let mut fds = [rustix::event::PollFd::new(&self.socket, PollFlags::OUT)];
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Lets the client finish, and throws away what it says. File descriptors are not taken.
    fn linger(&self) {
        let deadline = Instant::now() + LINGER.min(self.limits.read);
        let _ = shutdown(&self.socket, Shutdown::Write);
        let mut chunk = [0; CHUNK];
        for _ in 0..LINGER_CHUNKS {
            let left = deadline.saturating_duration_since(Instant::now());
            let (ready, ended) = wait(&self.socket, PollFlags::IN, &self.stop, Some(left));
            if ended || left.is_zero() {
                return;
            }
            match recv(&self.socket, &mut chunk[..], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return,
                Err(Errno::AGAIN | Errno::INTR) if !ready => {}
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }
}
