//! A machine's answers as a person reads them.

use std::fmt::Write as _;

use machine::control::{Description, Histogram, Metrics, SnapshotReport};

/// What the machine is made of, and what it is doing.
pub fn description(machine: &Description) -> String {
    let config = &machine.config;
    let rows = [
        ["State".into(), machine.state.to_string()],
        ["vmm".into(), format!("{}, process {}", plain(&machine.vmm_version), machine.pid)],
        ["Up".into(), time(machine.uptime_ms.saturating_mul(1_000_000))],
        ["vCPUs".into(), config.vcpus.to_string()],
        ["Memory".into(), config.memory.size.to_string()],
        ["Kernel".into(), plain(&config.boot.kernel.to_string_lossy())],
    ];
    let mut text = table("", &rows);
    if !machine.devices.is_empty() {
        let head = ["SLOT".into(), "DEVICE".into(), "BACK END".into()];
        let devices = machine.devices.iter().map(|device| {
            let backend = device.backend.as_deref().map_or_else(|| "-".into(), plain);
            let mode = if device.read_only == Some(true) { " (read-only)" } else { "" };
            [device.slot.to_string(), device.kind.to_string(), format!("{backend}{mode}")]
        });
        text += "\n";
        text += &table("", &[head].into_iter().chain(devices).collect::<Vec<_>>());
    }
    text
}

/// What a snapshot cost.
pub fn snapshot(report: &SnapshotReport) -> String {
    let mut rows = vec![
        ["Saved to".into(), plain(&report.directory.to_string_lossy())],
        ["Paused for".into(), time(report.pause_us.saturating_mul(1000))],
        ["Memory".into(), format!("{}, {} written", size(report.memory_bytes), size(report.file_bytes))],
    ];
    let disks = report.disks.iter().map(|disk| [format!("Disk in slot {}", disk.slot), plain(&disk.how)]);
    rows.extend(disks);
    if report.frozen {
        rows.push(["Container".into(), "frozen: copies get identities of their own".into()]);
    }
    table("", &rows)
}

/// What the machine has counted so far.
pub fn metrics(metrics: &Metrics) -> String {
    let mut rows = vec![["Up".into(), time(metrics.uptime_ms.saturating_mul(1_000_000))]];
    rows.extend(metrics.counters.iter().map(|(name, value)| [plain(name), value.to_string()]));
    let mut text = table("", &rows);
    for vcpu in &metrics.vcpus {
        let _ = writeln!(text, "\nvCPU {}", vcpu.id);
        text += &table("  ", &latencies("EXITS", &vcpu.exit_latency));
    }
    for device in &metrics.devices {
        let _ = writeln!(text, "\nDevice {} ({})", device.slot, plain(&device.kind));
        let counters: Vec<_> =
            device.counters.iter().map(|(name, value)| [plain(name), value.to_string()]).collect();
        text += &table("  ", &counters);
        if !device.latency.is_empty() {
            text += &table("  ", &latencies("REQUESTS", &device.latency));
        }
    }
    text
}

fn latencies<'a>(
    what: &str,
    histograms: impl IntoIterator<Item = (&'a String, &'a Histogram)>,
) -> Vec<[String; 5]> {
    let head = [what, "COUNT", "MEAN", "MEDIAN", "P99"].map(Into::into);
    let rows = histograms.into_iter().map(|(name, histogram)| {
        let mean = histogram.sum_ns.checked_div(histogram.count).map_or_else(|| "-".into(), time);
        let [median, most] = [50, 99].map(|percent| quantile(histogram, percent));
        [plain(name), histogram.count.to_string(), mean, median, most]
    });
    [head].into_iter().chain(rows).collect()
}

/// The upper end of the bucket that holds the value which `percent` of all do not exceed.
fn quantile(histogram: &Histogram, percent: u128) -> String {
    let total: u128 = histogram.buckets.iter().map(|count| u128::from(*count)).sum();
    let last = histogram.buckets.len().saturating_sub(1);
    let mut sum = 0;
    for (i, count) in histogram.buckets.iter().enumerate() {
        sum += u128::from(*count);
        if total > 0 && sum * 100 >= total * percent {
            let micros =
                u32::try_from(i.min(last.saturating_sub(1))).ok().and_then(|i| 1000_u64.checked_shl(i));
            let sign = if i == last { ">" } else { "≤" };
            return format!("{sign} {}", time(micros.unwrap_or(u64::MAX)));
        }
    }
    "-".into()
}

/// Columns as wide as their widest cell, two spaces apart.
fn table<const N: usize>(indent: &str, rows: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text += format!("{indent}{}", cells.join("  ")).trim_end();
        text.push('\n');
    }
    text
}

/// Three digits are enough.
fn time(nanoseconds: u64) -> String {
    let units = [(1_000_000_000, "s"), (1_000_000, "ms"), (1000, "µs"), (1, "ns")];
    let (unit, name) = units.into_iter().find(|(unit, _)| nanoseconds >= *unit).unwrap_or((1, "ns"));
    let tenths = nanoseconds % unit * 10 / unit;
    match nanoseconds / unit {
        whole if whole >= 100 || unit == 1 || tenths == 0 => format!("{whole} {name}"),
        whole => format!("{whole}.{tenths} {name}"),
    }
}

fn size(bytes: u64) -> String {
    let tenths = bytes % (1 << 20) * 10 / (1 << 20);
    format!("{}.{tenths} MiB", bytes >> 20)
}

/// A name may hold anything; a terminal obeys some of it.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use machine::config::MachineConfig;
    use machine::control::{DeviceDescription, DeviceKind, DeviceMetrics, SavedDisk, State, VcpuMetrics};

    use super::*;

    #[test]
    fn a_machine_is_a_table() {
        let device = |slot, kind, backend: Option<&str>, read_only| DeviceDescription {
            slot,
            kind,
            backend: backend.map(Into::into),
            read_only,
        };
        let mut config = MachineConfig::default();
        config.boot.kernel = "/boot/x\x1b[2J".into();
        let machine = Description {
            state: State::Running,
            vmm_version: "0.1.0".into(),
            pid: 42,
            uptime_ms: 12_345,
            config,
            devices: vec![
                device(0, DeviceKind::Block, Some("/disk"), Some(true)),
                device(1, DeviceKind::Block, None, Some(false)),
                device(2, DeviceKind::Rng, None, None),
            ],
        };
        let expected = "\
State   running
vmm     0.1.0, process 42
Up      12.3 s
vCPUs   1
Memory  256M
Kernel  /boot/x?[2J

SLOT  DEVICE  BACK END
0     block   /disk (read-only)
1     block   -
2     rng     -
";
        assert_eq!(description(&machine), expected);
    }

    #[test]
    fn a_snapshot_says_what_it_cost() {
        let report = SnapshotReport {
            directory: "/x".into(),
            diff: false,
            pause_us: 12_340,
            memory_bytes: 256 << 20,
            file_bytes: (3 << 20) + (1 << 19),
            disks: vec![SavedDisk { slot: 1, how: "reflink".into() }],
            frozen: false,
        };
        let expected = "\
Saved to        /x
Paused for      12.3 ms
Memory          256.0 MiB, 3.5 MiB written
Disk in slot 1  reflink
";
        assert_eq!(snapshot(&report), expected);
    }

    #[test]
    fn metrics_are_tables() {
        let histogram = |buckets: &[u64]| Histogram {
            count: buckets.iter().sum(),
            sum_ns: 300_000,
            buckets: buckets.to_vec(),
        };
        let exits = BTreeMap::from([
            ("mmio_write".to_string(), histogram(&[98, 1, 0, 1, 0])),
            ("port_read".to_string(), histogram(&[0, 0, 0, 0, 3])),
        ]);
        let metrics_of = Metrics {
            uptime_ms: 500,
            counters: BTreeMap::from([("emulated_instructions".into(), 7)]),
            vcpus: vec![VcpuMetrics { id: 0, exits: BTreeMap::new(), exit_latency: exits }],
            devices: vec![DeviceMetrics {
                slot: 0,
                kind: "block".into(),
                counters: BTreeMap::from([("reads".into(), 5)]),
                latency: BTreeMap::from([("read".into(), histogram(&[0, 0]))]),
            }],
        };
        let expected = "\
Up                     500 ms
emulated_instructions  7

vCPU 0
  EXITS       COUNT  MEAN    MEDIAN  P99
  mmio_write  100    3 µs    ≤ 1 µs  ≤ 2 µs
  port_read   3      100 µs  > 8 µs  > 8 µs

Device 0 (block)
  reads  5
  REQUESTS  COUNT  MEAN  MEDIAN  P99
  read      0      -     -       -
";
        assert_eq!(metrics(&metrics_of), expected);
    }

    #[test]
    fn times_and_sizes_are_short() {
        let table = [
            (0, "0 ns"),
            (999, "999 ns"),
            (1500, "1.5 µs"),
            (123_456, "123 µs"),
            (2_000_000, "2 ms"),
            (90_100_000_000, "90.1 s"),
        ];
        for (nanoseconds, expected) in table {
            assert_eq!(time(nanoseconds), expected);
        }
        assert_eq!(size(0), "0.0 MiB");
    }
}
