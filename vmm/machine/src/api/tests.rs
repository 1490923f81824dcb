//! Real sockets, real clients, and those that are neither: a machine that only pretends stands behind them.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Instant;

use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;

use super::client::{Answer, ClientError, Question};
use super::*;
use crate::control::{AttachBackend, Refusal, Reply, Request};

/// A machine that remembers what it was asked, and answers what it was told to.
pub(super) struct Fake {
    answers: Mutex<VecDeque<Result<Reply, Refusal>>>,
    asked: Mutex<Vec<String>>,
    /// The inode behind the last file that came.
    attached: Mutex<Option<u64>>,
    /// Held while it thinks.
    busy: Mutex<()>,
}

impl Fake {
    pub fn new(answer: Result<Reply, Refusal>) -> Self {
        Fake {
            answers: Mutex::new([answer].into()),
            asked: Mutex::default(),
            attached: Mutex::default(),
            busy: Mutex::default(),
        }
    }

    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

impl Control for Fake {
    fn ask(&self, request: Request) -> Result<Reply, Refusal> {
        self.asked.lock().unwrap().push(format!("{request:?}"));
        if matches!(request, Request::Pause) {
            drop(self.busy.lock().unwrap());
        }
        if let Request::Attach { backend: AttachBackend::Disk { file, .. }, .. } = request {
            let flags = rustix::io::fcntl_getfd(&file).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
            *self.attached.lock().unwrap() = Some(rustix::fs::fstat(&file).unwrap().st_ino);
        }
        self.answers.lock().unwrap().pop_front().unwrap_or(Ok(Reply::Done))
    }
}

struct Served {
    fake: Arc<Fake>,
    server: Option<Server>,
    path: PathBuf,
    _dir: TempDir,
}

/// Short enough for a test, long enough for a busy machine.
fn limits() -> Limits {
    Limits { read: Duration::from_millis(400), write: Duration::from_millis(400), ..Limits::default() }
}

fn serve(limits: Limits) -> Served {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    let fake = Arc::new(Fake::new(Ok(Reply::Done)));
    let socket = ListeningSocket::bind(&path).unwrap();
    let server = Some(Server::start(socket, fake.clone(), limits).unwrap());
    Served { fake, server, path, _dir: dir }
}

impl Served {
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    fn ask(&self, question: Question<'_>) -> Answer {
        question.ask(&self.path).unwrap()
    }

    /// Others are served.
    fn is_well(&self) {
        assert_eq!(self.ask(Question::new("PUT", "/v1/vm/start")).status, 204);
    }

    /// No connection is left; then a test may count what there is.
    fn settle(&self) {
        let open = self.server.as_ref().unwrap().open.clone();
        open.wait_for_none(Duration::from_secs(20));
        assert_eq!(*open.lock(), 0);
    }
}

/// All that comes until the connection ends.
fn rest(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    String::from_utf8(bytes).unwrap()
}

/// One answer, byte by byte: what follows stays in the socket.
fn one(stream: &mut UnixStream) -> String {
    let mut text = Vec::new();
    let mut byte = [0];
    while !text.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
        text.push(byte[0]);
    }
    let head = String::from_utf8(text).unwrap();
    let length =
        head.split("Content-Length: ").nth(1).map_or(0, |t| t.split('\r').next().unwrap().parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    head + &String::from_utf8(body).unwrap()
}

const START: &str = "PUT /v1/vm/start HTTP/1.1\r\nHost: x\r\n\r\n";

#[test]
fn one_connection_carries_many_requests_in_order() {
    let served = serve(Limits::default());
    let mut stream = served.connect();
    for _ in 0..3 {
        stream.write_all(START.as_bytes()).unwrap();
        assert_eq!(one(&mut stream), "HTTP/1.1 204 No Content\r\n\r\n");
    }
    // Some at once, one of them wrong, and the last one says that it is.
    let last = "GET /v1/openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let wrong = "PUT /v1/vm/stop HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";
    stream.write_all(format!("{START}{wrong}{START}{last}").as_bytes()).unwrap();
    let said = [one(&mut stream), one(&mut stream), one(&mut stream), rest(&mut stream)];
    assert!(said[0].starts_with("HTTP/1.1 204") && said[2].starts_with("HTTP/1.1 204"));
    assert!(said[1].starts_with("HTTP/1.1 404") && said[3].starts_with("HTTP/1.1 200"));
    assert!(said[3].contains("\r\nConnection: close\r\n") && said[3].ends_with(routes::OPENAPI));
    assert_eq!(served.fake.asked().len(), 5);
}

#[test]
fn a_request_may_come_in_any_two_pieces() {
    let served = serve(Limits::default());
    let body = "{\"directory\":\"/tmp/x\"}";
    let text = format!(
        "PUT /v1/vm/snapshot HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut stream = served.connect();
    for cut in 1..text.len() {
        stream.write_all(&text.as_bytes()[..cut]).unwrap();
        std::thread::yield_now();
        stream.write_all(&text.as_bytes()[cut..]).unwrap();
        assert!(one(&mut stream).starts_with("HTTP/1.1 204"), "cut at {cut}");
    }
    assert_eq!(served.fake.asked().len(), text.len() - 1);
}

#[test]
fn a_client_that_waits_for_a_word_gets_it() {
    let served = serve(limits());
    let mut stream = served.connect();
    let head =
        "PUT /v1/vm/start HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n";
    stream.write_all(format!("{head}Content-Length: 2\r\n\r\n").as_bytes()).unwrap();
    assert_eq!(one(&mut stream), "HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"{}").unwrap();
    assert!(one(&mut stream).starts_with("HTTP/1.1 204"));
    stream.write_all(format!("{head}Content-Length: 70000\r\n\r\n").as_bytes()).unwrap();
    assert!(rest(&mut stream).starts_with("HTTP/1.1 413"));
}

#[test]
fn what_is_too_large_is_refused_and_the_answer_arrives() {
    let served = serve(limits());
    for (request, status) in [
        (
            format!(
                "PUT /v1/vm/start HTTP/1.1\r\nHost: x\r\nContent-Length: 65537\r\n\r\n{}",
                "x".repeat(65537)
            ),
            413,
        ),
        (format!("GET /v1/vm HTTP/1.1\r\nHost: x\r\nA: {}\r\n\r\n", "x".repeat(1 << 17)), 431),
        ("\0".repeat(1 << 18), 400),
    ] {
        let mut stream = served.connect();
        // The server may have stopped listening before all is written.
        let _ = stream.write_all(request.as_bytes());
        let said = rest(&mut stream);
        assert!(said.starts_with(&format!("HTTP/1.1 {status}")), "{said}");
        served.is_well();
    }
    // The largest body that is taken.
    let body = format!("{{{}}}", " ".repeat((64 << 10) - 2));
    let head = "PUT /v1/vm/start HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n";
    let mut stream = served.connect();
    stream.write_all(format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).as_bytes()).unwrap();
    assert!(one(&mut stream).starts_with("HTTP/1.1 204"));
}

#[test]
fn slow_and_silent_clients_are_let_go_and_disturb_nobody() {
    let served = serve(limits());
    let begin = Instant::now();
    let mut silent = served.connect();
    let mut half = served.connect();
    half.write_all(b"PUT /v1/vm/start HTTP/1.1\r\nContent-").unwrap();
    let mut dripping = served.connect();
    let drip = std::thread::spawn(move || {
        for byte in START.bytes().cycle().filter(|b| !b"\r\n".contains(b)) {
            std::thread::sleep(Duration::from_millis(20));
            if dripping.write_all(&[byte]).is_err() {
                break;
            }
        }
        rest(&mut dripping)
    });
    served.is_well();
    assert_eq!(rest(&mut silent), "", "who says nothing hears nothing");
    assert!(rest(&mut half).starts_with("HTTP/1.1 408"));
    assert!(drip.join().unwrap().starts_with("HTTP/1.1 408"));
    assert!(begin.elapsed() >= limits().read);
    served.is_well();
    served.settle();
}

#[test]
fn a_client_that_does_not_read_is_let_go() {
    let served = serve(limits());
    let mut stream = served.connect();
    let request = "GET /v1/openapi.json HTTP/1.1\r\nHost: x\r\n\r\n";
    stream.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
    for _ in 0..200 {
        if stream.write_all(request.as_bytes()).is_err() {
            break;
        }
    }
    served.is_well();
    served.settle();
}

#[test]
fn half_closed_and_vanished_clients() {
    let served = serve(limits());
    let mut stream = served.connect();
    stream.write_all(START.as_bytes()).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(rest(&mut stream).starts_with("HTTP/1.1 204"), "it still reads");
    for cut in [0, 1, 20, START.len()] {
        let mut stream = served.connect();
        stream.write_all(&START.as_bytes()[..cut]).unwrap();
        drop(stream);
    }
    served.is_well();
    served.settle();
}

#[test]
fn there_are_so_many_connections_and_no_more() {
    let served = serve(Limits { connections: 2, ..Limits::default() });
    let mut first = served.connect();
    first.write_all(START.as_bytes()).unwrap();
    one(&mut first);
    let mut second = served.connect();
    second.write_all(START.as_bytes()).unwrap();
    one(&mut second);
    let said = rest(&mut served.connect());
    assert!(said.starts_with("HTTP/1.1 503") && said.contains("2 clients are connected"), "{said}");
    assert_eq!(served.ask(Question::new("GET", "/v1/vm")).status, 503, "our own client hears it too");
    drop(first);
    let again = Instant::now();
    while served.ask(Question::new("PUT", "/v1/vm/start")).status != 204 {
        assert!(again.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_machine_that_thinks_holds_up_nobody_else() {
    let served = serve(limits());
    let thinking = served.fake.busy.lock().unwrap();
    let mut waiting = served.connect();
    waiting.write_all(START.replace("start", "pause").as_bytes()).unwrap();
    served.is_well();
    std::thread::sleep(limits().read);
    served.is_well();
    drop(thinking);
    assert!(one(&mut waiting).starts_with("HTTP/1.1 204"), "it took as long as it took");
}

#[test]
fn the_end_lets_answers_out_and_leaves_nothing() {
    let mut served = serve(Limits::default());
    let mut idle = served.connect();
    let mut asking = served.connect();
    let thinking = served.fake.busy.lock().unwrap();
    asking.write_all(START.replace("start", "pause").as_bytes()).unwrap();
    while served.fake.asked().is_empty() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let server = served.server.take().unwrap();
    let ending = std::thread::spawn(move || drop(server));
    assert_eq!(rest(&mut idle), "");
    drop(thinking);
    assert!(one(&mut asking).starts_with("HTTP/1.1 204"));
    ending.join().unwrap();
    assert!(!served.path.exists());
    let error = Question::new("GET", "/v1/vm").ask(&served.path).unwrap_err();
    assert!(matches!(error, ClientError::Absent { .. }), "{error}");
}

/// Open file descriptors of this process that lie in `dir`.
fn open_in(dir: &std::path::Path) -> usize {
    let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    links.filter(|link| std::fs::read_link(link.path()).is_ok_and(|to| to.starts_with(dir))).count()
}

#[test]
fn file_descriptors_arrive_and_none_is_left() {
    let served = serve(limits());
    let dir = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(dir.path().join("disk")).unwrap();
    let inode = rustix::fs::fstat(&file).unwrap().st_ino;
    let body = json!({ "kind": "disk" });
    let ask = |path, count: usize| {
        let files = vec![file.as_fd(); count];
        served.ask(Question { body: Some(&body), files: &files, ..Question::new("PUT", path) })
    };
    let attach = "/v1/devices/2/backend";
    assert_eq!(ask(attach, 1).status, 204);
    assert_eq!(*served.fake.attached.lock().unwrap(), Some(inode));
    for (path, count, said) in [
        (attach, 2, "2 file descriptors came"),
        (attach, 0, "0 file descriptors came"),
        (attach, 4, "4 file descriptors came"),
        ("/v1/vm/pause", 1, "takes none"),
        ("/nowhere", 3, "there is no"),
    ] {
        let answer = ask(path, count);
        assert!((400..=404).contains(&answer.status));
        assert!(answer.content().unwrap_err().contains(said));
    }
    // More than a request may have, at once and one by one; and a client that goes away with a request begun.
    for batches in [vec![9], vec![3, 3], vec![1]] {
        let stream = served.connect();
        for count in batches {
            send_files(&stream, b"PUT /v1/vm/start HTTP/1.1\r\n", &vec![file.as_fd(); count]);
            std::thread::sleep(Duration::from_millis(20));
        }
        drop(stream);
    }
    served.settle();
    assert_eq!(open_in(dir.path()), 1, "only our own is left");
    assert!(file.as_raw_fd() > 2);
}

fn send_files(stream: &UnixStream, bytes: &[u8], files: &[std::os::fd::BorrowedFd<'_>]) {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(9))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(files)));
    let bytes = [std::io::IoSlice::new(bytes)];
    let _ = rustix::net::sendmsg(stream, &bytes, &mut control, rustix::net::SendFlags::NOSIGNAL);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_bytes_do_harm(
        bytes in proptest::collection::vec(any::<u8>(), 0..3000),
        begun in any::<bool>(),
        cut in 0_usize..3000,
    ) {
        let served = serve(Limits { read: Duration::from_millis(30), ..limits() });
        let mut stream = served.connect();
        if begun {
            stream.write_all(b"PUT /v1/vm/shutdown HTTP/1.1\r\nHost: x\r\n").unwrap();
        }
        let (first, second) = bytes.split_at(cut.min(bytes.len()));
        let _ = stream.write_all(first);
        let _ = stream.write_all(second);
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut said = Vec::new();
        let _ = stream.read_to_end(&mut said);
        prop_assert!(said.is_empty() || said.starts_with(b"HTTP/1.1 "));
        served.is_well();
    }
}
