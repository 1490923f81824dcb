use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::snapshot::hostile_tests::{example, state, written};
use crate::snapshot::{Draft, directory};

#[test]
fn what_is_no_snapshot_stays_as_it_is() {
    let home = TempDir::new().unwrap();
    let foreign = home.path().join("project");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join(MANIFEST), "my own").unwrap();
    fs::write(foreign.join(STATE), "my own").unwrap();
    assert!(matches!(Draft::create(&foreign), Err(SnapshotError::Occupied { .. })));
    assert!(matches!(directory::remove(&foreign), Err(SnapshotError::None { .. })));
    assert_eq!(fs::read_dir(&foreign).unwrap().count(), 2);
    // A snapshot with something else in it.
    let mixed = written(home.path(), "mixed", &example(1), &state(None));
    fs::write(mixed.join("notes"), "my own").unwrap();
    assert!(matches!(Draft::create(&mixed), Err(SnapshotError::Occupied { .. })));
    assert!(directory::remove(&mixed).is_err());
    assert!(mixed.join("notes").exists());
    // Links and files.
    let link = home.path().join("link");
    std::os::unix::fs::symlink(home.path().join("nowhere"), &link).unwrap();
    assert!(matches!(Draft::create(&link), Err(SnapshotError::Occupied { .. })));
    let file = home.path().join("file");
    fs::write(&file, "x").unwrap();
    assert!(matches!(Draft::create(&file), Err(SnapshotError::Occupied { .. })));
    assert!(Draft::create(&file.join("below")).is_err());
    assert!(Draft::create(Path::new("/")).is_err());
}

#[test]
fn what_killed_ones_left_is_removed_and_nothing_else() {
    let home = TempDir::new().unwrap();
    let at = |name: &str| home.path().join(name);
    // Killed while it was written; while an older one was removed.
    fs::create_dir(at(".a.partial-1-0")).unwrap();
    fs::write(at(".a.partial-1-0").join("lock"), "").unwrap();
    written(home.path(), "old", &example(1), &state(None));
    fs::rename(at("old"), at(".a.partial-2-0")).unwrap();
    fs::remove_file(at(".a.partial-2-0").join(MEMORY)).unwrap();
    // Just made, and made long ago.
    fs::create_dir(at(".a.partial-3-0")).unwrap();
    fs::create_dir(at(".a.partial-4-0")).unwrap();
    let ago = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
    fs::File::open(at(".a.partial-4-0")).unwrap().set_modified(ago).unwrap();
    // Still at work; a trap; another's.
    let working = Draft::create(&at("a")).unwrap();
    fs::create_dir(at(".a.partial-5-0")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, at(".a.partial-5-0").join("lock"), rustix::fs::Mode::RUSR).unwrap();
    fs::create_dir(at(".b.partial-1-0")).unwrap();
    let next = Draft::create(&at("a")).unwrap();
    let mut left: Vec<_> =
        fs::read_dir(home.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    left.sort();
    let name = |draft: &Draft| draft.path().file_name().unwrap().to_str().unwrap().to_owned();
    let mut expected = vec![
        ".a.partial-3-0".into(),
        ".a.partial-5-0".into(),
        ".b.partial-1-0".into(),
        name(&working),
        name(&next),
    ];
    expected.sort();
    assert_eq!(left, expected);
}
