//! `vmm ctl SOCKET …`: what a running machine can be asked from the command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::DiskArg;

/// `vmm ctl SOCKET …`
#[derive(Debug, Args)]
pub struct CtlArgs {
    /// The machine's socket, as --api-socket named it
    #[arg(value_name = "SOCKET")]
    pub socket: PathBuf,
    /// Print the machine's answer as it is, in JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// What to ask [default: describe]
    #[command(subcommand)]
    pub command: Option<CtlCommand>,
}

/// What to ask.
#[derive(Debug, Subcommand)]
pub enum CtlCommand {
    /// Say what the machine is made of, and what it is doing
    Describe,
    /// Let a machine begin that was started with --paused
    Start,
    /// Stop its vCPUs and devices where they are
    Pause,
    /// Go on after a pause
    Resume,
    /// End it: ask the guest first
    Shutdown {
        /// Do not ask the guest
        #[arg(long)]
        force: bool,
        /// End it all the same after so many seconds [default: 10]
        #[arg(long, value_name = "SECONDS", value_parser = seconds)]
        timeout: Option<Duration>,
    },
    /// Save it to a directory
    Snapshot {
        /// Where to
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// Only the memory that changed since the last one
        #[arg(long)]
        diff: bool,
    },
    /// Give a disk or a network card another back end
    #[command(group(clap::ArgGroup::new("backend").required(true)))]
    Attach {
        /// The device, as describe counts
        slot: usize,
        /// A raw disk
        #[arg(long, value_name = "FILE[,ro]", group = "backend")]
        disk: Option<DiskArg>,
        /// An existing TAP interface
        #[arg(long, value_name = "NAME", group = "backend")]
        tap: Option<String>,
    },
    /// Say what it has counted so far
    Metrics {
        /// In Prometheus' text format
        #[arg(long, conflicts_with = "json")]
        prometheus: bool,
    },
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.filter(|s| *s <= Duration::from_secs(600)).ok_or_else(|| "choose 0 to 600 seconds".into())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::{Cli, Command};
    use super::*;

    fn parse(words: &str) -> Result<CtlArgs, String> {
        let cli = Cli::try_parse_from(words.split(' ')).map_err(|e| e.to_string())?;
        match cli.command {
            Some(Command::Ctl(args)) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_machine_is_asked() {
        let args = parse("vmm ctl /s").unwrap();
        assert!(args.socket == *"/s" && args.command.is_none() && !args.json);
        assert!(parse("vmm ctl /s --json").unwrap().json && parse("vmm ctl /s metrics --json").unwrap().json);
        let shutdown = parse("vmm ctl /s shutdown --timeout 1.5").unwrap().command;
        let timeout = Some(Duration::from_millis(1500));
        assert!(
            matches!(shutdown, Some(CtlCommand::Shutdown { force: false, timeout: given }) if given == timeout)
        );
        let attach = parse("vmm ctl /s attach 2 --disk a.img,ro").unwrap().command;
        assert!(matches!(attach, Some(CtlCommand::Attach { slot: 2, disk: Some(_), tap: None })));
        for wrong in [
            "vmm ctl",
            "vmm ctl /s stop",
            "vmm ctl /s attach 1",
            "vmm ctl /s attach 1 --disk a --tap b",
            "vmm ctl /s attach -1 --tap b",
            "vmm ctl /s shutdown --timeout -1",
            "vmm ctl /s shutdown --timeout 601",
            "vmm ctl /s snapshot",
            "vmm ctl /s metrics --prometheus --json",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
