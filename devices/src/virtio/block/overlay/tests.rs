use std::io::Read;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::GuestMemory;
use crate::testing;
use crate::virtio::block::Medium;
use crate::virtio::chain::{Chain, Segment};

fn file(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

fn contents(mut file: &File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i / 512 + i).to_le_bytes()[0] ^ seed).collect()
}

/// What a snapshot does: reads through the overlay, without a guest.
fn flat(overlay: &Overlay) -> Vec<u8> {
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < overlay.size() {
        let at = bytes.len();
        match overlay.piece(at as u64, usize::MAX) {
            Piece::Zeros(len) => bytes.resize(at + len, 0),
            Piece::File(file, len) => {
                bytes.resize(at + len, 0);
                file.read_exact_at(&mut bytes[at..], at as u64).unwrap();
            }
        }
        assert!(bytes.len() > at, "pieces are not empty");
    }
    bytes
}

/// An overlay behind a disk, and guest memory to read from and write to.
struct Rig {
    memory: Arc<GuestMemory>,
    overlay: Arc<Overlay>,
    disk: Box<dyn Disk>,
}

impl Rig {
    fn new(overlay: Overlay) -> Self {
        let overlay = Arc::new(overlay);
        let disk = Medium::Overlay(overlay.clone()).open(false).unwrap();
        Rig { memory: testing::memory(16 << 20), overlay, disk }
    }

    /// Buffers for `len` bytes that are not beside each other and not aligned.
    fn chain(&self, len: usize, writable: bool) -> (Chain, Vec<(GuestAddress, usize)>) {
        let mut parts = Vec::new();
        let (mut at, mut left, mut part) = (0x10_0003u64, len, 700);
        while left > 0 {
            let now = left.min(part);
            parts.push((GuestAddress(at), now));
            at += now as u64 + 17;
            left -= now;
            part = part * 2 + 1;
        }
        let segment = |&(address, len)| Segment { address, len: u32::try_from(len).unwrap(), writable };
        let segments: Vec<_> = parts.iter().map(segment).collect();
        (Chain::new(0, self.memory.clone(), &segments).unwrap(), parts)
    }

    fn write(&mut self, offset: usize, data: &[u8]) -> io::Result<()> {
        let (mut chain, parts) = self.chain(data.len(), false);
        let mut rest = data;
        for (address, len) in parts {
            let (now, later) = rest.split_at(len);
            self.memory.write_slice(now, address).unwrap();
            rest = later;
        }
        self.disk.write(&mut chain.reader, offset as u64, data.len())
    }

    fn read(&mut self, offset: usize, len: usize) -> io::Result<Vec<u8>> {
        let (mut chain, parts) = self.chain(len, true);
        self.disk.read(&mut chain.writer, offset as u64, len)?;
        assert_eq!(chain.writer.written(), len);
        let mut data = vec![0; len];
        let mut at = 0;
        for (address, len) in parts {
            self.memory.read_slice(&mut data[at..at + len], address).unwrap();
            at += len;
        }
        Ok(data)
    }

    /// Copies the delta with its map, as a snapshot does.
    fn saved(&self) -> File {
        let copy = file(&contents(self.overlay.delta()));
        self.overlay.write_map(&copy).unwrap();
        copy
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write { sector: usize, sectors: usize, seed: u8 },
    Read { sector: usize, sectors: usize },
    Flush,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let place = || (0..200usize, 1..48usize);
    prop_oneof![
        4 => (place(), any::<u8>()).prop_map(|((sector, sectors), seed)| Step::Write { sector, sectors, seed }),
        3 => place().prop_map(|(sector, sectors)| Step::Read { sector, sectors }),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn is_a_disk(base_len in 1..100_000usize, steps in prop::collection::vec(step(), 1..40)) {
        let before = pattern(base_len, 0x5a);
        let base = file(&before);
        let mut model = before.clone();
        model.resize(base_len.next_multiple_of(512), 0);
        let mut rig = Rig::new(Overlay::new(base.try_clone().unwrap(), tempfile::tempfile().unwrap()).unwrap());
        prop_assert_eq!(rig.disk.sectors() * 512, model.len() as u64);
        for step in steps {
            match step {
                Step::Write { sector, sectors, seed } => {
                    let at = (sector * 512).min(model.len() - 512);
                    let len = (sectors * 512).min(model.len() - at);
                    let data = pattern(len, seed);
                    rig.write(at, &data).unwrap();
                    model[at..at + len].copy_from_slice(&data);
                }
                Step::Read { sector, sectors } => {
                    let at = (sector * 512).min(model.len() - 512);
                    let len = (sectors * 512).min(model.len() - at);
                    prop_assert!(rig.read(at, len).unwrap() == model[at..at + len]);
                }
                Step::Flush => rig.disk.flush().unwrap(),
                Step::Reopen => rig = Rig::new(Overlay::open(base.try_clone().unwrap(), rig.saved()).unwrap()),
            }
        }
        prop_assert!(rig.read(0, model.len()).unwrap() == model);
        prop_assert!(flat(&rig.overlay) == model);
        prop_assert!(contents(&base) == before, "the base is only read");
    }
}

#[test]
fn only_what_was_written_takes_room() {
    let base = file(&pattern(1 << 20, 0));
    let mut rig = Rig::new(Overlay::new(base, tempfile::tempfile().unwrap()).unwrap());
    rig.write(8192, &[1; 4096]).unwrap();
    rig.write(500 * 512, &[2; 512]).unwrap();
    let blocks = rig.overlay.delta().metadata().unwrap().blocks();
    assert!(blocks <= 16 * 2, "{blocks} sectors for two blocks");
    assert_eq!(
        rig.overlay.changes().collect::<Vec<_>>(),
        [8192..12288, 500 * 512 / 4096 * 4096..500 * 512 / 4096 * 4096 + 4096]
    );
    // A piece ends where the files meet.
    let len = |piece| match piece {
        Piece::File(_, len) | Piece::Zeros(len) => len,
    };
    assert_eq!(len(rig.overlay.piece(0, 1 << 20)), 8192);
    assert_eq!(len(rig.overlay.piece(9000, 1 << 20)), 12288 - 9000);
    assert_eq!(len(rig.overlay.piece(1 << 20, 1)), 0);
}

#[test]
fn a_failing_base_fails_requests_and_nothing_else() {
    let base = file(&pattern(16 * 4096, 0));
    let mut rig = Rig::new(Overlay::new(base.try_clone().unwrap(), tempfile::tempfile().unwrap()).unwrap());
    base.set_len(4096).unwrap();
    assert_eq!(rig.read(8192, 512).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    assert!(rig.write(8192 + 512, &[3; 512]).is_err(), "the rest of the block is gone");
    assert_eq!(rig.overlay.changes().count(), 0, "what failed was not written");
    rig.write(8192, &[3; 4096]).unwrap();
    assert_eq!(rig.read(8192, 4096).unwrap(), [3; 4096]);
}

#[test]
fn files_that_will_not_do() {
    let base = || file(&[1; 4096]);
    let refuse = |base, delta| Overlay::new(base, delta).unwrap_err().to_string();
    assert!(refuse(file(&[]), file(&[])).contains("base is empty"));
    assert!(refuse(base(), file(&[1])).contains("empty"));
    let same = base();
    assert!(refuse(same.try_clone().unwrap(), same).contains("another file"));
    assert!(refuse(File::open("/").unwrap(), file(&[])).contains("base is not"));
    assert!(refuse(base(), File::open("/dev/null").unwrap()).contains("regular"));
    let named = tempfile::NamedTempFile::new().unwrap();
    assert!(refuse(base(), File::open(named.path()).unwrap()).contains("reading and writing"));
    let huge = file(&[]);
    // Where the file system has so large files at all.
    if huge.set_len((16 << 40) + 1).is_ok() {
        assert!(refuse(huge, file(&[])).contains("16 TiB"));
    }
}

#[test]
fn a_map_that_somebody_touched_is_refused() {
    let base = file(&pattern(10 * 4096 + 100, 0));
    let mut rig = Rig::new(Overlay::new(base.try_clone().unwrap(), tempfile::tempfile().unwrap()).unwrap());
    rig.write(4096, &[9; 8192]).unwrap();
    rig.write(10 * 4096, &[8; 512]).unwrap();
    let saved = contents(&rig.saved());
    let start = 11 * 4096;
    assert_eq!(saved.len(), start + 2 * 4096);
    let open = |bytes: &[u8]| Overlay::open(base.try_clone().unwrap(), file(bytes));
    open(&saved).unwrap();
    // Every bit of the header, and of the map, counts.
    for byte in (start..start + 40).chain(start + 4096..start + 2 * 4096) {
        let mut bytes = saved.clone();
        bytes[byte] ^= 1 << (byte % 8);
        assert!(open(&bytes).is_err(), "byte {byte}");
    }
    for len in [0, 1, start - 1, start, start + 39, start + 4096, saved.len() - 1] {
        assert!(open(&saved[..len]).is_err(), "{len} bytes");
    }
    let live = contents(rig.overlay.delta());
    assert!(open(&live).is_err(), "a live delta has no map");
    let other = file(&pattern(10 * 4096 + 612, 0));
    assert!(Overlay::open(other, file(&saved)).is_err(), "another base");
}

#[test]
fn prepared_without_a_device() {
    let mut rig =
        Rig::new(Overlay::new(file(&pattern(8192 + 100, 0)), tempfile::tempfile().unwrap()).unwrap());
    rig.overlay.write_at(&[7; 5000], 100).unwrap();
    assert_eq!(rig.read(0, 8704).unwrap()[100..5100], [7; 5000]);
    assert_eq!(rig.read(0, 512).unwrap()[..100], pattern(8192, 0)[..100]);
    rig.overlay.write_at(&[1], 8703).unwrap();
    assert!(rig.overlay.write_at(&[1, 2], 8703).is_err());
    assert!(rig.overlay.write_at(&[1], u64::MAX).is_err());
}
