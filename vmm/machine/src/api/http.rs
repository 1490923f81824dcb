//! HTTP/1.1 as far as the API needs it (RFC 9112): what the head of a request says, and how an answer is written.
//!
//! Functions over bytes. Called by [`super::connection`] on its connection's thread, with whatever a client sent.

use std::fmt::Write as _;

use super::Limits;

/// Headers that a request may have.
const MAX_HEADERS: usize = 64;

/// What the head of a request says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// `GET`, `PUT` …
    pub method: String,
    /// Where to, without scheme and authority, which have no meaning here.
    pub path: String,
    /// The media type of the body, in lower case and without parameters.
    pub content_type: Option<String>,
    /// What the client would like to get.
    pub accept: Option<String>,
    /// Bytes of the head itself, with its empty line.
    pub len: usize,
    /// Bytes of the body that follows.
    pub content_length: usize,
    /// Another request may follow.
    pub keep_alive: bool,
    /// The client waits for a word before it sends the body.
    pub expects_continue: bool,
}

/// An answer, not written yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The media type of the body.
    pub content_type: &'static str,
    /// The body.
    pub body: Vec<u8>,
    /// The methods that the path has, where the status is 405.
    pub allow: Option<String>,
    /// Nothing that follows could be understood: the connection ends with this answer.
    pub close: bool,
}

/// What is sent to a client that waits before it sends a body.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
pub(super) const JSON: &str = "application/json";

impl Response {
    /// Done, and nothing to tell.
    pub fn empty() -> Self {
        Response { status: 204, content_type: JSON, body: Vec::new(), allow: None, close: false }
    }

    /// Done, and this is the answer.
    pub fn content(content_type: &'static str, body: Vec<u8>) -> Self {
        Response { status: 200, content_type, body, allow: None, close: false }
    }

    /// Not done. `message` is one line, whatever is in it.
    pub fn error(status: u16, message: &str) -> Self {
        Self::error_with(status, message, &[])
    }

    /// Not done, with more to say than why.
    pub fn error_with(status: u16, message: &str, more: &[(&str, String)]) -> Self {
        let line: String = message.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let mut body = serde_json::Map::new();
        body.insert("error".into(), line.into());
        body.extend(more.iter().map(|(key, value)| ((*key).into(), value.clone().into())));
        let body = serde_json::Value::from(body).to_string().into_bytes();
        Response { status, content_type: JSON, body, allow: None, close: false }
    }

    /// The connection ends with this answer.
    pub fn and_close(mut self) -> Self {
        self.close = true;
        self
    }

    /// As it goes over the socket. `HEAD` gets no body, but hears of its length.
    pub fn encode(&self, method: &str) -> Vec<u8> {
        let mut text = format!("HTTP/1.1 {} {}\r\n", self.status, reason(self.status));
        // Writing to a string does not fail.
        if self.status != 204 {
            let _ = write!(
                text,
                "Content-Type: {}\r\nContent-Length: {}\r\n",
                self.content_type,
                self.body.len()
            );
        }
        if let Some(allow) = &self.allow {
            let _ = write!(text, "Allow: {allow}\r\n");
        }
        if self.close {
            text.push_str("Connection: close\r\n");
        }
        text.push_str("\r\n");
        let mut bytes = text.into_bytes();
        if method != "HEAD" && self.status != 204 {
            bytes.extend_from_slice(&self.body);
        }
        bytes
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        410 => "Gone",
        411 => "Length Required",
        413 => "Content Too Large",
        415 => "Unsupported Media Type",
        417 => "Expectation Failed",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "Unknown",
    }
}

/// Reads the head at the start of `bytes`; `None` while it is not complete.
///
/// # Errors
/// The answer to a client whose request cannot be understood. It always ends the connection.
pub fn parse(bytes: &[u8], limits: &Limits) -> Result<Option<Head>, Response> {
    let refuse = |status, message: &str| Err(Response::error(status, message).and_close());
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let too_large = format!("the request's head is larger than {} bytes", limits.head);
    let window = bytes.get(..limits.head).unwrap_or(bytes);
    let len = match request.parse(window) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) if bytes.len() >= limits.head => return refuse(431, &too_large),
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => {
            return refuse(431, &format!("the request has more than {MAX_HEADERS} headers"));
        }
        Err(httparse::Error::Version) => return refuse(505, "only HTTP/1.0 and HTTP/1.1 are spoken here"),
        Err(error) => return refuse(400, &format!("this is not HTTP: {error}")),
    };
    let fields = match Fields::read(request.headers) {
        Ok(fields) => fields,
        Err(message) => return refuse(400, &message),
    };
    let newer = request.version == Some(1);
    if newer && fields.hosts != 1 {
        return refuse(400, "a request has one Host header");
    }
    if fields.transfer_encoding {
        return refuse(411, "a body is sent with its length here: leave Transfer-Encoding away");
    }
    if fields.expects_other {
        return refuse(417, "nothing but 100-continue can be expected here");
    }
    let content_length = match fields.content_length {
        Some(length) if length > limits.body => {
            return refuse(413, &format!("the body is larger than {} bytes", limits.body));
        }
        other => other.unwrap_or(0),
    };
    Ok(Some(Head {
        method: request.method.unwrap_or_default().into(),
        path: origin_form(request.path.unwrap_or_default()).into(),
        content_type: fields.content_type,
        accept: fields.accept,
        len,
        content_length,
        keep_alive: if newer { !fields.close } else { fields.keep_alive && !fields.close },
        expects_continue: newer && fields.expects_continue,
    }))
}

/// `http://anything/v1/vm` is `/v1/vm` (RFC 9112, 3.2.2).
fn origin_form(target: &str) -> &str {
    match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => target,
    }
}

/// The headers that mean something here.
#[derive(Default)]
struct Fields {
    hosts: usize,
    content_length: Option<usize>,
    transfer_encoding: bool,
    content_type: Option<String>,
    accept: Option<String>,
    close: bool,
    keep_alive: bool,
    expects_continue: bool,
    expects_other: bool,
}

impl Fields {
    fn read(headers: &[httparse::Header<'_>]) -> Result<Self, String> {
        let mut fields = Fields::default();
        for header in headers {
            let name = header.name.to_ascii_lowercase();
            let text = std::str::from_utf8(header.value);
            let text = || text.map(str::trim).map_err(|_| format!("the header {name} is not text"));
            match name.as_str() {
                "host" => fields.hosts += 1,
                "transfer-encoding" => fields.transfer_encoding = true,
                "content-length" => {
                    let length = length(text()?)?;
                    if fields.content_length.replace(length).is_some() {
                        return Err("the request has more than one Content-Length".into());
                    }
                }
                "content-type" => {
                    let media = text()?.split(';').next().unwrap_or_default().trim();
                    fields.content_type = Some(media.to_ascii_lowercase());
                }
                "accept" => fields.accept = Some(text()?.to_ascii_lowercase()),
                "connection" => {
                    for option in text()?.split(',').map(str::trim) {
                        fields.close |= option.eq_ignore_ascii_case("close");
                        fields.keep_alive |= option.eq_ignore_ascii_case("keep-alive");
                    }
                }
                "expect" if text()?.eq_ignore_ascii_case("100-continue") => fields.expects_continue = true,
                "expect" => fields.expects_other = true,
                _ => {}
            }
        }
        Ok(fields)
    }
}

/// Digits only: what else a number may be made of, others may read differently. Too many of them are more than any limit.
fn length(text: &str) -> Result<usize, String> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err("the Content-Length is not a number".into());
    }
    Ok(text.parse().unwrap_or(usize::MAX))
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
