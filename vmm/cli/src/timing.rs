//! `--timing`: the stages of a run, as a table for people or a line of JSON for programs.

use std::fmt::Write;
use std::time::Duration;

use machine::timeline::{Mark, PHASES, Phase, Timeline};
use serde::Serialize;

use crate::args::TimingFormat;

fn title(phase: Phase) -> &'static str {
    match phase {
        Phase::Start => "process started",
        Phase::FirstRun => "first KVM_RUN",
        Phase::KernelEntered => "kernel entered",
        Phase::AgentUp => "agent up",
        Phase::FirstByte => "container's first byte",
        Phase::Exit => "exit",
    }
}

fn key(phase: Phase) -> &'static str {
    match phase {
        Phase::Start => "start",
        Phase::FirstRun => "first_run",
        Phase::KernelEntered => "kernel_entered",
        Phase::AgentUp => "agent_up",
        Phase::FirstByte => "first_byte",
        Phase::Exit => "exit",
    }
}

/// One stage in JSON.
#[derive(Serialize)]
struct Stage {
    phase: &'static str,
    /// `CLOCK_MONOTONIC`.
    monotonic_ns: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    emulated_instructions: Option<u64>,
}

#[derive(Serialize)]
struct Report {
    phases: Vec<Stage>,
    /// Of the time to the first KVM_RUN, what KVM's own system calls took.
    kvm_setup_ns: u64,
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The report on `timeline`.
pub fn report(timeline: &Timeline, format: TimingFormat) -> String {
    let marks: Vec<_> = PHASES.iter().filter_map(|p| Some((*p, timeline.get(*p)?))).collect();
    match format {
        TimingFormat::Json => json(&marks, timeline.kvm_time()),
        TimingFormat::Text => table(&marks, timeline.kvm_time()),
    }
}

fn json(marks: &[(Phase, Mark)], kvm: Duration) -> String {
    let phases = marks
        .iter()
        .map(|(phase, mark)| Stage {
            phase: key(*phase),
            monotonic_ns: nanoseconds(mark.at),
            emulated_instructions: mark.emulated,
        })
        .collect();
    let report = Report { phases, kvm_setup_ns: nanoseconds(kvm) };
    serde_json::to_string(&report).unwrap_or_default()
}

fn milliseconds(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

fn millions(count: u64) -> String {
    // Fine for printing.
    #[allow(clippy::cast_precision_loss)]
    let millions = count as f64 / 1e6;
    format!("{millions:.3} M")
}

fn table(marks: &[(Phase, Mark)], kvm: Duration) -> String {
    let Some((_, start)) = marks.first() else { return String::new() };
    let counted = marks.iter().any(|(_, m)| m.emulated.is_some_and(|n| n > 0));
    let mut text = format!("{:<24}{:>12}{:>12}", "stage", "at", "took");
    if counted {
        text += &format!("{:>24}", "emulated instructions");
    }
    let mut before = start;
    for (phase, mark) in marks {
        let at = milliseconds(mark.at.saturating_sub(start.at));
        let took = milliseconds(mark.at.saturating_sub(before.at));
        let _ = write!(text, "\n{:<24}{at:>12}{took:>12}", title(*phase));
        if counted {
            let step = mark.emulated.unwrap_or(0).saturating_sub(before.emulated.unwrap_or(0));
            let _ = write!(text, "{:>24}", millions(step));
        }
        before = mark;
    }
    let _ = write!(text, "\nof the time to the first KVM_RUN, {} were KVM's own", milliseconds(kvm));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marks() -> Vec<(Phase, Mark)> {
        let mark = |ms, emulated| Mark { at: Duration::from_millis(ms), emulated };
        vec![
            (Phase::Start, mark(1000, None)),
            (Phase::FirstRun, mark(1002, Some(0))),
            (Phase::AgentUp, mark(5002, Some(8_000_000))),
            (Phase::Exit, mark(6002, Some(9_500_000))),
        ]
    }

    #[test]
    fn people_see_what_each_stage_took() {
        let text = table(&marks(), Duration::from_micros(1500));
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 6);
        assert!(lines[3].starts_with("agent up") && lines[3].ends_with("8.000 M"), "{text}");
        assert!(lines[4].contains("5002.0 ms") && lines[4].ends_with("1.500 M"), "{text}");
        assert_eq!(lines[0].len(), lines[4].len(), "columns line up");
        assert!(lines[5].contains("1.5 ms"));
    }

    #[test]
    fn hosts_that_count_nothing_have_no_column() {
        let marks: Vec<_> = marks().into_iter().map(|(p, m)| (p, Mark { emulated: Some(0), ..m })).collect();
        assert!(!table(&marks, Duration::ZERO).contains("emulated"));
    }

    #[test]
    fn programs_see_the_clock() {
        let report: serde_json::Value = serde_json::from_str(&json(&marks(), Duration::ZERO)).unwrap();
        assert_eq!(report["phases"][2]["phase"], "agent_up");
        assert_eq!(report["phases"][2]["monotonic_ns"], 5_002_000_000u64);
        assert_eq!(report["phases"][2]["emulated_instructions"], 8_000_000);
    }
}
