//! The other side of the API: what `vmm ctl` and tests speak it with. One question a connection.
//!
//! Called on whatever thread asks, which waits for the answer.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;
use serde_json::Value;
use thiserror::Error;

use super::MAX_FILES;

/// An answer larger than this is none of ours.
const MAX_ANSWER: u64 = 16 << 20;
/// Headers that an answer may have.
const MAX_HEADERS: usize = 32;

/// Why there is no answer. Each message is one line: what, where, and what to do.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the message says it")]
pub enum ClientError {
    #[error("no machine listens at {}: start it with --api-socket, or check the path", path.display())]
    Absent { path: PathBuf },
    #[error("no permission for {}: it is its owner's and root's", path.display())]
    Permission { path: PathBuf },
    #[error("cannot ask the machine at {}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("the machine at {} did not answer in time", path.display())]
    Timeout { path: PathBuf },
    #[error("the machine at {} went away before it answered", path.display())]
    Closed { path: PathBuf },
    #[error("what listens at {} is no vmm: {what}", path.display())]
    NotVmm { path: PathBuf, what: String },
}

/// A question.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// `GET` or `PUT`.
    pub method: &'a str,
    /// Such as `/v1/vm`.
    pub path: &'a str,
    /// What goes with it.
    pub body: Option<&'a Value>,
    /// File descriptors that go with it, at most [`MAX_FILES`].
    pub files: &'a [BorrowedFd<'a>],
    /// The media type that is wanted.
    pub accept: &'a str,
    /// How long the machine may take.
    pub patience: Duration,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The body, as it came.
    pub body: Vec<u8>,
}

#[derive(Deserialize)]
struct ErrorBody {
    error: String,
}

impl Answer {
    /// The body, where the machine did what was asked; why not, where it did not.
    ///
    /// # Errors
    /// The machine's own words.
    pub fn content(self) -> Result<Vec<u8>, String> {
        if (200..300).contains(&self.status) {
            return Ok(self.body);
        }
        let said = serde_json::from_slice::<ErrorBody>(&self.body).map(|body| body.error);
        Err(said.unwrap_or_else(|_| format!("the machine answered with status {}", self.status)))
    }
}

impl<'a> Question<'a> {
    /// A question without parameters.
    pub fn new(method: &'a str, path: &'a str) -> Self {
        let patience = Duration::from_secs(30);
        Question { method, path, body: None, files: &[], accept: "application/json", patience }
    }

    /// Asks the machine that listens at `socket`.
    ///
    /// # Errors
    /// [`ClientError`] when there is no answer. A refusal is one.
    pub fn ask(&self, socket: &Path) -> Result<Answer, ClientError> {
        let path = || socket.to_path_buf();
        let mut stream = UnixStream::connect(socket).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => {
                ClientError::Absent { path: path() }
            }
            std::io::ErrorKind::PermissionDenied => ClientError::Permission { path: path() },
            _ => ClientError::Io { path: path(), source },
        })?;
        let failed = |source: std::io::Error| match source.kind() {
            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => {
                ClientError::Timeout { path: path() }
            }
            _ => ClientError::Io { path: path(), source },
        };
        let patience = Some(self.patience.max(Duration::from_millis(1)));
        stream.set_read_timeout(patience).and(stream.set_write_timeout(patience)).map_err(failed)?;
        let sent = self.send(&mut stream);
        // Whoever is turned away is answered before all is sent.
        let mut bytes = Vec::new();
        let received = (&mut stream).take(MAX_ANSWER + 1).read_to_end(&mut bytes);
        if bytes.is_empty() {
            sent.map_err(failed)?;
            return Err(received.map_or_else(failed, |_| ClientError::Closed { path: path() }));
        }
        parse(&bytes).map_err(|what| match received {
            Err(source) => failed(source),
            Ok(_) => ClientError::NotVmm { path: path(), what },
        })
    }

    fn send(&self, stream: &mut UnixStream) -> std::io::Result<()> {
        let body = self.body.map(Value::to_string).unwrap_or_default();
        let mut request = format!(
            "{} {} HTTP/1.1\r\nHost: vmm\r\nAccept: {}\r\nConnection: close\r\n",
            self.method, self.path, self.accept
        );
        if self.body.is_some() {
            request += &format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
        }
        request += "\r\n";
        request += &body;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !self.files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(self.files)) {
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        let bytes = [IoSlice::new(request.as_bytes())];
        let sent = sendmsg(&*stream, &bytes, &mut control, SendFlags::NOSIGNAL)?;
        stream.write_all(request.as_bytes().get(sent..).unwrap_or_default())
    }
}

/// The answer in `bytes`, which are all that came.
fn parse(bytes: &[u8]) -> Result<Answer, String> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let len = match response.parse(bytes) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) => return Err("its answer has no end".into()),
        Err(error) => return Err(format!("its answer is not HTTP: {error}")),
    };
    let length = response.headers.iter().find(|h| h.name.eq_ignore_ascii_case("content-length"));
    let length = length.and_then(|h| std::str::from_utf8(h.value).ok()?.trim().parse().ok());
    let body = bytes.get(len..).unwrap_or_default();
    match length.unwrap_or(body.len()) {
        length if length > body.len() => Err("its answer is cut short".into()),
        length => Ok(Answer {
            status: response.code.unwrap_or_default(),
            body: body.get(..length).unwrap_or_default().to_vec(),
        }),
    }
}
