//! A virtqueue as a device sees it: take a chain, give it back, ring when the driver wants it.
//!
//! A thin skin over rust-vmm's `virtio-queue` (split rings, section 2.7), which does the ring arithmetic. What it adds: chains
//! that own what they need ([`Chain`]), errors instead of silence when a ring is malformed, and the interrupt.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

use thiserror::Error;
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{Chain, ChainError, Segment};
use super::interrupt::Interrupt;
use crate::memory::GuestMemory;

/// How many buffers a chain may have. With an indirect table a driver could link 65535; hosts take 1024 (the kernel's vhost
/// and QEMU alike, after `UIO_MAXIOV`), so no driver counts on more.
const MOST_SEGMENTS: usize = 1024;

/// How the driver broke a ring. There is no way on but a reset.
#[derive(Debug, Error)]
pub enum QueueError {
    /// The rings lie outside guest memory, or are misaligned.
    #[error("queue rings are outside guest memory or misaligned")]
    Layout,
    /// The available ring claims more entries than it has, or cannot be read.
    #[error("available ring: {0}")]
    Avail(virtio_queue::Error),
    /// The used ring cannot be written.
    #[error("used ring: {0}")]
    Used(virtio_queue::Error),
    /// A chain of descriptors is malformed.
    #[error(transparent)]
    Chain(#[from] ChainError),
}

/// One virtqueue, owned by its device from activation until it is quiesced.
pub struct Queue {
    ring: virtio_queue::Queue,
    memory: Arc<GuestMemory>,
    interrupt: Interrupt,
    /// The queue's own doorbell.
    kick: EventFd,
    /// How many chains were pushed since the driver was last considered for an interrupt.
    unannounced: u16,
}

impl Queue {
    /// A queue over rings that the driver has laid out. `kick` is its doorbell, which the queue itself rings when it gives
    /// way to others.
    ///
    /// # Errors
    /// [`QueueError::Layout`] when a queue that the driver enabled does not lie within `memory`.
    pub fn new(
        ring: virtio_queue::Queue,
        memory: Arc<GuestMemory>,
        interrupt: Interrupt,
        kick: EventFd,
    ) -> Result<Self, QueueError> {
        if ring.ready() && !ring.is_valid(&*memory) {
            return Err(QueueError::Layout);
        }
        Ok(Queue { ring, memory, interrupt, kick, unannounced: 0 })
    }

    /// Whether the driver enabled this queue. One that it did not enable is always empty.
    pub fn is_enabled(&self) -> bool {
        self.ring.ready()
    }

    /// The guest memory that the queue's chains point into.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Takes the next chain that the driver made available.
    ///
    /// # Errors
    /// [`QueueError`] when the ring or the chain is malformed.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        if !self.ring.ready() {
            return Ok(None);
        }
        let next = self.ring.iter(&*self.memory).map_err(QueueError::Avail)?.next();
        let Some(descriptors) = next else { return Ok(None) };
        let head = descriptors.head_index();
        let mut segments = Vec::with_capacity(4);
        let mut unfinished = true;
        for descriptor in descriptors {
            if segments.len() == MOST_SEGMENTS {
                return Err(ChainError::TooManyBuffers { head }.into());
            }
            unfinished = descriptor.has_next();
            segments.push(Segment {
                address: descriptor.addr(),
                len: descriptor.len(),
                writable: descriptor.is_write_only(),
            });
        }
        // The iterator ends at the first descriptor that it cannot follow; the last one it gave still pointed there.
        if unfinished {
            return Err(ChainError::Broken { head }.into());
        }
        Ok(Some(Chain::new(head, self.memory.clone(), &segments)?))
    }

    /// Puts back the chain that was popped last, as if it had never been taken.
    pub fn unpop(&mut self, chain: Chain) {
        drop(chain);
        self.ring.go_to_previous_position();
    }

    /// Gives a chain back to the driver. The used length is what the chain's writer counted.
    ///
    /// # Errors
    /// [`QueueError::Used`] when the used ring cannot be written.
    pub fn push(&mut self, chain: Chain) -> Result<(), QueueError> {
        self.count(&chain);
        self.unannounced = self.unannounced.wrapping_add(1);
        self.ring.add_used(&*self.memory, chain.head(), chain.used_len()).map_err(QueueError::Used)
    }

    fn count(&self, chain: &Chain) {
        let (read, written) = (chain.writer.written(), chain.reader.consumed());
        self.interrupt.counters().request(read, written, chain.has_failed());
    }

    /// Counts something that failed without being a request: a packet that was dropped.
    pub fn count_error(&self) {
        self.interrupt.counters().error();
    }

    /// Gives chains back so that the driver sees all of them or none: what they hold belongs together.
    ///
    /// # Errors
    /// As for [`push`](Self::push).
    pub fn push_together(&mut self, chains: impl ExactSizeIterator<Item = Chain>) -> Result<(), QueueError> {
        let used = |error| QueueError::Used(virtio_queue::Error::GuestMemory(error));
        let first = self.ring.next_used();
        let mut left = chains.len();
        for (at, chain) in (0u16..).zip(chains) {
            let slot = first.wrapping_add(at);
            left = left.saturating_sub(1);
            if left == 0 {
                // The ring's index passes all of them by at once.
                self.ring.set_next_used(slot);
                self.unannounced = self.unannounced.wrapping_add(at);
                return self.push(chain);
            }
            self.count(&chain);
            // Section 2.7.8: flags and index, then eight bytes an element.
            let element = [u32::from(chain.head()).to_le(), chain.used_len().to_le()];
            let offset = 4 + 8 * u64::from(slot % self.ring.size());
            let address = GuestAddress(self.ring.used_ring()).unchecked_add(offset);
            self.memory.write_obj(element, address).map_err(used)?;
        }
        Ok(())
    }

    /// Interrupts the driver if it wants to hear of what was pushed since the last call (section 2.7.7).
    ///
    /// # Errors
    /// [`QueueError::Avail`] when the ring cannot be read.
    pub fn notify(&mut self) -> Result<(), QueueError> {
        let pushed = std::mem::take(&mut self.unannounced);
        if pushed == 0 {
            return Ok(());
        }
        // The driver writes what it wants and then looks at the used index; we write that and then look at what it wants.
        fence(Ordering::SeqCst);
        let avail = GuestAddress(self.ring.avail_ring());
        let read = |offset: u64| {
            let value: Result<u16, _> = self.memory.load(avail.unchecked_add(offset), Ordering::Relaxed);
            value.map(u16::from_le).map_err(|e| QueueError::Avail(virtio_queue::Error::GuestMemory(e)))
        };
        let wanted = if self.ring.event_idx_enabled() {
            // Whether the index that the driver waits for is among those just used: `used_event` follows the ring.
            let event = read(4 + 2 * u64::from(self.ring.size()))?;
            self.ring.next_used().wrapping_sub(event).wrapping_sub(1) < pushed
        } else {
            u32::from(read(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupt.used_buffer();
        }
        Ok(())
    }

    /// Serves the chains that there are, with doorbells off meanwhile and one interrupt at the end.
    ///
    /// A driver could add chains for as long as they are served, so after as many as the ring holds the queue rings its own
    /// doorbell and lets others have their turn. `serve` ends the turn earlier with [`Served::Enough`], or leaves the chain
    /// for later with [`Served::Later`].
    ///
    /// # Errors
    /// That of a malformed ring or chain, or of `serve`.
    pub fn drain<E: From<QueueError>>(
        &mut self,
        mut serve: impl FnMut(&mut Chain) -> Result<Served, E>,
    ) -> Result<(), E> {
        if !self.ring.ready() {
            return Ok(());
        }
        let memory = self.memory.clone();
        let mut turn = self.ring.size();
        // One look at the clock a request: it ends where the next begins.
        let mut began = Instant::now();
        'turn: loop {
            self.ring.disable_notification(&*memory).map_err(QueueError::Avail)?;
            while let Some(mut chain) = self.pop()? {
                let served = serve(&mut chain)?;
                if served == Served::Later {
                    self.unpop(chain);
                    break 'turn;
                }
                self.push(chain)?;
                let now = Instant::now();
                self.interrupt.counters().latency(now.saturating_duration_since(began));
                began = now;
                turn = turn.saturating_sub(1);
                if served == Served::Enough || turn == 0 {
                    self.come_again();
                    break 'turn;
                }
            }
            // More may have come between the last look and the doorbell's return.
            if !self.ring.enable_notification(&*memory).map_err(QueueError::Avail)? {
                break;
            }
        }
        Ok(self.notify()?)
    }

    /// Rings the queue's own doorbell: the device is woken for it again, after others had their turn.
    pub fn come_again(&self) {
        // An eventfd refuses a write only when its counter is full: then it rings already.
        let _ = self.kick.write(1);
    }

    /// Wants the driver's doorbell again; `true` when there is something to take already.
    ///
    /// # Errors
    /// [`QueueError::Avail`] when the ring cannot be read or written.
    pub fn rearm(&mut self) -> Result<bool, QueueError> {
        if !self.ring.ready() {
            return Ok(false);
        }
        self.ring.enable_notification(&*self.memory).map_err(QueueError::Avail)
    }

    /// The rings: where they are and how far both sides have come.
    pub fn ring(&self) -> &virtio_queue::Queue {
        &self.ring
    }
}

/// What became of a chain that [`Queue::drain`] offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// It is used: give it back to the driver.
    Done,
    /// It is used, and it was work enough for one turn.
    Enough,
    /// It must wait: nothing of it was used. Doorbells stay off until the next [`Queue::drain`] or [`Queue::rearm`].
    Later,
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
