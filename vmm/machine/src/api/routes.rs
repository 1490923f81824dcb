//! What can be asked, and where: from a request that was read to the question that it is, and from the machine's answer to
//! the response.
//!
//! Functions over data, called on a connection's thread. [`ROUTES`] and `openapi.json` say the same; a test sees to it.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::http::{Head, JSON, Response};
use super::prometheus;
use crate::control::{AttachBackend, Control, Refusal, Reply, Request, SnapshotRequest};

/// What a path and a method are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// [`Request::Describe`].
    Describe,
    /// [`Request::Start`].
    Start,
    /// [`Request::Pause`].
    Pause,
    /// [`Request::Resume`].
    Resume,
    /// [`Request::Shutdown`].
    Shutdown,
    /// [`Request::Snapshot`].
    Snapshot,
    /// [`Request::Attach`].
    Attach,
    /// [`Request::Metrics`].
    Metrics,
    /// The description of the API itself.
    OpenApi,
}

/// Everything that is served: method, path, and what it does. `{slot}` stands for a number.
pub const ROUTES: [(&str, &str, Operation); 9] = [
    ("GET", "/v1/vm", Operation::Describe),
    ("PUT", "/v1/vm/start", Operation::Start),
    ("PUT", "/v1/vm/pause", Operation::Pause),
    ("PUT", "/v1/vm/resume", Operation::Resume),
    ("PUT", "/v1/vm/shutdown", Operation::Shutdown),
    ("PUT", "/v1/vm/snapshot", Operation::Snapshot),
    ("PUT", "/v1/devices/{slot}/backend", Operation::Attach),
    ("GET", "/v1/metrics", Operation::Metrics),
    ("GET", "/v1/openapi.json", Operation::OpenApi),
];

/// The API, as OpenAPI describes it.
pub const OPENAPI: &str = include_str!("openapi.json");

/// How long the guest has to shut down by itself, when nobody says.
const SHUTDOWN_PATIENCE_MS: u64 = 10_000;
/// The longest that anybody may say.
const MAX_SHUTDOWN_PATIENCE_MS: u64 = 600_000;

/// No parameters: an empty object, or no body at all.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NothingBody {}

/// The body of `PUT /v1/vm/shutdown`.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ShutdownBody {
    /// Do not ask the guest.
    pub force: bool,
    /// How long the guest may take before it is ended all the same.
    pub timeout_ms: u64,
}

impl Default for ShutdownBody {
    fn default() -> Self {
        ShutdownBody { force: false, timeout_ms: SHUTDOWN_PATIENCE_MS }
    }
}

/// The body of `PUT /v1/vm/snapshot`.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotBody {
    /// Where to: an absolute path.
    pub directory: PathBuf,
    /// Only what changed.
    #[serde(default)]
    pub diff: bool,
}

/// The body of `PUT /v1/devices/{slot}/backend`, which comes with one file descriptor.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackendBody {
    /// What the file descriptor is.
    pub kind: BackendKind,
    /// Whether the guest may only read; for disks.
    #[serde(default)]
    pub read_only: bool,
}

/// What a file descriptor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackendKind {
    /// A raw image or a block device.
    Disk,
    /// A TAP.
    Tap,
}

/// A request that was read completely, with the file descriptors that came with it.
pub struct Incoming {
    /// Its head.
    pub head: Head,
    /// Its body.
    pub body: Vec<u8>,
    /// What came by `SCM_RIGHTS`. Closed unless the machine takes it.
    pub files: Vec<OwnedFd>,
}

/// Answers a request.
pub fn answer(incoming: Incoming, control: &dyn Control) -> Response {
    serve(incoming, control).unwrap_or_else(|refused| refused)
}

fn serve(incoming: Incoming, control: &dyn Control) -> Result<Response, Response> {
    let Incoming { head, body, files } = incoming;
    let (operation, slot) = route(&head.method, &head.path)?;
    if !files.is_empty() && operation != Operation::Attach {
        return Err(Response::error(400, "file descriptors came with a request that takes none"));
    }
    let getting = matches!(operation, Operation::Describe | Operation::Metrics | Operation::OpenApi);
    if getting && !body.is_empty() {
        return Err(Response::error(400, &format!("GET {} takes no body", head.path)));
    }
    if !body.is_empty() && head.content_type.as_deref() != Some(JSON) {
        let given = head.content_type.as_deref().unwrap_or("nothing");
        return Err(Response::error(415, &format!("the body is {given}: send application/json")));
    }
    let request = match operation {
        Operation::OpenApi => return Ok(Response::content(JSON, OPENAPI.into())),
        Operation::Describe => Request::Describe,
        Operation::Metrics => Request::Metrics,
        Operation::Start => nothing(&body, Request::Start)?,
        Operation::Pause => nothing(&body, Request::Pause)?,
        Operation::Resume => nothing(&body, Request::Resume)?,
        Operation::Shutdown => shutdown(&body)?,
        Operation::Snapshot => snapshot(&body)?,
        Operation::Attach => attach(slot, &body, files)?,
    };
    let reply = control.ask(request).map_err(|refusal| refused(&refusal))?;
    respond(&reply, head.accept.as_deref())
}

/// Finds what `path` is, and its number if it has one.
fn route(method: &str, path: &str) -> Result<(Operation, usize), Response> {
    let (path, query) = path.split_once('?').unwrap_or((path, ""));
    let found: Vec<_> = ROUTES
        .iter()
        .filter_map(|(theirs, pattern, operation)| Some((*theirs, *operation, matched(pattern, path)?)))
        .collect();
    if found.is_empty() {
        return Err(Response::error(
            404,
            &format!("there is no {path} here: GET /v1/openapi.json says what is"),
        ));
    }
    let Some((_, operation, slot)) = found.iter().find(|(theirs, ..)| *theirs == method) else {
        let allow: Vec<&str> = found.iter().map(|(theirs, ..)| *theirs).collect();
        let allow = allow.join(", ");
        let mut response = Response::error(405, &format!("{path} takes {allow}, not {method}"));
        response.allow = Some(allow);
        return Err(response);
    };
    if !query.is_empty() {
        return Err(Response::error(400, &format!("{path} takes no query: parameters are in the body")));
    }
    Ok((*operation, *slot))
}

/// Whether `path` is what `pattern` says; with the number in it, or 0.
fn matched(pattern: &str, path: &str) -> Option<usize> {
    let Some((before, after)) = pattern.split_once("{slot}") else {
        return (pattern == path).then_some(0);
    };
    let number = path.strip_prefix(before)?.strip_suffix(after)?;
    // A slot has one name: no sign, no leading zero.
    let plain = number.bytes().all(|b| b.is_ascii_digit()) && (number == "0" || !number.starts_with('0'));
    if plain { number.parse().ok() } else { None }
}

/// The body as what it must be; serde's message names the field.
fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Response> {
    if body.is_empty() {
        return Err(Response::error(400, "the request has no body: send a JSON object"));
    }
    // Serde takes an array for an object whose fields are in order; nobody else does.
    if body.iter().find(|b| !b.is_ascii_whitespace()) != Some(&b'{') {
        return Err(Response::error(400, "the body is not a JSON object"));
    }
    serde_json::from_slice(body).map_err(|error| Response::error(400, &format!("the body: {error}")))
}

fn nothing(body: &[u8], request: Request) -> Result<Request, Response> {
    if !body.is_empty() {
        json::<NothingBody>(body)?;
    }
    Ok(request)
}

fn shutdown(body: &[u8]) -> Result<Request, Response> {
    let body: ShutdownBody = if body.is_empty() { ShutdownBody::default() } else { json(body)? };
    if body.timeout_ms > MAX_SHUTDOWN_PATIENCE_MS {
        let message = format!("timeout_ms {}: choose {MAX_SHUTDOWN_PATIENCE_MS} or less", body.timeout_ms);
        return Err(Response::error(400, &message));
    }
    Ok(Request::Shutdown { force: body.force, timeout: Duration::from_millis(body.timeout_ms) })
}

fn snapshot(body: &[u8]) -> Result<Request, Response> {
    let SnapshotBody { directory, diff } = json(body)?;
    if !directory.is_absolute() || directory.as_os_str().as_encoded_bytes().contains(&0) {
        let message = format!("directory {directory:?}: give a path from / on");
        return Err(Response::error(400, &message));
    }
    Ok(Request::Snapshot(SnapshotRequest { directory, diff }))
}

fn attach(slot: usize, body: &[u8], files: Vec<OwnedFd>) -> Result<Request, Response> {
    let BackendBody { kind, read_only } = json(body)?;
    let given = files.len();
    let Ok([file]) = <[OwnedFd; 1]>::try_from(files) else {
        let message = format!("{given} file descriptors came with the request: send one, by SCM_RIGHTS");
        return Err(Response::error(400, &message));
    };
    let backend = match kind {
        BackendKind::Disk => AttachBackend::Disk { file: file.into(), read_only },
        BackendKind::Tap if read_only => {
            return Err(Response::error(400, "read_only: a TAP cannot be read-only"));
        }
        BackendKind::Tap => AttachBackend::Tap(file),
    };
    Ok(Request::Attach { slot, backend })
}

fn refused(refusal: &Refusal) -> Response {
    let message = refusal.to_string();
    match refusal {
        Refusal::State { now, .. } => Response::error_with(409, &message, &[("state", now.to_string())]),
        Refusal::Invalid(_) => Response::error(400, &message),
        Refusal::Failed(_) => Response::error(500, &message),
        Refusal::Gone => Response::error(410, &message),
    }
}

fn respond(reply: &Reply, accept: Option<&str>) -> Result<Response, Response> {
    match reply {
        Reply::Done => Ok(Response::empty()),
        Reply::Description(description) => to_json(description),
        Reply::Snapshot(report) => to_json(report),
        Reply::Metrics(metrics) if wants_text(accept) => {
            Ok(Response::content(prometheus::CONTENT_TYPE, prometheus::text(metrics).into()))
        }
        Reply::Metrics(metrics) => to_json(metrics),
    }
}

/// Prometheus asks for `text/plain` among others, and not for JSON.
fn wants_text(accept: Option<&str>) -> bool {
    accept.is_some_and(|accept| accept.contains("text/plain") && !accept.contains(JSON))
}

fn to_json(value: &impl Serialize) -> Result<Response, Response> {
    match serde_json::to_vec(value) {
        Ok(body) => Ok(Response::content(JSON, body)),
        // A path that is not UTF-8 has no JSON.
        Err(error) => Err(Response::error(500, &format!("the answer cannot be written as JSON: {error}"))),
    }
}

#[cfg(test)]
#[path = "routes_tests.rs"]
mod tests;
