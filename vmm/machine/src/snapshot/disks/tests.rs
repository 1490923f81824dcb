use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use mount::{Mount, run};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

mod mount;

/// What this host must have for a test; the test is over where it has not.
macro_rules! or_skip {
    ($what:expr, $needs:expr) => {
        match $what {
            Some(value) => value,
            None => {
                println!("skipped: {} needs {}", std::thread::current().name().unwrap_or("a test"), $needs);
                return;
            }
        }
    };
}

fn live(slot: usize, planned: &plan::Disk) -> LiveDisk {
    let medium = Medium::Raw(planned.file.try_clone().unwrap());
    LiveDisk { slot, path: Some(planned.path.clone()), read_only: planned.read_only, medium, base: None }
}

fn disk_in(directory: &Path, name: &str, bytes: &[u8]) -> LiveDisk {
    let path = directory.join(name);
    std::fs::write(&path, bytes).unwrap();
    let planned = plan::Disk::open(&path, false).unwrap();
    live(3, &planned)
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i / 512 + i).to_le_bytes()[0] | 1).collect()
}

/// What the guest sees.
fn contents(medium: &Medium) -> Vec<u8> {
    let mut bytes = Vec::new();
    match medium {
        Medium::Raw(file) => {
            bytes.resize(usize::try_from(seek(file, SeekFrom::End(0)).unwrap()).unwrap(), 0);
            file.read_exact_at(&mut bytes, 0).unwrap();
        }
        Medium::Overlay(overlay) => {
            let to = tempfile::NamedTempFile::new().unwrap();
            let path = to.path().with_extension("flat");
            let flat = NewFile::create(&path).unwrap();
            copy::flattened(overlay, &path, &flat).unwrap();
            bytes = std::fs::read(&path).unwrap();
        }
    }
    bytes
}

fn write(medium: &Medium, data: &[u8], offset: u64) {
    match medium {
        Medium::Raw(file) => file.write_all_at(data, offset).unwrap(),
        Medium::Overlay(overlay) => overlay.write_at(data, offset).unwrap(),
    }
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Through JSON and back, as in a snapshot.
fn stored(saved: &SavedDisk) -> SavedDisk {
    let again = serde_json::from_str(&serde_json::to_string(saved).unwrap()).unwrap();
    assert_eq!(*saved, again);
    again
}

/// Saves, changes the original, restores, writes to the restored one, restores again: nobody sees the others' changes.
fn goes_round(
    original: &LiveDisk,
    directory: &Path,
    scratch: &Path,
    lean: Lean,
) -> (SavedDisk, LiveDisk, How) {
    let before = contents(&original.medium);
    let saved = stored(&save(original, directory, lean).unwrap().finish().unwrap());
    assert_eq!((saved.slot, saved.size, saved.read_only), (3, before.len() as u64, false));
    write(&original.medium, &[0xee; 1024], 512);
    let files = names(directory);
    let (first, how) = open_for_restore(&saved, directory, scratch, None).unwrap();
    assert!(contents(&first.medium) == before);
    write(&first.medium, &[0xdd; 5000], 300);
    let (second, _) = open_for_restore(&saved, directory, scratch, None).unwrap();
    assert!(contents(&second.medium) == before, "another machine's writes are in the snapshot");
    let mut changed = before;
    changed[300..5300].fill(0xdd);
    assert!(contents(&first.medium) == changed);
    assert_eq!(names(directory), files);
    (saved, first, how)
}

#[test]
fn saved_and_restored() {
    let (home, snapshot, scratch) =
        (TempDir::new().unwrap(), TempDir::new().unwrap(), TempDir::new().unwrap());
    let original = disk_in(home.path(), "disk", &pattern(70_000 / 512 * 512));
    let (saved, restored, how) = goes_round(&original, snapshot.path(), scratch.path(), Lean::OnNothing);
    assert!(matches!(&saved.content, Content::Whole { file, .. } if file.as_str() == "disk-3"));
    assert_eq!(saved.outside(), None);
    assert_eq!(
        std::fs::metadata(snapshot.path().join("disk-3")).unwrap().permissions().mode() & 0o7777,
        0o600
    );
    assert!(names(scratch.path()).is_empty(), "temporary files have no names");
    // A restored machine's disk is an overlay here, or a reflink on a better file system: it is saved and restored as any other.
    let next = TempDir::new().unwrap();
    let (whole, ..) = goes_round(&restored, next.path(), scratch.path(), Lean::OnNothing);
    assert_eq!(whole.outside(), None);
    if how == How::Overlay {
        let next = TempDir::new().unwrap();
        let (leaning, again, how) = goes_round(&restored, next.path(), scratch.path(), Lean::OnBases);
        assert_eq!(how, How::Overlay);
        assert_eq!(leaning.outside(), Some(snapshot.path().join("disk-3").as_path()));
        let kept = scratch.path().join("kept");
        let (disk, how) = open_for_restore(&leaning, next.path(), scratch.path(), Some(&kept)).unwrap();
        assert_eq!(how, How::SparseCopy);
        assert!(std::fs::read(&kept).unwrap() == contents(&disk.medium));
        drop(again);
        // Its base may not change.
        write(
            &Medium::Raw(File::options().write(true).open(snapshot.path().join("disk-3")).unwrap()),
            b"x",
            0,
        );
        let error = open_for_restore(&leaning, next.path(), scratch.path(), None).unwrap_err();
        assert!(error.to_string().contains("it was written since"), "{error}");
    }
}

#[test]
fn a_named_disk_stands_for_itself() {
    let (home, snapshot) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let original = disk_in(home.path(), "disk", &pattern(8192));
    let saved = save(&original, snapshot.path(), Lean::OnNothing).unwrap().finish().unwrap();
    let kept = home.path().join("kept");
    let (disk, how) = open_for_restore(&saved, snapshot.path(), home.path(), Some(&kept)).unwrap();
    assert_ne!(how, How::Overlay);
    write(&disk.medium, &[1; 512], 0);
    assert_eq!(std::fs::read(&kept).unwrap()[..512], [1; 512]);
    assert!(plan::Disk::open(&kept, false).is_err(), "it is locked");
    // What is there is never overwritten, nor removed.
    let error = open_for_restore(&saved, snapshot.path(), home.path(), Some(&kept)).unwrap_err();
    assert!(error.to_string().contains("cannot create"), "{error}");
    assert!(kept.exists());
    assert!(save(&original, snapshot.path(), Lean::OnNothing).is_err());
    assert!(snapshot.path().join("disk-3").exists());
}

#[test]
fn a_draft_that_is_not_finished_is_gone() {
    let (home, snapshot) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let original = disk_in(home.path(), "disk", &pattern(8192));
    let draft = save(&original, snapshot.path(), Lean::OnNothing).unwrap();
    assert_eq!(names(snapshot.path()), ["disk-3"]);
    drop(draft);
    assert!(names(snapshot.path()).is_empty());
}

#[test]
fn read_only_disks_stay_where_they_are() {
    let (home, snapshot) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let path = home.path().join("image");
    std::fs::write(&path, pattern(8192)).unwrap();
    let planned = plan::Disk::open(&path, true).unwrap();
    let saved = save(&live(0, &planned), snapshot.path(), Lean::OnNothing).unwrap();
    let saved = stored(&saved.finish().unwrap());
    assert_eq!(saved.how().to_string(), "shared, read-only");
    assert_eq!(saved.outside(), Some(path.as_path()));
    assert!(names(snapshot.path()).is_empty());
    let open = |saved: &SavedDisk| open_for_restore(saved, snapshot.path(), home.path(), None);
    let (disk, how) = open(&saved).unwrap();
    assert_eq!((how, disk.read_only), (How::Shared, true));
    // Without a name it could not be found again.
    let unnamed = LiveDisk { path: None, slot: 7, ..live(0, &planned) };
    let copied = save(&unnamed, snapshot.path(), Lean::OnNothing).unwrap().finish().unwrap();
    assert_eq!((copied.outside(), names(snapshot.path())), (None, vec!["disk-7".to_owned()]));
    let (copy, how) = open(&copied).unwrap();
    assert_eq!((how, copy.read_only, contents(&copy.medium)), (How::Shared, true, pattern(8192)));
    drop((disk, planned));

    let refused = |saved: &SavedDisk, why: &str| {
        let error = open(saved).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    };
    refused(&SavedDisk { read_only: false, ..saved.clone() }, "writable, but not in the snapshot");
    refused(&SavedDisk { size: 4096, ..saved.clone() }, "two sizes");
    refused(&SavedDisk { size: 0, ..saved.clone() }, "sectors");
    let Content::Shared { identity, .. } = saved.content.clone() else { panic!("{saved:?}") };
    let content = Content::Shared { path: "/dev/null".into(), identity };
    refused(&SavedDisk { content, ..saved.clone() }, "not a regular file");
    File::options().write(true).open(&path).unwrap().write_all_at(b"!", 0).unwrap();
    refused(&saved, "it was written since");
    std::fs::rename(&path, home.path().join("old")).unwrap();
    refused(&saved, "does not exist");
    std::fs::write(&path, pattern(8192)).unwrap();
    refused(&saved, "replaced by another file");
    std::fs::write(&path, pattern(4096)).unwrap();
    refused(&saved, "its size has changed");
}

#[test]
fn damaged_snapshots_are_refused() {
    let (home, snapshot) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let original = disk_in(home.path(), "disk", &pattern(8192));
    let saved = save(&original, snapshot.path(), Lean::OnNothing).unwrap().finish().unwrap();
    let path = snapshot.path().join("disk-3");
    let refused = |why: &str| {
        let error = open_for_restore(&saved, snapshot.path(), home.path(), None).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    };
    let writer = plan::Disk::open(&path, false).unwrap();
    refused("another machine writes it");
    writer.file.set_len(4096).unwrap();
    drop(writer);
    refused("another size");
    std::fs::remove_file(&path).unwrap();
    refused("missing");
    std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
    refused("a link");
    std::fs::remove_file(&path).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, Mode::RUSR, 0).unwrap();
    refused("not a regular file");
    assert_eq!(names(home.path()), ["disk"]);
}

#[test]
fn names_lead_nowhere_else() {
    for name in ["disk0.raw", "a", "A-b_c.9"] {
        assert_eq!(serde_json::from_str::<FileName>(&format!("{name:?}")).unwrap().as_str(), name);
    }
    assert!(is_disk_file("disk-0") && is_disk_file("disk-17"));
    assert!(!["disk-", "disk-01", "disk-x", "disk-+1", "disk", "xdisk-1"].into_iter().any(is_disk_file));
    let long = "x".repeat(101);
    for name in ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\0b", ".hidden", "a b", "é", &long] {
        assert!(serde_json::from_str::<FileName>(&serde_json::to_string(name).unwrap()).is_err(), "{name:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// On this file system, and from one to another, where the kernel does not copy.
    #[test]
    fn copies_are_equal_and_no_larger(parts in prop::collection::vec((0..200u64, 1..20usize, any::<u8>()), 0..6), tail in 0..3u64) {
        let home = TempDir::new().unwrap();
        let mut places = vec![TempDir::new().unwrap()];
        places.extend(TempDir::new_in("/dev/shm").ok());
        let path = home.path().join("disk");
        let source = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
        let mut model = vec![0; 230 * 4096 + usize::try_from(tail).unwrap() * 512];
        source.set_len(model.len() as u64).unwrap();
        for (block, blocks, byte) in parts {
            source.write_all_at(&vec![byte; blocks * 4096], block * 4096).unwrap();
            let at = usize::try_from(block).unwrap() * 4096;
            model[at..at + blocks * 4096].fill(byte);
        }
        for place in &places {
            let to = NewFile::create(&place.path().join("copy")).unwrap();
            copy::sparsely(&source, &path, &to).unwrap();
            prop_assert!(std::fs::read(place.path().join("copy")).unwrap() == model);
            let [from, copy] = [&source, to.file()].map(|f| f.metadata().unwrap().blocks());
            prop_assert!(copy <= from.max(8), "{copy} sectors instead of {from}");
        }
    }
}

#[test]
fn zeros_become_holes_on_the_way_from_a_device() {
    let home = TempDir::new().unwrap();
    let path = home.path().join("image");
    let mut bytes = pattern(3 << 20);
    bytes[4096..2 << 20].fill(0);
    std::fs::write(&path, &bytes).unwrap();
    let device = or_skip!(run("losetup", &["-f", "--show", path.to_str().unwrap()]), "root and loop devices");
    let saved = plan::Disk::open(Path::new(&device), false)
        .map(|planned| save(&live(1, &planned), home.path(), Lean::OnNothing).unwrap().finish().unwrap());
    let shared = plan::Disk::open(Path::new(&device), true)
        .map(|planned| save(&live(2, &planned), home.path(), Lean::OnNothing).unwrap().finish().unwrap());
    let again =
        open_for_restore(shared.as_ref().unwrap(), home.path(), home.path(), None).map(|(_, how)| how);
    run("losetup", &["-d", &device]).unwrap();
    assert_eq!(saved.unwrap().size, 3 << 20);
    assert!(matches!(shared.unwrap().content, Content::Shared { identity: Identity::Device { .. }, .. }));
    assert_eq!(again.unwrap(), How::Shared);
    let copy = home.path().join("disk-1");
    assert!(std::fs::read(&copy).unwrap() == bytes);
    assert!(std::fs::metadata(&copy).unwrap().blocks() * 512 <= (1 << 20) + 8192);
}

#[test]
fn reflinks_where_the_file_system_has_them() {
    let mount = or_skip!(Mount::reflinks(), "root, loop devices and mkfs.xfs or mkfs.btrfs");
    let place = |name: &str| {
        let path = mount.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    };
    let (home, snapshot, scratch, next) = (place("home"), place("snapshot"), place("scratch"), place("next"));
    let original = disk_in(&home, "disk", &pattern(1 << 20));
    let (saved, restored, how) = goes_round(&original, &snapshot, &scratch, Lean::OnNothing);
    assert_eq!(how, How::Reflink);
    assert!(matches!(saved.content, Content::Whole { how: How::Reflink, .. }));
    goes_round(&restored, &next, &scratch, Lean::OnBases);
    // An overlay is made whole by a reflink of its base, and what is a hole in its delta is zeros, not the base's bytes.
    let base = File::open(snapshot.join("disk-3")).unwrap();
    let overlay = Overlay::new(base, tempfile::tempfile_in(&scratch).unwrap()).unwrap();
    overlay.write_at(&[5; 8192], 512).unwrap();
    overlay.write_at(&[0; 65536], 131_072).unwrap();
    fn punch(file: &File) {
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(file, flags, 131_072, 65536).unwrap();
    }
    punch(overlay.delta());
    let mut expected = pattern(1 << 20);
    expected[512..8704].fill(5);
    expected[131_072..196_608].fill(0);
    let live = LiveDisk {
        slot: 9,
        path: None,
        read_only: false,
        medium: Medium::Overlay(Arc::new(overlay)),
        base: Some(snapshot.join("disk-3")),
    };
    let draft = save(&live, &snapshot, Lean::OnBases).unwrap();
    assert_eq!(draft.finish().unwrap().how(), How::Reflink);
    assert!(std::fs::read(snapshot.join("disk-9")).unwrap() == expected);
}

#[test]
fn without_room_nothing_is_left() {
    let mount = or_skip!(Mount::tmpfs("256k"), "root");
    let home = TempDir::new().unwrap();
    let original = disk_in(home.path(), "disk", &pattern(1 << 20));
    let error = save(&original, mount.path(), Lean::OnNothing).unwrap_err();
    assert!(
        matches!(&error, DiskError::NoRoom { path, .. } if *path == mount.path().join("disk-3")),
        "{error}"
    );
    assert!(names(mount.path()).is_empty());
    let saved = save(&original, home.path(), Lean::OnNothing).unwrap().finish().unwrap();
    let kept = mount.path().join("kept");
    let error = open_for_restore(&saved, home.path(), mount.path(), Some(&kept)).unwrap_err();
    assert!(matches!(error, DiskError::NoRoom { .. }), "{error}");
    assert!(names(mount.path()).is_empty());
    // An overlay needs room only for what is written; where there is none, writing fails and the block stays as it was.
    let (disk, how) = open_for_restore(&saved, home.path(), mount.path(), None).unwrap();
    assert_eq!(how, How::Overlay);
    let Medium::Overlay(overlay) = &disk.medium else { panic!("{how}") };
    let failed = (0..128).find(|i| overlay.write_at(&[9; 8192], i * 8192).is_err()).unwrap();
    assert_eq!(failed, 32, "as much as fits");
    let bytes = contents(&disk.medium);
    let end = usize::try_from(failed).unwrap() * 8192;
    assert!(bytes[..end].iter().all(|b| *b == 9) && bytes[end + 8192..] == pattern(1 << 20)[end + 8192..]);
}
