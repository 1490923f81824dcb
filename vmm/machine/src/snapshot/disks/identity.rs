//! Which file it was, and what a file in the snapshot's directory may be called. No I/O but `fstat`.

use std::fs::File;

use rustix::fs::{FileType, SeekFrom, fstat, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A file's name in the snapshot's directory: one that leads nowhere else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FileName(String);

/// A name that could lead out of the snapshot's directory.
#[derive(Debug, Error)]
#[error("not a plain file name: {0:?}")]
pub struct NotAName(String);

impl FileName {
    /// What the copy of the disk in `slot` is called.
    pub fn of_slot(slot: usize) -> Self {
        FileName(format!("disk-{slot}"))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for FileName {
    type Error = NotAName;

    fn try_from(name: String) -> Result<Self, NotAName> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        match name.as_bytes() {
            [first, ..] if *first != b'.' && name.len() <= 100 && name.bytes().all(plain) => {
                Ok(FileName(name))
            }
            _ => Err(NotAName(name)),
        }
    }
}

impl From<FileName> for String {
    fn from(name: FileName) -> Self {
        name.0
    }
}

/// Whether a file of this name in a snapshot's directory is a disk's.
pub fn is_disk_file(name: &str) -> bool {
    let number = name.strip_prefix("disk-").and_then(|number| number.parse().ok());
    number.is_some_and(|slot| FileName::of_slot(slot).as_str() == name)
}

/// Which file it was. Who writes to it changes its time, who replaces it its number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Identity {
    /// A regular file.
    File {
        /// Device number of its file system.
        dev: u64,
        /// Its inode.
        ino: u64,
        /// Its bytes.
        size: u64,
        /// When it was last written: seconds.
        mtime: i64,
        /// And nanoseconds.
        mtime_ns: u64,
    },
    /// A block device. Its content has no time; that nobody writes to it is up to its owner.
    Device {
        /// Its number.
        rdev: u64,
        /// Its bytes.
        size: u64,
    },
}

impl Identity {
    /// Of an open file.
    pub fn of(file: &File) -> Result<Self, Errno> {
        let stat = fstat(file)?;
        let size = seek(file, SeekFrom::End(0))?;
        Ok(match FileType::from_raw_mode(stat.st_mode) {
            FileType::BlockDevice => Identity::Device { rdev: stat.st_rdev, size },
            _ => Identity::File {
                dev: stat.st_dev,
                ino: stat.st_ino,
                size,
                mtime: stat.st_mtime,
                mtime_ns: stat.st_mtime_nsec,
            },
        })
    }

    /// Bytes in it.
    pub fn size(&self) -> u64 {
        match self {
            Identity::File { size, .. } | Identity::Device { size, .. } => *size,
        }
    }

    /// What makes `now` another one; `None` when it is the same.
    pub fn changed(&self, now: &Identity) -> Option<&'static str> {
        if self == now {
            return None;
        }
        Some(match (self, now) {
            _ if self.size() != now.size() => "its size has changed",
            (Identity::File { dev, ino, .. }, Identity::File { dev: dev_now, ino: ino_now, .. })
                if (dev, ino) == (dev_now, ino_now) =>
            {
                "it was written"
            }
            _ => "it was replaced by another file",
        })
    }
}
