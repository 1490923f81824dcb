//! Every question and every refusal, with a machine that only pretends.

use std::fs::File;
use std::os::fd::AsRawFd;

use super::*;
use crate::api::tests::Fake;
use crate::control::{Metrics, State};

fn incoming(method: &str, path: &str, body: &str) -> Incoming {
    let head = Head {
        method: method.into(),
        path: path.into(),
        content_type: Some("application/json".into()),
        accept: None,
        len: 0,
        content_length: body.len(),
        keep_alive: true,
        expects_continue: false,
    };
    Incoming { head, body: body.into(), files: Vec::new() }
}

fn null() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

fn ask(fake: &Fake, method: &str, path: &str, body: &str) -> (u16, String) {
    let response = answer(incoming(method, path, body), fake);
    (response.status, String::from_utf8(response.body).unwrap())
}

#[test]
fn every_question_reaches_the_machine() {
    let table = [
        ("GET", "/v1/vm", "", "Describe"),
        ("PUT", "/v1/vm/start", "", "Start"),
        ("PUT", "/v1/vm/start", "{}", "Start"),
        ("PUT", "/v1/vm/pause", "", "Pause"),
        ("PUT", "/v1/vm/resume", " {\n} ", "Resume"),
        ("PUT", "/v1/vm/shutdown", "", "Shutdown { force: false, timeout: 10s }"),
        ("PUT", "/v1/vm/shutdown", "{\"force\":true}", "Shutdown { force: true, timeout: 10s }"),
        ("PUT", "/v1/vm/shutdown", "{\"timeout_ms\":600000}", "Shutdown { force: false, timeout: 600s }"),
        (
            "PUT",
            "/v1/vm/snapshot",
            "{\"directory\":\"/a\",\"diff\":true}",
            "Snapshot(SnapshotRequest { directory: \"/a\", diff: true })",
        ),
        ("GET", "/v1/metrics", "", "Metrics"),
    ];
    for (method, path, body, expected) in table {
        let fake = Fake::new(Ok(Reply::Done));
        let (status, said) = ask(&fake, method, path, body);
        assert_eq!((status, said.as_str()), (204, ""), "{method} {path}");
        assert_eq!(fake.asked(), [expected]);
    }
}

#[test]
fn what_is_wrong_is_said_and_never_reaches_the_machine() {
    let table = [
        (404, "GET", "/", "", "there is no / here"),
        (404, "GET", "/v1/vm/", "", "no /v1/vm/"),
        (404, "GET", "/v2/vm", "", "no /v2/vm"),
        (404, "PUT", "/v1/devices//backend", "", "no /v1/devices//backend"),
        (404, "PUT", "/v1/devices/x/backend", "", "no "),
        (404, "PUT", "/v1/devices/-1/backend", "", "no "),
        (404, "PUT", "/v1/devices/01/backend", "", "no "),
        (404, "PUT", "/v1/devices/1/2/backend", "", "no "),
        (404, "PUT", "/v1/devices/99999999999999999999/backend", "", "no "),
        (405, "POST", "/v1/vm", "", "/v1/vm takes GET, not POST"),
        (405, "HEAD", "/v1/vm", "", "takes GET"),
        (405, "get", "/v1/vm", "", "takes GET"),
        (405, "GET", "/v1/vm/pause?x=1", "", "/v1/vm/pause takes PUT, not GET"),
        (405, "DELETE", "/v1/devices/0/backend", "", "takes PUT"),
        (400, "GET", "/v1/vm?x=1", "", "takes no query"),
        (400, "GET", "/v1/vm", "{}", "takes no body"),
        (400, "PUT", "/v1/vm/start", "{\"now\":1}", "unknown field `now`"),
        (400, "PUT", "/v1/vm/start", "[]", "not a JSON object"),
        (400, "PUT", "/v1/vm/pause", "{", "EOF while parsing"),
        (400, "PUT", "/v1/vm/pause", "{} x", "trailing characters"),
        (400, "PUT", "/v1/vm/shutdown", "{\"force\":1}", "invalid type: integer `1`, expected a boolean"),
        (400, "PUT", "/v1/vm/shutdown", "{\"timeout\":1}", "unknown field `timeout`"),
        (400, "PUT", "/v1/vm/shutdown", "{\"timeout_ms\":600001}", "choose 600000 or less"),
        (400, "PUT", "/v1/vm/shutdown", "{\"timeout_ms\":-1}", "invalid value: integer `-1`"),
        (400, "PUT", "/v1/vm/shutdown", "{\"force\":true,\"force\":true}", "duplicate field `force`"),
        (400, "PUT", "/v1/vm/snapshot", "", "no body"),
        (400, "PUT", "/v1/vm/snapshot", "{}", "missing field `directory`"),
        (400, "PUT", "/v1/vm/snapshot", "{\"directory\":\"a\"}", "directory \"a\": give a path from / on"),
        (400, "PUT", "/v1/vm/snapshot", "{\"directory\":\"/a\\u0000\"}", "give a path"),
        (400, "PUT", "/v1/vm/snapshot", &"[".repeat(60_000), "not a JSON object"),
        (
            400,
            "PUT",
            "/v1/vm/snapshot",
            &format!("{{\"directory\":{}", "[".repeat(60_000)),
            "expected path string",
        ),
        (400, "PUT", "/v1/vm/start", &format!("{{\"a\":{}", "[".repeat(60_000)), "unknown field `a`"),
        (400, "PUT", "/v1/devices/0/backend", "{\"kind\":\"disk\"}", "0 file descriptors came"),
        (400, "PUT", "/v1/devices/0/backend", "{\"kind\":\"floppy\"}", "unknown variant `floppy`"),
    ];
    for (status, method, path, body, expected) in table {
        let fake = Fake::new(Ok(Reply::Done));
        let (got, said) = ask(&fake, method, path, body);
        let shown = &body[..body.len().min(40)];
        let said =
            serde_json::from_str::<serde_json::Value>(&said).unwrap()["error"].as_str().unwrap().to_string();
        assert_eq!(got, status, "{method} {path} {shown}: {said}");
        assert!(said.contains(expected), "{method} {path} {shown}: {said}");
        assert_eq!(fake.asked(), [""; 0]);
    }
}

#[test]
fn a_wrong_method_hears_of_the_right_one() {
    let response = answer(incoming("PATCH", "/v1/metrics", ""), &Fake::new(Ok(Reply::Done)));
    assert_eq!((response.status, response.allow.as_deref()), (405, Some("GET")));
}

#[test]
fn a_body_is_json() {
    for (given, status) in [(Some("application/json"), 204), (Some("text/plain"), 415), (None, 415)] {
        let mut incoming = incoming("PUT", "/v1/vm/start", "{}");
        incoming.head.content_type = given.map(Into::into);
        assert_eq!(answer(incoming, &Fake::new(Ok(Reply::Done))).status, status);
    }
    let mut incoming = incoming("PUT", "/v1/vm/start", "");
    incoming.head.content_type = None;
    assert_eq!(answer(incoming, &Fake::new(Ok(Reply::Done))).status, 204, "no body has no type");
}

#[test]
fn file_descriptors_go_where_they_belong() {
    let table = [
        ("{\"kind\":\"disk\",\"read_only\":true}", 1, 204, "Attach { slot: 3, backend: Disk"),
        ("{\"kind\":\"tap\"}", 1, 204, "Attach { slot: 3, backend: Tap"),
        ("{\"kind\":\"tap\",\"read_only\":true}", 1, 400, ""),
        ("{\"kind\":\"disk\"}", 2, 400, ""),
        ("{\"kind\":\"disk\"}", 0, 400, ""),
    ];
    for (body, files, status, expected) in table {
        let fake = Fake::new(Ok(Reply::Done));
        let mut incoming = incoming("PUT", "/v1/devices/3/backend", body);
        incoming.files = (0..files).map(|_| null()).collect();
        assert_eq!(answer(incoming, &fake).status, status, "{body}");
        assert!(fake.asked().first().is_none_or(|asked| asked.starts_with(expected)));
        assert_eq!(fake.asked().len(), usize::from(status == 204));
    }
    let fake = Fake::new(Ok(Reply::Done));
    let mut incoming = incoming("PUT", "/v1/vm/pause", "");
    let file = null();
    assert!(file.as_raw_fd() >= 0);
    incoming.files = vec![file];
    assert_eq!(answer(incoming, &fake).status, 400);
    assert_eq!(fake.asked(), [""; 0]);
}

#[test]
fn refusals_have_their_codes() {
    let state = Refusal::State { now: State::Paused, wanted: "running" };
    let table = [
        (state, 409, r#"{"error":"the machine is paused: for this it must be running","state":"paused"}"#),
        (Refusal::Invalid("no slot 9".into()), 400, r#"{"error":"no slot 9"}"#),
        (Refusal::Failed("the disk\nis full".into()), 500, r#"{"error":"the disk is full"}"#),
        (Refusal::Gone, 410, r#"{"error":"the machine is gone"}"#),
    ];
    for (refusal, status, body) in table {
        let fake = Fake::new(Err(refusal));
        assert_eq!(ask(&fake, "PUT", "/v1/vm/pause", ""), (status, body.into()));
    }
}

#[test]
fn metrics_come_as_they_are_wanted() {
    let table = [
        (None, JSON),
        (Some("*/*"), JSON),
        (Some("application/json, text/plain"), JSON),
        (Some("text/plain"), prometheus::CONTENT_TYPE),
        (
            Some("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"),
            prometheus::CONTENT_TYPE,
        ),
    ];
    for (accept, expected) in table {
        let mut incoming = incoming("GET", "/v1/metrics", "");
        incoming.head.accept = accept.map(Into::into);
        let response = answer(incoming, &Fake::new(Ok(Reply::Metrics(Metrics::default()))));
        assert_eq!((response.status, response.content_type), (200, expected));
    }
}
