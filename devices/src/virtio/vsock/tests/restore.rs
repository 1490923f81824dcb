//! Random traffic with a snapshot in its midst: what both ends remember of each connection must agree in the copy.

use std::net::Shutdown;

use proptest::prelude::*;

use super::direct::Direct;
use super::*;
use crate::virtio::vsock::packet::Ports;
use crate::virtio::vsock::stream::Answer;

/// Bytes that the guest's program buffers: few, so that the host has to wait.
const ROOM: u32 = 20_000;
/// What a transmit buffer holds.
const MOST: usize = TX_BUFFER;

/// Byte `i` of what one end of connection `port` says.
fn said(port: u32, from_guest: bool, range: std::ops::Range<usize>) -> Vec<u8> {
    let seed = port as usize * 31 + usize::from(from_guest) * 97;
    range.map(|i| u8::try_from((i * 7 + i / 251 + seed) % 256).unwrap()).collect()
}

/// A connection, as its two ends remember it.
struct Talk {
    port: u32,
    host_port: u32,
    /// The guest asked for it; the device answered.
    asked: bool,
    open: bool,
    /// The guest got a reset.
    gone: bool,
    host: Option<UnixStream>,
    /// Bytes that each said, and heard.
    guest_said: usize,
    guest_heard: Vec<u8>,
    host_said: usize,
    host_heard: Vec<u8>,
    /// What the guest does not do any more, what the host does not, and what the guest was told of that.
    guest_shut: u32,
    host_shut: bool,
    told: u32,
    /// The host saw the end of what the guest says.
    host_end: bool,
    /// Up to which byte the guest may send.
    credit: usize,
}

impl Talk {
    fn new(port: u32, host_port: u32) -> Self {
        Talk {
            port,
            host_port,
            asked: false,
            open: false,
            gone: false,
            host: None,
            guest_said: 0,
            guest_heard: vec![],
            host_said: 0,
            host_heard: vec![],
            guest_shut: 0,
            host_shut: false,
            told: 0,
            host_end: false,
            credit: 0,
        }
    }

    fn header(&self, op: Op, len: usize) -> Header {
        let fwd_cnt = self.guest_heard.len().try_into().unwrap();
        Header { buf_alloc: ROOM, fwd_cnt, ..header(op, self.port, self.host_port, len) }
    }

    /// The host takes up to `len` bytes.
    fn read(&mut self, mut len: usize) {
        let Some(host) = &mut self.host else { return };
        host.set_nonblocking(true).unwrap();
        let mut some = [0; 4096];
        while len > 0 {
            let most = len.min(some.len());
            match host.read(&mut some[..most]) {
                Ok(0) => {
                    self.host_end = true;
                    break;
                }
                Ok(count) => {
                    self.host_heard.extend_from_slice(&some[..count]);
                    len -= count;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // The guest ended with words unread, as it may once it does not listen.
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    assert_eq!(self.guest_shut, shutdown::BOTH);
                    self.host_end = true;
                    break;
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// The host says up to `len` bytes, as far as its socket takes them.
    fn write(&mut self, len: usize) {
        let Some(host) = &mut self.host else { return };
        host.set_nonblocking(true).unwrap();
        if !self.host_shut {
            // A guest that does not listen any more is an error that the host may see.
            let data = said(self.port, false, self.host_said..self.host_said + len);
            self.host_said += host.write(&data).unwrap_or(0);
        }
    }

    fn check(&self) {
        let port = self.port;
        assert!(self.host_heard == said(port, true, 0..self.guest_said), "{port}: the host heard otherwise");
        assert!(self.guest_heard.len() <= self.host_said);
        assert!(self.guest_heard == said(port, false, 0..self.guest_heard.len()), "{port}: the guest did");
        if self.guest_shut & shutdown::RECEIVE == 0 {
            assert_eq!(self.guest_heard.len(), self.host_said, "{port}");
            assert_eq!(self.told & shutdown::SEND != 0, self.host_shut && self.open, "{port}");
        }
        assert_eq!(self.host_end, self.guest_shut & shutdown::SEND != 0, "{port}: the host's end");
        assert_eq!(self.gone, self.guest_shut == shutdown::BOTH, "{port}");
    }
}

#[derive(Debug, Clone)]
enum Step {
    Ask,
    Say(usize),
    Shut(u32),
    Read(usize),
    Write(usize),
    HostShut,
    Buffers(u8),
    Look,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => Just(Step::Ask),
        8 => (1..150_000usize).prop_map(Step::Say),
        1 => (1..4u32).prop_map(Step::Shut),
        4 => (1..100_000usize).prop_map(Step::Read),
        6 => (1..100_000usize).prop_map(Step::Write),
        1 => Just(Step::HostShut),
        6 => (1..20u8).prop_map(Step::Buffers),
        6 => Just(Step::Look),
    ]
}

struct World {
    guest: Direct,
    talks: Vec<Talk>,
    listeners: [Listener; 2],
    /// Connections that cannot survive, and how many resets the guest got for each.
    strangers: Vec<(Ports, u32)>,
    moved: bool,
}

fn backend() -> (Backend, [Listener; 2]) {
    let mut backend = Backend::new();
    let listeners = [backend.listen(1).unwrap(), backend.listen(2).unwrap()];
    (backend, listeners)
}

impl World {
    fn new(backend: Backend, listeners: [Listener; 2]) -> Self {
        let talks = (100..104).map(|port| Talk::new(port, 1 + port % 2)).collect();
        World { guest: Direct::new(backend), talks, listeners, strangers: vec![], moved: false }
    }

    fn apply(&mut self, which: usize, step: Step) {
        let talk = &mut self.talks[which];
        let can_say = talk.open && !talk.gone && talk.guest_shut & shutdown::SEND == 0;
        match step {
            Step::Ask if !talk.asked => {
                talk.asked = true;
                self.guest.send(&talk.header(Op::Request, 0).to_bytes()).unwrap();
                let (host, from) = self.listeners[talk.host_port as usize - 1].accept_from().unwrap();
                assert_eq!(from, talk.port);
                talk.host = Some(host);
            }
            Step::Say(mut left) if can_say => {
                while left > 0 && talk.guest_said < talk.credit {
                    let now = left.min(MOST).min(talk.credit - talk.guest_said);
                    let data = said(talk.port, true, talk.guest_said..talk.guest_said + now);
                    let packet = talk.header(Op::Data, now).to_bytes();
                    self.guest.send(&[&packet[..], &data].concat()).unwrap();
                    talk.guest_said += now;
                    left -= now;
                }
            }
            Step::Shut(flags) if talk.open && talk.guest_shut != shutdown::BOTH => {
                talk.guest_shut |= flags;
                let flags = talk.guest_shut;
                self.guest.send(&Header { flags, ..talk.header(Op::Shutdown, 0) }.to_bytes()).unwrap();
            }
            Step::Read(len) => talk.read(len),
            Step::Write(len) => talk.write(len),
            Step::HostShut => {
                if let Some(host) = &talk.host {
                    talk.host_shut = true;
                    let _ = host.shutdown(Shutdown::Write);
                }
            }
            Step::Buffers(count) => {
                for _ in 0..count {
                    self.take();
                }
            }
            Step::Look => self.guest.look(),
            Step::Ask | Step::Say(_) | Step::Shut(_) => {}
        }
        assert!(self.guest.device.streams_mut().is_consistent());
    }

    /// The guest takes a packet, if there is one.
    fn take(&mut self) -> Option<()> {
        let (packet, data) = self.guest.take()?;
        let ports = Ports { guest: packet.dst_port, host: packet.src_port };
        if let Some((_, resets)) = self.strangers.iter_mut().find(|(stranger, _)| *stranger == ports) {
            assert_eq!((packet.op, self.moved), (Op::Reset, true));
            *resets += 1;
            return Some(());
        }
        let talk =
            self.talks.iter_mut().find(|t| (t.port, t.host_port) == (ports.guest, ports.host)).unwrap();
        assert!(talk.asked && !talk.gone, "{packet:?}");
        talk.credit = packet.fwd_cnt as usize + packet.buf_alloc as usize;
        assert!(packet.fwd_cnt as usize <= talk.guest_said, "{packet:?}");
        match packet.op {
            Op::Response => assert!(!std::mem::replace(&mut talk.open, true)),
            Op::Data => {
                assert!(talk.told & shutdown::SEND == 0, "{packet:?}");
                if talk.guest_shut & shutdown::RECEIVE == 0 {
                    talk.guest_heard.extend(data);
                }
            }
            Op::Shutdown => talk.told |= packet.flags,
            Op::CreditUpdate => {}
            Op::Reset => {
                assert_eq!(talk.guest_shut, shutdown::BOTH, "{packet:?}");
                talk.gone = true;
            }
            other => panic!("{other:?}"),
        }
        Some(())
    }

    /// The device is saved, and a fresh one goes on.
    fn move_on(&mut self, new: Backend, listeners: [Listener; 2]) {
        let (state, queues) = self.guest.pause();
        let bytes = postcard::to_allocvec(&state).unwrap();
        let state: VsockState = postcard::from_bytes(&bytes).unwrap();
        let carried: Vec<_> = state.connections.iter().map(|c| (c.guest_port, c.host_port)).collect();
        let old = self.guest.move_to(CID, new, state, queues).unwrap();
        for talk in &mut self.talks {
            // What the old socket has is delivered, even if nobody has read it yet.
            talk.read(usize::MAX);
        }
        drop(old);
        for (port, host_port) in carried {
            let talk = self.talks.iter_mut().find(|t| (t.port, t.host_port) == (port, host_port)).unwrap();
            let (host, from) = listeners[host_port as usize - 1].accept_from().unwrap();
            assert_eq!(from, port);
            talk.host = Some(host);
            talk.host_end = false;
        }
        self.listeners = listeners;
        self.moved = true;
        assert!(self.guest.device.streams_mut().is_consistent());
    }

    /// Everybody takes what there is, until there is nothing.
    fn finish(&mut self) {
        let mut quiet = 0;
        while quiet < 3 {
            quiet += 1;
            for at in 0..self.talks.len() {
                let talk = &mut self.talks[at];
                let before = talk.host_heard.len();
                talk.read(usize::MAX);
                if talk.host_heard.len() > before {
                    quiet = 0;
                }
                if talk.open && talk.guest_shut != shutdown::BOTH {
                    let update = talk.header(Op::CreditUpdate, 0).to_bytes();
                    self.guest.send(&update).unwrap();
                }
            }
            self.guest.look();
            while self.take().is_some() {
                quiet = 0;
            }
            assert!(self.guest.device.streams_mut().is_consistent());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Whenever a snapshot is taken: each byte arrives once, in order, and each end is heard of.
    #[test]
    fn a_copy_loses_nothing_and_repeats_nothing(
        before in prop::collection::vec((0..4usize, step()), 0..100),
        between in prop::collection::vec((0..4usize, step()), 0..30),
        after in prop::collection::vec((0..4usize, step()), 0..60),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v.sock");
        let outside = UnixListener::bind(folder.path().join("v.sock_3")).unwrap();
        let (mut old, listeners) = backend();
        old.serve_path(&path);
        let mut world = World::new(old, listeners);

        // One to a path and one from the host, both established.
        world.guest.send(&header(Op::Request, 200, 3, 0).to_bytes()).unwrap();
        prop_assert_eq!(world.guest.op(), Some(Op::Response));
        let mut hosts = vec![outside.accept().unwrap().0];
        let (host, socket) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        hosts.push(host);
        world.guest.device.streams_mut().request(80, socket, Answer::Line);
        let request = world.guest.receive().unwrap();
        world.guest.send(&header(Op::Response, 80, request.src_port, 0).to_bytes()).unwrap();
        world.strangers = vec![
            (Ports { guest: 200, host: 3 }, 0),
            (Ports { guest: 80, host: request.src_port }, 0),
        ];

        before.into_iter().for_each(|(which, step)| world.apply(which, step));
        let (_, queues) = world.guest.pause();
        world.guest.resume(queues);
        // Twice, so that what was carried once is carried again.
        for steps in [between, after] {
            let (mut new, listeners) = backend();
            new.serve_path(&path);
            world.move_on(new, listeners);
            steps.into_iter().for_each(|(which, step)| world.apply(which, step));
        }
        world.finish();
        for talk in world.talks.iter().filter(|talk| talk.asked) {
            talk.check();
        }
        prop_assert!(world.strangers.iter().all(|(_, resets)| *resets == 1));
        for mut host in hosts {
            let mut end = Vec::new();
            let _ = host.read_to_end(&mut end);
            prop_assert!(end.is_empty() || end.starts_with(b"OK "));
        }
    }
}
