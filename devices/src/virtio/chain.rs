//! A chain of buffers that the driver made available: first those that the device reads, then those that it writes (2.7.4.2).
//!
//! A chain is checked against guest memory once, when it is taken; from then on a [`Reader`] or [`Writer`] moves over its
//! buffers and cannot leave them. A chain owns what it needs and borrows nothing, so it can be kept while I/O is in flight.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend};

use crate::memory::{GuestMemory, Slice};

/// How the driver broke a chain.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ChainError {
    /// A descriptor points at one that cannot be followed: out of the table, or round in a circle.
    #[error("descriptor chain {head} is broken or loops")]
    Broken {
        /// The chain's first descriptor.
        head: u16,
    },
    /// A buffer does not lie within guest memory.
    #[error("descriptor chain {head}: buffer {address:#x}+{len:#x} is outside guest memory")]
    OutsideMemory {
        /// The chain's first descriptor.
        head: u16,
        /// Where the buffer would be.
        address: u64,
        /// How long it would be.
        len: u32,
    },
    /// A buffer to read comes after one to write.
    #[error("descriptor chain {head}: a buffer to read follows one to write")]
    Order {
        /// The chain's first descriptor.
        head: u16,
    },
    /// The chain's buffers of one kind add up to more than a used length can say.
    #[error("descriptor chain {head} is longer than 4 GiB")]
    TooLong {
        /// The chain's first descriptor.
        head: u16,
    },
    /// The chain has more buffers than any driver needs.
    #[error("descriptor chain {head} has more than 1024 buffers")]
    TooManyBuffers {
        /// The chain's first descriptor.
        head: u16,
    },
    /// The device needs more bytes than the chain has.
    #[error("a buffer ends {missing} bytes too early")]
    Short {
        /// How many bytes more were needed.
        missing: usize,
    },
}

/// One descriptor, as it stands in the table.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    /// Guest-physical address of the buffer.
    pub address: GuestAddress,
    /// Its length in bytes.
    pub len: u32,
    /// Whether it is for the device to write.
    pub writable: bool,
}

/// Buffers of one kind, and how far the device has come.
struct Buffers {
    memory: Arc<GuestMemory>,
    segments: VecDeque<(GuestAddress, usize)>,
    remaining: usize,
    done: usize,
}

impl Buffers {
    fn new(memory: Arc<GuestMemory>) -> Self {
        Buffers { memory, segments: VecDeque::new(), remaining: 0, done: 0 }
    }

    fn push(&mut self, head: u16, segment: &Segment) -> Result<(), ChainError> {
        if segment.len == 0 {
            return Ok(());
        }
        let outside = ChainError::OutsideMemory { head, address: segment.address.0, len: segment.len };
        let len = usize::try_from(segment.len).map_err(|_| ChainError::TooLong { head })?;
        if !self.memory.check_range(segment.address, len) {
            return Err(outside);
        }
        let total = self.remaining.checked_add(len).ok_or(ChainError::TooLong { head })?;
        if u32::try_from(total).is_err() {
            return Err(ChainError::TooLong { head });
        }
        self.remaining = total;
        self.segments.push_back((segment.address, len));
        Ok(())
    }

    /// The next `count` bytes as slices of guest memory, without consuming them.
    fn peek(&self, count: usize) -> Vec<Slice<'_>> {
        let mut slices = Vec::with_capacity(self.segments.len());
        self.peek_into(count, &mut slices);
        slices
    }

    fn peek_into<'a>(&'a self, count: usize, slices: &mut Vec<Slice<'a>>) {
        let mut left = count.min(self.remaining);
        for &(address, len) in &self.segments {
            if left == 0 {
                break;
            }
            let take = len.min(left);
            // Every segment was checked when the chain was taken, and guest memory never shrinks: this yields no error.
            slices.extend(self.memory.get_slices(address, take).filter_map(Result::ok));
            left -= take;
        }
    }

    /// Moves on by `count` bytes, which must not be more than remain.
    fn advance(&mut self, count: usize) {
        let mut left = count.min(self.remaining);
        self.remaining -= left;
        self.done += left;
        while left > 0 {
            let Some((address, len)) = self.segments.front_mut() else { break };
            if *len <= left {
                left -= *len;
                self.segments.pop_front();
            } else {
                address.0 += left as u64;
                *len -= left;
                left = 0;
            }
        }
    }

    fn require(&self, count: usize) -> Result<(), ChainError> {
        match count.checked_sub(self.remaining) {
            None | Some(0) => Ok(()),
            Some(missing) => Err(ChainError::Short { missing }),
        }
    }

    /// Cuts everything from `offset` bytes on off into buffers of its own.
    fn split_off(&mut self, offset: usize) -> Result<Buffers, ChainError> {
        self.require(offset)?;
        let mut tail = Buffers::new(self.memory.clone());
        let mut keep = offset;
        let mut kept = VecDeque::new();
        for (address, len) in self.segments.drain(..) {
            let here = len.min(keep);
            keep -= here;
            if here > 0 {
                kept.push_back((address, here));
            }
            if here < len {
                tail.segments.push_back((GuestAddress(address.0 + here as u64), len - here));
            }
        }
        self.segments = kept;
        tail.remaining = self.remaining - offset;
        self.remaining = offset;
        Ok(tail)
    }

    fn transfer(
        &mut self,
        count: usize,
        io: impl FnOnce(&[Slice<'_>]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let moved = io(&self.peek(count))?.min(count);
        self.advance(moved);
        Ok(moved)
    }
}

/// The device-readable part of a chain.
pub struct Reader(Buffers);

impl Reader {
    /// How many bytes are left to read.
    pub fn remaining(&self) -> usize {
        self.0.remaining
    }

    /// How many bytes were read, or skipped.
    pub fn consumed(&self) -> usize {
        self.0.done
    }

    /// Reads exactly `data.len()` bytes.
    ///
    /// # Errors
    /// [`ChainError::Short`] when there are fewer; then nothing is consumed.
    pub fn read_exact(&mut self, data: &mut [u8]) -> Result<(), ChainError> {
        self.0.require(data.len())?;
        let mut done = 0;
        for slice in self.0.peek(data.len()) {
            done += slice.copy_to(data.get_mut(done..).unwrap_or_default());
        }
        self.0.advance(data.len());
        Ok(())
    }

    /// Reads a value that lies in memory as the guest wrote it (little endian, packed: the caller's type says so).
    ///
    /// # Errors
    /// As for [`read_exact`](Self::read_exact).
    pub fn read_obj<T: ByteValued + Default>(&mut self) -> Result<T, ChainError> {
        let mut value = T::default();
        self.read_exact(value.as_mut_slice())?;
        Ok(value)
    }

    /// Hands up to `count` bytes to `io` as slices of guest memory, and consumes as many as `io` says it took.
    ///
    /// # Errors
    /// That of `io`; then nothing is consumed.
    pub fn read_with(
        &mut self,
        count: usize,
        io: impl FnOnce(&[Slice<'_>]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        self.0.transfer(count, io)
    }

    /// Consumes `count` bytes, or all that are left, unread.
    pub fn skip(&mut self, count: usize) {
        self.0.advance(count);
    }
}

/// The device-writable part of a chain. It counts what is written: that becomes the used length.
pub struct Writer(Buffers);

impl Writer {
    /// How many bytes can still be written.
    pub fn remaining(&self) -> usize {
        self.0.remaining
    }

    /// How many bytes were written.
    pub fn written(&self) -> usize {
        self.0.done
    }

    /// Writes all of `data`.
    ///
    /// # Errors
    /// [`ChainError::Short`] when it does not fit; then nothing is written.
    pub fn write_all(&mut self, data: &[u8]) -> Result<(), ChainError> {
        self.0.require(data.len())?;
        let mut rest = data;
        for slice in self.0.peek(data.len()) {
            let (now, later) = rest.split_at(slice.len().min(rest.len()));
            slice.copy_from(now);
            rest = later;
        }
        self.0.advance(data.len());
        Ok(())
    }

    /// Writes a value as it lies in memory.
    ///
    /// # Errors
    /// As for [`write_all`](Self::write_all).
    pub fn write_obj<T: ByteValued>(&mut self, value: &T) -> Result<(), ChainError> {
        self.write_all(value.as_slice())
    }

    /// Hands up to `count` bytes of room to `io` as slices of guest memory, and counts as many as `io` says it filled.
    ///
    /// # Errors
    /// That of `io`; then nothing is counted.
    pub fn write_with(
        &mut self,
        count: usize,
        io: impl FnOnce(&[Slice<'_>]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        self.0.transfer(count, io)
    }

    /// Adds the room that is left to `slices`, for I/O that spans chains. What it fills is counted by [`fill`](Self::fill).
    pub fn room<'a>(&'a self, slices: &mut Vec<Slice<'a>>) {
        self.0.peek_into(usize::MAX, slices);
    }

    /// How many buffers the room that is left consists of.
    pub fn buffers(&self) -> usize {
        self.0.segments.len()
    }

    /// Counts `count` bytes, or all that remain, as written.
    pub fn fill(&mut self, count: usize) {
        self.0.advance(count);
    }

    /// Cuts off all but the next `offset` bytes into a writer of its own, whose bytes count for the chain only when
    /// [`rejoin`](Self::rejoin)ed.
    ///
    /// # Errors
    /// [`ChainError::Short`] when fewer than `offset` bytes remain.
    pub fn split_off(&mut self, offset: usize) -> Result<Writer, ChainError> {
        self.0.split_off(offset).map(Writer)
    }

    /// Counts what was written to a part that was split off.
    pub fn rejoin(&mut self, tail: &Writer) {
        self.0.done += tail.0.done;
    }
}

/// A chain of buffers, owned by the device until it is pushed back.
pub struct Chain {
    head: u16,
    failed: bool,
    /// What the driver tells the device.
    pub reader: Reader,
    /// Where the device answers.
    pub writer: Writer,
}

impl Chain {
    /// A chain over `segments`, all of which must lie in `memory`.
    ///
    /// # Errors
    /// [`ChainError`] when they do not, when their order is wrong, or when they are too long.
    pub fn new(head: u16, memory: Arc<GuestMemory>, segments: &[Segment]) -> Result<Self, ChainError> {
        let mut readable = Buffers::new(memory.clone());
        let mut writable = Buffers::new(memory);
        let mut writing = false;
        for segment in segments {
            if segment.writable {
                writing = true;
                writable.push(head, segment)?;
            } else if writing {
                return Err(ChainError::Order { head });
            } else {
                readable.push(head, segment)?;
            }
        }
        Ok(Chain { head, failed: false, reader: Reader(readable), writer: Writer(writable) })
    }

    /// Index of the chain's first descriptor, by which the driver knows it.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Counts the request among those that failed.
    pub fn fail(&mut self) {
        self.failed = true;
    }

    /// Whether [`fail`](Self::fail) was called.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// How many bytes the device wrote.
    pub fn used_len(&self) -> u32 {
        // A chain's writable part is at most u32::MAX bytes long: that was checked when it was taken.
        u32::try_from(self.writer.written()).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
#[path = "chain_tests.rs"]
mod tests;
