//! The block device (section 5.2): a [`Medium`] of the host as `/dev/vd*`, or a slot without one, which has no sectors until
//! a medium is attached. Linux then reads the capacity again (`virtblk_config_changed`).
//!
//! Built by whoever opened the file; then everything happens on the device loop's thread. Data moves between the file and
//! guest memory without a copy. I/O is synchronous: a request is over when [`Block::carry_out`] returns, and that is the one
//! place to change for I/O that completes later ([`request`] and the chain, which borrows nothing, do not care).

mod disk;
mod overlay;
mod raw;
mod request;

use std::fs::File;
use std::io;

use disk::Disk;
pub use disk::{DiskError, Medium};
pub use overlay::{Overlay, OverlayError, Piece};
use request::{ID_LEN, Request, Shape, Status};
use serde::{Deserialize, Serialize};

use super::device::{AttachError, Backend, DeviceState, StateError};
use super::queue::Served;
use super::{Chain, DeviceError, DeviceKind, Profile, Queue, VirtioDevice};
use crate::device_loop::{Source, Watch};

/// Feature bits (section 5.2.3).
mod feature {
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
}

/// Entries of the queue. Linux allocates as many requests when it finds the disk.
const QUEUE_SIZE: u16 = 128;
/// The most data buffers in a request: a chain that fills the queue, less header and status.
const MOST_BUFFERS: u32 = QUEUE_SIZE as u32 - 2;
/// The most bytes in one buffer of a request. The product bounds how long one request can keep the loop.
const MOST_BUFFER_BYTES: u32 = 1 << 20;
/// The block size that the driver is told; the smallest, so that any offset in a file can be addressed.
const BLOCK_BYTES: u32 = 512;
/// After so many bytes other devices have their turn.
const TURN_BYTES: usize = 8 << 20;

/// What a snapshot carries of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Whether the driver was told that it cannot write.
    pub read_only: bool,
    /// The serial number.
    pub id: [u8; ID_LEN],
}

/// A disk.
pub struct Block {
    /// Nothing, in a slot without a medium.
    disk: Option<Box<dyn Disk>>,
    shape: Shape,
    id: [u8; ID_LEN],
    queue: Option<Queue>,
    /// The driver cannot flush, so each write must last before it is answered (section 5.2.5, writethrough).
    write_through: bool,
    /// How many requests the host failed.
    failures: u64,
}

impl Block {
    /// A disk whose bytes are those of `file`, never interpreted. `id` is what the guest sees as its serial number: up to 20
    /// bytes of it.
    ///
    /// # Errors
    /// [`DiskError`] when the file is of the wrong kind or size, or not open for what is asked of it.
    pub fn new(file: File, read_only: bool, id: &str) -> Result<Self, DiskError> {
        Block::with(Medium::Raw(file), read_only, id)
    }

    /// A disk on `medium`.
    ///
    /// # Errors
    /// [`DiskError`] when the medium will not do.
    pub fn with(medium: Medium, read_only: bool, id: &str) -> Result<Self, DiskError> {
        let mut block = Block::empty(read_only, id);
        block.insert(medium)?;
        Ok(block)
    }

    /// A slot for a disk: it has no sectors, and whatever is asked of it fails, until a medium is attached. Whether that may be
    /// written is settled here, since a driver asks only once.
    pub fn empty(read_only: bool, id: &str) -> Self {
        let mut bytes = [0; ID_LEN];
        for (to, from) in bytes.iter_mut().zip(id.as_bytes()) {
            *to = *from;
        }
        let most = u64::from(MOST_BUFFERS) * u64::from(MOST_BUFFER_BYTES);
        let most_bytes = usize::try_from(most).unwrap_or(usize::MAX);
        let shape = Shape { sectors: 0, read_only, most_bytes };
        Block { disk: None, shape, id: bytes, queue: None, write_through: false, failures: 0 }
    }

    fn insert(&mut self, medium: Medium) -> Result<(), DiskError> {
        let disk = medium.open(self.shape.read_only)?;
        self.shape.sectors = disk.sectors();
        self.disk = Some(disk);
        Ok(())
    }

    /// Does what a chain asks for and answers it.
    fn serve(&mut self, chain: &mut Chain) -> Result<Work, DeviceError> {
        let (request, mut status) = request::take(chain, &self.shape)?;
        let (answer, work) = match request {
            Ok(request) => match self.carry_out(request, chain) {
                Ok(work) => (Status::Ok, work),
                Err(error) => {
                    self.report(request, &error);
                    (Status::IoError, Work::Waited)
                }
            },
            Err(answer) => (answer, Work::Moved(0)),
        };
        if answer != Status::Ok {
            chain.fail();
        }
        status.write_all(&[answer as u8])?;
        // The used length promises that all bytes up to it were written: the status counts only where no gap is before it.
        if chain.writer.remaining() == 0 {
            chain.writer.rejoin(&status);
        }
        Ok(work)
    }

    fn carry_out(&mut self, request: Request, chain: &mut Chain) -> io::Result<Work> {
        match (request, &mut self.disk) {
            (Request::Identify, _) => {
                chain.writer.write_all(&self.id).map_err(io::Error::other)?;
                Ok(Work::Moved(0))
            }
            (_, None) => Err(io::Error::other("there is no medium")),
            (Request::Read { offset, len }, Some(disk)) => {
                disk.read(&mut chain.writer, offset, len)?;
                Ok(Work::Moved(len))
            }
            (Request::Write { offset, len }, Some(disk)) => {
                disk.write(&mut chain.reader, offset, len)?;
                if self.write_through {
                    disk.flush()?;
                    return Ok(Work::Waited);
                }
                Ok(Work::Moved(len))
            }
            (Request::Flush, Some(disk)) => disk.flush().map(|()| Work::Waited),
        }
    }

    /// Logs a failure of the host: the first, and then ever fewer, since a guest may ask again and again.
    fn report(&mut self, request: Request, error: &io::Error) {
        self.failures += 1;
        if self.failures.is_power_of_two() {
            let id = String::from_utf8_lossy(&self.id);
            // It may come out of a snapshot, and the log may be a terminal.
            let id = id.trim_end_matches('\0').escape_debug();
            log::error!("disk {id}: {request:?}: {error} ({} failed so far)", self.failures);
        }
    }
}

/// What a request cost the loop.
enum Work {
    /// So many bytes were copied.
    Moved(usize),
    /// It waited for the host's storage.
    Waited,
}

impl VirtioDevice for Block {
    fn profile(&self) -> Profile {
        use feature::{BLK_SIZE, FLUSH, RO, SEG_MAX, SIZE_MAX};
        // `struct virtio_blk_config` (section 5.2.4) up to blk_size; the geometry at 16..20 is not offered.
        let mut config = Vec::with_capacity(24);
        config.extend(self.shape.sectors.to_le_bytes());
        config.extend(MOST_BUFFER_BYTES.to_le_bytes());
        config.extend(MOST_BUFFERS.to_le_bytes());
        config.extend([0; 4]);
        config.extend(BLOCK_BYTES.to_le_bytes());
        let access = if self.shape.read_only { RO } else { FLUSH };
        Profile {
            kind: DeviceKind::Block,
            features: SIZE_MAX | SEG_MAX | BLK_SIZE | access,
            queue_sizes: vec![QUEUE_SIZE],
            config,
        }
    }

    fn activate(&mut self, features: u64, queues: Vec<Queue>, _: &mut Watch) -> Result<(), DeviceError> {
        self.queue = queues.into_iter().next();
        self.write_through = features & feature::FLUSH == 0;
        Ok(())
    }

    fn kicked(&mut self, _: usize, _: &mut Watch) -> Result<(), DeviceError> {
        let Some(mut queue) = self.queue.take() else { return Ok(()) };
        let mut left = TURN_BYTES;
        let outcome = queue.drain(|chain| {
            left = match self.serve(chain)? {
                Work::Moved(bytes) => left.saturating_sub(bytes),
                Work::Waited => 0,
            };
            Ok(if left == 0 { Served::Enough } else { Served::Done })
        });
        self.queue = Some(queue);
        outcome
    }

    fn ready(&mut self, _: Source, _: &mut Watch) -> Result<(), DeviceError> {
        Ok(())
    }

    fn quiesce(&mut self, _: &mut Watch) -> Vec<Queue> {
        self.queue.take().into_iter().collect()
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block(BlockState { read_only: self.shape.read_only, id: self.id })
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        match state {
            DeviceState::Block(state) if state.read_only == self.shape.read_only => {
                self.id = state.id;
                Ok(())
            }
            DeviceState::Block(_) => {
                Err(StateError::Mismatch("read-only there and writable here, or the reverse".into()))
            }
            _ => Err(StateError::Mismatch("not a disk's".into())),
        }
    }

    fn attach(&mut self, backend: Backend) -> Result<Vec<u8>, AttachError> {
        let Backend::Disk(medium) = backend else { return Err(AttachError::Kind(DeviceKind::Block)) };
        self.insert(medium).map_err(|error| AttachError::Refused(error.to_string()))?;
        Ok(self.profile().config)
    }
}

#[cfg(test)]
mod tests;
