//! Heads by table, and bytes by the thousand.

use proptest::prelude::*;

use super::*;

fn limits() -> Limits {
    Limits { head: 512, body: 100, ..Limits::default() }
}

fn head(text: &str) -> Head {
    parse(text.as_bytes(), &limits()).unwrap().unwrap()
}

#[test]
fn a_head_says_what_matters() {
    let text = "PUT /v1/vm/pause HTTP/1.1\r\nHost: x\r\nContent-Type: Application/JSON; charset=utf-8\r\n\
                Content-Length: 7\r\nExpect: 100-Continue\r\nAccept: */*\r\nX-Other: y\r\n\r\n{...";
    let expected = Head {
        method: "PUT".into(),
        path: "/v1/vm/pause".into(),
        content_type: Some("application/json".into()),
        accept: Some("*/*".into()),
        len: text.len() - 4,
        content_length: 7,
        keep_alive: true,
        expects_continue: true,
    };
    assert_eq!(head(text), expected);
    for cut in 0..text.len() - 4 {
        assert_eq!(parse(&text.as_bytes()[..cut], &limits()), Ok(None), "cut at {cut}");
    }
}

#[test]
fn connections_are_kept_as_versions_say() {
    let keeps = |version: &str, headers: &str| {
        head(&format!("GET / HTTP/{version}\r\nHost: x\r\n{headers}\r\n")).keep_alive
    };
    assert!(keeps("1.1", "") && keeps("1.1", "Connection: keep-alive\r\n"));
    assert!(!keeps("1.1", "Connection: close\r\n") && !keeps("1.1", "Connection: foo, Close\r\n"));
    assert!(!keeps("1.0", "") && keeps("1.0", "Connection: Keep-Alive\r\n"));
}

#[test]
fn absolute_targets_lose_their_authority() {
    let path = |target: &str| head(&format!("GET {target} HTTP/1.1\r\nHost: x\r\n\r\n")).path;
    assert_eq!(path("http://vmm/v1/vm"), "/v1/vm");
    assert_eq!(path("http://vmm"), "/");
    assert_eq!(path("/v1/vm?x"), "/v1/vm?x");
}

#[test]
fn what_cannot_be_understood_ends_the_connection() {
    let put = |headers: &str| format!("PUT / HTTP/1.1\r\nHost: x\r\n{headers}\r\n");
    let table = [
        (400, "\0\0\0\0".to_string()),
        (400, "GET\r\n\r\n".into()),
        (400, "GET  / HTTP/1.1\r\n\r\n".into()),
        (400, "GET / HTTP/1.1\r\n\r\n".into()),
        (400, put("Host: y\r\n")),
        (400, put("Name\r\n")),
        (400, put(" folded: x\r\n")),
        (400, put("Content-Length: -1\r\n")),
        (400, put("Content-Length: +1\r\n")),
        (400, put("Content-Length: 0x1\r\n")),
        (400, put("Content-Length: 1, 1\r\n")),
        (400, put("Content-Length:\r\n")),
        (400, put("Content-Length: 1\r\nContent-Length: 1\r\n")),
        (411, put("Transfer-Encoding: chunked\r\n")),
        (411, put("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n")),
        (413, put("Content-Length: 101\r\n")),
        (413, put("Content-Length: 99999999999999999999999999\r\n")),
        (417, put("Expect: the-unexpected\r\n")),
        (431, put(&"A: b\r\n".repeat(65))),
        (431, put(&format!("A: {}\r\n", "b".repeat(600)))),
        (431, format!("GET /{}", "x".repeat(600))),
        (431, "\r\n".repeat(300)),
        (505, "GET / HTTP/2.0\r\n\r\n".into()),
        (505, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into()),
    ];
    for (status, text) in table {
        let refused = parse(text.as_bytes(), &limits()).unwrap_err();
        assert_eq!((refused.status, refused.close), (status, true), "{text:?}: {refused:?}");
        assert_ne!(reason(status), "Unknown");
    }
}

#[test]
fn limits_are_the_last_thing_allowed() {
    let with = |padding: usize| format!("GET / HTTP/1.1\r\nHost: x\r\nA: {}\r\n\r\n", "b".repeat(padding));
    let exact = 512 - with(0).len();
    assert_eq!(head(&with(exact)).len, 512);
    assert_eq!(parse(with(exact + 1).as_bytes(), &limits()).unwrap_err().status, 431);
    // A body behind a head of the right size is no part of it.
    assert_eq!(head(&(with(exact) + &"z".repeat(600))).len, 512);
    assert_eq!(head("PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n").content_length, 100);
}

#[test]
fn answers_are_http() {
    let text = |response: Response, method: &str| String::from_utf8(response.encode(method)).unwrap();
    assert_eq!(text(Response::empty(), "PUT"), "HTTP/1.1 204 No Content\r\n\r\n");
    let json = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n";
    assert_eq!(text(Response::content(JSON, b"{}".into()), "GET"), format!("{json}{{}}"));
    assert_eq!(text(Response::content(JSON, b"{}".into()), "HEAD"), json);
    let error = Response::error_with(409, "a \"b\"\r\nc", &[("state", "paused".into())]).and_close();
    let said = text(error, "PUT");
    assert!(
        said.ends_with("Connection: close\r\n\r\n{\"error\":\"a \\\"b\\\"  c\",\"state\":\"paused\"}"),
        "{said}"
    );
    let allowed = Response { allow: Some("GET, PUT".into()), ..Response::error(405, "x") };
    assert!(text(allowed, "POST").contains("\r\nAllow: GET, PUT\r\n"));
}

proptest! {
    #[test]
    fn any_bytes_get_an_answer_or_wait_for_more(bytes in proptest::collection::vec(any::<u8>(), 0..1500)) {
        if let Err(refused) = parse(&bytes, &limits()) {
            prop_assert!(refused.close && (400..=505).contains(&refused.status));
        } else if bytes.len() >= 512 {
            prop_assert!(parse(&bytes, &limits()).unwrap().is_some());
        }
    }

    /// Nearly right requests get further than random ones.
    #[test]
    fn nearly_right_requests_are_bounded(
        lines in proptest::collection::vec("(Host|Content-Length|Expect|Transfer-Encoding|Connection|[a-zA-Z-]{1,9}): ?[ -~]{0,20}", 0..8),
        flips in proptest::collection::vec((0_usize..200, any::<u8>()), 0..3),
    ) {
        let mut bytes = format!("PUT /v1/vm HTTP/1.1\r\nHost: x\r\n{}\r\n\r\n", lines.join("\r\n")).into_bytes();
        for (at, value) in flips {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        if let Ok(Some(head)) = parse(&bytes, &limits()) {
            prop_assert!(head.len <= bytes.len() && head.len <= 512 && head.content_length <= 100);
        }
    }
}
