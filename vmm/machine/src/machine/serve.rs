//! What the machine does when it is asked: one function for each [`Request`].

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::{Guest, Machine};
use crate::config::DeviceConfig;
use crate::control::{
    AttachBackend, Description, DeviceDescription, DeviceMetrics, Histogram, Metrics, Refusal, Reply,
    Request, SavedDisk, SnapshotReport, SnapshotRequest, State,
};
use crate::controller::{Event, Watch};
use crate::snapshot::manifest::{GuestStage, Manifest, MemoryFile, Parent};
use crate::snapshot::{
    Draft, MachineState, SnapshotError, SnapshotId, chain, changes, disks, memory, vcpu::VcpuState,
    vm::VmState,
};
use crate::vcpu::VcpuThread;

/// How long the guest's agent may take to stop its container.
const FREEZE_PATIENCE: Duration = Duration::from_secs(5);

/// A device's counters under the names that the API has for them.
fn device_metrics(slot: usize, device: &devices::virtio::DeviceMetrics) -> DeviceMetrics {
    let counters = [
        ("requests", device.requests),
        ("read_bytes", device.read_bytes),
        ("written_bytes", device.written_bytes),
        ("errors", device.errors),
        ("kicks", device.kicks),
        ("interrupts", device.interrupts),
        ("config_changes", device.config_changes),
    ];
    let latency = Histogram {
        count: device.latency.iter().sum(),
        sum_ns: device.latency_total.saturating_mul(1000),
        buckets: device.latency.clone(),
    };
    DeviceMetrics {
        slot,
        kind: device.kind.to_string(),
        counters: counters.map(|(name, value)| (name.to_owned(), value)).into(),
        latency: [("request".to_owned(), latency)].into(),
    }
}

impl Machine {
    pub(super) fn serve(
        &mut self,
        request: Request,
        guest: &mut dyn Guest,
        watch: &mut Watch,
    ) -> Result<Reply, Refusal> {
        match request {
            Request::Describe => Ok(Reply::Description(Box::new(self.describe()))),
            Request::Start => {
                self.must_be(&[State::Created], "created")?;
                self.start().map(|()| Reply::Done)
            }
            Request::Pause => {
                self.must_be(&[State::Running], "running")?;
                self.pause().map(|()| Reply::Done)
            }
            Request::Resume => {
                self.must_be(&[State::Paused], "paused")?;
                self.start().map(|()| Reply::Done)
            }
            Request::Shutdown { force, timeout } => self.shutdown(force, timeout, guest, watch),
            Request::Snapshot(request) => self.snapshot(&request, guest).map(Reply::Snapshot),
            Request::Attach { slot, backend } => self.attach(slot, backend).map(|()| Reply::Done),
            Request::Metrics => Ok(Reply::Metrics(self.metrics())),
        }
    }

    fn must_be(&self, states: &[State], wanted: &'static str) -> Result<(), Refusal> {
        if states.contains(&self.state) { Ok(()) } else { Err(Refusal::State { now: self.state, wanted }) }
    }

    fn describe(&self) -> Description {
        let devices = self.devices.iter().zip(&self.config.devices).enumerate();
        Description {
            state: self.state,
            vmm_version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_ms: u64::try_from(self.built.elapsed().as_millis()).unwrap_or(u64::MAX),
            config: self.config.clone(),
            devices: devices
                .map(|(slot, (device, config))| DeviceDescription {
                    slot,
                    kind: device.transport.profile().kind.into(),
                    backend: device.backend.clone(),
                    read_only: match config {
                        DeviceConfig::Block(block) => Some(block.read_only),
                        _ => None,
                    },
                })
                .collect(),
        }
    }

    fn metrics(&self) -> Metrics {
        let mut counters = BTreeMap::new();
        if let Some(count) = self.timeline.emulated() {
            counters.insert("emulated_instructions".into(), count);
        }
        Metrics {
            uptime_ms: u64::try_from(self.built.elapsed().as_millis()).unwrap_or(u64::MAX),
            counters,
            vcpus: self.vcpus.iter().map(VcpuThread::metrics).collect(),
            devices: self
                .devices
                .iter()
                .enumerate()
                .map(|(slot, device)| device_metrics(slot, &device.transport.metrics()))
                .collect(),
        }
    }

    fn shutdown(
        &mut self,
        force: bool,
        timeout: Duration,
        guest: &mut dyn Guest,
        watch: &mut Watch,
    ) -> Result<Reply, Refusal> {
        if force {
            self.handle.send(Event::Stop);
            return Ok(Reply::Done);
        }
        self.must_be(&[State::Running], "running, or this forced")?;
        if !guest.shutdown() {
            return Err(Refusal::Failed(
                "the guest has nobody who could be asked to shut down: ask it by its own means, or force it"
                    .into(),
            ));
        }
        watch.end_within(timeout);
        Ok(Reply::Done)
    }

    fn attach(&mut self, slot: usize, backend: AttachBackend) -> Result<(), Refusal> {
        let invalid = |what: String| Refusal::Invalid(what);
        let (Some(device), Some(config)) = (self.devices.get_mut(slot), self.config.devices.get_mut(slot))
        else {
            return Err(invalid(format!("there is no slot {slot}: the machine has {}", self.devices.len())));
        };
        super::attach::change(device, config, slot, backend)
    }

    /// Saves the machine. It goes on as before, whatever comes of it.
    fn snapshot(
        &mut self,
        request: &SnapshotRequest,
        guest: &mut dyn Guest,
    ) -> Result<SnapshotReport, Refusal> {
        self.must_be(&[State::Running, State::Paused], "running or paused")?;
        let failed = |error: SnapshotError| Refusal::Failed(error.to_string());
        let parent =
            if request.diff { Some(self.diff_to(&request.directory).map_err(failed)?) } else { None };
        let draft = Draft::create(&request.directory).map_err(failed)?;
        let running = self.state == State::Running;
        let mut stage = guest.stage();
        let freezes = stage == GuestStage::Running;
        if freezes {
            // Its own agent has to do it, which cannot while the machine stands still.
            self.must_be(&[State::Running], "running, since its container must be stopped from inside")?;
            guest.freeze(FREEZE_PATIENCE).map_err(Refusal::Failed)?;
            stage = GuestStage::Frozen;
        }
        let since = Instant::now();
        let saved = match if running { self.pause() } else { Ok(()) } {
            Ok(()) => self.save(&draft, parent, stage).map_err(failed),
            Err(refusal) => Err(refusal),
        };
        // A machine that could not be paused runs already.
        let resumed = if running && self.state == State::Paused { self.start() } else { Ok(()) };
        let pause = since.elapsed();
        // In any case, and before anything else can fail.
        if freezes {
            guest.thaw();
        }
        // What was noted of changes is used up: after a failure only a whole snapshot has them all.
        self.parent = None;
        resumed?;
        let (mut manifest, drafts) = saved?;
        // What takes long, to be sure that it lasts, is done while the guest runs again.
        let directory = draft.target().to_path_buf();
        let disks = drafts.into_iter().map(disks::Draft::finish).collect::<Result<_, _>>();
        manifest.disks =
            disks.map_err(|source| failed(SnapshotError::Disk { path: directory.clone(), source }))?;
        draft.commit(&manifest).map_err(failed)?;
        self.parent = Some(Parent { id: manifest.id, directory: directory.clone() });
        Ok(SnapshotReport {
            directory,
            diff: manifest.parent.is_some(),
            pause_us: u64::try_from(pause.as_micros()).unwrap_or(u64::MAX),
            memory_bytes: manifest.memory.size,
            file_bytes: manifest.memory.bytes,
            disks: manifest
                .disks
                .iter()
                .map(|d| SavedDisk { slot: d.slot, how: d.how().to_string() })
                .collect(),
            frozen: freezes,
        })
    }

    /// What a diff in `directory` would be the difference to.
    fn diff_to(&self, directory: &Path) -> Result<Parent, SnapshotError> {
        if !self.config.memory.track_dirty {
            let wanted = "what a diff needs was not recorded: start it with --track-dirty";
            return Err(SnapshotError::State { now: "without a record of its writes", wanted });
        }
        let wanted = "take a whole snapshot first, which the diff can be the difference to";
        let parent = self.parent.clone();
        let parent = parent.ok_or(SnapshotError::State { now: "without a snapshot so far", wanted })?;
        chain::check(directory, &parent)?;
        Ok(parent)
    }

    /// The pages that changed since the last snapshot, if that is recorded.
    fn take_changes(&self) -> Result<Option<Vec<memory::Run>>, SnapshotError> {
        if !self.config.memory.track_dirty {
            return Ok(None);
        }
        let changed = changes::take(&self.vm, &self.memory);
        changed.map(Some).map_err(|source| SnapshotError::Kvm { what: "tell which pages changed", source })
    }

    /// Writes everything but the manifest: all of the memory, or its difference to `parent`.
    fn save(
        &mut self,
        draft: &Draft,
        parent: Option<Parent>,
        guest: GuestStage,
    ) -> Result<(Manifest, Vec<disks::Draft>), SnapshotError> {
        let io = |what| {
            let path = draft.target().to_path_buf();
            move |source| SnapshotError::Io { path, what, source }
        };
        let id = SnapshotId::random().map_err(io("cannot be named"))?;
        let file = draft.memory()?;
        // In any case: what was written until now is in this snapshot, and not in the next diff.
        let changed = self.take_changes()?;
        let (changed, parent) = match (changed, parent) {
            (Some(changed), Some(parent)) => (Some(changed), Some(parent)),
            _ => (None, None),
        };
        let saved = match &changed {
            Some(runs) => memory::save_diff(&self.memory, &file, id, runs),
            None => memory::save(&self.memory, &file, id),
        };
        let saved = saved.map_err(io("cannot write its memory"))?;
        let state = self.machine_state(changed)?;
        let state = draft.state(&state)?;
        let disks = self.devices.iter().filter_map(|device| device.disk.as_ref());
        let disks = disks.map(|disk| disks::save(disk, draft.path(), disks::Lean::OnNothing));
        let disks = disks
            .collect::<Result<Vec<_>, _>>()
            .map_err(|source| SnapshotError::Disk { path: draft.target().into(), source })?;
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let manifest = Manifest {
            id,
            parent,
            created,
            vmm: env!("CARGO_PKG_VERSION").into(),
            host: self.host.clone(),
            guest,
            config: self.config.clone(),
            memory: MemoryFile { size: memory::size(&self.memory), bytes: saved.bytes, crc: saved.crc },
            state,
            disks: Vec::new(),
        };
        Ok((manifest, disks))
    }

    fn machine_state(&self, changed: Option<Vec<memory::Run>>) -> Result<MachineState, SnapshotError> {
        let stopped = || SnapshotError::Vcpu(crate::snapshot::vcpu::VcpuStateError::Stopped);
        let save = |vcpu: &VcpuThread| {
            let registers = self.registers.clone();
            let saved = vcpu.call(move |vcpu| {
                VcpuState::save(&vcpu.fd, &registers, vcpu.pvm.as_ref().map(crate::host::pvm::PvmVcpu::entry))
            });
            Ok(saved.ok_or_else(stopped)??)
        };
        let vcpus = self.vcpus.iter().map(save).collect::<Result<_, SnapshotError>>()?;
        let vm = VmState::save(&self.vm, self.pvm.is_none(), self.pvm.as_ref().map(|pvm| pvm.save()));
        let vm = vm.map_err(|source| SnapshotError::Kvm { what: "tell the machine's state", source })?;
        let held = self.held.iter().flatten();
        let devices = self.devices.iter().zip(held).enumerate().map(|(slot, (device, held))| {
            let saved = device.transport.save(held);
            saved.map_err(|e| SnapshotError::Device(format!("slot {slot}: {e}")))
        });
        let devices = devices.collect::<Result<_, _>>()?;
        Ok(MachineState { vm, vcpus, devices, serial: self.serial.save(), changed })
    }
}
