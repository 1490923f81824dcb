//! `bench boot`: from the start of the process to the container's first byte.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;

use crate::memory;
use crate::report::{Demand, Figure, Report};
use crate::run::{Account, Setup, need};

/// vmm's default.
const GUEST_MIB: u64 = 256;

/// Measures `runs` boots of each kind of kernel, after one that warms caches.
pub fn measure(vmm: &Path, images: &Path, runs: u32) -> anyhow::Result<Report> {
    let setup = Setup {
        vmm: need(vmm)?,
        kernel: need(&images.join("vmlinux"))?,
        rootfs: need(&images.join("ctr.img"))?,
    };
    let packed = Setup { kernel: need(&images.join("bzImage"))?, ..setup.clone() };
    let elf = several(&setup, "vmlinux", runs)?;
    let packed = several(&packed, "bzImage", runs)?;
    let demand = |must, aim| Some(Demand { must, aim });
    let all = |accounts: &[Account], f: &dyn Fn(&Account) -> anyhow::Result<f64>| {
        accounts.iter().map(f).collect::<anyhow::Result<Vec<f64>>>()
    };
    let emulated = |phase: &str| -> anyhow::Result<Vec<f64>> {
        elf.iter().filter_map(|a| a.emulated(phase).transpose()).collect()
    };
    let figures = [
        Figure::new(
            "emulated kernel instructions to the first byte",
            "million",
            emulated("first_byte")?,
            demand(18.0, 12.0),
        ),
        Figure::new("  of these until the agent is up", "million", emulated("agent_up")?, None),
        Figure::new(
            "process start to the container's first byte",
            "s",
            all(&elf, &|a| Ok(a.wall_ms("first_byte")? / 1e3))?,
            demand(10.0, 6.0),
        ),
        Figure::new(
            "our own time to the first KVM_RUN, vmlinux",
            "ms",
            all(&elf, &Account::own_ms)?,
            demand(10.0, 3.0),
        ),
        Figure::new(
            "our own time to the first KVM_RUN, bzImage",
            "ms",
            all(&packed, &Account::own_ms)?,
            demand(60.0, 25.0),
        ),
        Figure::new("memory beyond the guest's", "MiB", overhead(&setup, runs)?, demand(8.0, 4.0)),
        Figure::new("size of the binary, agent inside", "MB", vec![size_mb(vmm)?], demand(12.0, 6.0)),
    ];
    let kind =
        if emulated("first_byte")?.is_empty() { "kernel mode on the CPU" } else { "emulated kernel mode" };
    Ok(Report {
        title: format!("boot: /bin/echo in a container, 1 vCPU, {GUEST_MIB} MiB; medians of {runs} runs"),
        host: kind.into(),
        figures: figures.into_iter().flatten().collect(),
    })
}

fn several(setup: &Setup, name: &str, runs: u32) -> anyhow::Result<Vec<Account>> {
    let mut accounts = Vec::new();
    for run in 0..=runs {
        eprintln!("boot {name}: run {run} of {runs}");
        let account = setup.measure()?;
        if run > 0 {
            accounts.push(account);
        }
    }
    Ok(accounts)
}

/// The memory of machines whose container sleeps.
fn overhead(setup: &Setup, runs: u32) -> anyhow::Result<Vec<f64>> {
    (0..runs.min(3))
        .map(|run| {
            eprintln!("memory: run {} of {}", run + 1, runs.min(3));
            let mut child = setup.start(&[], "echo up; sleep 60")?;
            // Long enough for the start's last allocations to be over; what is measured does not move after that.
            std::thread::sleep(Duration::from_millis(500));
            let overhead = memory::overhead_mib(child.id(), GUEST_MIB);
            child.kill().context("cannot end vmm")?;
            child.wait()?;
            overhead
        })
        .collect()
}

fn size_mb(vmm: &Path) -> anyhow::Result<f64> {
    let bytes = std::fs::metadata(vmm)?.len();
    // A few million.
    #[allow(clippy::cast_precision_loss)]
    Ok(bytes as f64 / 1e6)
}
