//! Log lines on standard error: `vmm: what happened`, and with `-v` more of them.

use std::io::Write;

use log::{Level, LevelFilter, Metadata, Record};

struct Lines;

impl log::Log for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let kind = match record.level() {
            Level::Error => "",
            Level::Warn => "warning: ",
            Level::Info => "info: ",
            Level::Debug | Level::Trace => "debug: ",
        };
        // In one piece, so that lines of several threads stay whole.
        say(&format!("vmm: {kind}{}", record.args()));
    }

    fn flush(&self) {}
}

/// Writes `text` and a newline to standard error in one piece. If nobody reads it, nobody reads it.
pub fn say(text: &str) {
    let _ = std::io::stderr().write_all(format!("{text}\n").as_bytes());
}

/// Starts logging. Errors and warnings always; with `verbose` 1 also what is worth knowing, with 2 everything.
pub fn start(verbose: u8) {
    static LINES: Lines = Lines;
    if log::set_logger(&LINES).is_ok() {
        log::set_max_level(match verbose {
            0 => LevelFilter::Warn,
            1 => LevelFilter::Info,
            _ => LevelFilter::Trace,
        });
    }
}
