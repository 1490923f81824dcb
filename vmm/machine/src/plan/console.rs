//! Where the guest's serial port goes on the host.

use std::fs::File;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use thiserror::Error;

use super::open_no_wait;
use crate::config::ConsoleConfig;

/// An open console.
#[derive(Debug)]
pub enum ConsoleOutput {
    /// Only the last lines are kept, in memory.
    None,
    /// vmm's own standard input and output.
    Stdio,
    /// vmm's own standard error.
    Stderr,
    /// A file, terminal or pipe. Writing may wait for a pipe's reader, so it is done on a thread of its own.
    File(File),
}

/// Why a console cannot be written.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the message says it")]
pub enum ConsoleError {
    #[error("console {}: {source}: name a file in a directory that may be written", path.display())]
    Open { path: PathBuf, source: std::io::Error },
    #[error("console {}: nobody reads this pipe: start its reader first", path.display())]
    NoReader { path: PathBuf },
}

impl ConsoleOutput {
    pub(super) fn open(config: &ConsoleConfig) -> Result<Self, ConsoleError> {
        Ok(match config {
            ConsoleConfig::None => Self::None,
            ConsoleConfig::Stdio => Self::Stdio,
            ConsoleConfig::Stderr => Self::Stderr,
            ConsoleConfig::File(path) => Self::File(create(path)?),
        })
    }
}

/// Only we may read it: a guest's console shows what it does.
fn create(path: &Path) -> Result<File, ConsoleError> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
    open_no_wait(path, flags, Mode::RUSR | Mode::WUSR).map_err(|errno| match errno {
        Errno::NXIO => ConsoleError::NoReader { path: path.into() },
        _ => ConsoleError::Open { path: path.into(), source: errno.into() },
    })
}
