//! Guests that break the rules, and guests that do nothing that makes sense.

use proptest::prelude::*;

use super::direct::Direct;
use super::*;
use crate::device_loop::Watch;
use crate::virtio::vsock::stream::Answer;
use crate::virtio::vsock::streams::Streams;

#[test]
fn a_listener_that_does_not_accept_is_full_some_time() {
    let (backend, listener) = listening(1);
    let mut guest = Guest::new(backend);
    let mut accepted = 0;
    loop {
        guest.send(header(Op::Request, 100 + accepted, 1, 0), &[]);
        match guest.receive().0.op {
            Op::Response => accepted += 1,
            Op::Reset => break,
            other => panic!("{other:?}"),
        }
        assert!(accepted < 1000);
    }
    let _hosts: Vec<_> = (0..accepted).map(|_| listener.accept().unwrap()).collect();
    guest.connect(99, 1);
}

#[test]
fn a_guest_breaks_the_rules_of_one_connection() {
    let (backend, listener) = listening(1);
    let mut guest = Guest::new(backend);
    // A second request; data after its end; data that is not there.
    for bad in 0..3 {
        guest.connect(2, 1);
        let mut host = listener.accept().unwrap();
        guest.send(header(Op::Data, 2, 1, 3), b"yes");
        match bad {
            0 => guest.send(header(Op::Request, 2, 1, 0), &[]),
            1 => {
                guest.send(closing(shutdown::SEND, 2, 1), &[]);
                guest.send(header(Op::Data, 2, 1, 2), b"no");
            }
            _ => guest.send(header(Op::Data, 2, 1, 100), b"no"),
        }
        guest.expect(Op::Reset);
        let mut data = Vec::new();
        host.read_to_end(&mut data).unwrap();
        assert_eq!(data, b"yes", "what was said before still arrives");
    }
    // More than there is credit for, to a host that does not read.
    guest.connect(2, 1);
    let _host = listener.accept().unwrap();
    let chunk = vec![0; TX_BUFFER];
    let mut sent = 0;
    while guest.poll().is_none_or(|(packet, _)| packet.op != Op::Reset) {
        guest.send(header(Op::Data, 2, 1, chunk.len()), &chunk);
        sent += chunk.len();
        assert!(sent < 64 << 20, "no end to what the device buffers");
    }
    assert!(!guest.interrupt.has_failed());
}

#[test]
fn malformed_chains_fail_the_device() {
    let (backend, _listener) = listening(1);
    let mut guest = Guest::new(backend);
    guest.send_raw(&[0; HEADER_SIZE - 1]);
    let start = Instant::now();
    while !guest.interrupt.has_failed() {
        assert!(start.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
    let mut guest = Guest::without_buffers(Backend::new());
    let at = guest.rx_buffers[0];
    guest.rx.descriptor(0, at, 44, WRITE, 0);
    guest.rx.publish(0);
    guest.send(header(Op::Data, 1, 1, 0), &[]);
    while !guest.interrupt.has_failed() {
        assert!(start.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
}

#[test]
fn replies_are_bounded_when_the_guest_takes_none() {
    let mut guest = Guest::without_buffers(Backend::new());
    // As many as the transmit queue and the replies hold; the device stops there, and goes on when it can.
    let count = 64 + 128;
    for port in 0..count {
        guest.send(header(Op::Data, port, 1, 0), &[]);
    }
    let mut posted = 0;
    for port in 0..count {
        if posted < SLOTS {
            guest.post(posted);
            posted += 1;
        }
        assert_eq!(guest.expect(Op::Reset).dst_port, port);
    }
}

#[test]
fn connections_are_counted() {
    let (backend, listener) = listening(1);
    let mut guest = Direct::new(backend);
    *guest.device.streams_mut() = Streams::new(CID.into(), 3);
    let (program, socket) = UnixStream::pair().unwrap();
    guest.device.streams_mut().greet(socket, Instant::now(), &mut Watch::default());
    for (port, expected) in [(1, Op::Response), (2, Op::Response), (3, Op::Reset)] {
        guest.send(&header(Op::Request, port, 1, 0).to_bytes()).unwrap();
        assert_eq!(guest.op(), Some(expected), "{port}");
    }
    for refused in [true, false] {
        let (mut asking, socket) = UnixStream::pair().unwrap();
        guest.device.streams_mut().greet(socket, Instant::now(), &mut Watch::default());
        let (other, socket) = UnixStream::pair().unwrap();
        guest.device.streams_mut().request(1, socket, Answer::Line);
        if refused {
            assert_eq!(asking.read(&mut [0]).unwrap(), 0);
            // One that has not said where it wants to go does not keep its place for ever.
            guest.later();
            guest.device.kicked(0, &mut Watch::default()).unwrap();
        } else {
            drop((asking, other));
        }
    }
    drop((program, listener));
}

#[test]
fn a_guest_that_does_not_answer() {
    let (backend, listener) = listening(1);
    let mut guest = Direct::new(backend);
    // Neither the request of somebody on the host,
    let connector = guest.connector.clone();
    let asking = std::thread::spawn(move || connector.connect(80, PATIENCE));
    let start = Instant::now();
    let mut request = None;
    while request.is_none() {
        assert!(start.elapsed() < PATIENCE);
        guest.device.ready(1, &mut Watch::default()).unwrap();
        request = guest.receive();
    }
    assert_eq!(request.unwrap().op, Op::Request);
    guest.later();
    assert_eq!(guest.op(), Some(Op::Reset));
    assert_eq!(asking.join().unwrap().unwrap_err().kind(), ErrorKind::ConnectionRefused);
    // nor a shutdown.
    guest.send(&header(Op::Request, 5, 1, 0).to_bytes()).unwrap();
    assert_eq!(guest.op(), Some(Op::Response));
    drop(listener.accept().unwrap());
    guest.device.streams_mut().ready(17);
    assert_eq!(guest.op(), Some(Op::Shutdown));
    assert_eq!(guest.op(), None);
    guest.later();
    assert_eq!(guest.op(), Some(Op::Reset));
    guest.later();
    assert_eq!(guest.op(), None);
}

fn packets() -> impl Strategy<Value = (Header, usize)> {
    let edge = || prop_oneof![0..5000u32, any::<u32>()];
    let cid = prop_oneof![9 => Just(u64::from(CID)), 1 => any::<u64>()];
    let host = prop_oneof![9 => Just(HOST_CID), 1 => any::<u64>()];
    let kind = prop_oneof![9 => Just(STREAM), 1 => any::<u16>()];
    let op = prop_oneof![9 => 0..9u16, 3 => Just(1), 6 => Just(5), 1 => any::<u16>()];
    let body = prop_oneof![3 => (0..30_000usize).prop_map(|len| (u32::try_from(len).unwrap(), len)), 1 => (edge(), 0..5000usize)];
    ((cid, host, kind, op), (0..4u32, 0..4u32), body, (edge(), edge(), edge())).prop_map(
        |((src_cid, dst_cid, kind, op), (src_port, dst_port), (len, body), (flags, buf_alloc, fwd_cnt))| {
            let op = op.into();
            (Header { src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt }, body)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Whatever packets a guest sends, whatever the host does meanwhile: no panic, and never more than a reply for each.
    #[test]
    fn any_packets(steps in prop::collection::vec((packets(), 0..3usize, 0..8u8), 1..200)) {
        let mut backend = Backend::new();
        let listeners = [backend.listen(1).unwrap(), backend.listen(2).unwrap()];
        let mut guest = Direct::new(backend);
        let mut hosts: Vec<UnixStream> = Vec::new();
        for ((header, body), buffers, host) in steps {
            guest.send(&[&header.to_bytes()[..], &vec![0; body]].concat()).unwrap();
            for listener in &listeners {
                hosts.extend(listener.accept_timeout(Duration::ZERO));
            }
            match (host, hosts.first_mut()) {
                (0, Some(_)) => drop(hosts.remove(0)),
                (1, Some(socket)) => {
                    socket.set_nonblocking(true).unwrap();
                    let _ = socket.write(&[0; 3000]);
                    hosts.rotate_left(1);
                }
                (2, Some(socket)) => drop(socket.shutdown(std::net::Shutdown::Write)),
                (3, _) => guest.later(),
                (4, _) => (16..64).for_each(|source| guest.device.streams_mut().ready(source)),
                _ => {}
            }
            for _ in 0..buffers {
                let _ = guest.receive();
            }
            prop_assert!(guest.device.streams_mut().is_consistent());
        }
        prop_assert_eq!(guest.device.quiesce(&mut Watch::default()).len(), 3);
        prop_assert!(guest.device.streams_mut().is_consistent());
    }
}
