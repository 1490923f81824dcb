//! Who may have written a snapshot. Its owner decides what a restored machine is: which files of the host its guest reads
//! (read-only disks, parents), which TAP it is plugged into, what runs in it. Its memory file stays mapped for as long as the machine
//! lives, and who cuts that short kills the machine.
//!
//! So what is restored belongs to us or to root, and nobody else can write to it. A snapshot of somebody else's becomes ours by
//! copying it: a decision that a person makes. Called with open files, so that what is checked is what is used.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;

use rustix::process::geteuid;
use thiserror::Error;

/// Somebody else could have written it.
#[derive(Debug, PartialEq, Eq, Error)]
#[allow(missing_docs, reason = "the message says it")]
pub enum Untrusted {
    #[error(
        "{what} belongs to another user ({owner}), who could change it: copy the snapshot if you trust them"
    )]
    Owner { what: String, owner: u32 },
    #[error("others than its owner may write {what} (mode {mode:03o}): chmod go-w it if you trust them")]
    Writable { what: String, mode: u32 },
}

/// Checks one file, or a directory, that messages call `what`.
pub fn check(file: &File, what: &str) -> io::Result<Result<(), Untrusted>> {
    Ok(judge(&file.metadata()?, geteuid().as_raw(), what))
}

fn judge(found: &Metadata, us: u32, what: &str) -> Result<(), Untrusted> {
    let (owner, mode) = (found.uid(), found.mode() & 0o7777);
    if owner != us && owner != 0 {
        return Err(Untrusted::Owner { what: what.into(), owner });
    }
    if mode & 0o022 != 0 {
        return Err(Untrusted::Writable { what: what.into(), mode });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn only_what_we_or_root_wrote_alone() {
        let file = tempfile::tempfile().unwrap();
        let owner = file.metadata().unwrap().uid();
        let judged = |mode, us| {
            file.set_permissions(Permissions::from_mode(mode)).unwrap();
            judge(&file.metadata().unwrap(), us, "memory")
        };
        for mode in [0o600, 0o400, 0o644, 0o755] {
            assert_eq!(judged(mode, owner), Ok(()));
        }
        for mode in [0o660, 0o602, 0o777, 0o620] {
            assert_eq!(judged(mode, owner), Err(Untrusted::Writable { what: "memory".into(), mode }));
        }
        // Root's are anybody's to trust; those of others are not.
        let stranger = judged(0o600, owner + 1);
        let expected = Err(Untrusted::Owner { what: "memory".into(), owner });
        assert_eq!(stranger, if owner == 0 { Ok(()) } else { expected });
    }
}
