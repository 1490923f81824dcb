//! Clients of the control API that mean harm, while the container behind it goes on.

#![allow(clippy::unwrap_used, reason = "tests may")]

use std::fs;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::Signal;
use tests::{Vmm, require_kvm};

const COUNT: &str = "trap 'exit 3' TERM; i=0; while :; do echo n$i; i=$((i+1)); sleep 0.1; done";

fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
    stream
}

/// Descriptors that the process has open.
fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

fn describe(socket: &Path) -> bool {
    Vmm::new().arg("ctl").arg(socket).run().code() == 0
}

#[test]
fn clients_that_mean_harm_disturb_nobody() {
    require_kvm!();
    let home = tempfile::tempdir().unwrap();
    let socket = home.path().join("api");
    let running = Vmm::container().arg("--api-socket").arg(&socket).shell(COUNT).start();
    running.wait_for("n2");
    assert!(describe(&socket));
    let before = descriptors(running.pid());
    let counted = running.so_far().matches('n').count();

    // Noise, whole and cut off, some of it behind the beginning of a request.
    let mut word = 0x2545_f491_4f6c_dd1d_u64;
    for round in 0..150 {
        let mut stream = connect(&socket);
        if round % 3 == 0 {
            let _ = stream.write_all(b"GET /v1/vm HTTP/1.1\r\nHost: x\r\n");
        }
        let noise: Vec<u8> = (0..round * 40)
            .map(|_| {
                word ^= word << 13;
                word ^= word >> 7;
                word ^= word << 17;
                word.to_le_bytes()[0]
            })
            .collect();
        let _ = stream.write_all(&noise);
        if round % 2 == 0 {
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 "), "{answer:?}");
        }
    }
    // Headers without end.
    let mut huge = connect(&socket);
    let _ = huge.write_all(b"GET /v1/vm HTTP/1.1\r\nHost: x\r\n");
    for _ in 0..4000 {
        if huge.write_all(b"A-Header: with a value that is of no use to anybody at all\r\n").is_err() {
            break;
        }
    }
    let mut answer = Vec::new();
    let _ = huge.read_to_end(&mut answer);
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"), "{}", String::from_utf8_lossy(&answer));
    drop(huge);
    // A flood of descriptors, with requests that take none.
    let null = fs::File::open("/dev/null").unwrap();
    for _ in 0..40 {
        let stream = connect(&socket);
        for _ in 0..4 {
            send_files(&stream, b"GET /v1/vm HTTP/1.1\r\nHost: x\r\nX: ", &null);
        }
    }
    // Many who say nothing or little, more than are let in; one byte now and then.
    let mut idle: Vec<_> = (0..100)
        .filter_map(|number| {
            let mut stream = UnixStream::connect(&socket).ok()?;
            if number % 2 == 0 {
                let _ = stream.write_all(b"GET /v1/");
            }
            Some(stream)
        })
        .collect();
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(50));
        idle.iter_mut().for_each(|stream| drop(stream.write_all(b"x")));
    }
    drop(idle);

    // The container counts on, and who asks politely is answered.
    running.wait_for_count("n", counted + 10);
    let begin = Instant::now();
    while !describe(&socket) || descriptors(running.pid()) > before {
        assert!(begin.elapsed() < Duration::from_secs(60), "{} of {before}", descriptors(running.pid()));
        std::thread::sleep(Duration::from_millis(200));
    }
    running.signal(Signal::TERM);
    let ended = running.wait().expect(3);
    assert!(!ended.err().contains("panicked"), "{}", ended.transcript());
}

fn send_files(stream: &UnixStream, bytes: &[u8], file: &fs::File) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(9))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = [file.as_fd(); 9];
    assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
    let _ = sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
}
