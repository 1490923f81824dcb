//! Against the kernel's own network, in a network namespace that ends with its test. That takes root; without it these tests
//! say so and pass, but for CI.

mod changes;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::*;
use crate::testing::{self, Guest};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const HOST_IP: [u8; 4] = [10, 9, 0, 1];
const GUEST_IP: [u8; 4] = [10, 9, 0, 2];
const UDP: u8 = 17;
const TCP: u8 = 6;

fn ip(line: &str) {
    let status = Command::new("ip").args(line.split(' ')).status().expect("the `ip` command");
    assert!(status.success(), "ip {line}");
}

fn attach(name: &str, flags: libc::c_int) -> OwnedFd {
    let fd = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let mut request = tap::ifreq();
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap();
    // SAFETY: TUNSETIFF reads and writes one `ifreq`.
    assert_eq!(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) }, 0);
    fd.into()
}

/// Runs `body` on a thread in a network namespace of its own, with a TAP `tap0` that is up.
fn with_tap(body: impl FnOnce(OwnedFd) + Send + 'static) {
    let thread = std::thread::spawn(|| {
        // SAFETY: takes no memory; only this thread, made for it, moves to another namespace.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 || !std::path::Path::new("/dev/net/tun").exists()
        {
            assert!(std::env::var_os("CI").is_none(), "CI needs root and /dev/net/tun");
            eprintln!("skipped: a network namespace needs root and /dev/net/tun");
            return;
        }
        // Without IPv6 the host says nothing of its own accord that would take buffers from a test.
        for conf in ["all", "default"] {
            let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{conf}/disable_ipv6"), "1");
        }
        // A link that gets its carrier once it is up loses packets until the kernel has noticed.
        let tap = attach("tap0", tap::FLAGS);
        ip("link set tap0 address 02:00:00:00:00:01");
        ip("address add 10.9.0.1/24 dev tap0");
        ip("link set tap0 up");
        ip("neighbour add 10.9.0.2 lladdr 02:00:00:00:00:02 dev tap0");
        body(tap);
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let bytes = parts.concat();
    let mut sum: u32 =
        bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap().to_be_bytes()
}

fn len16(len: usize) -> [u8; 2] {
    u16::try_from(len).unwrap().to_be_bytes()
}

/// An Ethernet frame from guest to host with a UDP or TCP `segment`, whose checksum is left to the device. Behind a virtio
/// header that asks to cut it into pieces of `gso_size` if that is not 0.
fn frame(protocol: u8, mut segment: Vec<u8>, gso_size: u16) -> Vec<u8> {
    let field = if protocol == UDP { 6 } else { 16 };
    let pseudo = [&GUEST_IP[..], &HOST_IP, &[0, protocol], &len16(segment.len())].concat();
    segment[field..field + 2].copy_from_slice(&checksum(&[&pseudo]));
    let mut header = vec![0x45, 0];
    header.extend(len16(20 + segment.len()));
    header.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    header.extend(GUEST_IP.iter().chain(&HOST_IP));
    let sum = checksum(&[&header]);
    header[10..12].copy_from_slice(&[!sum[0], !sum[1]]);
    // Flags (checksum needed), GSO type, header length, GSO size, where the checksum starts and lies, number of buffers.
    let gso = u8::from(gso_size != 0);
    let mut frame = vec![1, gso, 54 * gso, 0];
    frame.extend(gso_size.to_le_bytes());
    frame.extend([34, 0, u8::try_from(field).unwrap(), 0, 0, 0]);
    frame.extend(HOST_MAC);
    frame.extend(MAC);
    frame.extend([8, 0]);
    frame.extend(header);
    frame.extend(segment);
    frame
}

fn udp(payload: &[u8]) -> Vec<u8> {
    [&5000u16.to_be_bytes(), &6000u16.to_be_bytes(), &len16(8 + payload.len()), &[0, 0], payload].concat()
}

struct Card {
    guest: Guest,
    counters: Arc<Counters>,
    /// Used lengths and buffers of what the driver posted, oldest first.
    posted: std::collections::VecDeque<Vec<(u64, usize)>>,
}

impl Card {
    fn new(tap: OwnedFd, features: u64) -> Self {
        let net = Net::new(tap, MAC).unwrap();
        let counters = net.counters();
        Card { guest: Guest::start(Box::new(net), features), counters, posted: Default::default() }
    }

    fn post(&mut self, count: usize, sizes: &[usize]) {
        for _ in 0..count {
            let (_, at) = self.guest.drivers[RX].send(&[], sizes);
            self.posted.push_back(at.into_iter().zip(sizes.iter().copied()).collect());
        }
        self.guest.kick(0);
    }

    fn send(&mut self, parts: &[&[u8]]) {
        self.guest.drivers[TX].send(parts, &[]);
        self.guest.kick(1);
        self.guest.receive(TX);
    }

    /// One packet with its header, and how many chains it came in.
    fn packet(&mut self) -> (Vec<u8>, u16) {
        let mut packet = self.chain();
        let count = u16::from_le_bytes([packet[10], packet[11]]);
        for _ in 1..count {
            packet.extend(self.chain());
        }
        (packet, count)
    }

    fn chain(&mut self) -> Vec<u8> {
        let (_, len) = self.guest.receive(RX);
        let driver = &self.guest.drivers[RX];
        let mut bytes = Vec::new();
        for (at, size) in self.posted.pop_front().unwrap() {
            bytes.extend(driver.bytes(at, size));
        }
        bytes.truncate(len as usize);
        bytes
    }

    /// The next IPv4 packet of `protocol`: its header for virtio, its UDP or TCP segment, and its chains. The host also says
    /// things of its own (IPv6 neighbours).
    fn segment(&mut self, protocol: u8) -> (Vec<u8>, Vec<u8>, u16) {
        loop {
            let (packet, count) = self.packet();
            if packet[24..26] == [8, 0] && packet[26 + 9] == protocol {
                assert_eq!(packet[12..18], MAC);
                return (packet[..12].to_vec(), packet[46..].to_vec(), count);
            }
        }
    }
}

#[test]
fn datagrams_go_both_ways_without_offloads() {
    with_tap(|tap| {
        let socket = UdpSocket::bind("10.9.0.1:6000").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        socket.send_to(b"stale", "10.9.0.2:5000").unwrap();
        let mut card = Card::new(tap, feature::CSUM);
        // Larger buffers than needed, in two pieces.
        card.post(64, &[100, 1426]);
        for round in 0..20usize {
            let text = vec![b'a' + u8::try_from(round).unwrap(); 60 * round];
            let frame = frame(UDP, udp(&text), 0);
            card.send(&[&frame[..7], &frame[7..]]);
            let mut heard = [0; 2000];
            let (len, from) = socket.recv_from(&mut heard).unwrap();
            assert_eq!((&heard[..len], from), (&text[..], "10.9.0.2:5000".parse().unwrap()));
            socket.send_to(&heard[..len], from).unwrap();
            let (header, segment, count) = card.segment(UDP);
            assert_eq!((&segment[8..], count, header[1]), (&text[..], 1, 0), "whole, and not what was stale");
            assert_eq!(header[0] & 1, 0, "its checksum was computed");
        }
        assert_eq!(card.counters.tx_packets.load(Relaxed), 20);
        assert_eq!(card.counters.tx_dropped.load(Relaxed), 0);
    });
}

#[test]
fn segments_of_many_packets_go_both_ways() {
    with_tap(|tap| {
        let listener = TcpListener::bind("10.9.0.1:6000").unwrap();
        let text: Vec<u8> = (0..20_000u16).flat_map(u16::to_le_bytes).collect();
        let sent = text.clone();
        let host = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut heard = vec![0; sent.len()];
            stream.read_exact(&mut heard).unwrap();
            assert!(heard == sent, "40 KB arrive as they were sent");
            stream.write_all(&sent[..12_000]).unwrap();
            stream
        });
        let mut card = Card::new(tap, !0);
        card.post(128, &[1526]);
        let tcp = |seq: u32, ack: u32, flags: u8, options: &[u8], data: &[u8]| {
            let mut segment = [5000u16.to_be_bytes(), 6000u16.to_be_bytes()].concat();
            segment.extend(seq.to_be_bytes().iter().chain(&ack.to_be_bytes()));
            segment.extend([
                u8::try_from(5 + options.len() / 4).unwrap() << 4,
                flags,
                0xff,
                0xff,
                0,
                0,
                0,
                0,
            ]);
            [&segment, options, data].concat()
        };
        const SYN: u8 = 2;
        const ACK: u8 = 16;
        let word = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
        card.send(&[&frame(TCP, tcp(1000, 0, SYN, &[2, 4, 5, 0xb4], &[]), 0)]);
        let (_, answer, _) = card.segment(TCP);
        assert_eq!((answer[13], word(&answer[8..12])), (SYN | ACK, 1001));
        let first = word(&answer[4..8]).wrapping_add(1);
        card.send(&[&frame(TCP, tcp(1001, first, ACK, &[], &text), 1460)]);

        let mut heard = vec![0; 12_000];
        let (mut missing, mut largest) = (heard.len(), (0, 0));
        while missing > 0 {
            let (header, segment, count) = card.segment(TCP);
            let data = &segment[usize::from(segment[12] >> 4) * 4..];
            if data.is_empty() {
                continue;
            }
            let at = word(&segment[4..8]).wrapping_sub(first) as usize;
            heard[at..at + data.len()].copy_from_slice(data);
            missing = missing.saturating_sub(data.len());
            largest = largest.max((data.len(), count));
            assert_eq!(header[0] & 1, 1, "nobody computed a checksum");
            assert_eq!(header[1] & 1, u8::from(data.len() > 1460), "GSO");
        }
        assert!(heard == text[..12_000]);
        assert!(largest.0 > 1460 && largest.1 > 1, "several packets in one, in several buffers: {largest:?}");
        drop(host.join().unwrap());
    });
}

#[test]
fn a_packet_waits_for_the_driver() {
    with_tap(|tap| {
        let mut card = Card::new(tap, feature::MRG_RXBUF);
        let socket = UdpSocket::bind("10.9.0.1:6000").unwrap();
        let text: Vec<u8> = (0..=255).cycle().take(1000).collect();
        card.post(1, &[100]);
        socket.send_to(&text, "10.9.0.2:5000").unwrap();
        socket.send_to(b"second", "10.9.0.2:5000").unwrap();
        // Whoever counts a packet has read it; yet the driver, short of room, must not see a part of it.
        while card.counters.rx_packets.load(Relaxed) == 0 {
            std::thread::yield_now();
        }
        assert_eq!(card.guest.drivers[RX].receive(), None);
        card.post(20, &[13, 387]);
        let (_, segment, count) = card.segment(UDP);
        assert_eq!((&segment[8..], count), (&text[..], 4), "100 + 3 × 400 bytes");
        assert_eq!(card.segment(UDP).1[8..], *b"second");
        let memory = card.guest.drivers[RX].memory.clone();
        let again = testing::marking(&memory, || {
            socket.send_to(&text, "10.9.0.2:5000").unwrap();
            card.segment(UDP)
        });
        assert_eq!(again.1[8..], text);
    });
}

#[test]
fn an_interface_that_is_down_or_gone_costs_packets_only() {
    with_tap(|tap| {
        let mut card = Card::new(tap, !0);
        card.post(8, &[1526]);
        ip("link set tap0 down");
        let packet = frame(UDP, udp(b"lost"), 0);
        card.send(&[&packet]);
        assert_eq!(card.counters.tx_dropped.load(Relaxed), 1);
        ip("link set tap0 up");
        card.send(&[&packet]);
        assert_eq!(card.counters.tx_packets.load(Relaxed), 1);
        ip("link delete tap0");
        card.send(&[&packet]);
        card.send(&[&packet]);
        assert_eq!(card.counters.tx_dropped.load(Relaxed), 3);
        assert_eq!(card.guest.get(0x70), 15, "the card lives");
    });
}

#[test]
fn a_receive_buffer_without_room_for_a_header_fails_the_card() {
    with_tap(|tap| {
        let mut card = Card::new(tap, !0);
        card.post(1, &[HEADER_LEN - 1]);
        // The host talks of its own accord when a link comes up; a datagram makes it sure.
        let _ = UdpSocket::bind("10.9.0.1:6000").unwrap().send_to(b"hello", "10.9.0.2:5000");
        card.guest.wait_for_failure();
        card.guest.set(0x70, 0);
        assert_eq!(card.guest.get(0x70), 0);
    });
}

#[test]
fn whatever_a_driver_sends_is_sent_or_dropped() {
    with_tap(|tap| {
        let card = std::cell::RefCell::new(Card::new(tap, !0));
        let packets = prop::collection::vec(
            (
                prop::collection::vec(any::<u8>(), 0..100),
                prop::collection::vec(0u8..6, HEADER_LEN),
                any::<bool>(),
            ),
            1..20,
        );
        let mut runner =
            TestRunner::new(Config { failure_persistence: None, cases: 16, ..Config::default() });
        let outcome = runner.run(&packets, |packets| {
            let mut card = card.borrow_mut();
            for (noise, header, whole) in packets {
                let mut packet = frame(UDP, udp(&noise), 0);
                packet[..HEADER_LEN].copy_from_slice(&header);
                card.send(&[if whole { &packet } else { &noise }]);
            }
            Ok(())
        });
        outcome.unwrap();
        let huge = vec![0; LONGEST + 1];
        card.borrow_mut().send(&[&huge]);
        let card = card.into_inner();
        assert!(card.counters.tx_dropped.load(Relaxed) > 0);
        assert_eq!(card.guest.get(0x70), 15, "the card lives");
    });
}

#[test]
fn only_a_tap_will_do() {
    let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    assert!(matches!(Net::new(null(), MAC).err(), Some(TapError::Flags)));
    assert!(matches!(Net::new(null(), [1, 0, 0, 0, 0, 0]).err(), Some(TapError::Multicast)));
    with_tap(|tap| {
        assert!(Net::new(attach("tap1", libc::IFF_TAP | libc::IFF_NO_PI), MAC).is_err(), "no header");
        assert!(Net::new(tap, MAC).is_ok());
    });
}
