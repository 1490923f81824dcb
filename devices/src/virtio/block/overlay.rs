//! A disk of which only the changes are ours: writes go to a sparse file, the *delta*; what was not written is read from the
//! *base*, which many disks may share and which nobody may write meanwhile.
//!
//! Opened by whoever builds the machine; then the device reads and writes on the device loop's thread. A snapshot reads it from
//! another thread while the device is quiesced ([`piece`](Overlay::piece), [`changes`](Overlay::changes)): that is why it is
//! shared and has no `&mut`. One device writes to it, never two.
//!
//! Blocks are 4 KiB: that is the block of the guest's file system and its page, so a guest hardly ever writes part of a
//! block, for which the rest would have to be copied from the base first; and it is the block of the host's file system, so that
//! the delta is no larger than what was written. The price is a bit of memory for each 4 KiB: 32 KiB a GiB, and only where
//! something was written. Requests are split where blocks of the delta and of the base meet.
//!
//! The map of written blocks is in memory: where the host's file system has holes is no substitute, since it may store more than
//! was written, or less (zeros). [`write_map`](Overlay::write_map) puts it into a copy of the delta, from which
//! [`open`](Overlay::open) makes the overlay again.

mod map;
mod stored;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::sync::Arc;

use map::Map;
use rustix::fs::OFlags;
use stored::Sizes;
use thiserror::Error;

use super::disk::Disk;
use super::request::{SECTOR, SECTOR_LEN};
use crate::virtio::{Reader, Writer, vectored};

/// Bytes in a block.
const BLOCK: u64 = 4096;
/// The same as a length in memory.
const BLOCK_LEN: usize = 4096;
/// The largest disk: 16 TiB, as large as a file can be on ext4. It bounds the map's memory.
const MOST_BYTES: u64 = 16 << 40;

/// Why two files cannot be an overlay.
#[derive(Debug, Error)]
pub enum OverlayError {
    /// The host says no.
    #[error(transparent)]
    Host(#[from] io::Error),
    /// What is to be changed is no disk.
    #[error("the base is not a regular file or a block device")]
    Base,
    /// A map of it would take too much memory.
    #[error("the base has {0} bytes: an overlay can have 16 TiB at most")]
    Size(u64),
    /// There is no sector in it.
    #[error("the base is empty: a disk needs at least 512 bytes")]
    Empty,
    /// The file for the changes cannot take them.
    #[error("the delta must be {0}")]
    Delta(&'static str),
    /// What was kept of an overlay is not usable.
    #[error("the delta cannot be used: {0}")]
    Stored(&'static str),
}

/// A disk over a base. See the module's prose.
pub struct Overlay {
    base: File,
    delta: File,
    sizes: Sizes,
    map: Map,
}

/// Where bytes of a disk are.
#[derive(Debug)]
pub enum Piece<'a> {
    /// So many bytes at the same offset of this file.
    File(&'a File, usize),
    /// So many zeros, behind a base whose last sector is incomplete.
    Zeros(usize),
}

impl Overlay {
    /// An overlay in which nothing was written yet. `delta` is an empty file, open for reading and writing.
    ///
    /// # Errors
    /// [`OverlayError`] when one of the files is of the wrong kind or opened in the wrong way, or the host fails.
    pub fn new(base: File, delta: File) -> Result<Self, OverlayError> {
        let overlay = Self::over(base, delta)?;
        if overlay.delta.metadata()?.len() != 0 {
            return Err(OverlayError::Delta("empty"));
        }
        overlay.delta.set_len(overlay.sizes.disk)?;
        Ok(overlay)
    }

    /// The overlay whose delta was copied to `delta` and got its map by [`write_map`](Self::write_map). `delta` is ours from
    /// now on: the map is cut off, since the next write would make it a lie.
    ///
    /// # Errors
    /// As for [`new`](Self::new), and when the map is missing, damaged or another disk's.
    pub fn open(base: File, delta: File) -> Result<Self, OverlayError> {
        let overlay = Self::over(base, delta)?;
        stored::read(&overlay.delta, overlay.sizes, &overlay.map)?;
        overlay.delta.set_len(overlay.sizes.disk)?;
        Ok(overlay)
    }

    fn over(mut base: File, delta: File) -> Result<Self, OverlayError> {
        let below = base.metadata()?;
        if !below.is_file() && !below.file_type().is_block_device() {
            return Err(OverlayError::Base);
        }
        let above = delta.metadata()?;
        let flags = rustix::fs::fcntl_getfl(&delta).map_err(io::Error::from)?;
        if !above.is_file() {
            return Err(OverlayError::Delta("a regular file"));
        }
        if flags & OFlags::RWMODE != OFlags::RDWR || flags.intersects(OFlags::APPEND | OFlags::PATH) {
            return Err(OverlayError::Delta("open for reading and writing"));
        }
        if (below.dev(), below.ino()) == (above.dev(), above.ino()) {
            return Err(OverlayError::Delta("another file than the base"));
        }
        let len = base.seek(SeekFrom::End(0))?;
        match len {
            0 => Err(OverlayError::Empty),
            1..=MOST_BYTES => {
                let sizes = Sizes { disk: len.next_multiple_of(SECTOR), base: len };
                let map = Map::new(sizes.disk.div_ceil(BLOCK));
                Ok(Overlay { base, delta, sizes, map })
            }
            _ => Err(OverlayError::Size(len)),
        }
    }

    /// Bytes of the disk: its base's, up to a whole sector.
    pub fn size(&self) -> u64 {
        self.sizes.disk
    }

    /// What lies below.
    pub fn base(&self) -> &File {
        &self.base
    }

    /// Where the changes are. A copy of it with a map ([`write_map`](Self::write_map)) is all that it takes, with the base, to
    /// have the disk again.
    pub fn delta(&self) -> &File {
        &self.delta
    }

    /// Where the disk's bytes from `offset` on are: up to `most` of them, as long as they are in one place.
    pub fn piece(&self, offset: u64, most: usize) -> Piece<'_> {
        let end = offset.saturating_add(most as u64).min(self.sizes.disk);
        let (written, blocks_end) = self.map.run(offset / BLOCK, end.div_ceil(BLOCK));
        let end = end.min(blocks_end.saturating_mul(BLOCK));
        let len = |end: u64| usize::try_from(end.saturating_sub(offset)).unwrap_or(most);
        match written {
            true => Piece::File(&self.delta, len(end)),
            false if offset >= self.sizes.base => Piece::Zeros(len(end)),
            false => Piece::File(&self.base, len(end.min(self.sizes.base))),
        }
    }

    /// The parts of the disk that are in the delta, in order.
    pub fn changes(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let blocks = self.sizes.disk.div_ceil(BLOCK);
        let mut at = 0;
        std::iter::from_fn(move || {
            loop {
                let start = at;
                if start >= blocks {
                    return None;
                }
                let (written, end) = self.map.run(start, blocks);
                at = end;
                if written {
                    return Some(start * BLOCK..(end * BLOCK).min(self.sizes.disk));
                }
            }
        })
    }

    /// Puts `data` at `offset`, for whoever prepares a disk: no device has it yet.
    ///
    /// # Errors
    /// `InvalidInput` when it does not lie within the disk, or that of the host.
    pub fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(data.len() as u64).ok_or(io::ErrorKind::InvalidInput)?;
        if end > self.sizes.disk {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut rest = data;
        self.write_with(offset, data.len(), |delta, at, most| {
            let written = delta.write_at(rest.get(..most).unwrap_or(rest), at)?;
            rest = rest.get(written..).unwrap_or_default();
            Ok(written)
        })
    }

    /// Writes `len` bytes at `offset`: `put` puts up to so many of them at a place of the delta and says how many they were.
    fn write_with(
        &self,
        mut offset: u64,
        len: usize,
        mut put: impl FnMut(&File, u64, usize) -> io::Result<usize>,
    ) -> io::Result<()> {
        let mut left = len;
        while left > 0 {
            let end = offset.checked_add(left as u64).ok_or(io::ErrorKind::InvalidInput)?;
            let (written, blocks_end) = self.map.run(offset / BLOCK, end.div_ceil(BLOCK));
            let most = usize::try_from(end.min(blocks_end * BLOCK).saturating_sub(offset)).unwrap_or(left);
            if !written {
                self.copy_up(offset - offset % BLOCK..offset)?;
            }
            match put(&self.delta, offset, most) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(moved) => {
                    let first = offset / BLOCK;
                    offset += moved as u64;
                    left -= moved;
                    if !written {
                        let block_end = offset.next_multiple_of(BLOCK).min(self.sizes.disk);
                        // Before the map says so: until then the base's bytes count, and a failure here changes nothing.
                        self.copy_up(offset..block_end)?;
                        self.map.add(first..offset.div_ceil(BLOCK));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Copies what is less than a block from the base to the delta; zeros where the base has ended.
    fn copy_up(&self, range: Range<u64>) -> io::Result<()> {
        let len = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(BLOCK_LEN).min(BLOCK_LEN);
        if len == 0 {
            return Ok(());
        }
        let mut block = [0; BLOCK_LEN];
        let there =
            usize::try_from(self.sizes.base.saturating_sub(range.start)).unwrap_or(BLOCK_LEN).min(len);
        self.base.read_exact_at(block.get_mut(..there).unwrap_or_default(), range.start)?;
        self.delta.write_all_at(block.get(..len).unwrap_or_default(), range.start)
    }

    /// Puts the map behind the disk's bytes in `copy`, a copy of the delta made while nothing wrote to it.
    ///
    /// # Errors
    /// Those of writing to `copy`, whose content is of no use then.
    pub fn write_map(&self, copy: &File) -> io::Result<()> {
        stored::write(copy, self.sizes, &self.map)
    }
}

/// All data moves straight between guest memory and one of the files.
impl Disk for Arc<Overlay> {
    fn sectors(&self) -> u64 {
        self.sizes.disk / SECTOR
    }

    fn read(&mut self, to: &mut Writer, mut offset: u64, len: usize) -> io::Result<()> {
        let mut left = len;
        while left > 0 {
            let moved = match self.piece(offset, left) {
                Piece::File(file, most) => {
                    match to.write_with(most, |slices| vectored::read_at(file, slices, offset)) {
                        Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                        other => other?,
                    }
                }
                Piece::Zeros(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Piece::Zeros(most) => {
                    let zeros = [0; SECTOR_LEN];
                    let now = zeros.get(..most).unwrap_or(&zeros);
                    to.write_all(now).map_err(io::Error::other)?;
                    now.len()
                }
            };
            offset += moved as u64;
            left -= moved;
        }
        Ok(())
    }

    /// What was written until an error may be there.
    fn write(&mut self, from: &mut Reader, offset: u64, len: usize) -> io::Result<()> {
        self.write_with(offset, len, |delta, at, most| {
            from.read_with(most, |slices| vectored::write_at(delta, slices, at))
        })
    }

    /// Of a live overlay that is the bytes, not the map: a delta outlives its machine only through a snapshot.
    fn flush(&mut self) -> io::Result<()> {
        self.delta.sync_data()
    }
}

impl std::fmt::Debug for Overlay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Overlay")
            .field("base", &self.base)
            .field("delta", &self.delta)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
