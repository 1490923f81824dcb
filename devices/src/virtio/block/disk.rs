//! What a disk's bytes are in. Used on the device loop's thread, which it blocks for as long as the host takes.

use std::fs::File;
use std::io;
use std::sync::Arc;

use thiserror::Error;

use super::overlay::Overlay;
use super::raw::Raw;
use crate::virtio::{Reader, Writer};

/// Why a file cannot be a disk.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The host says no.
    #[error(transparent)]
    Host(#[from] io::Error),
    /// It is a directory, a pipe or the like.
    #[error("not a regular file or a block device")]
    Kind,
    /// It was opened in a way that does not fit.
    #[error("the file must be open for {0}")]
    Mode(&'static str),
    /// There is no sector in it.
    #[error("the file is empty: a disk needs at least 512 bytes")]
    Empty,
    /// A last sector that is not whole could not be written.
    #[error("the file's size, {0} bytes, is not a multiple of 512; `truncate -s %512 FILE` makes it one")]
    Ragged(u64),
}

/// What is in a disk's slot, opened by somebody else.
///
/// Whoever opened it may keep a [`try_clone`](Self::try_clone) beside the device, to read what the disk holds while the device
/// is quiesced: that is how a snapshot copies the disk of a machine that lives on. Nothing but the device writes to it.
#[derive(Debug)]
pub enum Medium {
    /// A raw file or a block device.
    Raw(File),
    /// Changes over a base that is only read.
    Overlay(Arc<Overlay>),
}

impl Medium {
    /// Another handle to the same bytes, not a copy of them.
    ///
    /// # Errors
    /// That of `dup(2)`: there are too many open files.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Medium::Raw(file) => Medium::Raw(file.try_clone()?),
            Medium::Overlay(overlay) => Medium::Overlay(overlay.clone()),
        })
    }

    /// The medium as a disk that may be written to or not.
    ///
    /// # Errors
    /// [`DiskError`] when the file is of the wrong kind or size, or not open for what is asked of it.
    pub(super) fn open(self, read_only: bool) -> Result<Box<dyn Disk>, DiskError> {
        match self {
            Medium::Raw(file) => Ok(Box::new(Raw::new(file, read_only)?)),
            Medium::Overlay(overlay) => Ok(Box::new(overlay)),
        }
    }
}

/// Sectors that can be read and written. Requests were checked against the capacity.
pub trait Disk: Send {
    /// Capacity in sectors, which never changes.
    fn sectors(&self) -> u64;

    /// Fills the next `len` bytes of `to` with what is at `offset`.
    ///
    /// # Errors
    /// Those of the host.
    fn read(&mut self, to: &mut Writer, offset: u64, len: usize) -> io::Result<()>;

    /// Puts the next `len` bytes of `from` at `offset`.
    ///
    /// # Errors
    /// Those of the host.
    fn write(&mut self, from: &mut Reader, offset: u64, len: usize) -> io::Result<()>;

    /// Returns once all that was written is on stable storage.
    ///
    /// # Errors
    /// Those of the host.
    fn flush(&mut self) -> io::Result<()>;
}
