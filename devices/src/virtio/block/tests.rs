use std::fs::OpenOptions;
use std::io::{Read, Seek, SeekFrom, Write};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testing::{self, Driver, Guest, NEXT, WRITE};
use crate::virtio::Interrupt;

const SECTORS: u64 = 64;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

fn image(len: u64) -> File {
    let mut file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..len).map(|i| (i / 512 + i).to_le_bytes()[0]).collect();
    file.write_all(&bytes).unwrap();
    file
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut file = file;
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// A disk and its driver, without a loop: `serve` is the doorbell.
struct Bench {
    device: Block,
    driver: Driver,
}

impl Bench {
    fn new(file: &File, read_only: bool, features: u64) -> Self {
        let mut device = Block::new(file.try_clone().unwrap(), read_only, "disk0").unwrap();
        let driver = Driver::new(testing::memory(16 << 20), 0, 128);
        let queue = driver.queue(&Interrupt::new().unwrap());
        device.activate(features, vec![queue], &mut Watch::default()).unwrap();
        Bench { device, driver }
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        self.device.kicked(0, &mut Watch::default())
    }

    /// One request. Returns the status, what was read, and the used length.
    fn ask(&mut self, kind: u32, sector: u64, data: &[u8], room: usize) -> (u8, Vec<u8>, u32) {
        let (head, answers) = self.driver.send(&[&header(kind, sector), data], &[room, 1]);
        self.serve().unwrap();
        let (used, len) = self.driver.receive().unwrap();
        assert_eq!(used, u32::from(head));
        (self.driver.bytes(answers[1], 1)[0], self.driver.bytes(answers[0], room), len)
    }
}

#[test]
fn reads_writes_flushes_and_names_itself() {
    let file = image(SECTORS * 512);
    let before = contents(&file);
    let mut bench = Bench::new(&file, false, feature::FLUSH);
    assert_eq!(bench.ask(IN, 2, &[], 1024), (0, before[1024..2048].to_vec(), 1025));
    assert_eq!(bench.ask(OUT, 63, &[0xab; 512], 0), (0, vec![], 1));
    assert_eq!(bench.ask(FLUSH, 0, &[], 0), (0, vec![], 1));
    assert_eq!(contents(&file)[63 * 512..], [0xab; 512]);
    assert_eq!(bench.ask(GET_ID, 0, &[], 20), (0, b"disk0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec(), 21));
    let (status, id, used) = bench.ask(GET_ID, 0, &[], 32);
    assert_eq!(
        (status, &id[..5], used),
        (0, &b"disk0"[..], 20),
        "a gap before the status: only the name counts"
    );
    assert_eq!(bench.ask(77, 0, &[], 0).0, 2);
    assert_eq!(bench.ask(IN, 64, &[], 512).0, 1);
    assert_eq!(bench.ask(OUT, 64, &[0; 512], 0).0, 1);
    assert_eq!(contents(&file).len(), before.len(), "no write makes the file longer");
}

#[test]
fn writes_without_flush_last_at_once() {
    let file = image(512);
    let mut bench = Bench::new(&file, false, 0);
    assert!(bench.device.write_through);
    assert_eq!(bench.ask(OUT, 0, &[7; 512], 0).0, 0);
    assert_eq!(contents(&file), [7; 512]);
}

#[test]
fn a_read_only_disk_may_end_within_a_sector() {
    let file = image(512 + 100);
    let mut expected = contents(&file);
    expected.resize(1024, 0);
    let mut bench = Bench::new(&file, true, 0);
    assert_eq!(bench.device.profile().features, 0x66);
    assert_eq!(bench.device.profile().config[..8], 2u64.to_le_bytes());
    assert_eq!(bench.ask(IN, 0, &[], 1024), (0, expected, 1025));
    assert_eq!(bench.ask(OUT, 0, &[0; 512], 0), (1, vec![], 1));
    assert_eq!(bench.ask(FLUSH, 0, &[], 0).0, 0);
    assert_eq!(contents(&file).len(), 612);
}

#[test]
fn an_image_that_shrinks_fails_requests_not_the_device() {
    let file = image(SECTORS * 512);
    let mut bench = Bench::new(&file, false, feature::FLUSH);
    file.set_len(1024).unwrap();
    assert_eq!(bench.ask(IN, 1, &[], 1024).0, 1);
    assert_eq!(bench.ask(IN, 1, &[], 512).0, 0);
    assert_eq!(bench.device.failures, 1);
}

#[test]
fn header_and_status_may_lie_anywhere() {
    let file = image(SECTORS * 512);
    let before = contents(&file);
    let mut bench = Bench::new(&file, false, feature::FLUSH);
    // A header in three pieces, with the first data byte in the third; data in odd pieces; the status at the end of one.
    let mut out = header(OUT, 1).to_vec();
    out.extend([0xcd; 512]);
    let (_, status) = bench.driver.send(&[&out[..3], &out[3..10], &out[10..17], &out[17..]], &[1]);
    let (_, read) = bench.driver.send(&[&header(IN, 1)], &[1, 500, 12]);
    bench.serve().unwrap();
    assert_eq!(bench.driver.bytes(status[0], 1), [0]);
    assert_eq!(bench.driver.bytes(read[1], 500), [0xcd; 500]);
    assert_eq!(bench.driver.bytes(read[2], 12), [[0xcd; 11].as_slice(), &[0]].concat());
    assert_eq!(contents(&file)[1024..], before[1024..]);
}

#[test]
fn a_request_without_a_status_fails_the_device_and_one_without_a_header_itself() {
    let file = image(512);
    let mut bench = Bench::new(&file, false, 0);
    let (_, status) = bench.driver.send(&[b"short"], &[1]);
    bench.serve().unwrap();
    assert_eq!((bench.driver.receive(), bench.driver.bytes(status[0], 1)), (Some((0, 1)), vec![1]));
    bench.driver.send(&[&header(OUT, 0), &[9; 512]], &[]);
    assert!(bench.serve().is_err());
    assert_ne!(contents(&file), [9; 512]);
}

#[test]
fn unfit_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, [0; 700]).unwrap();
    let ro = || File::open(&path).unwrap();
    let rw = || OpenOptions::new().read(true).write(true).open(&path).unwrap();
    assert!(Block::new(ro(), true, "").is_ok());
    assert!(matches!(Block::new(ro(), false, "").err(), Some(DiskError::Mode(_))));
    assert!(matches!(Block::new(rw(), false, "").err(), Some(DiskError::Ragged(700))));
    let append = OpenOptions::new().read(true).append(true).open(&path).unwrap();
    assert!(matches!(Block::new(append, false, "").err(), Some(DiskError::Mode(_))));
    let blind = OpenOptions::new().write(true).open(&path).unwrap();
    assert!(matches!(Block::new(blind, true, "").err(), Some(DiskError::Mode("reading"))));
    assert!(matches!(Block::new(File::open(dir.path()).unwrap(), true, "").err(), Some(DiskError::Kind)));
    rw().set_len(0).unwrap();
    assert!(matches!(Block::new(rw(), false, "").err(), Some(DiskError::Empty)));
    let (pipe, _other) = io::pipe().unwrap();
    let pipe = File::from(std::os::fd::OwnedFd::from(pipe));
    assert!(matches!(Block::new(pipe, true, "").err(), Some(DiskError::Kind)));
}

#[test]
fn a_guest_reads_and_writes_through_its_registers() {
    let file = image(SECTORS * 512);
    let before = contents(&file);
    let mut guest = Guest::start(Box::new(Block::new(file.try_clone().unwrap(), false, "x").unwrap()), !0);
    assert_eq!((guest.get(0x008), guest.get(0x100), guest.get(0x10c)), (2, 64, 126));
    // A flush ends the turn: the loop comes back for the rest.
    let mut answers = Vec::new();
    for sector in 0..32 {
        answers.push(guest.drivers[0].send(&[&header(IN, sector)], &[512, 1]).1);
    }
    guest.drivers[0].send(&[&header(FLUSH, 0)], &[1]);
    guest.drivers[0].send(&[&header(OUT, 5), &[0x55; 512]], &[1]);
    testing::marking(&guest.drivers[0].memory.clone(), || {
        guest.kick(0);
        for _ in 0..34 {
            guest.receive(0);
        }
    });
    for (sector, answer) in answers.iter().enumerate() {
        assert_eq!(guest.drivers[0].bytes(answer[0], 512), before[sector * 512..][..512]);
    }
    assert_eq!(contents(&file)[5 * 512..6 * 512], [0x55; 512]);
    let (_, at) = guest.drivers[0].send(&[&header(IN, 99)], &[512, 1]);
    guest.kick(0);
    guest.receive(0);
    assert_eq!(guest.drivers[0].bytes(at[1], 1), [1]);
    let metrics = guest.transport.metrics();
    assert_eq!((metrics.requests, metrics.errors, metrics.config_changes), (35, 1, 0));
    assert_eq!(metrics.written_bytes, 35 * 16 + 512);
    assert_eq!(metrics.read_bytes, 32 * 513 + 2, "the failed one ends with a gap and its status");
    assert!(metrics.kicks >= 2 && (1..=35).contains(&metrics.interrupts), "{metrics:?}");
    guest.drivers[0].send(&[&header(IN, 0)], &[]);
    guest.kick(0);
    guest.wait_for_failure();
    let metrics = guest.transport.metrics();
    assert_eq!((metrics.requests, metrics.errors, metrics.config_changes), (35, 2, 1));
    assert_eq!(metrics.latency.iter().sum::<u64>(), 35);
}

#[test]
fn an_empty_slot_fails_requests_until_a_medium_is_attached() {
    let mut guest = Guest::start(Box::new(Block::empty(false, "spare")), !0);
    let capacity = |guest: &Guest| guest.get(0x100);
    let ask = |guest: &mut Guest, kind, sector, room| {
        let (_, at) = guest.drivers[0].send(&[&header(kind, sector)], &[room, 1]);
        guest.kick(0);
        guest.receive(0);
        (guest.drivers[0].bytes(at[1], 1)[0], guest.drivers[0].bytes(at[0], room))
    };
    assert_eq!((capacity(&guest), guest.get(0xfc)), (0, 0));
    for (kind, room) in [(IN, 512), (IN, 0), (OUT, 0), (FLUSH, 0)] {
        assert_eq!(ask(&mut guest, kind, 0, room).0, 1, "{kind}");
    }
    assert_eq!(ask(&mut guest, GET_ID, 0, 20).1[..5], *b"spare");

    let refused = guest.transport.attach(Backend::Disk(Medium::Raw(image(700))));
    assert!(refused.unwrap_err().to_string().contains("not a multiple of 512"));
    assert!(guest.transport.attach(Backend::Tap(image(512).into())).is_err());
    assert_eq!((capacity(&guest), guest.get(0xfc), guest.get(0x60) & 2), (0, 0, 0));

    // One waits in the ring, unannounced, while the medium comes.
    let file = image(SECTORS * 512);
    guest.drivers[0].send(&[&header(IN, 0)], &[512, 1]);
    guest.transport.attach(Backend::Disk(Medium::Raw(file.try_clone().unwrap()))).unwrap();
    assert_eq!((capacity(&guest), guest.get(0xfc)), (64, 1));
    assert_eq!(guest.get(0x60) & 2, 2, "the driver is told");
    guest.receive(0);
    assert_eq!(ask(&mut guest, IN, 2, 512), (0, contents(&file)[1024..1536].to_vec()));

    let held = guest.transport.quiesce().unwrap();
    guest.transport.attach(Backend::Disk(Medium::Raw(image(1024)))).unwrap();
    assert_eq!((capacity(&guest), guest.get(0xfc)), (2, 2));
    guest.transport.attach(Backend::Disk(Medium::Raw(image(1024)))).unwrap();
    assert_eq!(guest.get(0xfc), 2, "nothing to tell");
    guest.transport.resume(held).unwrap();
    assert_eq!(ask(&mut guest, IN, 2, 512).0, 1);
    assert_eq!(ask(&mut guest, IN, 1, 512).0, 0);
}

/// What a hostile or merely odd driver may send.
#[derive(Debug, Clone)]
struct Odd {
    kind: u32,
    sector: u64,
    data: usize,
    room: usize,
    cut: usize,
    fill: u8,
}

fn odd() -> impl Strategy<Value = Odd> {
    let kind =
        prop_oneof![6 => Just(IN), 6 => Just(OUT), 1 => Just(FLUSH), 1 => Just(GET_ID), 1 => any::<u32>()];
    let sector = prop_oneof![8 => 0..SECTORS, 2 => SECTORS - 2..SECTORS + 2, 1 => any::<u64>()];
    let len = || prop_oneof![6 => (0usize..6).prop_map(|n| n * 512), 1 => 0usize..2000];
    (kind, sector, len(), len(), 0usize..2100, any::<u8>())
        .prop_map(|(kind, sector, data, room, cut, fill)| Odd { kind, sector, data, room, cut, fill })
}

/// The disk as it should behave.
fn model(disk: &mut [u8], odd: &Odd, data: &[u8]) -> (u8, Option<Vec<u8>>) {
    let range = |len: usize| {
        let start = usize::try_from(odd.sector).ok()?.checked_mul(512)?;
        (len.is_multiple_of(512) && start.checked_add(len)? <= disk.len()).then_some(start..start + len)
    };
    match odd.kind {
        IN => match range(odd.room) {
            Some(range) => (0, Some(disk[range].to_vec())),
            None => (1, None),
        },
        OUT => match range(data.len()) {
            Some(range) => {
                disk[range].copy_from_slice(data);
                (0, None)
            }
            None => (1, None),
        },
        FLUSH => (0, None),
        GET_ID => (u8::from(odd.room < 20), None),
        _ => (2, None),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn behaves_like_an_array(requests in prop::collection::vec(odd(), 1..40)) {
        let file = image(SECTORS * 512);
        let mut expected = contents(&file);
        let mut bench = Bench::new(&file, false, feature::FLUSH);
        for odd in requests {
            let data: Vec<u8> = (0..odd.data).map(|i| odd.fill.wrapping_add(i.to_le_bytes()[0])).collect();
            let mut out = header(odd.kind, odd.sector).to_vec();
            out.extend(&data);
            // The readable and the writable part are each cut in two at any place; the status is wherever the end is.
            let (first, second) = out.split_at(odd.cut.min(out.len()));
            let whole = odd.room + 1;
            let cut = odd.cut.min(whole);
            let (_, answers) = bench.driver.send(&[first, second], &[cut, whole - cut]);
            bench.serve().unwrap();
            let (_, used) = bench.driver.receive().unwrap();
            let mut written = bench.driver.bytes(answers[0], cut);
            written.extend(bench.driver.bytes(answers[1], whole - cut));
            let (status, read) = model(&mut expected, &odd, &data);
            prop_assert_eq!(written[whole - 1], status);
            prop_assert!(used as usize <= whole);
            if let Some(read) = read {
                prop_assert_eq!((&written[..odd.room], used as usize), (&read[..], whole));
            }
        }
        prop_assert!(contents(&file) == expected);
    }

    /// Whatever is in the descriptors: the device answers or fails, and the file keeps its length.
    #[test]
    fn any_chain_ends(
        descriptors in prop::collection::vec((0u64..0x2_0000, 0u32..5000, 0u16..4, 0u16..8), 8),
        headers in prop::collection::vec((0u32..12, 0u64..80), 8),
    ) {
        let file = image(SECTORS * 512);
        let mut bench = Bench::new(&file, false, feature::FLUSH);
        for (i, (kind, sector)) in (0u64..).zip(headers) {
            bench.driver.memory.write_slice(&header(kind, sector), GuestAddress(0x8000 + i * 0x1000)).unwrap();
        }
        for (i, (address, len, flags, next)) in (0u16..).zip(descriptors) {
            let address = if flags & WRITE == 0 { 0x8000 + address % 8 * 0x1000 } else { address };
            bench.driver.descriptor(i, address, len, flags & (NEXT | WRITE), next);
        }
        for head in 0..8 {
            bench.driver.publish(head);
        }
        let _ = bench.serve();
        prop_assert_eq!(contents(&file).len() as u64, SECTORS * 512);
    }
}
