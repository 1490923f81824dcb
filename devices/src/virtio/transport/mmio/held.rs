//! Pausing a device and carrying it elsewhere: called by the machine's controller, while no vCPU runs.
//!
//! [`quiesce`](MmioTransport::quiesce) takes the queues out of the device into a [`Held`], and only
//! [`resume`](MmioTransport::resume) puts them back, so a pause can neither be forgotten nor happen twice. In between the
//! device touches no guest memory, and [`save`](MmioTransport::save) says all there is to know of it.
//! [`restore`](MmioTransport::restore) ends where `quiesce` does: with a `Held`.

use std::sync::PoisonError;

use super::MmioTransport;
use crate::device_loop::{LoopError, NodeId};
use crate::virtio::interrupt::{CONFIG_CHANGE, USED_BUFFER};
use crate::virtio::transport::negotiation::{Negotiation, status};
use crate::virtio::transport::state::{RestoreError, TransportState};
use crate::virtio::{DeviceError, Queue};

/// The queues of a device that is paused. A device that is not live has none, and can be paused all the same.
#[must_use = "a device that is not resumed answers its driver no more"]
pub struct Held {
    node: NodeId,
    queues: Option<Vec<Queue>>,
    restored: bool,
}

impl Held {
    /// Whether the device will serve its driver once it is resumed.
    pub fn is_live(&self) -> bool {
        self.queues.is_some()
    }
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let queues = self.queues.as_ref().map(Vec::len);
        f.debug_struct("Held").field("queues", &queues).field("restored", &self.restored).finish()
    }
}

impl MmioTransport {
    /// Takes the queues back from the device. What it had begun is finished.
    ///
    /// # Errors
    /// [`LoopError`] when the device loop has ended.
    pub fn quiesce(&self) -> Result<Held, LoopError> {
        let _negotiation = self.lock();
        let mut queues = self.device_loop.quiesce(self.node)?;
        for queue in queues.iter_mut().flatten() {
            // What was used and not announced yet would be forgotten. The rings lie in memory: that was checked.
            let _ = queue.notify();
        }
        Ok(Held { node: self.node, queues, restored: false })
    }

    /// Goes on where [`quiesce`](Self::quiesce) stopped, or where a saved device was.
    ///
    /// # Errors
    /// [`LoopError`] when the device loop has ended, `held` is another device's, or the device cannot go on: then its driver
    /// is told that it needs a reset.
    pub fn resume(&self, held: Held) -> Result<(), LoopError> {
        self.check(&held)?;
        let negotiation = self.lock();
        if let Some(queues) = held.queues {
            let enabled: Vec<bool> = queues.iter().map(Queue::is_enabled).collect();
            if let Err(error) = self.device_loop.activate(self.node, negotiation.features(), queues) {
                self.interrupt.device_failed();
                return Err(error);
            }
            // Whoever waited for a host's descriptor, or was rung for in the process that saved it, looks again.
            for (kick, _) in self.kicks.iter().zip(enabled).filter(|(_, enabled)| *enabled) {
                let _ = kick.write(1);
            }
        }
        if held.restored {
            // An interrupt that was on its way when the device was saved may have got lost on it.
            self.interrupt.repeat();
        }
        Ok(())
    }

    /// What a snapshot carries of the device, whose queues are `held`.
    ///
    /// # Errors
    /// [`LoopError`] when the device loop has ended, or `held` is another device's.
    pub fn save(&self, held: &Held) -> Result<TransportState, LoopError> {
        self.check(held)?;
        let negotiation = self.lock();
        let live = held.queues.iter().flatten().map(Queue::ring);
        Ok(TransportState {
            kind: self.profile.kind,
            negotiation: negotiation.save(live),
            interrupt_status: self.interrupt.status(),
            failed: self.interrupt.has_failed(),
            config: self.config().clone(),
            device: self.device_loop.save(self.node)?,
        })
    }

    /// Becomes the transport that `state` was saved from; the device loop must run, and guest memory must be what it was.
    /// Only for a transport that no driver has spoken to yet.
    ///
    /// # Errors
    /// [`RestoreError`]. The state may come from anybody: nothing in it is believed.
    pub fn restore(&self, state: TransportState) -> Result<Held, RestoreError> {
        let mut negotiation = self.lock();
        if negotiation.status() != 0 || self.interrupt.has_failed() {
            return Err(RestoreError::NotFresh);
        }
        if state.kind != self.profile.kind {
            return Err(RestoreError::Kind { saved: state.kind, here: self.profile.kind });
        }
        if state.interrupt_status & !(USED_BUFFER | CONFIG_CHANGE) != 0 {
            return Err(RestoreError::Interrupt(state.interrupt_status));
        }
        let (restored, rings) = Negotiation::restore(&self.profile, &state.negotiation, state.failed)?;
        let queue = |(index, (ring, kick))| {
            self.queue(ring, kick).map_err(|error| match error {
                LoopError::Device(problem) => RestoreError::Queue { index, problem: problem.to_string() },
                other => RestoreError::Loop(other),
            })
        };
        let queues: Option<Result<Vec<_>, _>> =
            rings.map(|rings| rings.into_iter().zip(&self.kicks).enumerate().map(queue).collect());
        let queues = queues.transpose()?;
        let config = self.device_loop.restore(self.node, state.device)??;

        *negotiation = restored;
        self.interrupt.restore(state.interrupt_status, state.failed);
        self.set_config(state.config.generation, state.config.bytes != config, config, negotiation.status());
        Ok(Held { node: self.node, queues, restored: true })
    }

    /// Shows the driver another configuration space, and tells it so if it `changed`: the generation becomes another, and a
    /// driver that is at work is interrupted (section 2.5.1).
    pub(super) fn set_config(&self, generation: u32, changed: bool, bytes: Vec<u8>, status: u32) {
        let mut config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        config.generation = generation.wrapping_add(u32::from(changed));
        config.bytes = bytes;
        drop(config);
        if changed && status & status::DRIVER_OK != 0 {
            self.interrupt.config_changed();
        }
    }

    fn check(&self, held: &Held) -> Result<(), LoopError> {
        if held.node == self.node {
            return Ok(());
        }
        Err(DeviceError::Protocol("the queues are another device's".into()).into())
    }
}

#[cfg(test)]
#[path = "held_tests.rs"]
mod tests;
