//! Snapshots that somebody broke, by accident or with all checksums put right again.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use devices::virtio::device::{DeviceKind, DeviceState};
use devices::virtio::transport::state::{ConfigState, NegotiationState};
use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::directory::{MANIFEST, MEMORY, STATE};
use super::manifest::{GuestStage, HostKind, MemoryFile};
use super::*;
use crate::config::{BlockConfig, DeviceConfig, MachineConfig, RngConfig};
use crate::host::KernelMode;

const SIZE: u64 = 1 << 20;

fn here() -> HostKind {
    HostKind { arch: "x86_64".into(), kernel_mode: KernelMode::Hardware, boot_id: "one".into() }
}

fn rng() -> TransportState {
    TransportState {
        kind: DeviceKind::Rng,
        negotiation: NegotiationState {
            offered: 1 << 32,
            accepted: 0,
            offered_page: 0,
            accepted_page: 0,
            status: 0,
            selected: 0,
            queues: Vec::new(),
        },
        interrupt_status: 0,
        failed: false,
        config: ConfigState::default(),
        device: DeviceState::Rng,
    }
}

pub fn state(changed: Option<Vec<memory::Run>>) -> MachineState {
    let serial = devices::serial::SerialPort::new(devices::console::Console::new()).unwrap().save();
    let devices = vec![rng()];
    MachineState { vm: vm::example(), vcpus: vec![vcpu::example()], devices, serial, changed }
}

fn config() -> MachineConfig {
    let mut config =
        MachineConfig { vcpus: 1, devices: vec![DeviceConfig::Rng(RngConfig {})], ..Default::default() };
    config.memory.size = serde_json::from_str("\"1M\"").unwrap();
    config
}

pub fn example(id: u8) -> Manifest {
    Manifest {
        id: SnapshotId([id; 16]),
        parent: None,
        created: 1_790_000_000,
        vmm: "0.1.0".into(),
        host: here(),
        guest: GuestStage::Own,
        config: config(),
        memory: MemoryFile { size: SIZE, bytes: 4096, crc: 1 },
        state: manifest::StateFile { bytes: 0, crc: 0 },
        disks: Vec::new(),
    }
}

/// A snapshot called `name`, with `state`.
pub fn written(home: &Path, name: &str, manifest: &Manifest, state: &MachineState) -> PathBuf {
    let directory = home.join(name);
    let draft = Draft::create(&directory).unwrap();
    let memory = devices::memory::anonymous(&[(GuestAddress(0), 1 << 20)], false).unwrap();
    memory.write_slice(&[manifest.id.0[0]; 4096], GuestAddress(0x3000)).unwrap();
    let saved = memory::save(&memory, &draft.memory().unwrap(), manifest.id).unwrap();
    let file = draft.state(state).unwrap();
    let memory = MemoryFile { size: SIZE, bytes: saved.bytes, crc: saved.crc };
    draft.commit(&Manifest { memory, state: file, ..manifest.clone() }).unwrap();
    directory
}

/// Refused in one line, soon.
#[track_caller]
fn refused(directory: &Path, what: &str) -> String {
    let begin = Instant::now();
    let Err(error) = Loaded::open(directory, &here()).map(|_| ()) else { panic!("{what}: accepted") };
    let line = error.to_string();
    assert!(!line.is_empty() && !line.contains('\n'), "{what}: {line:?}");
    assert!(begin.elapsed().as_secs() < 10, "{what}");
    line
}

/// A generator of its own: the same cases every time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 11).unwrap() % sides
    }
}

#[test]
fn every_kind_of_damage_is_noticed() {
    let home = TempDir::new().unwrap();
    let directory = written(home.path(), "a", &example(1), &state(None));
    Loaded::open(&directory, &here()).unwrap().verify().unwrap();
    let mut dice = Dice(88172645463325252);
    let mut cases = 0;
    for name in [MANIFEST, STATE] {
        let path = directory.join(name);
        let whole = fs::read(&path).unwrap();
        for case in 0..1500 {
            let mut bytes = whole.clone();
            let at = dice.roll(bytes.len());
            match case % 5 {
                0 | 1 => bytes[at] ^= 1 << dice.roll(8),
                2 => bytes.truncate(at),
                3 => bytes.extend(std::iter::repeat_n(bytes[at], 1 + dice.roll(100))),
                // Two pieces change places.
                _ => bytes.rotate_left(1 + at % (whole.len() - 1)),
            }
            if bytes == whole {
                continue;
            }
            fs::write(&path, &bytes).unwrap();
            refused(&directory, &format!("{name}, case {case} at {at}"));
            cases += 1;
        }
        fs::write(&path, &whole).unwrap();
    }
    // Of the memory the last page is read at once, and all of it when somebody asks.
    let path = directory.join(MEMORY);
    let whole = fs::read(&path).unwrap();
    for case in 0..600 {
        let mut bytes = whole.clone();
        let at = match case % 3 {
            0 => usize::try_from(SIZE).unwrap() + dice.roll(4096),
            _ => dice.roll(bytes.len()),
        };
        match case % 4 {
            0 | 1 => bytes[at] ^= 1 << dice.roll(8),
            2 => bytes.truncate(at),
            _ => bytes.extend(vec![0; 1 + dice.roll(5000)]),
        }
        fs::write(&path, &bytes).unwrap();
        match Loaded::open(&directory, &here()) {
            // The guest's own bytes.
            Ok(loaded) => {
                assert_eq!(bytes.len(), whole.len(), "case {case}");
                let ours = usize::try_from(SIZE).unwrap();
                assert_eq!(bytes[ours..], whole[ours..], "case {case}");
                loaded.verify().unwrap_err();
            }
            Err(_) => {
                refused(&directory, &format!("memory, case {case} at {at}"));
            }
        }
        cases += 1;
    }
    assert!(cases > 3400, "{cases}");
    fs::write(&path, &whole).unwrap();
    Loaded::open(&directory, &here()).unwrap().verify().unwrap();
}

#[test]
fn files_of_two_snapshots_do_not_mix() {
    let home = TempDir::new().unwrap();
    let second = MachineState { devices: vec![rng(), rng()], ..state(None) };
    for name in [MANIFEST, STATE, MEMORY] {
        let a = written(home.path(), "a", &example(1), &state(None));
        let b = written(home.path(), "b", &Manifest { config: two(), ..example(2) }, &second);
        Loaded::open(&b, &here()).unwrap();
        fs::rename(a.join(name), home.path().join("x")).unwrap();
        fs::rename(b.join(name), a.join(name)).unwrap();
        fs::rename(home.path().join("x"), b.join(name)).unwrap();
        refused(&a, name);
        refused(&b, name);
    }
    // Within one.
    let a = written(home.path(), "a", &example(1), &state(None));
    for (one, other) in [(MANIFEST, STATE), (STATE, MEMORY), (MANIFEST, MEMORY)] {
        let swap = || {
            fs::rename(a.join(one), home.path().join("x")).unwrap();
            fs::rename(a.join(other), a.join(one)).unwrap();
            fs::rename(home.path().join("x"), a.join(other)).unwrap();
        };
        swap();
        refused(&a, one);
        swap();
    }
    Loaded::open(&a, &here()).unwrap();
    for name in [STATE, MEMORY] {
        fs::rename(a.join(name), home.path().join(name)).unwrap();
        refused(&a, "missing");
        std::os::unix::fs::symlink(home.path().join(name), a.join(name)).unwrap();
        refused(&a, "a link");
        fs::remove_file(a.join(name)).unwrap();
        fs::create_dir(a.join(name)).unwrap();
        refused(&a, "a directory");
        fs::remove_dir(a.join(name)).unwrap();
        // Nobody will ever write to it.
        rustix::fs::mkfifoat(rustix::fs::CWD, a.join(name), rustix::fs::Mode::RUSR).unwrap();
        refused(&a, "a pipe");
        fs::remove_file(a.join(name)).unwrap();
        fs::rename(home.path().join(name), a.join(name)).unwrap();
    }
}

fn two() -> MachineConfig {
    let mut config = config();
    config.devices.push(DeviceConfig::Rng(RngConfig {}));
    config
}

/// Puts `bytes` in the place of the state, and the manifest's checksums right.
fn forge(directory: &Path, manifest: &Manifest, bytes: &[u8]) {
    fs::write(directory.join(STATE), bytes).unwrap();
    let state = manifest::StateFile { bytes: bytes.len() as u64, crc: crc32fast::hash(bytes) };
    fs::write(directory.join(MANIFEST), Manifest { state, ..manifest.clone() }.encode()).unwrap();
}

#[test]
fn forged_state_is_read_or_refused() {
    let home = TempDir::new().unwrap();
    let directory = written(home.path(), "a", &example(1), &state(None));
    let manifest = directory::manifest(&directory).unwrap();
    let honest = fs::read(directory.join(STATE)).unwrap();
    let mut dice = Dice(1234567);
    let (mut read, mut not) = (0, 0);
    for _ in 0..4000 {
        let mut bytes = honest.clone();
        for _ in 0..1 + dice.roll(4) {
            let at = dice.roll(bytes.len());
            match dice.roll(4) {
                0 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][dice.roll(5)],
                1 => bytes[at] ^= 1 << dice.roll(8),
                2 => drop(bytes.drain(at..bytes.len().min(at + 1 + dice.roll(9)))),
                _ => drop(bytes.splice(at..at, std::iter::repeat_n(0xff, 1 + dice.roll(9)))),
            }
        }
        forge(&directory, &manifest, &bytes);
        match Loaded::open(&directory, &here()) {
            Ok(_) => read += 1,
            Err(error) => {
                assert!(!error.to_string().contains('\n'));
                not += 1;
            }
        }
    }
    assert!(read > 100 && not > 100, "{read} and {not}");
}

/// A byte of the file may stand for kilobytes in memory: the lists are bounded.
#[test]
fn short_files_do_not_become_long_lists() {
    let honest = postcard::to_stdvec(&state(None)).unwrap();
    let zeros = vec![0; 8 << 20];
    // After the three lists of the VM's own state come the vCPUs.
    let head = postcard::to_stdvec(&state(None).vm).unwrap();
    assert_eq!(honest[..head.len()], head);
    for list in [vec![], head.clone(), [&head[..], &[0]].concat()] {
        let begin = Instant::now();
        // A length of 2^27.
        let bytes = [&list[..], &[0x80, 0x80, 0x80, 0x40], &zeros].concat();
        assert!(postcard::from_bytes::<MachineState>(&bytes).is_err());
        assert!(begin.elapsed().as_millis() < 2000);
    }
    let many = MachineState { vcpus: vec![vcpu::example(); 65], ..state(None) };
    assert!(postcard::from_bytes::<MachineState>(&postcard::to_stdvec(&many).unwrap()).is_err());
    let most = MachineState { vcpus: vec![vcpu::example(); 64], ..state(None) };
    assert!(postcard::from_bytes::<MachineState>(&postcard::to_stdvec(&most).unwrap()).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let _ = postcard::from_bytes::<MachineState>(&bytes);
        let _ = Manifest::decode(&bytes);
        // With the first line that belongs to it.
        let line = format!("vmm-snapshot 1 {} {:08x}\n", bytes.len(), crc32fast::hash(&bytes));
        prop_assert!(Manifest::decode(&[line.as_bytes(), &bytes].concat()).is_err());
    }

    #[test]
    fn runs_of_pages_are_in_order_and_within(
        runs in proptest::collection::vec((0_u64..40, 0_u64..12), 0..6),
        huge in any::<u64>(),
    ) {
        let runs: Vec<_> = runs.into_iter().map(|(start, count)| memory::Run { start, count }).collect();
        let mut pages: Vec<u64> = runs.iter().flat_map(|run| run.start..run.start + run.count).collect();
        let listed = pages.clone();
        pages.sort_unstable();
        pages.dedup();
        let good = pages == listed && runs.iter().all(|run| run.count > 0) && pages.iter().all(|page| *page < 32);
        prop_assert_eq!(memory::are_pages_of(&runs, 32 * 4096), good);
        let far = memory::Run { start: huge, count: u64::MAX - 3 };
        prop_assert!(!memory::are_pages_of(&[far], u64::MAX));
    }
}

#[test]
fn diffs_that_repeat_their_pages_are_refused() {
    let home = TempDir::new().unwrap();
    let base = written(home.path(), "base", &example(1), &state(None));
    let parent = Some(manifest::Parent { id: SnapshotId([1; 16]), directory: base });
    let diff = Manifest { parent, ..example(2) };
    let run = |start, count| memory::Run { start, count };
    for (name, runs, good) in [
        ("good", vec![run(0, 2), run(5, 1)], true),
        ("again", vec![run(0, 256), run(0, 256)], false),
        ("back", vec![run(5, 1), run(0, 2)], false),
        ("beyond", vec![run(256, 1)], false),
        ("none", vec![run(1, 0)], false),
    ] {
        let directory = written(home.path(), name, &diff, &state(Some(runs)));
        let opened = Loaded::open(&directory, &here());
        assert_eq!(opened.is_ok(), good, "{name}: {:?}", opened.err());
    }
    // Its own parent, or one that is not there.
    let own = manifest::Parent { id: SnapshotId([2; 16]), directory: home.path().join("own") };
    let directory =
        written(home.path(), "own", &Manifest { parent: Some(own), ..example(2) }, &state(Some(vec![])));
    assert!(refused(&directory, "its own parent").contains("more than 32"));
}

#[test]
fn forged_manifests_are_refused() {
    let home = TempDir::new().unwrap();
    let directory = written(home.path(), "a", &example(1), &state(None));
    let honest = directory::manifest(&directory).unwrap();
    let block = |path: Option<&str>, read_only| {
        DeviceConfig::Block(BlockConfig { path: path.map(Into::into), read_only })
    };
    let disk = |slot| disks::SavedDisk {
        slot,
        read_only: true,
        size: 512,
        path: None,
        content: serde_json::from_str(r#"{"Whole":{"file":"disk-0","how":"reflink"}}"#).unwrap(),
    };
    let machine = |devices| MachineConfig { devices, ..config() };
    let mut forged = vec![
        // The guest would get the file, whatever it is, to write to.
        ("missing", Manifest { config: machine(vec![block(Some("/etc/shadow"), false)]), ..honest.clone() }),
        ("no disk", Manifest { disks: vec![disk(0)], ..honest.clone() }),
        ("no slot", Manifest { disks: vec![disk(usize::MAX)], ..honest.clone() }),
        (
            "twice",
            Manifest {
                config: machine(vec![block(None, true)]),
                disks: vec![disk(0), disk(0)],
                ..honest.clone()
            },
        ),
        (
            "writable",
            Manifest { config: machine(vec![block(None, false)]), disks: vec![disk(0)], ..honest.clone() },
        ),
        ("escapes", Manifest { vmm: "\u{1b}[2J".into(), ..honest.clone() }),
        ("devices", Manifest { config: two(), ..honest.clone() }),
        ("vcpus", Manifest { config: MachineConfig { vcpus: 2, ..config() }, ..honest.clone() }),
    ];
    for size in [0, 1, SIZE - 4096, SIZE + 4096, u64::MAX, u64::MAX - 4095, 1 << 63] {
        let memory = MemoryFile { size, ..honest.memory };
        forged.push(("memory", Manifest { memory, ..honest.clone() }));
    }
    for (what, manifest) in forged {
        fs::write(directory.join(MANIFEST), manifest.encode()).unwrap();
        refused(&directory, what);
    }
}

#[test]
fn what_others_can_write_is_not_restored() {
    let home = TempDir::new().unwrap();
    let directory = written(home.path(), "a", &example(1), &state(None));
    let chmod = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    for name in [MANIFEST, STATE, MEMORY] {
        let path = directory.join(name);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        chmod(&path, 0o620);
        assert!(refused(&directory, name).contains("chmod go-w"));
        chmod(&path, 0o644);
    }
    assert_eq!(fs::metadata(&directory).unwrap().permissions().mode() & 0o777, 0o700);
    chmod(&directory, 0o777);
    assert!(refused(&directory, "directory").contains("the directory"));
    chmod(&directory, 0o755);
    Loaded::open(&directory, &here()).unwrap();
    // Only root can give files away.
    if rustix::process::geteuid().is_root() {
        for name in [MANIFEST, STATE, MEMORY] {
            std::os::unix::fs::chown(directory.join(name), Some(4242), None).unwrap();
            assert!(refused(&directory, name).contains("another user (4242)"));
            std::os::unix::fs::chown(directory.join(name), Some(0), None).unwrap();
        }
    }
}
