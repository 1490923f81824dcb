//! Opens a raw disk: a regular file or a block device, locked so that no two machines spoil it.

use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags, SeekFrom, flock, seek};
use rustix::io::Errno;
use thiserror::Error;

use super::open_no_wait;

/// virtio's unit of disks (virtio 1.2, 5.2).
pub const SECTOR: u64 = 512;

/// An open, locked disk. The lock goes with the last copy of the file descriptor.
#[derive(Debug)]
pub struct Disk {
    /// The open file.
    pub file: File,
    /// Its bytes: a multiple of [`SECTOR`], not 0.
    pub size: u64,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Where it was found, for messages.
    pub path: PathBuf,
}

/// A disk that cannot be used.
#[derive(Debug, Error)]
#[error("disk {}: {fault}", path.display())]
pub struct DiskError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    #[source]
    pub fault: DiskFault,
}

/// What is wrong with a disk, and what to do about it.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the message says it")]
pub enum DiskFault {
    #[error("it does not exist: check the path")]
    Missing,
    #[error("no permission to {0} it: change its owner or mode{1}")]
    Permission(&'static str, &'static str),
    #[error("it lies on a read-only file system: give the disk as read-only (,ro)")]
    ReadOnlyFileSystem,
    #[error("cannot {0} it: {1}")]
    Io(&'static str, std::io::Error),
    #[error("not a regular file or block device: give a raw image")]
    Kind,
    #[error("it is empty: make it with `truncate -s 1G FILE`, or copy it again")]
    Empty,
    #[error(
        "its {0} bytes are not whole sectors of {SECTOR}: if it is a raw image, `truncate -s %{SECTOR} FILE` fills it up"
    )]
    Size(u64),
    #[error("another machine (or another --disk) writes it: stop that one, or give it a copy")]
    Written,
    #[error(
        "another machine (or another --disk) uses it: give it to both as read-only (,ro), or give one a copy"
    )]
    InUse,
    #[error("it is mounted, or in use by the host: unmount it first, or give it as read-only (,ro)")]
    Claimed,
}

impl Disk {
    /// Opens and locks the disk: shared with other readers when `read_only`, alone otherwise.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        Self::try_open(path, read_only).map_err(|fault| DiskError { path: path.into(), fault })
    }

    fn try_open(path: &Path, read_only: bool) -> Result<Self, DiskFault> {
        // On a block device O_EXCL keeps out mounts and other claims; on a file, without O_CREAT, it says nothing.
        let flags = if read_only { OFlags::RDONLY } else { OFlags::RDWR | OFlags::EXCL };
        let file = open_no_wait(path, flags, Mode::empty()).map_err(|errno| open_fault(errno, read_only))?;
        let kind = file.metadata().map_err(|e| DiskFault::Io("look at", e))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskFault::Kind);
        }
        let size = seek(&file, SeekFrom::End(0)).map_err(|e| DiskFault::Io("measure", e.into()))?;
        if size == 0 {
            return Err(DiskFault::Empty);
        }
        if !size.is_multiple_of(SECTOR) {
            return Err(DiskFault::Size(size));
        }
        lock(&file, read_only)?;
        Ok(Self { file, size, read_only, path: path.into() })
    }
}

fn open_fault(errno: Errno, read_only: bool) -> DiskFault {
    match errno {
        Errno::NOENT | Errno::NOTDIR => DiskFault::Missing,
        Errno::ACCESS | Errno::PERM if read_only => DiskFault::Permission("read", ""),
        Errno::ACCESS | Errno::PERM => DiskFault::Permission("write", ", or give it as read-only (,ro)"),
        Errno::ROFS => DiskFault::ReadOnlyFileSystem,
        Errno::BUSY => DiskFault::Claimed,
        Errno::ISDIR | Errno::NXIO => DiskFault::Kind,
        other => DiskFault::Io("open", other.into()),
    }
}

/// `flock` belongs to the open file, not to the process: it also keeps one machine from using a disk twice, and it is what
/// udev minds before it probes a block device.
fn lock(file: &File, read_only: bool) -> Result<(), DiskFault> {
    let operation = match read_only {
        true => FlockOperation::NonBlockingLockShared,
        false => FlockOperation::NonBlockingLockExclusive,
    };
    match flock(file, operation) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) if read_only => Err(DiskFault::Written),
        Err(Errno::WOULDBLOCK) => Err(DiskFault::InUse),
        Err(e) => Err(DiskFault::Io("lock", e.into())),
    }
}
