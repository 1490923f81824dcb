//! Pausing a device and carrying it elsewhere: called by the machine's controller, while no vCPU runs.
//!
//! [`quiesce`](MmioTransport::quiesce) takes the queues out of the device into a [`Held`], and only
//! [`resume`](MmioTransport::resume) puts them back, so a pause can neither be forgotten nor happen twice. In between the
//! device touches no guest memory, and [`save`](MmioTransport::save) says all there is to know of it.
//! [`restore`](MmioTransport::restore) ends where `quiesce` does: with a `Held`.

use thiserror::Error;

use super::MmioTransport;
use crate::device_loop::{LoopError, NodeId};
use crate::virtio::device::{AttachError, Backend};
use crate::virtio::interrupt::{CONFIG_CHANGE, USED_BUFFER};
use crate::virtio::transport::negotiation::{Negotiation, status};
use crate::virtio::transport::state::{ConfigState, RestoreError, TransportState};
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

/// Why a device has not got another back end.
#[derive(Debug, Error)]
pub enum AttachFailed {
    /// The device does not take it.
    #[error(transparent)]
    Refused(#[from] AttachError),
    /// The device loop has ended, or the device did not start again.
    #[error(transparent)]
    Loop(#[from] LoopError),
}

impl MmioTransport {
    /// Takes the queues back from the device. What it had begun is finished.
    ///
    /// # Errors
    /// [`LoopError`] when the device loop has ended, or the device is paused already.
    pub fn quiesce(&self) -> Result<Held, LoopError> {
        let negotiation = self.lock();
        let mut queues = self.device_loop.quiesce(self.node)?;
        let live = negotiation.status() & status::DRIVER_OK != 0 && !self.interrupt.has_failed();
        if live && queues.is_none() {
            return Err(DeviceError::Protocol("the device is paused already".into()).into());
        }
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
            self.device_loop.resume(self.node, negotiation.features(), queues)?;
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
        self.show_config(&state.config, config, negotiation.status());
        Ok(Held { node: self.node, queues, restored: true })
    }

    /// Gives the device another back end, whether it is at work or paused; a `Held` stays what it is. May be called before
    /// [`restore`](Self::restore), and that is best: then the driver of a restored machine need not be told.
    ///
    /// # Errors
    /// [`AttachFailed`]; when the back end was refused, the device goes on with the one that it had.
    pub fn attach(&self, backend: Backend) -> Result<(), AttachFailed> {
        let negotiation = self.lock();
        let bytes = self.device_loop.attach(self.node, negotiation.features(), backend)??;
        let before = self.config().clone();
        self.show_config(&before, bytes, negotiation.status());
        Ok(())
    }

    /// Shows the driver a configuration space. Where that differs from the one `before`, so does the generation, and a driver
    /// that is at work is interrupted (section 2.5.1).
    fn show_config(&self, before: &ConfigState, bytes: Vec<u8>, reached: u32) {
        let changed = before.bytes != bytes;
        let generation = before.generation.wrapping_add(u32::from(changed));
        *self.config() = ConfigState { bytes, generation };
        if changed && reached & status::DRIVER_OK != 0 {
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
