//! The agent's end of the control connection.

use protocol::{FrameDecoder, FromAgent, ToAgent, encode};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::error::{Error, at};

/// The connection and what of a message has arrived.
pub struct Control {
    socket: OwnedFd,
    decoder: FrameDecoder,
}

impl Control {
    /// Takes an established connection, in blocking mode.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, decoder: FrameDecoder::new() }
    }

    /// Sends; waits for a host that is slow to read.
    pub fn send(&self, message: &FromAgent) -> Result<(), Error> {
        let frame = encode(message)?;
        let mut rest: &[u8] = &frame;
        while !rest.is_empty() {
            match send(&self.socket, rest, SendFlags::NOSIGNAL) {
                Ok(sent) => rest = rest.get(sent..).unwrap_or_default(),
                Err(Errno::INTR) => (),
                Err(_) => return Err(Error::Ended),
            }
        }
        Ok(())
    }

    /// The next message, waiting for it.
    pub fn wait(&mut self) -> Result<ToAgent, Error> {
        loop {
            if let Some(message) = self.decoder.next_message()? {
                return Ok(message);
            }
            self.fill(RecvFlags::empty())?;
        }
    }

    /// Takes in what has arrived, without waiting. To be followed by calls of [`next`](Self::next) until it gives `None`.
    pub fn receive(&mut self) -> Result<(), Error> {
        self.fill(RecvFlags::DONTWAIT)
    }

    /// The next message of those that have arrived.
    pub fn next(&mut self) -> Result<Option<ToAgent>, Error> {
        Ok(self.decoder.next_message()?)
    }

    fn fill(&mut self, flags: RecvFlags) -> Result<(), Error> {
        let mut piece = [0u8; 4 << 10];
        match recv(&self.socket, &mut piece, flags) {
            Ok((0, _)) | Err(Errno::CONNRESET | Errno::NOTCONN) => Err(Error::Ended),
            Ok((count, _)) => {
                self.decoder.push(piece.get(..count).unwrap_or_default());
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(errno) => Err(at("control connection")(errno)),
        }
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
