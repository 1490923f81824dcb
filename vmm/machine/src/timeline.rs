//! When the stages of a run were reached, and how much guest kernel work each took: what `--timing` prints.
//!
//! Marked from any thread, read at the end. The emulated instructions are KVM's own count, and exact; on hosts that run guest
//! kernels on the CPU there are none.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::kvm::stats::VcpuStats;

/// The stages, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The process's `main` began.
    Start,
    /// The first `KVM_RUN` is about to be made.
    FirstRun,
    /// The guest did something that needed us: it runs.
    KernelEntered,
    /// The agent connected.
    AgentUp,
    /// The container wrote its first byte.
    FirstByte,
    /// The machine stopped.
    Exit,
}

/// All stages, in order.
pub const PHASES: [Phase; 6] =
    [Phase::Start, Phase::FirstRun, Phase::KernelEntered, Phase::AgentUp, Phase::FirstByte, Phase::Exit];

/// When a stage was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// `CLOCK_MONOTONIC`, so that another process can compare it with its own clock.
    pub at: Duration,
    /// Instructions of the guest that KVM had emulated by then, all vCPUs together; `None` before there are vCPUs.
    pub emulated: Option<u64>,
}

/// The marks of one run.
#[derive(Default)]
pub struct Timeline {
    marks: [OnceLock<Mark>; PHASES.len()],
    stats: Mutex<Vec<VcpuStats>>,
    kvm_nanoseconds: AtomicU64,
}

fn now() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or_default(),
        u32::try_from(time.tv_nsec).unwrap_or_default(),
    )
}

impl Timeline {
    /// A timeline that begins now.
    pub fn start() -> Self {
        let timeline = Timeline::default();
        timeline.mark(Phase::Start);
        timeline
    }

    /// Marks that `phase` is reached. Only the first time counts.
    pub fn mark(&self, phase: Phase) {
        let Some(slot) = self.marks.get(phase as usize) else { return };
        slot.get_or_init(|| Mark { at: now(), emulated: self.emulated() });
    }

    /// When `phase` was reached, if it was.
    pub fn get(&self, phase: Phase) -> Option<Mark> {
        self.marks.get(phase as usize)?.get().copied()
    }

    /// Counts the instructions of a vCPU from now on.
    pub fn count(&self, stats: VcpuStats) {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner).push(stats);
    }

    /// Does `work`, most of which is KVM's, and books the time on KVM's account.
    pub fn in_kvm<T>(&self, work: impl FnOnce() -> T) -> T {
        let before = now();
        let result = work();
        let spent = u64::try_from((now() - before).as_nanos()).unwrap_or(u64::MAX);
        self.kvm_nanoseconds.fetch_add(spent, Ordering::Relaxed);
        result
    }

    /// Time that went into KVM's own system calls while the machine was built.
    pub fn kvm_time(&self) -> Duration {
        Duration::from_nanos(self.kvm_nanoseconds.load(Ordering::Relaxed))
    }

    /// Instructions of the guest that KVM has emulated so far; `None` before there are vCPUs.
    pub fn emulated(&self) -> Option<u64> {
        let stats = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        if stats.is_empty() { None } else { stats.iter().map(|s| s.insn_emulation()).sum() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_mark_counts_and_time_goes_forward() {
        let timeline = Timeline::start();
        timeline.mark(Phase::Exit);
        let first = timeline.get(Phase::Exit).unwrap();
        timeline.mark(Phase::Exit);
        assert_eq!(timeline.get(Phase::Exit), Some(first));
        assert!(first.at >= timeline.get(Phase::Start).unwrap().at);
        assert_eq!(timeline.get(Phase::AgentUp), None);
        assert_eq!(first.emulated, None);
    }
}
