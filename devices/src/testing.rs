//! The driver's side of a queue, for tests: lays rings out in guest memory and plays guests, well- and ill-behaved.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue as Ring, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::device_loop::{DeviceLoop, RunningLoop};
use crate::memory::{self, GuestMemory};
use crate::virtio::transport::{MmioTransport, TransportState};
use crate::virtio::{Interrupt, Queue, VirtioDevice};

/// Descriptor flag: the chain goes on.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Feature bit: [`Driver::event_idx`].
pub const EVENT_IDX: u64 = 1 << 29;

/// `size` bytes of guest memory from address 0, with its dirty pages tracked.
///
/// # Panics
/// When the host has none.
pub fn memory(size: usize) -> Arc<GuestMemory> {
    Arc::new(memory::anonymous(&[(GuestAddress(0), size)], true).expect("test memory"))
}

/// What `body` returns, after checking that every page of `memory` that changed meanwhile was marked as dirty. The driver's
/// own writes are marked too, so `body` should only have the device write.
///
/// # Panics
/// When a write went past the marks.
pub fn marking<T>(memory: &Arc<GuestMemory>, body: impl FnOnce() -> T) -> T {
    let contents = || {
        let len = usize::try_from(memory.last_addr().0 + 1).unwrap();
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    };
    memory::take_dirty_pages(memory);
    let before = contents();
    let result = body();
    let after = contents();
    let dirty = &memory::take_dirty_pages(memory)[0].pages;
    let page = memory::PAGE.get();
    let mut changes = 0;
    for (index, (before, after)) in before.chunks(page).zip(after.chunks(page)).enumerate() {
        if before != after {
            changes += 1;
            assert!(dirty[index / 64] & 1 << (index % 64) != 0, "page {index} was written to and not marked");
        }
    }
    assert!(changes > 0, "nothing was written");
    result
}

/// A driver of one queue. Its rings take 16 KiB from `base`; buffers are cut from the 64 KiB pages after that.
pub struct Driver {
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    base: u64,
    size: u16,
    free_descriptor: u16,
    free_buffer: u64,
    avail: u16,
    used_seen: u16,
    /// Says which used entry it waits for, as a driver that took `RING_EVENT_IDX` does.
    pub event_idx: bool,
}

impl Driver {
    /// A driver with a queue of `size` entries (at most 256) whose rings begin at `base`.
    pub fn new(memory: Arc<GuestMemory>, base: u64, size: u16) -> Self {
        assert!(size <= 256, "the test driver's rings have room for 256 entries");
        Driver {
            memory,
            base,
            size,
            free_descriptor: 0,
            free_buffer: base + 0x4000,
            avail: 0,
            used_seen: 0,
            event_idx: false,
        }
    }

    /// Addresses of the descriptor table, the available ring and the used ring.
    pub fn rings(&self) -> (u64, u64, u64) {
        (self.base, self.base + 0x1000, self.base + 0x2000)
    }

    /// The queue as the transport would hand it to the device.
    pub fn queue(&self, interrupt: &Interrupt) -> Queue {
        let mut ring = Ring::new(self.size).unwrap();
        let (table, avail, used) = self.rings();
        ring.try_set_desc_table_address(GuestAddress(table)).unwrap();
        ring.try_set_avail_ring_address(GuestAddress(avail)).unwrap();
        ring.try_set_used_ring_address(GuestAddress(used)).unwrap();
        ring.set_ready(true);
        let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        Queue::new(ring, self.memory.clone(), interrupt.clone(), kick).unwrap()
    }

    /// Cuts a buffer of `len` bytes.
    pub fn buffer(&mut self, len: usize) -> u64 {
        let at = self.free_buffer;
        self.free_buffer += (len as u64).next_multiple_of(16);
        assert!(self.memory.check_range(GuestAddress(at), len), "the test's memory is used up");
        at
    }

    /// Writes descriptor `index` of the table.
    pub fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(self.base + 16 * u64::from(index));
        self.memory.write_obj(address, at).unwrap();
        self.memory.write_obj(len, GuestAddress(at.0 + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at.0 + 14)).unwrap();
    }

    /// Makes the chain that begins at descriptor `head` available.
    pub fn publish(&mut self, head: u16) {
        let (_, ring, _) = self.rings();
        let slot = ring + 4 + 2 * u64::from(self.avail % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.memory.write_obj(self.avail, GuestAddress(ring + 2)).unwrap();
    }

    /// Claims `index` as the available ring's index, whatever is in the ring.
    pub fn claim(&mut self, index: u16) {
        self.avail = index;
        let (_, ring, _) = self.rings();
        self.memory.write_obj(index, GuestAddress(ring + 2)).unwrap();
    }

    /// Makes a chain available: `read` are buffers for the device to read, `write` lengths of buffers for it to write.
    /// Returns the head and the addresses of the latter.
    pub fn send(&mut self, read: &[&[u8]], write: &[usize]) -> (u16, Vec<u64>) {
        let mut parts = Vec::new();
        for data in read {
            let at = self.buffer(data.len());
            self.memory.write_slice(data, GuestAddress(at)).unwrap();
            parts.push((at, data.len(), 0));
        }
        let mut answers = Vec::new();
        for &len in write {
            let at = self.buffer(len);
            answers.push(at);
            parts.push((at, len, WRITE));
        }
        let head = self.free_descriptor;
        let count = u16::try_from(parts.len()).unwrap();
        for (i, (at, len, flags)) in (0u16..).zip(parts) {
            let index = (head + i) % self.size;
            let next = (index + 1) % self.size;
            let more = if i + 1 < count { NEXT } else { 0 };
            self.descriptor(index, at, u32::try_from(len).unwrap(), flags | more, next);
        }
        self.free_descriptor = (head + count) % self.size;
        self.publish(head);
        (head, answers)
    }

    /// The next used entry: the chain's head and the used length.
    pub fn receive(&mut self) -> Option<(u32, u32)> {
        let (_, avail, ring) = self.rings();
        if self.event_idx {
            // First say what to wait for, then look.
            let event = GuestAddress(avail + 4 + 2 * u64::from(self.size));
            self.memory.store(self.used_seen, event, Ordering::SeqCst).unwrap();
        }
        let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        if index == self.used_seen {
            return None;
        }
        let slot = ring + 4 + 8 * u64::from(self.used_seen % self.size);
        self.used_seen = self.used_seen.wrapping_add(1);
        let head = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let len = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        Some((head, len))
    }

    /// `len` bytes of guest memory at `at`.
    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }
}

/// A guest with one device behind a real transport on a real loop.
pub struct Guest {
    /// The device's registers.
    pub transport: MmioTransport,
    /// A driver for each queue, 4 MiB of memory apart.
    pub drivers: Vec<Driver>,
    _running: RunningLoop,
}

impl Guest {
    /// `device` before its driver's first word.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let profile = device.profile();
        let memory = memory(profile.queue_sizes.len() << 22);
        let drivers = (0u64..)
            .zip(profile.queue_sizes)
            .map(|(i, size)| Driver::new(memory.clone(), i << 22, size.min(256)))
            .collect();
        Guest::with(device, memory, drivers)
    }

    fn with(device: Box<dyn VirtioDevice>, memory: Arc<GuestMemory>, drivers: Vec<Driver>) -> Self {
        let mut device_loop = DeviceLoop::new().unwrap();
        let transport = MmioTransport::new(device, memory, &mut device_loop).unwrap();
        Guest { transport, drivers, _running: device_loop.spawn().unwrap() }
    }

    /// A guest with the same memory and drivers, whose device nobody has spoken to.
    pub fn moved_to(self, device: Box<dyn VirtioDevice>) -> Self {
        let memory = self.drivers[0].memory.clone();
        let Guest { drivers, .. } = self;
        Guest::with(device, memory, drivers)
    }

    /// Pauses, saves, and goes on with `device` in a process of its own, as it were.
    pub fn restored_on(self, device: Box<dyn VirtioDevice>) -> Self {
        let state = self.saved();
        let guest = self.moved_to(device);
        let held = guest.transport.restore(state.clone()).unwrap();
        assert_eq!(guest.transport.save(&held).unwrap(), state, "restoring and saving changes nothing");
        guest.transport.resume(held).unwrap();
        guest
    }

    /// What a snapshot carries of the device, as it comes out of a file. The device stays paused.
    pub fn saved(&self) -> TransportState {
        let held = self.transport.quiesce().unwrap();
        let state = self.transport.save(&held).unwrap();
        serde_json::from_slice(&serde_json::to_vec(&state).unwrap()).unwrap()
    }

    /// Starts `device` as a driver would that takes those of `features` that it offers.
    pub fn start(device: Box<dyn VirtioDevice>, features: u64) -> Self {
        let guest = Guest::new(device);
        guest.steps(features & !EVENT_IDX).iter().for_each(|&(register, value)| guest.set(register, value));
        assert_eq!(guest.get(0x70), 15, "the device is live");
        guest
    }

    /// The register writes that make the device live, for a driver that takes those of `features` that are offered.
    pub fn steps(&self, features: u64) -> Vec<(u64, u32)> {
        let offered = self.transport.profile().features | EVENT_IDX;
        let features = u32::try_from(features & offered).unwrap();
        let mut steps =
            vec![(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x24, 0), (0x20, features), (0x70, 11)];
        for (i, driver) in (0u32..).zip(&self.drivers) {
            let (table, avail, used) = driver.rings();
            steps.extend([(0x30, i), (0x38, driver.size.into())]);
            for (register, address) in [(0x80, table), (0x90, avail), (0xa0, used)] {
                steps.push((register, u32::try_from(address).unwrap()));
            }
            steps.push((0x44, 1));
        }
        steps.push((0x70, 15));
        steps
    }

    /// Reads a register.
    pub fn get(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    /// Writes a register.
    pub fn set(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    /// Rings for queue `queue`.
    pub fn kick(&self, queue: u32) {
        self.set(0x50, queue);
    }

    /// Waits for the next used entry of queue `queue`.
    pub fn receive(&mut self, queue: usize) -> (u32, u32) {
        loop {
            if let Some(used) = self.drivers[queue].receive() {
                return used;
            }
            self.wait();
        }
    }

    /// Waits until the device has failed.
    pub fn wait_for_failure(&self) {
        while self.get(0x70) & 64 == 0 {
            self.wait();
        }
    }

    /// Waits for an interrupt, for a minute at most.
    pub fn wait(&self) {
        use rustix::event::{PollFd, PollFlags, poll};
        let line = self.transport.interrupt().line();
        // SAFETY: the eventfd lives as long as the transport, which is borrowed for longer than the poll.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(line)) };
        let minute = rustix::time::Timespec { tv_sec: 60, tv_nsec: 0 };
        let ready = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&minute)).unwrap();
        assert_eq!(ready, 1, "the device never interrupted");
        line.read().unwrap();
        self.set(0x64, 3);
    }
}
