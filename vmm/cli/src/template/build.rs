//! Boots a machine until its agent waits, and saves it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use machine::config::MachineConfig;
use machine::control::{Control, Reply, Request, SnapshotReport, SnapshotRequest};
use machine::controller::{Ending, PanicWords};
use machine::host::Host;
use machine::plan::Plan;
use machine::snapshot::manifest::GuestStage;
use machine::timeline::Timeline;
use machine::{Guest, builder};
use protocol::CONTROL_PORT;

use crate::assets::ASSETS;
use crate::session;

/// How long a boot may take: minutes for a large guest on a busy host that emulates kernel mode.
const PATIENCE: Duration = Duration::from_secs(600);

/// The agent, which waits for its first message and need not be asked to stand still.
struct Waiting;

impl Guest for Waiting {
    fn stage(&self) -> GuestStage {
        GuestStage::Greeted
    }

    fn freeze(&mut self, _: Duration) -> Result<(), String> {
        Ok(())
    }

    fn thaw(&mut self) {}

    fn shutdown(&mut self) -> bool {
        false
    }
}

/// Boots the machine that `template` describes and saves it to `target` when its agent waits.
///
/// # Errors
/// When it cannot be built, its agent does not come up, or it cannot be saved.
pub fn build(template: &MachineConfig, host: &Host, target: &Path) -> anyhow::Result<SnapshotReport> {
    let (plan, boot) = Plan::new(template, host, &ASSETS)?;
    let timeline = Arc::new(Timeline::start());
    let (mut machine, mut channels) = builder::build(plan, boot, host, &session::PORTS, &timeline)?;
    let control = channels.listener(CONTROL_PORT).context("the template has no vsock device")?;
    let handle = machine.handle();
    let directory = target.to_path_buf();
    let saver = std::thread::Builder::new().name("template".into()).spawn(move || {
        let saved =
            session::greet(&control, PATIENCE).map_err(|line| anyhow!(line)).and_then(|_connection| {
                // The connection stays open until it is saved.
                match handle.ask(Request::Snapshot(SnapshotRequest { directory, diff: false }))? {
                    Reply::Snapshot(report) => Ok(report),
                    other => Err(anyhow!("an unexpected answer: {other:?}")),
                }
            });
        handle.stop();
        saved
    });
    let saver = saver.context("cannot start a thread")?;
    machine.start()?;
    let ending = machine.run(PanicWords::AreTheEnd, &mut Waiting);
    let saved = saver.join().map_err(|_| anyhow!("the template's saver is gone"))?;
    saved.map_err(|error| match ending {
        Ending::Stopped => error,
        other => anyhow!("the machine ended before its agent was up: {other:?}"),
    })
}
