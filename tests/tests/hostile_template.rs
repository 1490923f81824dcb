//! A store of templates that somebody else could have filled.

#![allow(clippy::unwrap_used, reason = "tests may")]

use std::fs;
use std::os::unix::fs::PermissionsExt;

use tests::{Vmm, require_kvm, require_root};

#[test]
fn templates_that_others_could_write_are_not_used() {
    require_kvm!();
    require_root!();
    let home = tempfile::tempdir().unwrap();
    let store = home.path().join("templates");
    fs::create_dir(&store).unwrap();
    let set = format!("VMM_TEMPLATES={}", store.display());
    for (mode, owner) in [(0o777, 0), (0o700, 4242)] {
        fs::set_permissions(&store, fs::Permissions::from_mode(mode)).unwrap();
        std::os::unix::fs::chown(&store, Some(owner), None).unwrap();
        let ended = Vmm::container().within(&["env", &set]).shell("echo hi").run().expect(0);
        assert_eq!(ended.out(), "hi\n");
        assert_eq!(ended.err().lines().count(), 1, "{}", ended.transcript());
        assert!(ended.err().contains("so the guest boots"), "{}", ended.transcript());
        assert_eq!(fs::read_dir(&store).unwrap().count(), 0);
    }
}
