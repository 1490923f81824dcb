//! A diff and the snapshots beneath it. Asked on the controller's thread before a machine stands still: a diff that nobody could
//! restore is not taken.

use std::fs;
use std::path::Path;

use super::SnapshotError;
use super::directory::{MAX_CHAIN, manifest};
use super::manifest::Parent;

/// Whether a difference to `parent` could be restored from `target`: all beneath it is still there and stays there, and there is not
/// too much of it.
///
/// # Errors
/// [`SnapshotError`], with the reason.
pub fn check(target: &Path, parent: &Parent) -> Result<(), SnapshotError> {
    let unfit = |reason| SnapshotError::Unfit { path: target.into(), reason };
    let mut layers = 1;
    let mut beneath = Some(parent.clone());
    while let Some(Parent { id, directory }) = beneath {
        layers += 1;
        if layers > MAX_CHAIN {
            return Err(unfit(format!(
                "it would be a diff over {MAX_CHAIN} others, which is too many: take a whole one"
            )));
        }
        if same(target, &directory) {
            return Err(unfit("the diff needs the one that it would replace: name another directory".into()));
        }
        let found = manifest(&directory).ok().filter(|found| found.id == id);
        let Some(found) = found else {
            return Err(unfit(format!(
                "the diff needs the one that was in {}, which is gone: take a whole one",
                directory.display()
            )));
        };
        beneath = found.parent;
    }
    Ok(())
}

fn same(a: &Path, b: &Path) -> bool {
    match (fs::canonicalize(a), fs::canonicalize(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::SnapshotId;
    use crate::snapshot::directory::MANIFEST;
    use crate::snapshot::manifest::tests::manifest as sample;

    /// A snapshot in `above`/`name` over `parent`.
    fn put(above: &Path, name: &str, parent: Option<&Parent>) -> Parent {
        let directory = above.join(name);
        fs::create_dir_all(&directory).unwrap();
        let id = SnapshotId::random().unwrap();
        let manifest = super::super::Manifest { id, parent: parent.cloned(), ..sample() };
        fs::write(directory.join(MANIFEST), manifest.encode()).unwrap();
        Parent { id, directory }
    }

    #[test]
    fn a_diff_never_replaces_what_it_needs() {
        let above = tempfile::tempdir().unwrap();
        let place = |name: &str| above.path().join(name);
        let whole = put(above.path(), "whole", None);
        let diff = put(above.path(), "diff", Some(&whole));
        for parent in [&whole, &diff] {
            check(&place("new"), parent).unwrap();
            let refused = check(&place("whole"), parent).unwrap_err().to_string();
            assert!(refused.contains("would replace"), "{refused}");
        }
        std::os::unix::fs::symlink(place("whole"), place("link")).unwrap();
        assert!(check(&place("diff/../link"), &diff).is_err());
    }

    #[test]
    fn all_beneath_must_still_be_there() {
        let above = tempfile::tempdir().unwrap();
        let new = above.path().join("new");
        let whole = put(above.path(), "whole", None);
        let diff = put(above.path(), "diff", Some(&whole));
        put(above.path(), "whole", None);
        assert!(check(&new, &diff).unwrap_err().to_string().contains("gone: take a whole one"));
        fs::remove_dir_all(&diff.directory).unwrap();
        assert!(check(&new, &diff).unwrap_err().to_string().contains("gone"));
    }

    #[test]
    fn no_more_diffs_are_taken_than_can_be_restored() {
        let above = tempfile::tempdir().unwrap();
        let new = above.path().join("new");
        let mut last = put(above.path(), "0", None);
        for number in 1..MAX_CHAIN {
            check(&new, &last).unwrap();
            last = put(above.path(), &number.to_string(), Some(&last));
        }
        assert!(check(&new, &last).unwrap_err().to_string().contains("too many"));
    }
}
