//! What starting a container costs in emulated kernel instructions, on hosts that emulate kernel mode. The count does not depend on how busy
//! or fast the machine is, so it is held to figures that stand here.

#![allow(clippy::unwrap_used, reason = "tests may")]

use tests::{Vmm, artefacts, require_emulated_kernel_mode, require_kvm};

/// Emulated instructions until a stage, in millions, for the sample container with 1 vCPU and 256 MiB.
const BUDGET: [(&str, f64); 2] = [("agent_up", 6.9), ("first_byte", 8.8)];

/// The same for a container that starts from a template, until all is over, for the command `true`.
const WARM: (&str, f64) = ("exit", 2.05);

/// How far a run may be off, up or down: who makes it cheaper says so here.
const TOLERANCE: f64 = 0.10;

/// The one thing that does move with the host's load is how many timer ticks fall into the run: of several runs the cheapest has the
/// fewest.
const RUNS: usize = 3;

#[test]
fn emulated_instructions() {
    require_kvm!();
    require_emulated_kernel_mode!();
    within(&BUDGET, || Vmm::kernel(artefacts::vmlinux()).arg("--rootfs").arg(artefacts::sample()).cold());
    within(&[WARM], || Vmm::container().command(&["true"]));
}

/// Holds a machine to its budget.
#[track_caller]
fn within(budget: &[(&str, f64)], vmm: impl Fn() -> Vmm) {
    let runs: Vec<_> = (0..RUNS).map(|_| measure(budget, vmm())).collect();
    for (index, (phase, budget)) in budget.iter().enumerate() {
        let millions = runs.iter().map(|run| run[index]).fold(f64::INFINITY, f64::min);
        println!("{phase}: {millions:.3} M, budget {budget} M");
        assert!(
            (millions / budget - 1.0).abs() <= TOLERANCE,
            "{phase} took {millions:.3} M emulated instructions at best ({runs:?}); the budget is {budget} M ± {:.0} %",
            TOLERANCE * 100.0
        );
    }
}

/// What one run took until each stage of `budget`, in millions.
fn measure(budget: &[(&str, f64)], vmm: Vmm) -> Vec<f64> {
    let ended = vmm.arg("--timing=json").run().expect(0);
    let err = ended.err();
    let report: serde_json::Value = serde_json::from_str(err.lines().last().unwrap()).unwrap();
    let figures = budget.iter().map(|(phase, _)| {
        let stage = report["phases"].as_array().unwrap().iter().find(|stage| stage["phase"] == *phase);
        let count = stage.and_then(|stage| stage["emulated_instructions"].as_f64());
        count.unwrap_or_else(|| panic!("no stage {phase}: {err}")) / 1e6
    });
    figures.collect()
}
