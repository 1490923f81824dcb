//! One device on the loop, between event-manager and [`VirtioDevice`]. Everything here happens on the loop's thread.

use std::os::fd::AsRawFd;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use super::{Change, KICK, Watch};
use crate::virtio::device::{AttachError, Backend, DeviceState, StateError};
use crate::virtio::{DeviceError, DeviceKind, Interrupt, Queue, VirtioDevice};

/// One device on the loop: adapts any [`VirtioDevice`] to event-manager.
pub struct Node {
    device: Box<dyn VirtioDevice>,
    kind: DeviceKind,
    interrupt: Interrupt,
    /// One doorbell a queue.
    kicks: Vec<EventFd>,
    active: bool,
    /// How often its driver broke a rule.
    failures: u32,
}

impl Node {
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        kind: DeviceKind,
        interrupt: Interrupt,
        kicks: Vec<EventFd>,
    ) -> Self {
        Node { device, kind, interrupt, kicks, active: false, failures: 0 }
    }

    fn watch_kicks(&self, watch: &mut Watch, on: bool) {
        for (index, kick) in (0u32..).zip(&self.kicks) {
            let (fd, data) = (kick.as_raw_fd(), KICK | index);
            watch.changes.push(match on {
                true => Change::Add(fd, data, EventSet::IN),
                false => Change::Remove(fd, data),
            });
        }
    }

    pub(super) fn activate(
        &mut self,
        features: u64,
        queues: Vec<Queue>,
        watch: &mut Watch,
    ) -> Result<(), DeviceError> {
        if self.active {
            return Err(DeviceError::Protocol("device is active already".into()));
        }
        if let Err(error) = self.device.activate(features, queues, watch) {
            drop(self.device.quiesce(watch));
            return Err(error);
        }
        // A driver may have rung before it was done with the status register: an eventfd still rings.
        self.active = true;
        self.watch_kicks(watch, true);
        Ok(())
    }

    /// Activates a device whose driver is at work. It looks at every queue once: it may have waited for a descriptor of the
    /// host, or been rung for in another process.
    pub(super) fn resume(
        &mut self,
        features: u64,
        queues: Vec<Queue>,
        watch: &mut Watch,
    ) -> Result<(), DeviceError> {
        let enabled: Vec<bool> = queues.iter().map(Queue::is_enabled).collect();
        if let Err(error) = self.activate(features, queues, watch) {
            self.interrupt.device_failed();
            return Err(error);
        }
        for (kick, _) in self.kicks.iter().zip(enabled).filter(|(_, enabled)| *enabled) {
            // An eventfd refuses a write only when its counter is full: then it rings already.
            let _ = kick.write(1);
        }
        Ok(())
    }

    /// Takes the queues back; `None` when the device had none, because it is not active or has failed.
    pub(super) fn quiesce(&mut self, watch: &mut Watch) -> Option<Vec<Queue>> {
        if !std::mem::take(&mut self.active) {
            return None;
        }
        self.watch_kicks(watch, false);
        Some(self.device.quiesce(watch))
    }

    pub(super) fn reset(&mut self, watch: &mut Watch) {
        // The driver lays fresh rings out; the old ones end here.
        drop(self.quiesce(watch));
        self.device.reset(watch);
    }

    pub(super) fn save(&self) -> DeviceState {
        self.device.save()
    }

    pub(super) fn attach(&mut self, backend: Backend) -> Result<Vec<u8>, AttachError> {
        self.device.attach(backend)
    }

    pub(super) fn restore(&mut self, state: DeviceState) -> Result<Vec<u8>, StateError> {
        if self.active {
            return Err(StateError::Mismatch("the device is active already".into()));
        }
        self.device.restore(state)?;
        Ok(self.device.profile().config)
    }

    fn serve(&mut self, data: u32, watch: &mut Watch) {
        let outcome = if data & KICK == 0 {
            self.device.ready(data, watch)
        } else {
            let index = data & !KICK;
            let Some(kick) = usize::try_from(index).ok().and_then(|i| self.kicks.get(i)) else { return };
            self.interrupt.counters().kick();
            // Non-blocking: a doorbell that somebody else drained is no reason to wait.
            let _ = kick.read();
            match usize::try_from(index) {
                Ok(queue) => self.device.kicked(queue, watch),
                Err(_) => return,
            }
        };
        if let Err(error) = outcome {
            // A driver that does nothing else must not fill the log of its host.
            self.failures = self.failures.saturating_add(1);
            self.interrupt.counters().error();
            if self.failures.is_power_of_two() {
                log::error!("virtio-{}: {error}; the device waits for its driver to reset it", self.kind);
            }
            // The queues go: no doorbell or descriptor wakes a device whose driver broke the rules.
            drop(self.quiesce(watch));
            self.interrupt.device_failed();
        }
    }
}

impl MutEventSubscriber for Node {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let mut watch = Watch::default();
        self.serve(events.data(), &mut watch);
        watch.apply(ops);
    }

    fn init(&mut self, _ops: &mut EventOps) {}
}
