//! The thread on which virtio devices run: one `event-manager` loop for all of them.
//!
//! A device comes here when the machine is built and stays for its life. Doorbells and the device's own file descriptors wake
//! it on this thread; a transport's status write reaches it as a short synchronous call ([`LoopHandle`]). Devices never wait
//! for a vCPU, so such a call always ends.

mod node;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::thread::JoinHandle;

use event_manager::{EventManager, EventOps, EventSet, Events, RemoteEndpoint, SubscriberId, SubscriberOps};
pub use node::Node;
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::device::{AttachError, Backend, DeviceState, StateError};
use crate::virtio::{DeviceError, DeviceKind, Interrupt, Queue, VirtioDevice};

/// A device's own name for one of the file descriptors that it watches. The upper half of the range is the loop's.
pub type Source = u32;

/// Marks a doorbell; the rest is its queue's number.
const KICK: u32 = 1 << 31;

/// Why the loop cannot serve.
#[derive(Debug, Error)]
pub enum LoopError {
    /// The host refused a thread, an epoll or an eventfd.
    #[error("device loop: {0}")]
    Host(#[from] io::Error),
    /// event-manager refused.
    #[error("device loop: {0}")]
    Events(event_manager::Error),
    /// A device refused.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl From<event_manager::Error> for LoopError {
    fn from(error: event_manager::Error) -> Self {
        LoopError::Events(error)
    }
}

/// What a device wants changed about the file descriptors that wake it. Collected during a call, applied after it.
///
/// Conditions are level-triggered: what is ready and not served wakes the device again at once.
#[derive(Default)]
pub struct Watch {
    changes: Vec<Change>,
}

enum Change {
    Add(RawFd, Source, EventSet),
    Modify(RawFd, Source, EventSet),
    Remove(RawFd, Source),
    Retire(OwnedFd, Source),
}

impl Watch {
    /// Wakes the device as `source` when `fd` meets `events`. The device must keep `fd` open until it takes it back.
    pub fn add(&mut self, fd: &impl AsRawFd, source: Source, events: EventSet) {
        self.changes.push(Change::Add(fd.as_raw_fd(), source & !KICK, events));
    }

    /// Changes what `fd` is watched for. An empty set keeps it registered and silent (but for errors and hang-up).
    pub fn modify(&mut self, fd: &impl AsRawFd, source: Source, events: EventSet) {
        self.changes.push(Change::Modify(fd.as_raw_fd(), source & !KICK, events));
    }

    /// Stops watching `fd`, which stays open at least until this call of the device ends.
    pub fn remove(&mut self, fd: &impl AsRawFd, source: Source) {
        self.changes.push(Change::Remove(fd.as_raw_fd(), source & !KICK));
    }

    /// Stops watching `fd` and closes it, in this order: a descriptor that is closed first could wake the wrong device.
    pub fn retire(&mut self, fd: impl Into<OwnedFd>, source: Source) {
        self.changes.push(Change::Retire(fd.into(), source & !KICK));
    }

    fn apply(self, ops: &mut EventOps) {
        for change in self.changes {
            let outcome = match &change {
                Change::Add(fd, source, events) => ops.add(Events::with_data_raw(*fd, *source, *events)),
                Change::Modify(fd, source, events) => {
                    ops.modify(Events::with_data_raw(*fd, *source, *events))
                }
                Change::Remove(fd, source) => {
                    ops.remove(Events::with_data_raw(*fd, *source, EventSet::empty()))
                }
                Change::Retire(fd, source) => {
                    ops.remove(Events::with_data_raw(fd.as_raw_fd(), *source, EventSet::empty()))
                }
            };
            if let Err(error) = outcome {
                log::error!("device loop: cannot change what is watched: {error}");
            }
        }
    }
}

/// Names a device on the loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeId(SubscriberId);

/// A way into the loop from other threads. Must not be used on the loop's own thread.
#[derive(Clone)]
pub struct LoopHandle {
    endpoint: RemoteEndpoint<Node>,
}

impl LoopHandle {
    /// Gives the queues to device `id` and starts it.
    ///
    /// # Errors
    /// [`LoopError`] when the device refuses, or the loop has ended.
    pub fn activate(&self, id: NodeId, features: u64, queues: Vec<Queue>) -> Result<(), LoopError> {
        self.call(id, move |node, watch| node.activate(features, queues, watch).map_err(LoopError::from))
    }

    /// Gives queues back to device `id` that were taken from it, here or in the process that saved it.
    ///
    /// # Errors
    /// [`LoopError`] when the device refuses, which its driver is told, or the loop has ended.
    pub fn resume(&self, id: NodeId, features: u64, queues: Vec<Queue>) -> Result<(), LoopError> {
        self.call(id, move |node, watch| node.resume(features, queues, watch).map_err(LoopError::from))
    }

    /// Stops device `id` and takes the queues back. A device that is not active, or has failed, has none.
    ///
    /// # Errors
    /// [`LoopError`] when the loop has ended.
    pub fn quiesce(&self, id: NodeId) -> Result<Option<Vec<Queue>>, LoopError> {
        self.call(id, |node, watch| Ok(node.quiesce(watch)))
    }

    /// Stops device `id` and has it forget its driver.
    ///
    /// # Errors
    /// [`LoopError`] when the loop has ended.
    pub fn reset(&self, id: NodeId) -> Result<(), LoopError> {
        self.call(id, |node, watch| {
            node.reset(watch);
            Ok(())
        })
    }

    /// What a snapshot must carry of device `id`, which must be quiesced.
    ///
    /// # Errors
    /// [`LoopError`] when the loop has ended.
    pub fn save(&self, id: NodeId) -> Result<DeviceState, LoopError> {
        self.call(id, |node, _| Ok(node.save()))
    }

    /// Makes device `id`, which was not active yet, the one that `state` was saved from. Returns its configuration space.
    ///
    /// # Errors
    /// [`LoopError`] when the loop has ended; the inner error when the device does not take the state.
    pub fn restore(&self, id: NodeId, state: DeviceState) -> Result<Result<Vec<u8>, StateError>, LoopError> {
        self.call(id, |node, _| Ok(node.restore(state)))
    }

    /// Gives device `id` another back end, between two requests if it is active; then `features` are those that its driver
    /// took. Returns its configuration space.
    ///
    /// # Errors
    /// [`LoopError`] when the loop has ended, or the device does not start again; the inner error when it goes on with what it
    /// had.
    pub fn attach(
        &self,
        id: NodeId,
        features: u64,
        backend: Backend,
    ) -> Result<Result<Vec<u8>, AttachError>, LoopError> {
        self.endpoint.call_blocking(move |manager| {
            // The old back end closes within `attach`: until then nothing of it may be watched.
            let mut watch = Watch::default();
            let queues = manager.subscriber_mut(id.0)?.quiesce(&mut watch);
            watch.apply(&mut manager.event_ops(id.0)?);
            let mut watch = Watch::default();
            let node = manager.subscriber_mut(id.0)?;
            let outcome = node.attach(backend);
            let restarted = queues.map_or(Ok(()), |queues| node.resume(features, queues, &mut watch));
            watch.apply(&mut manager.event_ops(id.0)?);
            restarted?;
            Ok(outcome)
        })
    }

    fn call<T: Send + 'static>(
        &self,
        id: NodeId,
        f: impl FnOnce(&mut Node, &mut Watch) -> Result<T, LoopError> + Send + 'static,
    ) -> Result<T, LoopError> {
        self.endpoint.call_blocking(move |manager| {
            let mut watch = Watch::default();
            let outcome = f(manager.subscriber_mut(id.0)?, &mut watch);
            // Even a device that refused may have begun to watch something.
            watch.apply(&mut manager.event_ops(id.0)?);
            outcome
        })
    }
}

/// The loop before it runs: devices are added to it while the machine is built.
pub struct DeviceLoop {
    manager: EventManager<Node>,
}

impl DeviceLoop {
    /// An empty loop.
    ///
    /// # Errors
    /// [`LoopError`] when the host refuses an epoll or an eventfd.
    pub fn new() -> Result<Self, LoopError> {
        // A few ready events at a time are plenty, and the table stays small.
        Ok(DeviceLoop { manager: EventManager::new_with_capacity(32)? })
    }

    /// Moves a device to the loop, with one doorbell for each of its queues.
    pub fn add(
        &mut self,
        device: Box<dyn VirtioDevice>,
        kind: DeviceKind,
        interrupt: Interrupt,
        kicks: Vec<EventFd>,
    ) -> NodeId {
        NodeId(self.manager.add_subscriber(Node::new(device, kind, interrupt, kicks)))
    }

    /// A way into the loop for transports and the controller.
    pub fn handle(&self) -> LoopHandle {
        LoopHandle { endpoint: self.manager.remote_endpoint() }
    }

    /// Runs the loop on a thread of its own, until the returned handle is dropped.
    ///
    /// # Errors
    /// [`LoopError::Host`] when the host refuses the thread.
    pub fn spawn(mut self) -> Result<RunningLoop, LoopError> {
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let endpoint = self.manager.remote_endpoint();
        let stopped = stop.clone();
        let thread = std::thread::Builder::new().name("devices".into()).spawn(move || {
            while !stopped.load(std::sync::atomic::Ordering::Acquire) {
                match self.manager.run() {
                    Ok(_) => {}
                    // A signal that was meant for the process, not for us.
                    Err(event_manager::Error::Epoll(e)) if e.errno() == libc::EINTR => {}
                    Err(error) => {
                        log::error!("device loop: {error}; devices stop");
                        break;
                    }
                }
            }
        })?;
        Ok(RunningLoop { endpoint, stop, thread: Some(thread) })
    }
}

/// The loop while it runs. Dropping it ends the loop, and with it every device.
pub struct RunningLoop {
    endpoint: RemoteEndpoint<Node>,
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for RunningLoop {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::Release);
        let _ = self.endpoint.kick();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
