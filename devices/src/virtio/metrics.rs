//! What a device has done, counted. Counted on the device loop's thread and read on any other: nothing here locks, allocates or
//! orders memory. Counts begin with the process; a snapshot does not carry them.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::device::DeviceKind;

/// How many classes of latency there are. Class *n* holds what took less than 2ⁿ µs and not less than the class below; the last
/// one everything from four seconds on.
pub const LATENCY_CLASSES: usize = 24;

/// The counters of one device.
#[derive(Debug, Default)]
pub struct Counters {
    requests: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    errors: AtomicU64,
    kicks: AtomicU64,
    interrupts: AtomicU64,
    config_changes: AtomicU64,
    latency: [AtomicU64; LATENCY_CLASSES],
    latency_total: AtomicU64,
}

/// The counters of one device at one moment. Those of a device that is at work may be a request apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceMetrics {
    /// Which device.
    pub kind: DeviceKind,
    /// Chains of buffers that the driver got back, on all queues.
    pub requests: u64,
    /// Bytes in them that the driver read: headers and what is in a status included.
    pub read_bytes: u64,
    /// Bytes in them that the driver wrote.
    pub written_bytes: u64,
    /// Requests that failed and packets that were dropped; and how often the device itself failed.
    pub errors: u64,
    /// How often the driver's doorbell woke the device.
    pub kicks: u64,
    /// How often the driver was interrupted.
    pub interrupts: u64,
    /// How often it was told that the device's configuration or its status had changed.
    pub config_changes: u64,
    /// How many requests took less than 1, 2, 4, 8 … µs, each counted in the first class that it fits into; the last class has
    /// no bound. Packets to the guest are not in here: nobody waits for those.
    pub latency: Vec<u64>,
    /// How long all of those took, in µs.
    pub latency_total: u64,
}

impl Counters {
    /// A chain went back to the driver.
    pub(crate) fn request(&self, read: usize, written: usize, failed: bool) {
        self.requests.fetch_add(1, Relaxed);
        self.read_bytes.fetch_add(read as u64, Relaxed);
        self.written_bytes.fetch_add(written as u64, Relaxed);
        if failed {
            self.error();
        }
    }

    /// How long it took from when the device turned to it.
    pub(crate) fn latency(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        if let Some(class) = self.latency.get(class(micros)) {
            class.fetch_add(1, Relaxed);
        }
        self.latency_total.fetch_add(micros, Relaxed);
    }

    /// Something failed that is no request.
    pub(crate) fn error(&self) {
        self.errors.fetch_add(1, Relaxed);
    }

    /// The driver rang.
    pub(crate) fn kick(&self) {
        self.kicks.fetch_add(1, Relaxed);
    }

    /// The driver is interrupted.
    pub(crate) fn interrupt(&self) {
        self.interrupts.fetch_add(1, Relaxed);
    }

    /// The driver is told that something changed.
    pub(crate) fn config_change(&self) {
        self.config_changes.fetch_add(1, Relaxed);
    }

    /// What was counted so far, for a device of `kind`.
    pub fn metrics(&self, kind: DeviceKind) -> DeviceMetrics {
        let read = |counter: &AtomicU64| counter.load(Relaxed);
        DeviceMetrics {
            kind,
            requests: read(&self.requests),
            read_bytes: read(&self.read_bytes),
            written_bytes: read(&self.written_bytes),
            errors: read(&self.errors),
            kicks: read(&self.kicks),
            interrupts: read(&self.interrupts),
            config_changes: read(&self.config_changes),
            latency: self.latency.iter().map(read).collect(),
            latency_total: read(&self.latency_total),
        }
    }
}

/// The class of a latency: how many bits its microseconds have.
fn class(micros: u64) -> usize {
    let bits = u64::BITS - micros.leading_zeros();
    usize::try_from(bits).unwrap_or(usize::MAX).min(LATENCY_CLASSES - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_fall_into_powers_of_two() {
        let top = LATENCY_CLASSES - 1;
        let cases = [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (1023, 10), (1024, 11), (u64::MAX, top)];
        for (micros, expected) in cases {
            assert_eq!(class(micros), expected, "{micros}");
        }
        assert_eq!((class((1 << 22) - 1), class(1 << 22), class(1 << 23)), (22, 23, 23));
        let counters = Counters::default();
        counters.latency(Duration::from_micros(3));
        counters.latency(Duration::from_nanos(3100));
        let metrics = counters.metrics(DeviceKind::Rng);
        assert_eq!((metrics.latency[2], metrics.latency_total, metrics.latency.len()), (2, 6, 24));
    }
}
