//! A device's way to the guest's attention: interrupt status bits, and the eventfd that an irqfd listens to.
//!
//! It also carries the device's counters: it is what transport, queues and loop have in common.
//!
//! Shared by the transport (which shows the bits to the driver on vCPU threads) and the queues (which raise them on the
//! device loop).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::metrics::Counters;

/// InterruptStatus bit 0: the device has used a buffer (section 4.2.2).
pub const USED_BUFFER: u32 = 1;
/// InterruptStatus bit 1: the configuration has changed (section 4.2.2).
pub const CONFIG_CHANGE: u32 = 2;

/// The interrupt of one device. Clones raise the same line.
#[derive(Clone)]
pub struct Interrupt(Arc<Inner>);

struct Inner {
    line: EventFd,
    status: AtomicU32,
    failed: AtomicBool,
    counters: Counters,
}

impl Interrupt {
    /// An interrupt with nothing pending, on a fresh eventfd.
    ///
    /// # Errors
    /// That of `eventfd(2)`.
    pub fn new() -> io::Result<Self> {
        let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let (status, failed, counters) = Default::default();
        Ok(Interrupt(Arc::new(Inner { line, status, failed, counters })))
    }

    /// The eventfd that is written to when the line is raised: what a VM registers as an irqfd.
    pub fn line(&self) -> &EventFd {
        &self.0.line
    }

    /// What the device has done.
    pub fn counters(&self) -> &Counters {
        &self.0.counters
    }

    /// Tells the driver that buffers were used.
    pub fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// Tells the driver that the device's configuration, or its status, has changed.
    pub fn config_changed(&self) {
        self.0.counters.config_change();
        self.raise(CONFIG_CHANGE);
    }

    /// Says that the device is beyond use until it is reset: the transport shows `DEVICE_NEEDS_RESET` (section 2.1.2).
    pub fn device_failed(&self) {
        // Counted first: whoever sees the failure finds it counted.
        self.0.counters.config_change();
        self.0.failed.store(true, Ordering::Release);
        self.raise(CONFIG_CHANGE);
    }

    /// Whether [`device_failed`](Self::device_failed) was called since the last [`reset`](Self::reset).
    pub fn has_failed(&self) -> bool {
        self.0.failed.load(Ordering::Acquire)
    }

    /// The pending bits, as the driver reads them.
    pub fn status(&self) -> u32 {
        self.0.status.load(Ordering::Acquire)
    }

    /// Takes back the bits that the driver acknowledged.
    pub fn acknowledge(&self, bits: u32) {
        self.0.status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Forgets all that is pending.
    pub fn reset(&self) {
        self.0.status.store(0, Ordering::Release);
        self.0.failed.store(false, Ordering::Release);
    }

    /// Becomes the interrupt of a device that was saved. The line stays as it is: see [`repeat`](Self::repeat).
    pub fn restore(&self, status: u32, failed: bool) {
        self.0.status.store(status, Ordering::Release);
        self.0.failed.store(failed, Ordering::Release);
    }

    /// Raises the line again when something is pending. To a driver that has seen it already it is spurious, and harmless.
    pub fn repeat(&self) {
        if self.status() != 0 {
            self.raise(0);
        }
    }

    fn raise(&self, bit: u32) {
        self.0.counters.interrupt();
        self.0.status.fetch_or(bit, Ordering::AcqRel);
        // An eventfd refuses a write only when its counter is full: then the line is raised already.
        let _ = self.0.line.write(1);
    }
}
