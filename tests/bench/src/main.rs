//! `./scripts/bench`: measures vmm from outside, as a person would with a stopwatch, and prints medians beside what the project
//! demands of itself. No test: nothing here passes or fails.

mod boot;
mod memory;
mod report;
mod run;
mod snapshots;

use std::path::PathBuf;

use anyhow::Context;
use clap::{Parser, Subcommand};

/// Measures vmm. Leave the machine alone meanwhile.
#[derive(Parser)]
#[command(max_term_width = 120)]
struct Cli {
    #[command(subcommand)]
    what: What,
    /// Counted runs, after one that is not counted
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100), global = true)]
    runs: u32,
    /// The binary to measure
    #[arg(long, default_value = "target/release/vmm", global = true)]
    vmm: PathBuf,
    /// Where kernels and images are
    #[arg(long, default_value = "images/out", global = true)]
    images: PathBuf,
    /// Also write the figures as JSON to this file
    #[arg(long, value_name = "FILE", global = true)]
    json: Option<PathBuf>,
}

#[derive(Subcommand)]
enum What {
    /// From the start of the process to the container's first byte: 1 vCPU, 256 MiB
    Boot,
    /// Templates, restores, clones and pauses: 1 vCPU, 256 MiB
    Snapshots,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let report = match cli.what {
        What::Boot => boot::measure(&cli.vmm, &cli.images, cli.runs)?,
        What::Snapshots => snapshots::measure(&cli.vmm, &cli.images, cli.runs)?,
    };
    println!("{}", report.table());
    if let Some(path) = &cli.json {
        if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        }
        std::fs::write(path, report.json()?).with_context(|| format!("cannot write {}", path.display()))?;
        eprintln!("figures: {}", path.display());
    }
    Ok(())
}
