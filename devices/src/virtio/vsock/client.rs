//! A program on the host that has connected to the device's socket and says where in the guest it wants to go:
//! `CONNECT <port>\n`. Device loop only.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::net::RecvFlags;

/// `CONNECT 4294967295\n`, and some room for a program that pads.
const LONGEST_LINE: usize = 32;

/// A program that has not said all of its line yet.
pub struct Client {
    /// The socket, non-blocking.
    pub socket: UnixStream,
    /// When it must have said it.
    pub deadline: Instant,
    line: Vec<u8>,
}

/// How far a [`Client`] has come.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// Its line is not complete.
    Waiting,
    /// It wants this port of the guest.
    Wants(u32),
    /// It is gone, or speaks something else.
    Hopeless,
}

impl Client {
    /// A fresh one.
    pub fn new(socket: UnixStream, deadline: Instant) -> Self {
        Client { socket, deadline, line: Vec::new() }
    }

    /// Reads on. Nothing after the end of the line is consumed: that is for the guest.
    pub fn progress(&mut self) -> Progress {
        let mut ahead = [0; LONGEST_LINE];
        let seen = match rustix::net::recv(&self.socket, &mut ahead[..], RecvFlags::PEEK) {
            Ok((_, 0)) => return Progress::Hopeless,
            Ok((_, count)) => ahead.get(..count).unwrap_or_default(),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Progress::Waiting,
            Err(_) => return Progress::Hopeless,
        };
        let end = seen.iter().position(|&byte| byte == b'\n');
        let mut line = vec![0; end.map_or(seen.len(), |at| at + 1)];
        match self.socket.read_exact(&mut line) {
            Ok(()) => self.line.append(&mut line),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Progress::Waiting,
            Err(_) => return Progress::Hopeless,
        }
        match end {
            _ if self.line.len() > LONGEST_LINE => Progress::Hopeless,
            None => Progress::Waiting,
            Some(_) => parse(&self.line).map_or(Progress::Hopeless, Progress::Wants),
        }
    }
}

/// The port in `CONNECT <port>\n`.
fn parse(line: &[u8]) -> Option<u32> {
    let port = line.strip_prefix(b"CONNECT ")?.trim_ascii();
    // `u32::from_str` takes a sign.
    if !port.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(port).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn lines() {
        for (line, port) in [
            ("CONNECT 1024\n", Some(1024)),
            ("CONNECT 4294967295\r\n", Some(u32::MAX)),
            ("CONNECT 4294967296\n", None),
            ("CONNECT +1\n", None),
            ("CONNECT -1\n", None),
            ("CONNECT \n", None),
            ("connect 1\n", None),
            ("GET / HTTP/1.1\n", None),
            ("\n", None),
        ] {
            assert_eq!(parse(line.as_bytes()), port, "{line:?}");
        }
    }

    #[test]
    fn a_line_may_come_in_pieces_and_what_follows_is_left() {
        let (mut program, socket) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        let mut client = Client::new(socket, Instant::now());
        assert_eq!(client.progress(), Progress::Waiting);
        program.write_all(b"CONN").unwrap();
        assert_eq!(client.progress(), Progress::Waiting);
        program.write_all(b"ECT 52\nhello").unwrap();
        assert_eq!(client.progress(), Progress::Wants(52));
        let mut rest = [0; 5];
        client.socket.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello");
        program.write_all(&[b'x'; 2 * LONGEST_LINE]).unwrap();
        assert_eq!(client.progress(), Progress::Hopeless);
    }
}
