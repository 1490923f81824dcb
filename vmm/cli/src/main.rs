//! The `vmm` command: reads the command line, calls the command, turns its outcome into an exit code. One file a command in
//! [`cmd`], and no logic here.

mod args;
mod assets;
mod cmd;
mod drive;
mod exit_code;
mod keyboard;
mod log_line;
mod session;
mod signals;
mod template;
mod terminal;
mod timing;

use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use clap::error::ErrorKind;
use machine::timeline::Timeline;

use args::{Cli, Command};

fn main() -> ExitCode {
    let timeline = Arc::new(Timeline::start());
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    log_line::start(cli.verbose);
    // A process that we started ourselves would be called `exe`, after /proc/self/exe.
    let _ = std::fs::write("/proc/self/comm", "vmm");
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        terminal::restore();
        before(info);
    }));
    if let Err(error) = signals::explain_lost_memory() {
        log::warn!("SIGBUS cannot be caught: {error}");
    }
    let outcome = match cli.command {
        Some(Command::Ctl(args)) => cmd::ctl::run(&args),
        Some(Command::Restore(args)) => cmd::restore::run(&args, &timeline),
        Some(Command::Snapshot { command }) => cmd::snapshot::run(&command),
        Some(Command::Template { command }) => cmd::template::run(&command),
        Some(Command::Info { json }) => cmd::info::run(json).map(|()| 0),
        None => cmd::run::run(&cli.run, &timeline),
    };
    terminal::restore();
    let code = outcome.unwrap_or_else(|error| {
        log_line::say(&format!("vmm: {}", one_line(&error)));
        exit_code::VMM
    });
    // Threads that wait for input have nothing more to do.
    std::process::exit(code.into());
}

/// The error and its causes. Most say their cause themselves, with what to do about it: that is not said again.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if line.is_empty() {
            line = cause;
        } else if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line.replace('\n', " ")
}

/// Prints help where it was asked for, and one line about what is wrong where it was not.
fn usage(error: &clap::Error) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    log_line::say(&format!("vmm: {} (vmm --help says more)", complaint(error)));
    ExitCode::from(exit_code::VMM)
}

/// One line about it.
fn complaint(error: &clap::Error) -> String {
    match error.kind() {
        // What it has to say is all of the help.
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => "a command is missing".into(),
        _ => first_paragraph(&error.to_string()),
    }
}

/// What is wrong, without the usage that follows it.
fn first_paragraph(text: &str) -> String {
    let lines = text.trim_start_matches("error: ").lines();
    lines.map(str::trim).take_while(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_flags_is_one_line() {
        let text =
            "error: the argument '--init' cannot be used with:\n  --tty\n  --interactive\n\nUsage: vmm";
        let line = "the argument '--init' cannot be used with: --tty --interactive";
        assert_eq!(first_paragraph(text), line);
        let of = |words: &[&str]| complaint(&Cli::try_parse_from(words).unwrap_err());
        assert_eq!(of(&["vmm", "snapshot"]), "a command is missing");
        assert_eq!(of(&["vmm", "restore"]), "the following required arguments were not provided: <DIR>");
    }

    #[test]
    fn causes_are_said_once() {
        let error =
            anyhow::anyhow!("the file is empty").context("root image x: the file is empty: copy it again");
        assert_eq!(one_line(&error), "root image x: the file is empty: copy it again");
        let error = anyhow::anyhow!("too many\nthreads").context("cannot start");
        assert_eq!(one_line(&error), "cannot start: too many threads");
    }
}
