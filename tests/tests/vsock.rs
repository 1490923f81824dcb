//! `--vsock PATH`: connections between processes of the host and of the guest.

#![allow(clippy::unwrap_used, reason = "tests may")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use prober::Pattern;
use tests::{Vmm, require_kvm};

const BYTES: usize = 1 << 20;

/// The host connects into the guest, which sends back what comes; then the guest connects to the host.
#[test]
fn both_ways() {
    require_kvm!();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vsock");
    let listener = UnixListener::bind(directory.path().join("vsock_7000")).unwrap();
    let running = Vmm::prober()
        .arg("--vsock")
        .arg(&path)
        .arg("-i")
        .shell(&format!(
            "prober vsock-serve 6000; read line; prober vsock-send 7000 {BYTES}; prober vsock-send 7001 1"
        ))
        .start();
    running.wait_for("listening: 6000");

    // Nobody listens there.
    let mut nobody = UnixStream::connect(&path).unwrap();
    nobody.write_all(b"CONNECT 6001\n").unwrap();
    let mut answer = String::new();
    let _ = nobody.read_to_string(&mut answer);
    assert_eq!(answer, "", "closed without a word");
    // Nor is this a request.
    let mut rude = UnixStream::connect(&path).unwrap();
    rude.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let _ = rude.read_to_string(&mut answer);
    assert_eq!(answer, "");

    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"CONNECT 6000\n").unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(line.starts_with("OK "), "{line:?}");
    let pattern = Pattern::bytes(BYTES);
    let echoed = thread::spawn(move || {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).map(|_| bytes)
    });
    stream.write_all(&pattern).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert!(echoed.join().unwrap().unwrap() == pattern, "other bytes came back");
    running.wait_for(&format!("served: {BYTES}"));

    let mut running = running;
    running.write(b"go on\n");
    let (mut connection, _) = listener.accept().unwrap();
    let mut bytes = Vec::new();
    connection.read_to_end(&mut bytes).unwrap();
    assert!(bytes == pattern, "the guest sent other bytes");
    connection.write_all(b"thank you").unwrap();
    drop(connection);
    // The last one finds no socket on the host.
    let ended = running.wait().expect(1);
    assert_eq!(ended.field("answer"), "thank you");
    assert!(ended.err().contains("prober: "), "{}", ended.transcript());
    assert!(!path.exists(), "the socket is gone");
}
