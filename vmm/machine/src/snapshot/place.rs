//! What lies at the path of a snapshot: nothing, a snapshot, what is left of one, or something that is none of our business and
//! must stay as it is. Called by whoever writes or removes one, on that thread.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};

use super::directory::{LOCK, MANIFEST, MEMORY, STATE};
use super::{SnapshotError, disks, manifest};

/// A vmm makes a directory and locks it at once: one that is older than this and was never locked is nobody's.
const MAKING: Duration = Duration::from_secs(60);

/// Opens a regular file and nothing else: a pipe in its place must not hold us up, and a link leads elsewhere.
pub fn open(path: &Path) -> io::Result<File> {
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}

/// Whether something is at `target` that is neither a snapshot nor an empty directory.
pub fn occupied(target: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(target) {
        Ok(found) if !found.is_dir() => return Ok(true),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    }
    let mut empty = true;
    for entry in fs::read_dir(target)? {
        empty = false;
        // Whoever keeps anything else there would lose it.
        if !is_ours(&entry?.file_name()) {
            return Ok(true);
        }
    }
    Ok(!empty && !is_snapshot(target))
}

/// Whether a file of this name is a snapshot's.
fn is_ours(name: &std::ffi::OsStr) -> bool {
    [MANIFEST, STATE, MEMORY, LOCK].iter().any(|ours| name == *ours)
        || name.to_str().is_some_and(disks::is_disk_file)
}

/// Whether `directory` has a manifest, damaged or not. Other programs have files of that name too.
fn is_snapshot(directory: &Path) -> bool {
    let mut begin = [0; manifest::MAGIC.len()];
    let read = open(&directory.join(MANIFEST)).and_then(|mut file| file.read_exact(&mut begin));
    read.is_ok() && begin == *manifest::MAGIC.as_bytes()
}

/// Removes directories in `parent` that a killed vmm was writing, or was about to remove.
pub fn remove_abandoned(parent: &Path, prefix: &str) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten().filter(|e| e.file_name().to_string_lossy().starts_with(prefix)) {
        let path = entry.path();
        match open(&path.join(LOCK)) {
            Ok(lock) if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() => {
                let _ = fs::remove_dir_all(path);
            }
            Ok(_) => {}
            // Its lock went when it was a snapshot, and another has taken its place since.
            Err(_) if is_snapshot(&path) => {
                let _ = fs::remove_dir_all(path);
            }
            // Somebody was killed before the lock was made, or is about to make it.
            Err(error) if error.kind() == io::ErrorKind::NotFound && is_old(&path) => {
                let _ = fs::remove_dir_all(path);
            }
            Err(_) => {}
        }
    }
}

/// Removes an older snapshot whose place was taken. The manifest goes last: until then [`remove_abandoned`] knows what it is.
pub fn remove_replaced(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_name() != *MANIFEST {
            let _ = fs::remove_file(entry.path());
        }
    }
    let _ = fs::remove_dir_all(directory);
}

fn is_old(path: &Path) -> bool {
    let made = fs::symlink_metadata(path).and_then(|found| found.modified());
    made.is_ok_and(|made| SystemTime::now().duration_since(made).is_ok_and(|age| age > MAKING))
}

/// Removes the snapshot in `directory`, and nothing that is not a snapshot's.
///
/// # Errors
/// When it is not a snapshot, or the file system refuses.
pub fn remove(directory: &Path) -> Result<(), SnapshotError> {
    let failed = |source| SnapshotError::Io { path: directory.into(), what: "cannot be removed", source };
    if !is_snapshot(directory) {
        return Err(SnapshotError::None { path: directory.into() });
    }
    let entries = fs::read_dir(directory).map_err(failed)?;
    // The manifest goes first: what is left of a removal that was cut short is no snapshot any more.
    fs::remove_file(directory.join(MANIFEST)).map_err(failed)?;
    for entry in entries.flatten().filter(|entry| is_ours(&entry.file_name())) {
        match fs::remove_file(entry.path()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
    }
    fs::remove_dir(directory).map_err(failed)
}

#[cfg(test)]
#[path = "place_tests.rs"]
mod tests;
