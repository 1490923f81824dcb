//! What a machine counts: how often vCPUs came back to us and why, how long serving that took, and what devices report.
//!
//! Counted on vCPU threads, without locks and without a lock prefix, because each counter has one writer. Read on whichever
//! thread asks; a reader may see one counter a moment ahead of another, never one that goes backwards.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::kvm::run::Exit;

/// Buckets of a [`Histogram`]: up to 1 µs, 2 µs, 4 µs … 2²⁰ µs (about a second), and longer.
pub const BUCKETS: usize = 22;

/// What a machine has counted so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// Since the machine was built or restored.
    pub uptime_ms: u64,
    /// Of the machine as a whole, by name, such as `emulated_instructions`.
    pub counters: BTreeMap<String, u64>,
    /// By vCPU.
    pub vcpus: Vec<VcpuMetrics>,
    /// By device.
    pub devices: Vec<DeviceMetrics>,
}

/// What a vCPU came back for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuMetrics {
    /// Its number.
    pub id: u8,
    /// How often, by reason.
    pub exits: BTreeMap<String, u64>,
    /// How long it took to serve it, by reason.
    pub exit_latency: BTreeMap<String, Histogram>,
}

/// What a device counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceMetrics {
    /// Where it is.
    pub slot: usize,
    /// `block`, `net`, `vsock` or `rng`.
    pub kind: String,
    /// By name, such as `reads` or `read_bytes`.
    pub counters: BTreeMap<String, u64>,
    /// How long requests took, by name, such as `read`.
    pub latency: BTreeMap<String, Histogram>,
}

/// How long something took, and how often.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Histogram {
    /// How often.
    pub count: u64,
    /// All together.
    pub sum_ns: u64,
    /// Element i: how often it took at most 2ⁱ µs, and more than the element before says. The last one has no upper end,
    /// whatever their number.
    pub buckets: Vec<u64>,
}

/// The bucket that `elapsed` belongs to.
pub fn bucket(elapsed: Duration) -> usize {
    let micros = elapsed.as_nanos().div_ceil(1000);
    // The least i with micros ≤ 2^i.
    let bits = u128::BITS - micros.saturating_sub(1).leading_zeros();
    usize::try_from(bits).map_or(BUCKETS - 1, |i| i.min(BUCKETS - 1))
}

/// Why a vCPU came back, without the exit's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// [`Exit::PortRead`].
    PortRead,
    /// [`Exit::PortWrite`].
    PortWrite,
    /// [`Exit::MmioRead`].
    MmioRead,
    /// [`Exit::MmioWrite`].
    MmioWrite,
    /// [`Exit::WriteMsr`].
    WriteMsr,
    /// [`Exit::Halt`].
    Halt,
    /// [`Exit::Shutdown`].
    Shutdown,
    /// [`Exit::EmulationFailure`].
    EmulationFailure,
    /// [`Exit::Interrupted`].
    Interrupted,
    /// [`Exit::Fatal`].
    Fatal,
}

/// Their names, in the order of the enum.
const REASONS: [&str; 10] = [
    "port_read",
    "port_write",
    "mmio_read",
    "mmio_write",
    "write_msr",
    "halt",
    "shutdown",
    "emulation_failure",
    "interrupted",
    "fatal",
];

impl Reason {
    /// Why the vCPU came back.
    pub fn of(exit: &Exit<'_>) -> Self {
        match exit {
            Exit::PortRead { .. } => Reason::PortRead,
            Exit::PortWrite { .. } => Reason::PortWrite,
            Exit::MmioRead { .. } => Reason::MmioRead,
            Exit::MmioWrite { .. } => Reason::MmioWrite,
            Exit::WriteMsr { .. } => Reason::WriteMsr,
            Exit::Halt => Reason::Halt,
            Exit::Shutdown => Reason::Shutdown,
            Exit::EmulationFailure { .. } => Reason::EmulationFailure,
            Exit::Interrupted => Reason::Interrupted,
            Exit::Fatal(_) => Reason::Fatal,
        }
    }
}

/// A counter with one writer.
#[derive(Debug, Default)]
struct Counter(AtomicU64);

impl Counter {
    fn add(&self, more: u64) {
        self.0.store(self.get().wrapping_add(more), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug, Default)]
struct ReasonCounters {
    sum_ns: Counter,
    buckets: [Counter; BUCKETS],
}

/// One vCPU's exits. The vCPU's thread writes, anybody reads.
#[derive(Debug, Default)]
pub struct ExitCounters([ReasonCounters; REASONS.len()]);

impl ExitCounters {
    /// The vCPU came back for `reason`, and `elapsed` later it was served. On the vCPU's thread only.
    pub fn record(&self, reason: Reason, elapsed: Duration) {
        if let Some(counters) = self.0.get(reason as usize) {
            counters.sum_ns.add(u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX));
            counters.buckets[bucket(elapsed)].add(1);
        }
    }

    /// A number that changes whenever the guest has done something that needed us. Kicks of ours do not count.
    pub fn activity(&self) -> u64 {
        let guests = self.0.iter().enumerate().filter(|(reason, _)| *reason != Reason::Interrupted as usize);
        guests.fold(0, |sum, (_, counters)| sum.wrapping_add(counters.sum_ns.get()))
    }

    /// What was counted until now, without reasons that never were.
    pub fn read(&self, id: u8) -> VcpuMetrics {
        let mut metrics = VcpuMetrics { id, ..Default::default() };
        for (name, counters) in REASONS.iter().zip(&self.0) {
            let buckets: Vec<u64> = counters.buckets.iter().map(Counter::get).collect();
            // What belongs together is taken from one place: a histogram's count is that of its buckets.
            let count = buckets.iter().sum();
            if count > 0 {
                let histogram = Histogram { count, sum_ns: counters.sum_ns.get(), buckets };
                metrics.exits.insert((*name).into(), count);
                metrics.exit_latency.insert((*name).into(), histogram);
            }
        }
        metrics
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn buckets_are_powers_of_two_of_a_microsecond() {
        let of = |nanoseconds| bucket(Duration::from_nanos(nanoseconds));
        let table =
            [(0, 0), (1, 0), (1000, 0), (1001, 1), (2000, 1), (2001, 2), (4000, 2), (4001, 3), (1 << 20, 11)];
        for (nanoseconds, expected) in table {
            assert_eq!(of(nanoseconds), expected, "{nanoseconds} ns");
        }
        assert_eq!(of(1000 << 20), 20);
        assert_eq!(of((1000 << 20) + 1), 21);
        assert_eq!(bucket(Duration::MAX), 21);
    }

    proptest! {
        #[test]
        fn a_value_lies_in_its_bucket(nanoseconds in any::<u64>()) {
            let bucket = bucket(Duration::from_nanos(nanoseconds));
            let upper = |i: usize| 1000_u128 << i;
            prop_assert!(bucket == BUCKETS - 1 || u128::from(nanoseconds) <= upper(bucket));
            prop_assert!(bucket == 0 || u128::from(nanoseconds) > upper(bucket - 1));
        }
    }

    #[test]
    fn exits_are_counted_by_reason() {
        let counters = ExitCounters::default();
        let data = &[0];
        let reason = Reason::of(&Exit::PortWrite { port: 0x3f8, width: 1, data });
        counters.record(reason, Duration::from_nanos(700));
        counters.record(reason, Duration::from_micros(3));
        counters.record(Reason::Fatal, Duration::ZERO);
        let metrics = counters.read(1);
        assert_eq!(metrics.id, 1);
        assert_eq!(metrics.exits, BTreeMap::from([("port_write".into(), 2), ("fatal".into(), 1)]));
        let histogram = &metrics.exit_latency["port_write"];
        assert_eq!((histogram.count, histogram.sum_ns), (2, 3700));
        assert_eq!(histogram.buckets[..4], [1, 0, 1, 0]);
        assert_eq!(histogram.buckets.len(), BUCKETS);
    }
}
