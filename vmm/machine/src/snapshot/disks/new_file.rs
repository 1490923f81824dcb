//! Files that are made here: mode 0600, never one that exists, and gone again unless somebody keeps them.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

use super::DiskError;

const PRIVATE: Mode = Mode::RUSR.union(Mode::WUSR);

/// A file that is being filled. Dropped before its end, it is removed.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    /// Its name, or for messages the directory of one without.
    path: PathBuf,
    named: bool,
}

impl NewFile {
    /// A new file at `path`.
    pub fn create(path: &Path) -> Result<Self, DiskError> {
        let file = make(path).map_err(|errno| fault(path, "create", errno.into()))?;
        Ok(NewFile { file, path: path.into(), named: true })
    }

    /// A new file at `keep`, locked as a disk that a machine writes; or else one without a name in `directory`.
    pub fn private(directory: &Path, keep: Option<&Path>) -> Result<Self, DiskError> {
        if let Some(path) = keep {
            let new = Self::create(path)?;
            flock(&new.file, FlockOperation::NonBlockingLockExclusive)
                .map_err(DiskError::io("lock", path))?;
            return Ok(new);
        }
        let file =
            unnamed(directory).map_err(|errno| fault(directory, "make a temporary file in", errno.into()))?;
        Ok(NewFile { file, path: directory.into(), named: false })
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What writing to it failed with.
    pub fn fault(&self, source: io::Error) -> DiskError {
        fault(&self.path, "write", source)
    }

    /// Makes its bytes last, and keeps it.
    pub fn finish(mut self) -> Result<(), DiskError> {
        self.file.sync_all().map_err(|source| self.fault(source))?;
        self.named = false;
        Ok(())
    }

    /// Keeps it, for a machine to write to.
    pub fn into_disk(mut self) -> Result<File, DiskError> {
        let file = self.file.try_clone().map_err(|source| self.fault(source))?;
        self.named = false;
        Ok(file)
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if self.named
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            log::warn!("{}: cannot remove what was not finished: {error}", self.path.display());
        }
    }
}

fn fault(path: &Path, what: &'static str, source: io::Error) -> DiskError {
    let path = path.into();
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            DiskError::NoRoom { path, source }
        }
        _ => DiskError::Io { what, path, source },
    }
}

fn make(path: &Path) -> Result<File, Errno> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, PRIVATE).map(File::from)
}

/// A file that no directory has: it is gone when its last descriptor is closed, however the process ends.
fn unnamed(directory: &Path) -> Result<File, Errno> {
    // O_EXCL: it will not get a name either.
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::EXCL | OFlags::CLOEXEC;
    match rustix::fs::open(directory, flags, PRIVATE) {
        // What file systems say that do not have it (open(2)).
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
            let mut random = [0; 8];
            getrandom(&mut random, GetRandomFlags::empty())?;
            let path = directory.join(format!(".vmm-disk-{:016x}", u64::from_le_bytes(random)));
            let file = make(&path)?;
            rustix::fs::unlink(&path)?;
            Ok(file)
        }
        other => other.map(File::from),
    }
}
