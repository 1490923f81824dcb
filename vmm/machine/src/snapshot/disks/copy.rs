//! Gets a disk's bytes from one file to another, with as little work as the file system allows.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use devices::virtio::block::{Overlay, Piece};
use rustix::fs::{FallocateFlags, SeekFrom, copy_file_range, fallocate, ioctl_ficlone, seek};
use rustix::io::Errno;

use super::new_file::NewFile;
use super::{DiskError, How};

/// How much is copied at once where the kernel does not do it.
const BUFFER_BYTES: usize = 1 << 20;
/// What is looked at for being zeros: a block of most file systems.
const BLOCK_BYTES: usize = 4096;

/// Which of the two files failed.
enum Fault {
    From(io::Error),
    To(io::Error),
}

impl Fault {
    fn at(self, from: &Path, to: &NewFile) -> DiskError {
        match self {
            Fault::From(source) => DiskError::Io { what: "read", path: from.into(), source },
            Fault::To(source) => to.fault(source),
        }
    }
}

/// Copies all of `from`, which lies at `path`, into `to`, which is empty.
pub fn whole(from: &File, path: &Path, to: &NewFile) -> Result<How, DiskError> {
    if reflinked(from, to)? {
        return Ok(How::Reflink);
    }
    sparsely(from, path, to)?;
    Ok(How::SparseCopy)
}

/// Makes `to`, which is empty, share all blocks of `from`, where the file system can do that. Where not, it is still empty.
pub fn reflinked(from: &File, to: &NewFile) -> Result<bool, DiskError> {
    // Why it does not matter: another way will do, or fail for a better reason.
    if ioctl_ficlone(to.file(), from).is_ok() {
        return Ok(true);
    }
    // It may have come some way.
    to.file().set_len(0).map_err(|source| to.fault(source))?;
    Ok(false)
}

/// Copies all of `from` but its holes and zeros into `to`, which is empty.
pub fn sparsely(from: &File, path: &Path, to: &NewFile) -> Result<(), DiskError> {
    // Also right for block devices, whose metadata says 0.
    let len = seek(from, SeekFrom::End(0)).map_err(DiskError::io("measure", path))?;
    to.file().set_len(len).map_err(|source| to.fault(source))?;
    range(from, to.file(), 0..len).map_err(|fault| fault.at(path, to))
}

/// Copies what the guest sees through an overlay into `to`, which is empty: a reflink of the base with the changes over it,
/// or else all of it.
pub fn flattened(overlay: &Overlay, path: &Path, to: &NewFile) -> Result<How, DiskError> {
    let linked = reflinked(overlay.base(), to)?;
    to.file().set_len(overlay.size()).map_err(|source| to.fault(source))?;
    let copy = || -> Result<How, Fault> {
        if linked {
            for changed in overlay.changes() {
                let len = changed.end - changed.start;
                // The base's bytes are there. As a hole they are as good as never written.
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(to.file(), flags, changed.start, len).map_err(|e| Fault::To(e.into()))?;
                range(overlay.delta(), to.file(), changed)?;
            }
            return Ok(How::Reflink);
        }
        let mut at = 0;
        while at < overlay.size() {
            at += match overlay.piece(at, usize::MAX) {
                Piece::Zeros(len) => len as u64,
                Piece::File(file, len) => {
                    range(file, to.file(), at..at + len as u64)?;
                    len as u64
                }
            };
        }
        Ok(How::SparseCopy)
    };
    copy().map_err(|fault| fault.at(path, to))
}

/// Copies a range to the same place of `to`, where nothing was written yet.
fn range(from: &File, to: &File, range: Range<u64>) -> Result<(), Fault> {
    let mut at = range.start;
    while at < range.end {
        let Some(data) = next_data(from, at, range.end).map_err(Fault::From)? else { return Ok(()) };
        at = data.end;
        let rest = by_kernel(from, to, data)?;
        by_hand(from, to, rest)?;
    }
    Ok(())
}

/// The next part of `from` that is not a hole. Where holes cannot be found, everything.
fn next_data(from: &File, at: u64, end: u64) -> io::Result<Option<Range<u64>>> {
    let start = match seek(from, SeekFrom::Data(at)) {
        Ok(start) if start >= end => return Ok(None),
        Ok(start) => start,
        // Behind the last data.
        Err(Errno::NXIO) => return Ok(None),
        // Block devices, and file systems that do not know.
        Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(Some(at..end)),
        Err(errno) => return Err(errno.into()),
    };
    let hole = seek(from, SeekFrom::Hole(start))?;
    // Somebody may punch holes meanwhile; what must not happen is that we stay where we are.
    Ok(Some(start..if hole > start { hole.min(end) } else { end }))
}

/// Copies within the kernel, which may share blocks. Returns what it did not want to copy.
fn by_kernel(from: &File, to: &File, mut range: Range<u64>) -> Result<Range<u64>, Fault> {
    while range.start < range.end {
        let most = usize::try_from(range.end - range.start).unwrap_or(usize::MAX).min(1 << 30);
        let (mut here, mut there) = (range.start, range.start);
        match copy_file_range(from, Some(&mut here), to, Some(&mut there), most) {
            Ok(copied) if copied > 0 => range.start += copied as u64,
            Err(Errno::INTR) => {}
            Err(errno @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) => return Err(Fault::To(errno.into())),
            // Two file systems, a device, or one that says that it copied nothing: reading and writing will do, or say why not.
            Ok(_) | Err(_) => break,
        }
    }
    Ok(range)
}

/// Reads and writes, but no zeros.
fn by_hand(from: &File, to: &File, range: Range<u64>) -> Result<(), Fault> {
    let mut buffer = vec![0; if range.is_empty() { 0 } else { BUFFER_BYTES }];
    let mut at = range.start;
    while at < range.end {
        let most = usize::try_from(range.end - at).unwrap_or(BUFFER_BYTES).min(BUFFER_BYTES);
        let now = buffer.get_mut(..most).unwrap_or_default();
        from.read_exact_at(now, at).map_err(Fault::From)?;
        let mut rest = &*now;
        while !rest.is_empty() {
            let (zeros, others) = rest.split_at(leading(rest, is_zeros));
            at += zeros.len() as u64;
            let (data, later) = others.split_at(leading(others, |block| !is_zeros(block)));
            to.write_all_at(data, at).map_err(Fault::To)?;
            at += data.len() as u64;
            rest = later;
        }
    }
    Ok(())
}

/// Length of the blocks at the start of `bytes` for which `holds` is true.
fn leading(bytes: &[u8], holds: impl Fn(&[u8]) -> bool) -> usize {
    bytes.chunks(BLOCK_BYTES).take_while(|block| holds(block)).map(<[u8]>::len).sum()
}

fn is_zeros(block: &[u8]) -> bool {
    const ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
    ZEROS.get(..block.len()) == Some(block)
}
