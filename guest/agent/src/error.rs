//! What goes wrong before the command runs, as the host is told it.

use alloc::string::{String, ToString};
use core::ffi::CStr;
use core::fmt;

use protocol::{ByteString, FailReason, FromAgent, MAX_FAIL_MESSAGE, ProtocolError};
use rustix::io::Errno;

/// Why no container runs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No file of this name.
    #[error("{command:?}: no such command in the container")]
    NotFound {
        /// The first argument.
        command: ByteString,
    },
    /// There is a file, and the kernel does not execute it.
    #[error("{path:?} cannot be executed: {errno}")]
    NotExecutable {
        /// The file.
        path: ByteString,
        /// What the kernel said.
        errno: Reason,
    },
    /// The image's disk.
    #[error("cannot mount the image's disk as {fstype:?}: {errno}")]
    Image {
        /// The file system type that was tried last.
        fstype: ByteString,
        /// What the kernel said.
        errno: Reason,
    },
    /// A step that has nothing to do with the image or the command.
    #[error("{step}: {errno}")]
    Step {
        /// What was done, with the path.
        step: String,
        /// What the kernel said.
        errno: Reason,
    },
    /// The host asks for something impossible.
    #[error("{0}")]
    Request(String),
    /// The control connection cannot be used any more.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// The host wants an end, or is gone.
    #[error("the host closed the control connection")]
    Ended,
}

impl Error {
    /// What the host hears.
    pub fn message(&self) -> FromAgent {
        let reason = match self {
            Self::NotFound { .. } => FailReason::NotFound,
            Self::NotExecutable { .. } => FailReason::NotExecutable,
            Self::Image { .. } => FailReason::RootFs,
            _ => FailReason::Setup,
        };
        let mut message = self.to_string();
        while message.len() > MAX_FAIL_MESSAGE {
            message.pop();
        }
        FromAgent::Failed { reason, message }
    }
}

/// For `map_err`: names the step that a system call belonged to.
pub fn at(step: impl Into<String>) -> impl FnOnce(Errno) -> Error {
    move |errno| Error::Step { step: step.into(), errno: Reason(errno) }
}

/// An error number that prints as the C library's text for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reason(pub Errno);

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut buffer = [0u8; 64];
        match crate::sys::error_text(self.0, &mut buffer).map(CStr::to_str) {
            Some(Ok(text)) => f.write_str(text),
            _ => write!(f, "error {}", self.0.raw_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts() {
        let error = at("mount /proc")(Errno::PERM);
        assert_eq!(error.to_string(), "mount /proc: Operation not permitted");
        assert!(matches!(error.message(), FromAgent::Failed { reason: FailReason::Setup, .. }));
        let error = Error::NotFound { command: ByteString::from("x\n") };
        assert_eq!(error.to_string(), "\"x\\n\": no such command in the container");
    }

    #[test]
    fn messages_are_bounded() {
        let FromAgent::Failed { message, .. } = Error::Request("ü".repeat(MAX_FAIL_MESSAGE)).message()
        else {
            panic!()
        };
        assert_eq!(message.len(), MAX_FAIL_MESSAGE);
    }
}
