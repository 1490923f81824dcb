//! Pauses, and copies of a guest that go on in another process' stead.

use super::direct::Direct;
use super::*;
use crate::device_loop::Watch;
use crate::virtio::vsock::stream::Answer;

impl Guest {
    /// Pauses the device, and lets it go on.
    pub fn pause(&mut self) {
        let queues = self.handle.quiesce(self.node).unwrap().unwrap();
        assert_eq!(queues.len(), 3);
        self.handle.resume(self.node, 0, queues).unwrap();
    }

    /// Goes on as a copy of this guest, whose device is a fresh one with address `cid` on a fresh loop.
    fn become_copy(&mut self, cid: u32, backend: Backend) {
        let queues = self.handle.quiesce(self.node).unwrap().unwrap();
        let state = self.handle.save(self.node).unwrap();
        let mut device_loop = DeviceLoop::new().unwrap();
        let (device, connector) = Vsock::new(cid, backend).unwrap();
        let interrupt = Interrupt::new().unwrap();
        let kicks: Vec<_> = (0..3).map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap()).collect();
        let heard = kicks.iter().map(|k| k.try_clone().unwrap()).collect();
        self.node = device_loop.add(Box::new(device), DeviceKind::Vsock, interrupt.clone(), heard);
        self.handle = device_loop.handle();
        // The original ends here.
        self._running = device_loop.spawn().unwrap();
        assert_eq!(self.handle.restore(self.node, state).unwrap().unwrap(), u64::from(cid).to_le_bytes());
        let memory = &self.rx.memory;
        let queues = queues.iter().zip(&kicks).map(|(queue, kick)| {
            let ring = virtio_queue::Queue::try_from(queue.ring().state()).unwrap();
            Queue::new(ring, memory.clone(), interrupt.clone(), kick.try_clone().unwrap()).unwrap()
        });
        self.handle.resume(self.node, 0, queues.collect()).unwrap();
        (self.connector, self.interrupt, self.kicks) = (connector, interrupt, kicks);
    }
}

#[test]
fn a_pause_keeps_everybody() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v.sock");
    let (mut backend, listener) = listening(1);
    backend.accept_from(UnixListener::bind(&path).unwrap()).unwrap();
    let mut guest = Guest::new(backend);
    guest.connect(2, 1);
    let mut slow = listener.accept().unwrap();
    let data = pattern(BUF_ALLOC as usize);
    for chunk in data.chunks(TX_BUFFER) {
        guest.send(header(Op::Data, 2, 1, chunk.len()), chunk);
    }
    guest.send(closing(shutdown::SEND, 2, 1), &[]);
    let mut program = UnixStream::connect(&path).unwrap();
    program.write_all(b"CONN").unwrap();
    guest.send(header(Op::CreditRequest, 2, 1, 0), &[]);
    guest.expect(Op::CreditUpdate);

    let queues = guest.handle.quiesce(guest.node).unwrap().unwrap();
    while let Some((packet, _)) = guest.poll() {
        assert_eq!(packet.op, Op::CreditUpdate);
    }
    // Whatever happens meanwhile waits.
    program.write_all(b"ECT 80\n").unwrap();
    slow.write_all(b"meanwhile").unwrap();
    let connector = guest.connector.clone();
    let asking = std::thread::spawn(move || connector.connect(81, PATIENCE));
    std::thread::sleep(Duration::from_millis(50));
    assert!(guest.poll().is_none());
    guest.handle.resume(guest.node, 0, queues).unwrap();

    let mut got = Vec::new();
    slow.read_to_end(&mut got).unwrap();
    assert!(got == data);
    let (mut heard, mut asked) = (Vec::new(), Vec::new());
    while heard.len() < 9 || asked.len() < 2 {
        let (packet, data) = guest.receive();
        match packet.op {
            Op::Data => heard.extend(data),
            Op::Request => {
                asked.push(packet.dst_port);
                guest.send(header(Op::Response, packet.dst_port, packet.src_port, 0), &[]);
            }
            Op::CreditUpdate => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((&heard[..], asked.contains(&80), asked.contains(&81)), (&b"meanwhile"[..], true, true));
    asking.join().unwrap().unwrap();
    let mut answer = [0; 3];
    program.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"OK ");
}

#[test]
fn nobodys_patience_runs_out_in_a_pause() {
    let mut guest = Direct::new(Backend::new());
    let (_asking, socket) = UnixStream::pair().unwrap();
    let (mut silent, unheard) = UnixStream::pair().unwrap();
    let streams = guest.device.streams_mut();
    streams.greet(unheard, Instant::now(), &mut Watch::default());
    streams.request(80, socket, Answer::Line);
    assert_eq!(guest.op(), Some(Op::Request));
    let hour = Duration::from_secs(3600);
    let streams = guest.device.streams_mut();
    streams.pause(Instant::now(), &mut Watch::default());
    streams.resume(Instant::now() + hour, &mut Watch::default());
    streams.expire(Instant::now() + hour);
    assert_eq!(guest.op(), None);
    silent.set_nonblocking(true).unwrap();
    assert_eq!(silent.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    guest.device.streams_mut().expire(Instant::now() + hour + hour);
    assert_eq!(guest.op(), Some(Op::Reset));
}

#[test]
fn packets_that_wait_for_replies_wait_in_the_copy() {
    let mut guest = Guest::without_buffers(Backend::new());
    let count = 64 + 128;
    for port in 0..count {
        guest.send(header(Op::Data, port, 1, 0), &[]);
    }
    for then in 0..2 {
        match then {
            0 => guest.pause(),
            _ => guest.become_copy(CID, Backend::new()),
        }
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
fn a_copy_goes_on_where_its_original_stopped() {
    let (backend, listener) = listening(1);
    let mut guest = Guest::without_buffers(backend);
    guest.post(0);
    guest.connect(2, 1);
    guest.connect(3, 1);
    let (mut before, mut gone) = (listener.accept().unwrap(), listener.accept().unwrap());
    let data = pattern(600_000);
    let (early, late) = data.split_at(BUF_ALLOC as usize);
    for chunk in early.chunks(TX_BUFFER) {
        guest.send(header(Op::Data, 2, 1, chunk.len()), chunk);
    }
    // The guest has no room for more than the first bytes of this.
    before.write_all(&data[..100_000]).unwrap();
    // The guest hangs up, and the host has not taken all.
    for chunk in early.chunks(TX_BUFFER) {
        guest.send(header(Op::Data, 3, 1, chunk.len()), chunk);
    }
    guest.send(closing(shutdown::BOTH, 3, 1), &[]);
    guest.send(header(Op::Reset, 3, 1, 0), &[]);
    guest.send(header(Op::CreditRequest, 2, 1, 0), &[]);
    let (_, mut heard) = guest.receive();

    let (backend, listener) = listening(1);
    guest.become_copy(CID, backend);
    let (mut hosts, mut taken) = (Vec::new(), Vec::new());
    for (old, port) in [(&mut before, 2), (&mut gone, 3)] {
        // The original is gone; what its socket had taken was delivered.
        let mut got = Vec::new();
        let _ = old.read_to_end(&mut got);
        let (socket, from) = listener.accept_from().unwrap();
        assert_eq!(from, port);
        hosts.push(socket);
        taken.push(got);
    }
    (1..SLOTS).for_each(|slot| guest.post(slot));
    let mut rest = hosts.pop().unwrap();
    rest.read_to_end(&mut taken[1]).unwrap();
    assert!(taken[1] == early);

    let mut host = hosts.pop().unwrap();
    let mut writer = host.try_clone().unwrap();
    let from_host = data[100_000..].to_vec();
    let writing = std::thread::spawn(move || writer.write_all(&from_host).unwrap());
    let mut all = taken.remove(0);
    let missing = data.len() - all.len();
    let reading = std::thread::spawn(move || {
        let mut more = vec![0; missing];
        host.read_exact(&mut more).unwrap();
        all.extend(more);
        all
    });
    // Now and then the host says how much it has taken.
    let mut credit = BUF_ALLOC as usize;
    let mut sent = early.len();
    let start = Instant::now();
    while heard.len() < data.len() || sent < data.len() {
        assert!(start.elapsed() < PATIENCE);
        let now = (data.len() - sent).min(TX_BUFFER).min(credit - sent);
        let base = Header { fwd_cnt: heard.len().try_into().unwrap(), ..header(Op::Data, 2, 1, now) };
        if now > 0 {
            guest.send(base, &late[sent - early.len()..][..now]);
            sent += now;
        }
        if let Some((packet, bytes)) = guest.poll() {
            assert!(matches!(packet.op, Op::Data | Op::CreditUpdate), "{packet:?}");
            credit = packet.fwd_cnt as usize + packet.buf_alloc as usize;
            heard.extend(bytes);
        }
    }
    writing.join().unwrap();
    assert!(heard == data);
    assert!(reading.join().unwrap() == data);
}

#[test]
fn a_copy_with_another_address_loses_its_connections() {
    let (backend, listener) = listening(1);
    let mut guest = Guest::new(backend);
    guest.connect(2, 1);
    let mut host = listener.accept().unwrap();
    let (backend, listener) = listening(1);
    guest.become_copy(CID + 1, backend);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    assert_eq!(listener.accept_timeout(Duration::ZERO).unwrap_err().kind(), ErrorKind::TimedOut);
    // The driver hears of it as soon as it has a buffer, even if that takes another copy.
    std::thread::sleep(Duration::from_millis(20));
    guest.become_copy(CID + 1, Backend::new());
    let (_, answers) = guest.event.send(&[], &[4]);
    guest.event.memory.write_slice(&[0xff; 4], GuestAddress(answers[0])).unwrap();
    guest.kicks[2].write(1).unwrap();
    let start = Instant::now();
    let used = loop {
        if let Some((_, used)) = guest.event.receive() {
            break used;
        }
        assert!(start.elapsed() < PATIENCE);
        std::thread::yield_now();
    };
    assert_eq!((used, guest.event.bytes(answers[0], 4)), (4, vec![0; 4]));
    // Once.
    guest.event.send(&[], &[4]);
    guest.kicks[2].write(1).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(guest.event.receive().is_none() && guest.poll().is_none());
    // Packets from the address before are nobody's.
    guest.send(header(Op::Data, 2, 1, 1), b"x");
    guest.send(Header { src_cid: u64::from(CID) + 1, ..header(Op::Data, 9, 1, 1) }, b"x");
    let start = Instant::now();
    let slot = loop {
        if let Some((slot, _)) = guest.rx.receive() {
            break slot;
        }
        assert!(start.elapsed() < PATIENCE);
    };
    let raw = guest.rx.bytes(guest.rx_buffers[slot as usize], HEADER_SIZE);
    let refused = Header::parse(raw[..].try_into().unwrap());
    assert_eq!((refused.dst_cid, refused.dst_port), (u64::from(CID) + 1, 9));
}
