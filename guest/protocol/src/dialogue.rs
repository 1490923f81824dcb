//! Which message may follow which, as a table over plain data. The host feeds it everything that the agent says.

use crate::{FromAgent, MAX_FAIL_MESSAGE, MAX_IMAGE_CONFIG, PROTOCOL_VERSION};

/// Where the agent's side of a session stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Dialogue {
    /// Nothing was said yet.
    #[default]
    Silent,
    /// `Hello` came: the host may send `Start`.
    Greeted,
    /// The host has sent `Start`.
    Asked,
    /// `Started` came.
    Running,
    /// `Failed` or `Exited` came: nothing may follow.
    Over,
}

/// A message that a correct agent does not send. End the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Agent and host do not belong together.
    #[error(
        "the agent speaks version {0} of the protocol, not {PROTOCOL_VERSION}: use the agent that was built with this vmm"
    )]
    Version(u32),
    /// The message has no place here.
    #[error("the agent sent a message out of turn")]
    OutOfTurn,
    /// A field is longer than it may be.
    #[error("the agent sent a field longer than allowed")]
    TooLong,
}

impl Dialogue {
    /// Notes a message of the agent.
    pub fn heard(&mut self, message: &FromAgent) -> Result<(), Violation> {
        *self = match (*self, message) {
            (Self::Silent, FromAgent::Hello { version, image_config }) => {
                if *version != PROTOCOL_VERSION {
                    return Err(Violation::Version(*version));
                }
                if image_config.as_ref().is_some_and(|config| config.len() > MAX_IMAGE_CONFIG) {
                    return Err(Violation::TooLong);
                }
                Self::Greeted
            }
            (Self::Asked, FromAgent::Started { .. }) => Self::Running,
            (Self::Running, FromAgent::Exited(_)) => Self::Over,
            (
                Self::Silent | Self::Greeted | Self::Asked | Self::Running,
                FromAgent::Failed { message, .. },
            ) => {
                if message.len() > MAX_FAIL_MESSAGE {
                    return Err(Violation::TooLong);
                }
                Self::Over
            }
            _ => return Err(Violation::OutOfTurn),
        };
        Ok(())
    }

    /// Notes that the host sends `Start`. `false`, and no change, when it may not: before `Hello`, or a second time.
    pub fn start(&mut self) -> bool {
        let allowed = *self == Self::Greeted;
        if allowed {
            *self = Self::Asked;
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ByteString, ExitStatus, FailReason};
    use alloc::string::String;

    fn hello(version: u32, size: usize) -> FromAgent {
        FromAgent::Hello { version, image_config: Some(ByteString(vec![b' '; size])) }
    }

    fn failed(size: usize) -> FromAgent {
        FromAgent::Failed { reason: FailReason::Setup, message: "x".repeat(size) }
    }

    #[test]
    fn a_session() {
        let mut dialogue = Dialogue::default();
        assert!(!dialogue.start());
        assert_eq!(dialogue.heard(&hello(PROTOCOL_VERSION, MAX_IMAGE_CONFIG)), Ok(()));
        assert!(dialogue.start());
        assert!(!dialogue.start());
        assert_eq!(dialogue.heard(&FromAgent::Started { pid: 2 }), Ok(()));
        assert_eq!(dialogue.heard(&FromAgent::Exited(ExitStatus::Code(0))), Ok(()));
        assert_eq!(dialogue, Dialogue::Over);
    }

    #[test]
    fn everything_else_is_refused() {
        let messages = [
            hello(PROTOCOL_VERSION, 0),
            FromAgent::Started { pid: 2 },
            FromAgent::Exited(ExitStatus::Signal(9)),
            FromAgent::Failed { reason: FailReason::Setup, message: String::new() },
        ];
        let allowed = [
            (Dialogue::Silent, [true, false, false, true]),
            (Dialogue::Greeted, [false, false, false, true]),
            (Dialogue::Asked, [false, true, false, true]),
            (Dialogue::Running, [false, false, true, true]),
            (Dialogue::Over, [false, false, false, false]),
        ];
        for (state, row) in allowed {
            for (message, allowed) in messages.iter().zip(row) {
                let mut dialogue = state;
                assert_eq!(dialogue.heard(message).is_ok(), allowed, "{state:?} {message:?}");
                assert_eq!(dialogue != state, allowed, "{state:?} {message:?}");
            }
        }
    }

    #[test]
    fn limits() {
        assert_eq!(
            Dialogue::Silent.heard(&hello(PROTOCOL_VERSION + 1, 0)),
            Err(Violation::Version(PROTOCOL_VERSION + 1))
        );
        assert_eq!(
            Dialogue::Silent.heard(&hello(PROTOCOL_VERSION, MAX_IMAGE_CONFIG + 1)),
            Err(Violation::TooLong)
        );
        assert_eq!(Dialogue::Asked.heard(&failed(MAX_FAIL_MESSAGE)), Ok(()));
        assert_eq!(Dialogue::Asked.heard(&failed(MAX_FAIL_MESSAGE + 1)), Err(Violation::TooLong));
    }
}
