//! `vmm restore DIR`: a machine goes on from a snapshot, as a machine of its own.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use machine::builder;
use machine::config::{ConsoleConfig, DeviceConfig, MachineConfig};
use machine::host::Host;
use machine::plan::Plan;
use machine::snapshot::Loaded;
use machine::snapshot::disks::{self, LiveDisk};
use machine::snapshot::manifest::{GuestStage, HostKind};
use machine::timeline::Timeline;

use super::run::{network, warn};
use crate::args::snapshot::RestoreArgs;
use crate::drive::{self, Caught, Settings};
use crate::session::{self, NewSelf, Opening};
use crate::terminal;

/// Runs it, and returns the exit code.
///
/// # Errors
/// What is wrong with the snapshot, or keeps it from being restored here.
pub fn run(args: &RestoreArgs, timeline: &Arc<Timeline>) -> anyhow::Result<u8> {
    let caught = Caught::now()?;
    let host = Host::detect()?;
    let loaded = Loaded::open(&args.directory, &HostKind::here(&host))?;
    check(args, loaded.manifest.guest)?;
    let mut config = loaded.manifest.config.clone();
    // What stands there is the original's to write; this is another machine.
    config.console =
        if loaded.manifest.guest == GuestStage::Own { ConsoleConfig::Stdio } else { ConsoleConfig::None };
    let changed = rewire(args, &mut config)?;
    let media = media(&loaded, &args.directory)?;
    let plan = Plan::for_snapshot(&config, &host, media)?;
    warn(&plan);
    let opening = match loaded.manifest.guest {
        GuestStage::Own => None,
        GuestStage::Frozen => Some(Opening::Snapshot(new_self(args, &plan.config, changed)?)),
        GuestStage::Greeted | GuestStage::Running => {
            bail!("{}: it has no container", args.directory.display())
        }
    };
    let settings = Settings {
        raw: args.interactive && (args.tty || opening.is_none()),
        opening,
        api: drive::api_socket(args.api_socket.as_ref())?,
        paused: args.paused,
        ready: args.ready_fd.map(ready_file).transpose()?,
        timing: args.timing,
    };
    let (machine, channels) = builder::restore(plan, loaded, &host, &session::PORTS, timeline)?;
    drive::drive(machine, channels, caught, settings, timeline)
}

/// Whether the flags fit what is in the snapshot. What nobody would heed is not taken.
fn check(args: &RestoreArgs, guest: GuestStage) -> anyhow::Result<()> {
    let directory = args.directory.display();
    match guest {
        GuestStage::Greeted => bail!("{directory} is a template: vmm --rootfs starts from it"),
        GuestStage::Running => bail!("{directory}: its container was not frozen: save it again"),
        GuestStage::Frozen if args.tty && args.interactive && !terminal::is_terminal() => {
            bail!("standard input is not a terminal: leave -t away, or -i")
        }
        GuestStage::Frozen => {}
        GuestStage::Own => {
            let given = [
                ("--hostname", args.hostname.is_some()),
                ("--machine-id", args.machine_id.is_some()),
                ("--tty", args.tty),
            ];
            if let Some((flag, _)) = given.into_iter().find(|(_, given)| *given) {
                bail!(
                    "{flag} is for a container, and {directory} is an ordinary VM, in which nobody hears of it: leave it away"
                );
            }
        }
    }
    Ok(())
}

/// Puts the copy's own back ends into its description. Says whether its network has changed.
fn rewire(args: &RestoreArgs, config: &mut MachineConfig) -> anyhow::Result<bool> {
    let mut changed = false;
    let mut wanted = args.net.clone();
    let mut socket = args.vsock.clone();
    for device in &mut config.devices {
        match device {
            DeviceConfig::Net(net) => {
                let Some(arg) = wanted.take() else { continue };
                changed = true;
                match arg.0 {
                    Some(new) => {
                        net.tap = new.tap;
                        net.mac = new.mac;
                        if new.address.is_some() {
                            (net.address, net.gateway) = (new.address, new.gateway);
                        }
                    }
                    // The card stays, and nothing is plugged into it.
                    None => (net.tap, net.mac) = (None, None),
                }
            }
            DeviceConfig::Vsock(vsock) => {
                vsock.uds_path = socket.take();
            }
            _ => {}
        }
    }
    if wanted.is_some_and(|arg| arg.0.is_some()) {
        bail!("the machine was saved without a network card: it cannot get one now");
    }
    if socket.is_some() {
        bail!("the machine was saved without a vsock device: it cannot get one now");
    }
    Ok(changed)
}

fn new_self(args: &RestoreArgs, config: &MachineConfig, net_changed: bool) -> anyhow::Result<NewSelf> {
    let mut new = NewSelf::random().map_err(anyhow::Error::msg)?;
    new.hostname.clone_from(&args.hostname);
    new.interactive = args.interactive;
    new.terminal = args.tty;
    if let Some(id) = &args.machine_id {
        let id = machine::snapshot::SnapshotId::try_from(id.clone())
            .map_err(|_| anyhow::anyhow!("--machine-id takes 32 hexadecimal digits"))?;
        new.machine_id = id.0;
    }
    if net_changed {
        new.network = network(config);
        if let Some(network) = &mut new.network {
            network.mac = config.devices.iter().find_map(|device| match device {
                DeviceConfig::Net(net) => net.mac.map(|mac| mac.bytes()),
                _ => None,
            });
        }
    }
    Ok(new)
}

/// The copy's disks: its own, and whatever the original could only read.
fn media(loaded: &Loaded, directory: &Path) -> anyhow::Result<BTreeMap<usize, LiveDisk>> {
    let mut media = BTreeMap::new();
    let scratch = std::env::temp_dir();
    for saved in &loaded.manifest.disks {
        let (disk, how) = disks::open_for_restore(saved, directory, &scratch, None)
            .with_context(|| format!("snapshot {}", directory.display()))?;
        if !saved.read_only {
            let name = saved
                .path
                .as_deref()
                .map_or_else(|| format!("slot {}", saved.slot), |p| p.display().to_string());
            log::info!("disk {name}: {how}");
        }
        media.insert(saved.slot, disk);
    }
    Ok(media)
}

fn ready_file(fd: i32) -> anyhow::Result<Box<dyn Write + Send>> {
    // Opened anew by its name, so that nothing need be believed of the number.
    let file = File::options().write(true).open(format!("/proc/self/fd/{fd}"));
    let file = file.with_context(|| format!("--ready-fd {fd} cannot be written"))?;
    Ok(Box::new(file))
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use machine::config::{NetConfig, VsockConfig};

    use super::*;
    use crate::args::{Cli, Command};

    fn args(flags: &[&str]) -> RestoreArgs {
        match Cli::try_parse_from([&["vmm", "restore", "DIR"], flags].concat()).unwrap().command {
            Some(Command::Restore(args)) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_nobody_would_heed_is_refused() {
        let refused = |flags: &[&str], guest| check(&args(flags), guest).map_err(|e| e.to_string());
        assert!(refused(&["--hostname", "x"], GuestStage::Own).unwrap_err().starts_with("--hostname is for"));
        assert!(refused(&["-t"], GuestStage::Own).unwrap_err().starts_with("--tty is for"));
        refused(&["-i"], GuestStage::Own).unwrap();
        refused(&["--hostname", "x"], GuestStage::Frozen).unwrap();
        assert!(refused(&[], GuestStage::Greeted).unwrap_err().contains("template"));
    }

    #[test]
    fn back_ends_need_their_devices() {
        let mut bare = MachineConfig::default();
        assert!(rewire(&args(&["--vsock", "/s"]), &mut bare).unwrap_err().to_string().contains("vsock"));
        assert!(rewire(&args(&["--net", "tap=t"]), &mut bare).unwrap_err().to_string().contains("card"));
        assert!(!rewire(&args(&["--net", "none"]), &mut bare).unwrap());
        let old = VsockConfig { uds_path: Some("/old".into()), ..VsockConfig::default() };
        let net = NetConfig { tap: Some("old".into()), mac: None, address: None, gateway: None };
        bare.devices = vec![DeviceConfig::Vsock(old.clone()), DeviceConfig::Net(net)];
        // The original may still have its own socket; its TAP is the default.
        assert!(!rewire(&args(&[]), &mut bare).unwrap());
        assert_eq!(bare.devices[0], DeviceConfig::Vsock(VsockConfig { uds_path: None, ..old.clone() }));
        assert!(rewire(&args(&["--net", "tap=new", "--vsock", "/new"]), &mut bare).unwrap());
        assert_eq!(
            bare.devices[0],
            DeviceConfig::Vsock(VsockConfig { uds_path: Some("/new".into()), ..old })
        );
        assert!(matches!(&bare.devices[1], DeviceConfig::Net(net) if net.tap.as_deref() == Some("new")));
    }
}
