//! From the TAP to the guest (section 5.1.6.4): packets are read straight into the buffers that the driver posted.
//!
//! How long a packet is shows only once it has been read. So buffers for the longest are offered, several chains in a row
//! where the driver can take a packet in pieces, and behind them a buffer of our own: what lands there waits for the driver
//! to post more.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

use super::tap::Tap;
use super::{Counters, HEADER_LEN, LONGEST};
use crate::virtio::{Chain, DeviceError, Queue};

/// Where in the header the number of chains stands that a packet takes (section 5.1.6).
const NUM_BUFFERS: usize = 10;
/// After so many packets others have their turn.
const TURN: usize = 256;
/// The most buffers that one `readv(2)` fills, besides our own.
const MOST_BUFFERS: usize = 1023;
/// After so many failures in a row there is nobody at the other end.
const GIVE_UP: u32 = 16;

/// Why a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// The TAP has no more packets, or enough were taken for now.
    Over,
    /// The driver has posted no more buffers. Its doorbell is on.
    Starved,
    /// The interface is gone.
    Gone,
}

/// A chain that the driver posted, as it was when it was taken.
struct Posted {
    chain: Chain,
    size: usize,
    buffers: usize,
}

/// The receiving half of the card.
pub struct Receiver {
    queue: Queue,
    /// The driver takes packets in pieces (VIRTIO_NET_F_MRG_RXBUF).
    mergeable: bool,
    /// Taken from the ring and not used yet.
    posted: VecDeque<Posted>,
    /// What of a packet did not fit into them.
    spill: Box<[u8]>,
    /// The part of `spill` that waits for chains.
    rest: Range<usize>,
    /// Length of the packet that waits.
    len: usize,
    failures: u32,
}

impl Receiver {
    pub fn new(queue: Queue, mergeable: bool) -> Self {
        let spill = vec![0; LONGEST].into();
        Receiver { queue, mergeable, posted: VecDeque::new(), spill, rest: 0..0, len: 0, failures: 0 }
    }

    /// Takes packets until there are none, or no room.
    pub fn run(&mut self, tap: &Tap, counters: &Counters) -> Result<Turn, DeviceError> {
        let turn = self.receive(tap, counters)?;
        self.queue.notify()?;
        Ok(turn)
    }

    /// Puts back what was taken and not used. A packet that waits for room is lost.
    pub fn into_queue(mut self) -> Queue {
        while let Some(posted) = self.posted.pop_back() {
            self.queue.unpop(posted.chain);
        }
        self.queue
    }

    fn receive(&mut self, tap: &Tap, counters: &Counters) -> Result<Turn, DeviceError> {
        for _ in 0..TURN {
            while !self.has_room()? {
                if !self.queue.rearm()? {
                    return Ok(Turn::Starved);
                }
            }
            match self.read(tap) {
                Ok(len) if len < HEADER_LEN => self.lose(counters),
                Ok(len) => {
                    self.failures = 0;
                    let room: usize = self.posted.iter().map(|p| p.size).sum();
                    let spilled = len.saturating_sub(room);
                    if spilled > 0 && (!self.mergeable || spilled > self.spill.len()) {
                        self.lose(counters);
                        continue;
                    }
                    (self.len, self.rest) = (len, 0..spilled);
                    counters.rx_packets.fetch_add(1, Relaxed);
                    counters.rx_bytes.fetch_add(len.saturating_sub(HEADER_LEN) as u64, Relaxed);
                    if spilled == 0 {
                        self.deliver()?;
                    }
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Turn::Over),
                Err(error) => {
                    self.failures += 1;
                    if self.failures == GIVE_UP {
                        log::error!(
                            "virtio-net: the TAP cannot be read: {error}; nothing is received any more"
                        );
                        return Ok(Turn::Gone);
                    }
                    self.lose(counters);
                }
            };
        }
        Ok(Turn::Over)
    }

    /// Counts a packet that the guest does not get.
    fn lose(&self, counters: &Counters) {
        counters.rx_dropped.fetch_add(1, Relaxed);
        self.queue.count_error();
    }

    /// Whether there are chains for a packet, after delivering one that waited for them.
    fn has_room(&mut self) -> Result<bool, DeviceError> {
        while !self.rest.is_empty() {
            let Some(mut posted) = self.take()? else { return Ok(false) };
            let part = self.rest.len().min(posted.size);
            let end = self.rest.start + part;
            posted.chain.writer.write_all(self.spill.get(self.rest.start..end).unwrap_or_default())?;
            self.rest.start = end;
            self.posted.push_back(posted);
            if self.rest.is_empty() {
                self.deliver()?;
            }
        }
        let mut room: usize = self.posted.iter().map(|p| p.size).sum();
        let mut buffers: usize = self.posted.iter().map(|p| p.buffers).sum();
        while room < LONGEST && (self.mergeable || self.posted.is_empty()) {
            let Some(posted) = self.take()? else { break };
            buffers += posted.buffers;
            if buffers > MOST_BUFFERS {
                self.queue.unpop(posted.chain);
                break;
            }
            room += posted.size;
            self.posted.push_back(posted);
        }
        Ok(!self.posted.is_empty())
    }

    fn take(&mut self) -> Result<Option<Posted>, DeviceError> {
        let Some(chain) = self.queue.pop()? else { return Ok(None) };
        let (size, buffers) = (chain.writer.remaining(), chain.writer.buffers());
        // Section 5.1.6.3.1: at least the header fits into each.
        if size < HEADER_LEN || buffers > MOST_BUFFERS {
            return Err(DeviceError::Protocol(format!(
                "a receive buffer of {size} bytes in {buffers} pieces: at least {HEADER_LEN} bytes are needed"
            )));
        }
        Ok(Some(Posted { chain, size, buffers }))
    }

    fn read(&mut self, tap: &Tap) -> io::Result<usize> {
        let mut slices = Vec::with_capacity(64);
        self.posted.iter().for_each(|p| p.chain.writer.room(&mut slices));
        super::retry(|| tap.read(&slices, &mut self.spill))
    }

    /// Gives the chains back that the packet filled, all at once, with their number in its header.
    fn deliver(&mut self) -> Result<(), DeviceError> {
        let mut left = self.len;
        let mut count = 0u16;
        for posted in &mut self.posted {
            if left == 0 {
                break;
            }
            count += 1;
            let part = left.min(posted.size);
            left -= part;
            // The first chain's writer must still be at the header; later ones have it behind them what was spilled.
            if count > 1 {
                posted.chain.writer.fill(part - posted.chain.writer.written());
            }
        }
        if let Some(first) = self.posted.front_mut() {
            let writer = &mut first.chain.writer;
            writer.fill(NUM_BUFFERS);
            writer.write_all(&count.to_le_bytes())?;
            writer.fill(self.len.min(first.size) - HEADER_LEN);
        }
        let filled = self.posted.drain(..usize::from(count)).map(|p| p.chain);
        Ok(self.queue.push_together(filled)?)
    }
}
