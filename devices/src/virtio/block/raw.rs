//! A raw image or a block device of the host as a disk: nothing in it is interpreted.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;

use rustix::fs::OFlags;

use super::disk::{Disk, DiskError};
use super::request::{SECTOR, SECTOR_LEN};
use crate::virtio::vectored;
use crate::virtio::{Reader, Writer};

/// A file whose bytes are the disk's.
pub struct Raw {
    file: File,
    /// Length of the file when it was opened.
    len: u64,
    read_only: bool,
}

impl Raw {
    /// Takes a file whose bytes are the disk's. Of a read-only disk the last sector may be incomplete: the rest of it reads
    /// as zeros.
    ///
    /// # Errors
    /// [`DiskError`] when the file is of the wrong kind or size, or opened in the wrong way.
    pub fn new(mut file: File, read_only: bool) -> Result<Self, DiskError> {
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind);
        }
        let flags = rustix::fs::fcntl_getfl(&file).map_err(io::Error::from)?;
        let mode = flags & OFlags::RWMODE;
        if mode == OFlags::WRONLY || flags.contains(OFlags::PATH) {
            return Err(DiskError::Mode("reading"));
        }
        if !read_only && mode != OFlags::RDWR {
            return Err(DiskError::Mode("reading and writing"));
        }
        // Linux appends whatever the offset says (pwrite(2), BUGS).
        if !read_only && flags.contains(OFlags::APPEND) {
            return Err(DiskError::Mode("writing anywhere, not for appending"));
        }
        // Unlike the metadata's, this length also holds for block devices.
        let len = file.seek(SeekFrom::End(0))?;
        if len == 0 {
            return Err(DiskError::Empty);
        }
        if !read_only && !len.is_multiple_of(SECTOR) {
            return Err(DiskError::Ragged(len));
        }
        Ok(Raw { file, len, read_only })
    }
}

impl Disk for Raw {
    fn sectors(&self) -> u64 {
        self.len.div_ceil(SECTOR)
    }

    fn read(&mut self, to: &mut Writer, mut offset: u64, len: usize) -> io::Result<()> {
        let mut left = len;
        while left > 0 {
            match to.write_with(left, |slices| vectored::read_at(&self.file, slices, offset)) {
                // Behind the end of an image that is no multiple of a sector.
                Ok(0) if offset >= self.len && left < SECTOR_LEN => {
                    let zeros = [0; SECTOR_LEN];
                    let rest = zeros.get(..left).unwrap_or_default();
                    return to.write_all(rest).map_err(io::Error::other);
                }
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(moved) => {
                    offset += moved as u64;
                    left -= moved;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn write(&mut self, from: &mut Reader, mut offset: u64, len: usize) -> io::Result<()> {
        let mut left = len;
        while left > 0 {
            match from.read_with(left, |slices| vectored::write_at(&self.file, slices, offset)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(moved) => {
                    offset += moved as u64;
                    left -= moved;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.file.sync_data() }
    }
}
