//! What memory a machine process takes beyond its guest's, from `/proc/PID/smaps` (proc(5)).

use std::path::Path;

use anyhow::Context;

/// One mapping, in KiB.
#[derive(Debug, Default, PartialEq, Eq)]
struct Mapping {
    size: u64,
    rss: u64,
    private_dirty: u64,
    path: String,
}

/// MiB of resident memory of process `pid`, without mappings of `guest_mib` MiB or more (the guest's) and without clean pages of
/// shared libraries.
pub fn overhead_mib(pid: u32, guest_mib: u64) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/smaps");
    let text = std::fs::read_to_string(&path).with_context(|| path)?;
    let kib = overhead_kib(&parse(&text), guest_mib * 1024);
    // A few thousand.
    #[allow(clippy::cast_precision_loss)]
    Ok(kib as f64 / 1024.0)
}

/// The proportional share of process `pid` in all memory that it has mapped, in MiB: what is shared by `n` counts a `n`-th.
pub fn proportional_mib(pid: u32) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    proportional_kib(&text).map(|kib| kib / 1024.0).with_context(|| format!("{path} has no line Pss"))
}

fn proportional_kib(rollup: &str) -> Option<f64> {
    rollup.lines().find_map(|line| line.strip_prefix("Pss:")?.split_whitespace().next()?.parse().ok())
}

fn overhead_kib(mappings: &[Mapping], guest_kib: u64) -> u64 {
    let library =
        |path: &str| Path::new(path).file_name().is_some_and(|n| n.to_string_lossy().contains(".so"));
    mappings
        .iter()
        .filter(|m| m.size < guest_kib)
        .map(|m| if library(&m.path) { m.private_dirty } else { m.rss })
        .sum()
}

fn parse(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        let Some(key) = first.strip_suffix(':') else {
            // address perms offset device inode [path]
            let path = words.nth(4).unwrap_or_default().to_owned();
            mappings.push(Mapping { path, ..Mapping::default() });
            continue;
        };
        let value = words.next().and_then(|w| w.parse().ok()).unwrap_or(0);
        let Some(mapping) = mappings.last_mut() else { continue };
        match key {
            "Size" => mapping.size = value,
            "Rss" => mapping.rss = value,
            "Private_Dirty" => mapping.private_dirty = value,
            _ => {}
        }
    }
    mappings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_share() {
        let rollup =
            "00400000-7ffd00021000 ---p 00000000 00:00 0   [rollup]\nRss:      9000 kB\nPss:      2048 kB\n";
        assert_eq!(proportional_kib(rollup), Some(2048.0));
        assert_eq!(proportional_kib("Pss_Dirty: 3 kB\n"), None);
    }

    #[test]
    fn counts_what_is_ours() {
        let smaps = "\
55d0d8600000-55d0d8700000 r-xp 00000000 fe:00 123                        /usr/bin/vmm
Size:               1024 kB
Rss:                 600 kB
Private_Dirty:         0 kB
7f7300000000-7f7310000000 rw-p 00000000 00:00 0
Size:             262144 kB
Rss:               50000 kB
Private_Dirty:     50000 kB
7f733f200000-7f733f400000 r-xp 00000000 fe:00 77                         /lib/x86_64-linux-gnu/libc.so.6
Size:               2048 kB
Rss:                1500 kB
Private_Dirty:        20 kB
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
Size:                132 kB
Rss:                  40 kB
Private_Dirty:        40 kB
";
        let mappings = parse(smaps);
        assert_eq!(mappings.len(), 4);
        assert_eq!(overhead_kib(&mappings, 256 * 1024), 600 + 20 + 40);
    }
}
