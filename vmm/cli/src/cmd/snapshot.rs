//! `vmm snapshot save|ls|inspect|rm|clone`.

mod clone;

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use machine::host::Host;
use machine::snapshot::manifest::{GuestStage, HostKind};
use machine::snapshot::{Loaded, Manifest, directory};

use super::ctl;
use crate::args::snapshot::SnapshotCommand;
use crate::exit_code;
use crate::log_line::say;

/// Does it, and returns the exit code.
///
/// # Errors
/// When it cannot be done.
pub fn run(command: &SnapshotCommand) -> anyhow::Result<u8> {
    match command {
        SnapshotCommand::Save { socket, directory, diff } => save(socket, directory, *diff),
        SnapshotCommand::Ls { directory } => list(directory).map(|()| 0),
        SnapshotCommand::Inspect { directory, verify, json } => {
            inspect(directory, *verify, *json).map(|()| 0)
        }
        SnapshotCommand::Rm { directories } => {
            for directory in directories {
                directory::remove(directory)?;
            }
            Ok(0)
        }
        SnapshotCommand::Clone { socket, count, directory, json } => {
            clone::run(socket, *count, directory.as_deref(), *json)
        }
    }
}

fn save(socket: &Path, directory: &Path, diff: bool) -> anyhow::Result<u8> {
    match ctl::snapshot(socket, directory, diff)?.content() {
        Ok(answer) => {
            print!("{}", ctl::text::snapshot(&ctl::read(&answer)?));
            Ok(0)
        }
        Err(refusal) => {
            say(&format!("vmm: {refusal}"));
            Ok(exit_code::REFUSED)
        }
    }
}

fn list(above: &Path) -> anyhow::Result<()> {
    let entries = std::fs::read_dir(above).with_context(|| format!("cannot list {}", above.display()))?;
    let mut found: Vec<(String, Manifest, u64)> = entries
        .flatten()
        .filter_map(|entry| {
            let manifest = directory::manifest(&entry.path()).ok()?;
            Some((entry.file_name().to_string_lossy().into_owned(), manifest, on_disk(&entry.path())))
        })
        .collect();
    if found.is_empty() {
        println!("no snapshots in {}", above.display());
        return Ok(());
    }
    found.sort_by_key(|(_, manifest, _)| manifest.created);
    let width = found.iter().map(|(name, ..)| name.chars().count()).max().unwrap_or(0).max(4) + 2;
    println!(
        "{:<width$}{:<14}{:>6}{:>8}{:>10}  {:<10}KIND",
        "NAME", "TAKEN", "VCPUS", "MEMORY", "SIZE", "GUEST"
    );
    for (name, manifest, bytes) in found {
        println!(
            "{name:<width$}{:<14}{:>6}{:>8}{:>10}  {:<10}{}",
            ago(age(&manifest)),
            manifest.config.vcpus,
            manifest.config.memory.size.to_string(),
            mebibytes(bytes),
            stage(manifest.guest),
            if manifest.parent.is_some() { "diff" } else { "whole" }
        );
    }
    Ok(())
}

fn inspect(directory: &Path, verify: bool, json: bool) -> anyhow::Result<()> {
    let host = Host::detect()?;
    let loaded = Loaded::open(directory, &HostKind::here(&host));
    if verify && let Ok(loaded) = &loaded {
        loaded.verify()?;
    }
    let manifest = directory::manifest(directory)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&manifest)?);
        return Ok(());
    }
    let line = |what: &str, is: &dyn std::fmt::Display| println!("{what:<12}{is}");
    line("id", &manifest.id);
    line("taken", &format!("{}, by vmm {}", ago(age(&manifest)), manifest.vmm));
    line("guest", &stage(manifest.guest));
    line("machine", &format!("{} vCPUs, {} of memory", manifest.config.vcpus, manifest.config.memory.size));
    let of = manifest.memory.size;
    line("memory", &format!("{} of {} written", mebibytes(manifest.memory.bytes), mebibytes(of)));
    if let Some(parent) = &manifest.parent {
        line("parent", &format!("{} in {}", parent.id, parent.directory.display()));
    }
    for disk in &manifest.disks {
        let path = disk.path.as_deref().map_or_else(|| "unnamed".into(), |path| path.display().to_string());
        line(&format!("disk {}", disk.slot), &format!("{path}, {}: {}", mebibytes(disk.size), disk.how()));
    }
    match loaded {
        Ok(_) if verify && manifest.parent.is_some() => {
            line("restores", &"here; only memory of whole snapshots can be compared, and this is a diff");
        }
        Ok(_) if verify => line("restores", &"here; all of its memory is as it was written"),
        Ok(_) => line("restores", &"here"),
        Err(error) => line("restores", &format!("not here: {error}")),
    }
    Ok(())
}

fn stage(guest: GuestStage) -> &'static str {
    match guest {
        GuestStage::Greeted => "template",
        GuestStage::Frozen | GuestStage::Running => "container",
        GuestStage::Own => "ordinary",
    }
}

/// Bytes that the files of a directory take.
fn on_disk(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let files = std::fs::read_dir(directory).into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).map(|found| found.blocks() * 512).sum()
}

fn age(manifest: &Manifest) -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.saturating_sub(Duration::from_secs(manifest.created))
}

/// How long ago, for people.
pub fn ago(age: Duration) -> String {
    let seconds = age.as_secs();
    match seconds {
        0..60 => format!("{seconds} s ago"),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..86400 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86400),
    }
}

/// A size, for people.
pub fn mebibytes(bytes: u64) -> String {
    let tenths = bytes.saturating_mul(10).div_ceil(1 << 20);
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_ages() {
        assert_eq!(mebibytes(0), "0.0 MiB");
        assert_eq!(mebibytes(1), "0.1 MiB");
        assert_eq!(mebibytes((3 << 20) + (1 << 19)), "3.5 MiB");
        assert_eq!(ago(Duration::from_secs(59)), "59 s ago");
        assert_eq!(ago(Duration::from_secs(7200)), "2 h ago");
        assert_eq!(ago(Duration::from_secs(200_000)), "2 days ago");
    }
}
