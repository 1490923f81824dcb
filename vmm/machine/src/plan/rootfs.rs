//! Is this file a file system that a container's root can be? Recognised by its superblock, never mounted here. Used by
//! the command on the main thread, before the file becomes a disk.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, SeekFrom, seek};
use thiserror::Error;

use super::open_no_wait;

/// Enough for every magic number that is looked for; btrfs's is at 65,600.
const HEAD: usize = 68 << 10;

/// A file system that Linux can mount as a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// EROFS, what vmm's own images are made of.
    Erofs,
    /// ext2, ext3 or ext4: the ext4 driver mounts them all.
    Ext4,
    /// Squashfs.
    Squashfs,
    /// XFS.
    Xfs,
    /// Btrfs.
    Btrfs,
}

impl FileSystem {
    /// The name that `mount -t` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Erofs => "erofs",
            Self::Ext4 => "ext4",
            Self::Squashfs => "squashfs",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }
}

impl fmt::Display for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A root image that cannot be used.
#[derive(Debug, Error)]
#[error("root image {}: {fault}", path.display())]
pub struct RootfsError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    #[source]
    pub fault: RootfsFault,
}

/// What is wrong with a root image, and what to do about it.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the message says it")]
pub enum RootfsFault {
    #[error("it does not exist: check the path given with --rootfs")]
    Missing,
    #[error("cannot read it: {0}")]
    Io(std::io::Error),
    #[error(
        "not a regular file or block device: make an image of it, such as with `mkfs.erofs ctr.img DIRECTORY`"
    )]
    Kind,
    #[error("the file is empty: build or copy it again")]
    Empty,
    #[error("it is {0}, not a file system: give an EROFS, ext4 or squashfs image")]
    Other(&'static str),
    #[error("not a file system: give an EROFS, ext4 or squashfs image")]
    Unknown,
    #[error("truncated: its {file_system} has {expected} bytes, the file {length}: build or copy it again")]
    Truncated { file_system: FileSystem, expected: u64, length: u64 },
}

/// Checks that the file at `path` is a whole file system, and says which.
pub fn check(path: &Path) -> Result<FileSystem, RootfsError> {
    try_check(path).map_err(|fault| RootfsError { path: path.into(), fault })
}

fn try_check(path: &Path) -> Result<FileSystem, RootfsFault> {
    let file = open_no_wait(path, OFlags::RDONLY, Mode::empty()).map_err(|errno| match errno {
        rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR => RootfsFault::Missing,
        other => RootfsFault::Io(other.into()),
    })?;
    let kind = file.metadata().map_err(RootfsFault::Io)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(RootfsFault::Kind);
    }
    let length = seek(&file, SeekFrom::End(0)).map_err(|e| RootfsFault::Io(e.into()))?;
    let head = read_head(&file).map_err(RootfsFault::Io)?;
    if head.is_empty() {
        return Err(RootfsFault::Empty);
    }
    let head = Head(&head);
    let Some(file_system) = head.file_system() else {
        return Err(head.other().map_or(RootfsFault::Unknown, RootfsFault::Other));
    };
    match head.expected_length(file_system) {
        Some(expected) if expected > length => Err(RootfsFault::Truncated { file_system, expected, length }),
        _ => Ok(file_system),
    }
}

/// Which file system an open file holds, if any.
pub fn detect(file: &File) -> std::io::Result<Option<FileSystem>> {
    Ok(Head(&read_head(file)?).file_system())
}

fn read_head(file: &File) -> std::io::Result<Vec<u8>> {
    let mut head = vec![0; HEAD];
    let mut len = 0;
    while let Some(rest) = head.get_mut(len..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, len as u64) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    head.truncate(len);
    Ok(head)
}

/// The first bytes of a file, as many as there are.
struct Head<'a>(&'a [u8]);

impl Head<'_> {
    fn has(&self, at: usize, magic: &[u8]) -> bool {
        self.0.get(at..).is_some_and(|bytes| bytes.starts_with(magic))
    }

    fn le<const N: usize>(&self, at: usize) -> Option<u64> {
        let bytes: &[u8; N] = self.0.get(at..)?.first_chunk()?;
        Some(bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    fn file_system(&self) -> Option<FileSystem> {
        // ext's magic has only two bytes and comes last but for btrfs, whose first 64 KiB belong to others.
        match () {
            () if self.has(0, b"hsqs") => Some(FileSystem::Squashfs),
            () if self.has(0, b"XFSB") => Some(FileSystem::Xfs),
            () if self.has(1024, &0xe0f5_e1e2_u32.to_le_bytes()) => Some(FileSystem::Erofs),
            () if self.archive().is_some() => None,
            () if self.has(1080, &0xef53_u16.to_le_bytes()) => Some(FileSystem::Ext4),
            () if self.has(0x1_0040, b"_BHRfS_M") => Some(FileSystem::Btrfs),
            () => None,
        }
    }

    /// How long the image must be by its own superblock; `None` where that is not looked at.
    fn expected_length(&self, file_system: FileSystem) -> Option<u64> {
        match file_system {
            // erofs_fs.h: blkszbits u8 at 12, blocks_lo u32 at 36.
            FileSystem::Erofs => scaled(self.le::<4>(1024 + 36)?, self.le::<1>(1024 + 12)?),
            // ext4.h: s_blocks_count_lo at 4, s_log_block_size (less 10) at 24.
            FileSystem::Ext4 => scaled(self.le::<4>(1024 + 4)?, self.le::<4>(1024 + 24)?.checked_add(10)?),
            // squashfs_fs.h: bytes_used at 40.
            FileSystem::Squashfs => self.le::<8>(40),
            FileSystem::Xfs | FileSystem::Btrfs => None,
        }
    }

    /// What else it is, in words that fit behind "it is".
    fn other(&self) -> Option<&'static str> {
        match () {
            () if self.archive().is_some() => self.archive(),
            // boot.rst: the setup header's magic. The sector before it ends like a boot sector.
            () if self.has(0x202, b"HdrS") => Some("a Linux kernel (bzImage)"),
            () if self.has(0x8001, b"CD001") => Some("a CD image (ISO 9660)"),
            () if self.has(512, b"EFI PART") || self.has(510, &[0x55, 0xaa]) => {
                Some("a disk with a partition table")
            }
            () if self.0.iter().all(|byte| *byte == 0) => Some("a file of zeros"),
            () => None,
        }
    }

    /// Archives and disk formats, by strong signs at their start.
    fn archive(&self) -> Option<&'static str> {
        const KNOWN: [(usize, &[u8], &str); 13] = [
            (0, b"\x1f\x8b", "gzip-compressed"),
            (0, b"\x28\xb5\x2f\xfd", "zstd-compressed"),
            (0, b"\xfd7zXZ\0", "xz-compressed"),
            (0, b"BZh", "bzip2-compressed"),
            (0, b"PK\x03\x04", "a zip archive"),
            (257, b"ustar", "a tar archive"),
            (0, b"070701", "a cpio archive (an initramfs?)"),
            (0, b"QFI\xfb", "a qcow2 disk"),
            (0, b"KDMV", "a VMDK disk"),
            (0, b"vhdxfile", "a VHDX disk"),
            (0, b"\x7fELF", "an ELF program (a kernel?)"),
            (0, b"#!", "a script"),
            (0, b"{", "a JSON text"),
        ];
        KNOWN.iter().find(|(at, magic, _)| self.has(*at, magic)).map(|(_, _, name)| *name)
    }
}

/// `blocks << bits`, or `None` for what no image says.
fn scaled(blocks: u64, bits: u64) -> Option<u64> {
    let bits = u32::try_from(bits).ok().filter(|bits| *bits <= 16)?;
    blocks.checked_mul(1 << bits)
}
