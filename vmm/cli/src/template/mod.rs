//! Templates: machines that have booted once, so that none of their kind has to again.
//!
//! A template is a snapshot taken when the agent is up and waits for its first message. `vmm --rootfs …` restores one, puts disks and
//! cards into its slots, and tells the agent what to run. It is never written to: all machines map the same file copy-on-write.
//!
//! * [`shape`]: which machines can be copies of the same template, and what a machine becomes in one's slots. Pure.
//! * [`key`]: what a template depends on. A template with another key is another template.
//! * [`store`]: where they are kept, built by one process at a time and put in place whole.
//! * [`build`](build()): boots one.

mod build;
pub mod key;
pub mod shape;
pub mod store;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, bail};
use machine::Machine;
use machine::channels::Channels;
use machine::config::{DeviceConfig, MachineConfig};
use machine::host::Host;
use machine::plan::Plan;
use machine::snapshot::Loaded;
use machine::snapshot::manifest::{GuestStage, HostKind};
use machine::timeline::Timeline;
use machine::{builder, snapshot};

pub use build::build;

use crate::assets::ASSETS;
use crate::cmd::run::warn;
use crate::log_line::say;
use crate::session::{self, Request};
use key::Key;
use store::Store;

/// Makes the machine of `config` from a template, which is built first if it is not there, and tells `request` where its disks are then.
/// `None` when the machine has to boot: it has something that a template cannot give it, or there is no template to be had, which is
/// said, once, in the log.
///
/// # Errors
/// What is wrong with the machine itself: a disk that is not there, a TAP in use.
pub fn copy(
    config: &MachineConfig,
    request: &mut Request,
    host: &Host,
    timeline: &Arc<Timeline>,
) -> anyhow::Result<Option<(Machine, Channels)>> {
    let Some(fitted) = shape::fit(config) else { return Ok(None) };
    // What a boot would find wrong with the description is wrong.
    config.validate(&host.facts)?;
    // And with its files: nobody waits for a template, or hears of one, to learn then that a disk is not there.
    if !is_there(&fitted.template, host) {
        Plan::new(config, host, &ASSETS)?;
    }
    let found = find_or_build(&fitted.template, host).and_then(|directory| {
        let loaded = Loaded::open(&directory, &HostKind::here(host))?;
        if loaded.manifest.guest != GuestStage::Greeted {
            bail!("the template in {} is not one", directory.display());
        }
        Ok(loaded)
    });
    let loaded = match found {
        Ok(loaded) => loaded,
        Err(error) => {
            log::warn!("no template, so the guest boots: {error:#}");
            return Ok(None);
        }
    };
    let plan = Plan::for_snapshot(&fitted.machine, host, BTreeMap::new())?;
    warn(&plan);
    for (disk, letter) in request.disks.iter_mut().zip(&fitted.disks) {
        disk.device = format!("vd{letter}");
    }
    if let Some(network) = &mut request.network {
        // The driver has read the template's.
        network.mac = plan.config.devices.iter().find_map(|device| match device {
            DeviceConfig::Net(net) => net.mac.map(|mac| mac.bytes()),
            _ => None,
        });
    }
    Ok(Some(builder::restore(plan, loaded, host, &session::PORTS, timeline)?))
}

fn is_there(template: &MachineConfig, host: &Host) -> bool {
    let key = || Key::new(template, host, ASSETS.initramfs).ok();
    Store::open().is_ok_and(|store| key().is_some_and(|key| store.find(&key).is_some()))
}

/// The snapshot of the template for machines of this shape.
pub fn find_or_build(template: &MachineConfig, host: &Host) -> anyhow::Result<PathBuf> {
    let store = Store::open()?;
    let key = Key::new(template, host, ASSETS.initramfs).context("cannot tell the templates apart")?;
    if let Some(directory) = store.find(&key) {
        return Ok(directory);
    }
    let lock = store.lock(&key).context("cannot lock the template")?;
    if let Some(directory) = store.find(&key) {
        return Ok(directory);
    }
    say(
        "vmm: preparing a template, so that machines like this one need not boot again (--no-template does without)",
    );
    store.sweep(&key);
    // In a process of its own: what it counts, catches and maps is not this machine's.
    let mut child = Command::new("/proc/self/exe")
        .args(["template", "build", "--config", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .env("VMM_TEMPLATE_TARGET", store.place(&key))
        .spawn()
        .context("cannot start vmm to build the template")?;
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(&serde_json::to_vec(template)?);
    }
    let status = child.wait().context("the template's builder")?;
    if !status.success() {
        bail!("the template could not be built ({status})");
    }
    store.publish(&key).context("cannot put the template in its place")?;
    drop(lock);
    store.find(&key).context("the template was removed at once")
}

/// Whether a directory holds a template's snapshot, for those who list them.
pub fn describe(directory: &std::path::Path) -> Option<snapshot::Manifest> {
    snapshot::directory::manifest(directory).ok()
}
