//! Metrics in Prometheus' text format, version 0.0.4: one block of lines a metric, histograms cumulative, times in seconds.
//!
//! A function over data, called on a connection's thread.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::metrics::{Histogram, Metrics};

/// What a scraper wants to hear.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

type Labels<'a> = Vec<(&'a str, String)>;

/// All that is known of one metric: samples of the same name stand together.
enum Samples<'a> {
    Counter(Vec<(Labels<'a>, u64)>),
    Histogram(Vec<(Labels<'a>, &'a Histogram)>),
}

struct Family<'a> {
    help: String,
    samples: Samples<'a>,
}

#[derive(Default)]
struct Families<'a>(BTreeMap<String, Family<'a>>);

impl<'a> Families<'a> {
    fn counter(&mut self, name: &str, help: String, labels: Labels<'a>, value: u64) {
        let name = match name.strip_suffix("_total") {
            Some(_) => name.to_string(),
            None => format!("{name}_total"),
        };
        let family =
            self.0.entry(name).or_insert_with(|| Family { help, samples: Samples::Counter(Vec::new()) });
        if let Samples::Counter(samples) = &mut family.samples {
            samples.push((labels, value));
        }
    }

    fn histogram(&mut self, name: &str, help: String, labels: Labels<'a>, value: &'a Histogram) {
        let family = self
            .0
            .entry(format!("{name}_seconds"))
            .or_insert_with(|| Family { help, samples: Samples::Histogram(Vec::new()) });
        if let Samples::Histogram(samples) = &mut family.samples {
            samples.push((labels, value));
        }
    }
}

/// `metrics` as a scraper reads them.
pub fn text(metrics: &Metrics) -> String {
    let mut families = Families::default();
    for (name, value) in &metrics.counters {
        let help = format!("{} of the machine.", words(name));
        families.counter(&format!("vmm_{}", identifier(name)), help, Vec::new(), *value);
    }
    for vcpu in &metrics.vcpus {
        let labels = |reason: &str| vec![("vcpu", vcpu.id.to_string()), ("reason", reason.to_string())];
        for (reason, value) in &vcpu.exits {
            let help = "How often a vCPU came back from the guest.".to_string();
            families.counter("vmm_vcpu_exits", help, labels(reason), *value);
        }
        for (reason, value) in &vcpu.exit_latency {
            let help = "How long it took to serve a vCPU.".to_string();
            families.histogram("vmm_vcpu_exit", help, labels(reason), value);
        }
    }
    for device in &metrics.devices {
        let labels = || vec![("slot", device.slot.to_string()), ("kind", device.kind.clone())];
        for (name, value) in &device.counters {
            let help = format!("{} of a device.", words(name));
            families.counter(&format!("vmm_device_{}", identifier(name)), help, labels(), *value);
        }
        for (name, value) in &device.latency {
            let help = format!("How long {} took on a device.", words(name));
            families.histogram(&format!("vmm_device_{}", identifier(name)), help, labels(), value);
        }
    }
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = write!(
        text,
        "# HELP vmm_uptime_seconds Since the machine was built or restored.\n\
         # TYPE vmm_uptime_seconds gauge\nvmm_uptime_seconds {}.{:03}\n",
        metrics.uptime_ms / 1000,
        metrics.uptime_ms % 1000
    );
    for (name, family) in &families.0 {
        write_family(&mut text, name, family);
    }
    text
}

fn write_family(text: &mut String, name: &str, family: &Family<'_>) {
    let _ = writeln!(text, "# HELP {name} {}", family.help);
    match &family.samples {
        Samples::Counter(samples) => {
            let _ = writeln!(text, "# TYPE {name} counter");
            for (labels, value) in samples {
                let _ = writeln!(text, "{name}{} {value}", braces(labels, None));
            }
        }
        Samples::Histogram(samples) => {
            let _ = writeln!(text, "# TYPE {name} histogram");
            for (labels, histogram) in samples {
                write_histogram(text, name, labels, histogram);
            }
        }
    }
}

/// Cumulative: a bucket counts what the smaller ones do. The last says what the whole does.
fn write_histogram(text: &mut String, name: &str, labels: &Labels<'_>, histogram: &Histogram) {
    let mut sum = 0_u64;
    let bounded = histogram.buckets.split_last().map_or(&[][..], |(_, bounded)| bounded);
    for (count, end) in bounded.iter().zip(std::iter::successors(Some(1000_u64), |end| end.checked_mul(2))) {
        sum = sum.saturating_add(*count);
        let _ = writeln!(text, "{name}_bucket{} {sum}", braces(labels, Some(&seconds(end))));
    }
    // A histogram that was read while it was written may say less than its buckets.
    let count = histogram.count.max(sum);
    let _ = writeln!(text, "{name}_bucket{} {count}", braces(labels, Some("+Inf")));
    let _ = writeln!(text, "{name}_sum{} {}", braces(labels, None), seconds(histogram.sum_ns));
    let _ = writeln!(text, "{name}_count{} {count}", braces(labels, None));
}

fn braces(labels: &Labels<'_>, le: Option<&str>) -> String {
    let pairs = labels.iter().map(|(key, value)| (*key, value.as_str())).chain(le.map(|le| ("le", le)));
    let pairs: Vec<String> = pairs.map(|(key, value)| format!("{key}=\"{}\"", escaped(value))).collect();
    if pairs.is_empty() { String::new() } else { format!("{{{}}}", pairs.join(",")) }
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// A name as Prometheus takes it behind a prefix.
fn identifier(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}

fn words(name: &str) -> String {
    identifier(name).replace('_', " ")
}

/// Nanoseconds as seconds, exactly.
fn seconds(nanoseconds: u64) -> String {
    let text = format!("{}.{:09}", nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::metrics::{BUCKETS, DeviceMetrics, ExitCounters, Reason};

    #[test]
    fn times_are_exact() {
        let table = [(0, "0"), (1000, "0.000001"), (1_048_576_000, "1.048576"), (10_000_000_000, "10")];
        for (nanoseconds, expected) in table {
            assert_eq!(seconds(nanoseconds), expected);
        }
    }

    #[test]
    fn labels_are_escaped_and_names_valid() {
        assert_eq!(braces(&vec![("a", "x\"y\\z\n".into())], None), r#"{a="x\"y\\z\n"}"#);
        assert_eq!(identifier("read bytes/s"), "read_bytes_s");
    }

    #[test]
    fn a_scraper_can_read_it() {
        let exits = [ExitCounters::default(), ExitCounters::default()];
        exits[0].record(Reason::PortWrite, Duration::from_micros(3));
        exits[0].record(Reason::PortWrite, Duration::from_secs(60));
        exits[1].record(Reason::MmioRead, Duration::from_nanos(500));
        let latency =
            Histogram { count: 1, sum_ns: 1500, buckets: [vec![0, 1], vec![0; BUCKETS - 2]].concat() };
        let device = |slot| DeviceMetrics {
            slot,
            kind: "block".into(),
            counters: BTreeMap::from([("reads".into(), 7)]),
            latency: BTreeMap::from([("read".into(), latency.clone())]),
        };
        let metrics = Metrics {
            uptime_ms: 1500,
            counters: BTreeMap::from([("emulated_instructions".into(), 9)]),
            vcpus: vec![exits[0].read(0), exits[1].read(1)],
            devices: vec![device(0), device(1)],
        };
        let text = text(&metrics);
        for line in [
            "vmm_uptime_seconds 1.500",
            "# TYPE vmm_emulated_instructions_total counter",
            "vmm_emulated_instructions_total 9",
            "vmm_vcpu_exits_total{vcpu=\"0\",reason=\"port_write\"} 2",
            "# TYPE vmm_vcpu_exit_seconds histogram",
            "vmm_vcpu_exit_seconds_bucket{vcpu=\"0\",reason=\"port_write\",le=\"0.000002\"} 0",
            "vmm_vcpu_exit_seconds_bucket{vcpu=\"0\",reason=\"port_write\",le=\"0.000004\"} 1",
            "vmm_vcpu_exit_seconds_bucket{vcpu=\"0\",reason=\"port_write\",le=\"1.048576\"} 1",
            "vmm_vcpu_exit_seconds_bucket{vcpu=\"0\",reason=\"port_write\",le=\"+Inf\"} 2",
            "vmm_vcpu_exit_seconds_count{vcpu=\"0\",reason=\"port_write\"} 2",
            "vmm_vcpu_exit_seconds_sum{vcpu=\"0\",reason=\"port_write\"} 60.000003",
            "vmm_device_reads_total{slot=\"1\",kind=\"block\"} 7",
            "vmm_device_read_seconds_bucket{slot=\"1\",kind=\"block\",le=\"0.000002\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
        }
        // Every metric is announced once, and its samples follow.
        let mut announced = Vec::new();
        for line in text.lines() {
            match line.strip_prefix("# TYPE ") {
                Some(rest) => announced.push(rest.split(' ').next().unwrap()),
                None if line.starts_with('#') => {}
                None => assert!(line.starts_with(announced.last().unwrap()), "{line}"),
            }
        }
        let mut unique = announced.clone();
        unique.dedup();
        unique.sort_unstable();
        assert_eq!(announced.len(), unique.len());
        assert!(text.ends_with('\n'));
    }
}
