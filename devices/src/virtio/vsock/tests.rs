//! Guests, well- and ill-behaved, against the device on a real loop with real sockets.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::credit::BUF_ALLOC;
use super::packet::{HEADER_SIZE, HOST_CID, Header, Op, STREAM, shutdown};
use super::*;
use crate::device_loop::{DeviceLoop, LoopHandle, NodeId, RunningLoop};
use crate::testing::{self, Driver, WRITE};
use crate::virtio::{DeviceKind, Interrupt, Queue, VirtioDevice};

mod bulk;
mod direct;
mod hostile;
mod hostile_state;
mod pause;
mod restore;

const CID: u32 = 7;
/// What Linux posts: a page less what it keeps for itself.
const RX_BUFFER: usize = 3776;
const TX_BUFFER: usize = 32 * 1024;
const SLOTS: u16 = 64;
const TX_RING: u64 = 0x10_0000;
const EVENT_RING: u64 = 0x8_0000;
/// Far beyond what anything here takes; only a test that fails waits so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// A guest's kernel, as far as the device sees it.
struct Guest {
    rx: Driver,
    tx: Driver,
    event: Driver,
    rx_buffers: Vec<u64>,
    tx_buffers: Vec<u64>,
    tx_free: Vec<u16>,
    interrupt: Interrupt,
    kicks: Vec<EventFd>,
    handle: LoopHandle,
    node: NodeId,
    connector: Connector,
    _running: RunningLoop,
}

impl Guest {
    /// Boots with receive buffers posted.
    fn new(backend: Backend) -> Self {
        let mut guest = Self::without_buffers(backend);
        (0..SLOTS).for_each(|slot| guest.post(slot));
        guest
    }

    fn without_buffers(backend: Backend) -> Self {
        let memory = testing::memory(8 << 20);
        let interrupt = Interrupt::new().unwrap();
        let kicks: Vec<_> = (0..3).map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap()).collect();
        let mut device_loop = DeviceLoop::new().unwrap();
        let (device, connector) = Vsock::new(CID, backend).unwrap();
        assert_eq!(device.profile().config, [7, 0, 0, 0, 0, 0, 0, 0]);
        let heard = kicks.iter().map(|k| k.try_clone().unwrap()).collect();
        let node = device_loop.add(Box::new(device), DeviceKind::Vsock, interrupt.clone(), heard);
        let handle = device_loop.handle();
        let mut guest = Guest {
            rx: Driver::new(memory.clone(), 0, SLOTS),
            tx: Driver::new(memory.clone(), TX_RING, SLOTS),
            event: Driver::new(memory, EVENT_RING, 8),
            rx_buffers: vec![],
            tx_buffers: vec![],
            tx_free: (0..SLOTS).collect(),
            interrupt,
            kicks,
            handle,
            node,
            connector,
            _running: device_loop.spawn().unwrap(),
        };
        guest.rx_buffers = (0..SLOTS).map(|_| guest.rx.buffer(RX_BUFFER)).collect();
        guest.tx_buffers = (0..SLOTS).map(|_| guest.tx.buffer(TX_BUFFER + HEADER_SIZE)).collect();
        guest.activate();
        guest
    }

    fn activate(&self) {
        let drivers = [&self.rx, &self.tx, &self.event];
        let queues = drivers.iter().zip(&self.kicks).map(|(d, k)| queue(d, &self.interrupt, k)).collect();
        self.handle.activate(self.node, 0, queues).unwrap();
    }

    fn post(&mut self, slot: u16) {
        let at = self.rx_buffers[usize::from(slot)];
        self.rx.descriptor(slot, at, u32::try_from(RX_BUFFER).unwrap(), WRITE, 0);
        self.rx.publish(slot);
        self.kicks[0].write(1).unwrap();
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        self.send_raw(&[&header.to_bytes(), payload].concat());
    }

    fn send_raw(&mut self, packet: &[u8]) {
        let start = Instant::now();
        let slot = loop {
            while let Some((slot, used)) = self.tx.receive() {
                assert_eq!(used, 0);
                self.tx_free.push(u16::try_from(slot).unwrap());
            }
            if let Some(slot) = self.tx_free.pop() {
                break slot;
            }
            assert!(start.elapsed() < PATIENCE, "the device takes nothing");
            std::thread::yield_now();
        };
        let at = self.tx_buffers[usize::from(slot)];
        self.tx.memory.write_slice(packet, GuestAddress(at)).unwrap();
        self.tx.descriptor(slot, at, u32::try_from(packet.len()).unwrap(), 0, 0);
        self.tx.publish(slot);
        self.kicks[1].write(1).unwrap();
    }

    /// A packet that is there already; its buffer is posted again.
    fn poll(&mut self) -> Option<(Header, Vec<u8>)> {
        let (slot, used) = self.rx.receive()?;
        let slot = u16::try_from(slot).unwrap();
        let bytes = self.rx.bytes(self.rx_buffers[usize::from(slot)], used.try_into().unwrap());
        self.post(slot);
        let header = Header::parse(bytes[..HEADER_SIZE].try_into().unwrap());
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID.into()));
        assert_eq!(header.len as usize, bytes.len() - HEADER_SIZE);
        Some((header, bytes[HEADER_SIZE..].to_vec()))
    }

    fn receive(&mut self) -> (Header, Vec<u8>) {
        let start = Instant::now();
        loop {
            if let Some(packet) = self.poll() {
                return packet;
            }
            assert!(start.elapsed() < PATIENCE, "the device sends nothing");
            std::thread::yield_now();
        }
    }

    fn expect(&mut self, op: Op) -> Header {
        let (header, _) = self.receive();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    /// Connects from `port` to `host`.
    fn connect(&mut self, port: u32, host: u32) {
        self.send(header(Op::Request, port, host, 0), &[]);
        let answer = self.expect(Op::Response);
        assert_eq!((answer.src_port, answer.dst_port, answer.buf_alloc), (host, port, BUF_ALLOC));
    }
}

/// The driver's queue, with the doorbell that the loop hears.
fn queue(driver: &Driver, interrupt: &Interrupt, kick: &EventFd) -> Queue {
    let mut ring = virtio_queue::Queue::new(if driver.rings().0 == EVENT_RING { 8 } else { SLOTS }).unwrap();
    let (table, avail, used) = driver.rings();
    ring.try_set_desc_table_address(GuestAddress(table)).unwrap();
    ring.try_set_avail_ring_address(GuestAddress(avail)).unwrap();
    ring.try_set_used_ring_address(GuestAddress(used)).unwrap();
    ring.set_ready(true);
    Queue::new(ring, driver.memory.clone(), interrupt.clone(), kick.try_clone().unwrap()).unwrap()
}

fn header(op: Op, port: u32, host: u32, len: usize) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: port,
        dst_port: host,
        len: len.try_into().unwrap(),
        kind: STREAM,
        op,
        flags: 0,
        buf_alloc: 1 << 20,
        fwd_cnt: 0,
    }
}

fn closing(flags: u32, port: u32, host: u32) -> Header {
    Header { flags, ..header(Op::Shutdown, port, host, 0) }
}

fn listening(port: u32) -> (Backend, Listener) {
    let mut backend = Backend::new();
    let listener = backend.listen(port).unwrap();
    assert_eq!(backend.listen(port).err().unwrap().kind(), ErrorKind::AddrInUse);
    (backend, listener)
}

/// Some bytes that say where they belong.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((i * 7 + i / 251) % 256).unwrap()).collect()
}

#[test]
fn a_guest_talks_to_a_listener_and_hangs_up() {
    let (backend, listener) = listening(1024);
    let mut guest = Guest::new(backend);
    guest.connect(5000, 1024);
    let mut host = listener.accept().unwrap();
    guest.send(header(Op::Data, 5000, 1024, 5), b"hello");
    let mut data = [0; 5];
    host.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"hello");
    host.write_all(b"well met").unwrap();
    let (packet, data) = guest.receive();
    assert_eq!((packet.op, packet.fwd_cnt, &data[..]), (Op::Data, 5, &b"well met"[..]));
    guest.send(header(Op::CreditRequest, 5000, 1024, 0), &[]);
    assert_eq!(guest.expect(Op::CreditUpdate).fwd_cnt, 5);
    guest.send(closing(shutdown::BOTH, 5000, 1024), &[]);
    guest.expect(Op::Reset);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    // The ports are free again.
    guest.connect(5000, 1024);
    listener.accept().unwrap();
}

#[test]
fn halves_close_one_by_one() {
    let (backend, listener) = listening(1);
    let mut guest = Guest::new(backend);
    guest.connect(2, 1);
    let mut host = listener.accept().unwrap();
    guest.send(header(Op::Data, 2, 1, 4), b"last");
    guest.send(closing(shutdown::SEND, 2, 1), &[]);
    let mut data = Vec::new();
    host.read_to_end(&mut data).unwrap();
    assert_eq!(data, b"last");
    host.write_all(b"answer").unwrap();
    assert_eq!(guest.receive().1, b"answer");
    // With the other half, both are closed.
    host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.expect(Op::Shutdown).flags, shutdown::BOTH);
    guest.send(header(Op::Reset, 2, 1, 0), &[]);

    guest.connect(2, 1);
    let mut host = listener.accept().unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.expect(Op::Shutdown).flags, shutdown::SEND);
    guest.send(header(Op::Data, 2, 1, 3), b"yet");
    host.read_exact(&mut data[..3]).unwrap();
    assert_eq!(&data[..3], b"yet");
    drop(host);
    assert_eq!(guest.expect(Op::Shutdown).flags, shutdown::BOTH);
    guest.send(header(Op::Reset, 2, 1, 0), &[]);
    guest.connect(2, 1);
    let mut host = listener.accept().unwrap();
    guest.send(closing(shutdown::RECEIVE, 2, 1), &[]);
    // The host hears of it when it writes.
    let start = Instant::now();
    while host.write(b"x").is_ok() {
        assert!(start.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
}

#[test]
fn refusals() {
    let (backend, listener) = listening(1);
    let mut guest = Guest::new(backend);
    let mut refused = |packet: Header| {
        guest.send(packet, &[]);
        let answer = guest.expect(Op::Reset);
        assert_eq!((answer.src_port, answer.dst_port), (packet.dst_port, packet.src_port));
        assert_eq!(answer.kind, packet.kind);
    };
    refused(header(Op::Request, 9, 2, 0));
    for op in [Op::Data, Op::Response, Op::Shutdown, Op::CreditUpdate, Op::CreditRequest, Op::Unknown(0)] {
        refused(header(op, 9, 1, 0));
    }
    refused(Header { kind: 2, ..header(Op::Request, 9, 1, 0) });
    drop(listener);
    refused(header(Op::Request, 9, 1, 0));
    // Not answered: resets, and what is not from this guest to this host.
    guest.send(header(Op::Reset, 9, 1, 0), &[]);
    guest.send(Header { src_cid: 8, ..header(Op::Request, 9, 1, 0) }, &[]);
    guest.send(Header { src_cid: u64::from(CID) | 1 << 32, ..header(Op::Request, 9, 1, 0) }, &[]);
    guest.send(Header { dst_cid: 1, ..header(Op::Request, 9, 1, 0) }, &[]);
    guest.send(header(Op::Request, 77, 77, 0), &[]);
    assert_eq!(guest.expect(Op::Reset).dst_port, 77);
    assert!(!guest.interrupt.has_failed());
}

#[test]
fn the_host_connects_into_the_guest() {
    let mut guest = Guest::new(Backend::new());
    let connector = guest.connector.clone();
    let connecting = std::thread::spawn(move || {
        let refused = connector.connect(1, PATIENCE).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        let late = connector.connect(2, Duration::from_millis(1)).unwrap_err();
        assert_eq!(late.kind(), ErrorKind::TimedOut);
        connector.connect(3, PATIENCE).unwrap()
    });
    let refused = guest.expect(Op::Request);
    assert_eq!(refused.dst_port, 1);
    guest.send(header(Op::Reset, 1, refused.src_port, 0), &[]);
    // Nobody waits for the second one any more.
    assert_eq!(guest.expect(Op::Request).dst_port, 2);
    let mut third = None;
    while third.is_none() {
        let (packet, _) = guest.receive();
        match (packet.op, packet.dst_port) {
            (Op::Reset, 2) => {}
            (Op::Request, 3) => third = Some(packet.src_port),
            other => panic!("{other:?}"),
        }
    }
    let port = third.unwrap();
    guest.send(header(Op::Response, 3, port, 0), &[]);
    let mut host = connecting.join().unwrap();
    guest.send(header(Op::Data, 3, port, 2), b"hi");
    let mut data = [0; 2];
    host.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"hi");
}

#[test]
fn unix_sockets_by_path() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v.sock");
    let mut backend = Backend::new();
    backend.serve_path(&path);
    backend.accept_from(UnixListener::bind(&path).unwrap()).unwrap();
    let port_52 = UnixListener::bind(folder.path().join("v.sock_52")).unwrap();
    let mut guest = Guest::new(backend);
    guest.connect(1000, 52);
    let (mut host, _) = port_52.accept().unwrap();
    guest.send(header(Op::Data, 1000, 52, 3), b"out");
    let mut data = [0; 3];
    host.read_exact(&mut data).unwrap();
    guest.send(header(Op::Request, 1000, 53, 0), &[]);
    guest.expect(Op::Reset);

    // Programs that say nothing, half of it, or nonsense.
    let silent: Vec<_> = (0..20).map(|_| UnixStream::connect(&path).unwrap()).collect();
    for (i, mut client) in silent.iter().enumerate() {
        client.write_all(&b"CONNECT 1"[..i % 10]).unwrap();
    }
    for nonsense in [&b"HELO\n"[..], &[b'1'; 1000]] {
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(nonsense).unwrap();
        // Closed with bytes unread, which a unix socket reports.
        assert!(matches!(client.read(&mut [0]), Ok(0) | Err(_)));
    }
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"CONNECT 80\nGET /").unwrap();
    let request = guest.expect(Op::Request);
    assert_eq!(request.dst_port, 80);
    guest.send(header(Op::Response, 80, request.src_port, 0), &[]);
    assert_eq!(guest.receive().1, b"GET /");
    guest.send(header(Op::Data, 80, request.src_port, 3), b"200");
    let expected = format!("OK {}\n200", request.src_port);
    let mut answer = vec![0; expected.len()];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(answer, expected.as_bytes());

    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"CONNECT 81\n").unwrap();
    let request = guest.expect(Op::Request);
    guest.send(header(Op::Reset, 81, request.src_port, 0), &[]);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    // One that leaves before the guest has answered.
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"CONNECT 82\n").unwrap();
    guest.expect(Op::Request);
    drop(client);
    assert_eq!(guest.expect(Op::Reset).dst_port, 82);
}
