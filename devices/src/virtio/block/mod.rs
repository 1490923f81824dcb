//! The block device (section 5.2): a raw file or block device of the host as `/dev/vd*`.
//!
//! Built by whoever opened the file; then everything happens on the device loop's thread. Data moves between the file and
//! guest memory without a copy. I/O is synchronous: a request is over when [`Block::carry_out`] returns, and that is the one
//! place to change for I/O that completes later ([`request`] and the chain, which borrows nothing, do not care).

mod disk;
mod request;

use std::fs::File;
use std::io;

use disk::Disk;
pub use disk::DiskError;
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

/// What is in a disk's slot.
#[derive(Debug)]
pub enum Medium {
    /// A raw file or a block device.
    Raw(File),
}

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
    disk: Disk,
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
        let disk = Disk::new(file, read_only)?;
        let mut bytes = [0; ID_LEN];
        for (to, from) in bytes.iter_mut().zip(id.as_bytes()) {
            *to = *from;
        }
        let most = u64::from(MOST_BUFFERS) * u64::from(MOST_BUFFER_BYTES);
        let most_bytes = usize::try_from(most).unwrap_or(usize::MAX);
        let shape = Shape { sectors: disk.sectors(), read_only, most_bytes };
        Ok(Block { disk, shape, id: bytes, queue: None, write_through: false, failures: 0 })
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
        status.write_all(&[answer as u8])?;
        // The used length promises that all bytes up to it were written: the status counts only where no gap is before it.
        if chain.writer.remaining() == 0 {
            chain.writer.rejoin(&status);
        }
        Ok(work)
    }

    fn carry_out(&self, request: Request, chain: &mut Chain) -> io::Result<Work> {
        match request {
            Request::Read { offset, len } => {
                self.disk.read(&mut chain.writer, offset, len)?;
                Ok(Work::Moved(len))
            }
            Request::Write { offset, len } => {
                self.disk.write(&mut chain.reader, offset, len)?;
                if self.write_through {
                    self.disk.flush()?;
                    return Ok(Work::Waited);
                }
                Ok(Work::Moved(len))
            }
            Request::Flush => self.disk.flush().map(|()| Work::Waited),
            Request::Identify => {
                chain.writer.write_all(&self.id).map_err(io::Error::other)?;
                Ok(Work::Moved(0))
            }
        }
    }

    /// Logs a failure of the host: the first, and then ever fewer, since a guest may ask again and again.
    fn report(&mut self, request: Request, error: &io::Error) {
        self.failures += 1;
        if self.failures.is_power_of_two() {
            let id = String::from_utf8_lossy(&self.id);
            let id = id.trim_end_matches('\0');
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
        let access = if self.disk.read_only() { RO } else { FLUSH };
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
        let Backend::Disk(Medium::Raw(file)) = backend else {
            return Err(AttachError::Kind(DeviceKind::Block));
        };
        let disk = Disk::new(file, self.shape.read_only).map_err(|e| AttachError::Refused(e.to_string()))?;
        self.shape.sectors = disk.sectors();
        self.disk = disk;
        Ok(self.profile().config)
    }
}

#[cfg(test)]
mod tests;
