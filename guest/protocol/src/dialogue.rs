//! Which message may follow which, as tables over plain data. The host feeds it everything that the agent says, and asks before it says
//! anything itself.

use crate::{FromAgent, MAX_FAIL_MESSAGE, MAX_IMAGE_CONFIG, MAX_STREAMS, PROTOCOL_VERSION, ToAgent};

/// Where a session stands, as the host knows it. The default is that of a machine which boots.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Dialogue {
    /// How far the container is.
    pub stage: Stage,
    /// Whether it is held.
    pub pause: Pause,
}

/// How far the container is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Stage {
    /// Nothing was said yet.
    #[default]
    Silent,
    /// `Hello` came: the host may send `Begin`.
    Greeted,
    /// The host has sent `Begin`.
    Begun,
    /// `Image` came: the host may send `Start`.
    Ready,
    /// The host has sent `Start`.
    Asked,
    /// `Started` came.
    Running,
    /// `Failed` or `Exited` came: nothing may follow.
    Over,
}

/// Whether the container is held, for a snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Pause {
    /// It is not.
    #[default]
    No,
    /// The host has sent `Freeze`.
    Asked,
    /// `Frozen` came.
    Frozen,
    /// The host has sent `Thaw` before `Frozen` came, which is still to come.
    Recalled,
    /// The host has sent `Restored`.
    Identifying,
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
    /// In a copy of a template, whose agent has said `Hello` long ago.
    pub fn in_template() -> Self {
        Self { stage: Stage::Greeted, pause: Pause::No }
    }

    /// In a copy of a machine whose container was frozen.
    pub fn in_snapshot() -> Self {
        Self { stage: Stage::Running, pause: Pause::Frozen }
    }

    /// Notes a message of the agent.
    pub fn heard(&mut self, message: &FromAgent) -> Result<(), Violation> {
        check(message)?;
        let Self { stage, pause } = *self;
        let (stage, pause) = match (message, stage, pause) {
            (FromAgent::Hello { .. }, Stage::Silent, _) => (Stage::Greeted, pause),
            (FromAgent::Image { .. }, Stage::Begun, _) => (Stage::Ready, pause),
            (FromAgent::Started { .. }, Stage::Asked, _) => (Stage::Running, pause),
            // It may cross with `Freeze`; and what is frozen does not end.
            (FromAgent::Exited(_), Stage::Running, Pause::No | Pause::Asked | Pause::Recalled) => {
                (Stage::Over, pause)
            }
            (FromAgent::Frozen, Stage::Greeted | Stage::Running, Pause::Asked) => (stage, Pause::Frozen),
            (FromAgent::Frozen, Stage::Greeted | Stage::Running, Pause::Recalled) => (stage, Pause::No),
            (FromAgent::Restored { .. }, Stage::Running, Pause::Identifying) => (stage, Pause::No),
            (FromAgent::Failed { .. }, stage, _) if stage != Stage::Over => (Stage::Over, pause),
            _ => return Err(Violation::OutOfTurn),
        };
        *self = Self { stage, pause };
        Ok(())
    }

    /// Notes that the host is about to send `message`. `false`, and no change, when it may not.
    #[must_use]
    pub fn say(&mut self, message: &ToAgent) -> bool {
        let Self { stage, pause } = *self;
        let (stage, pause) = match (message, stage, pause) {
            (ToAgent::Begin(_), Stage::Greeted, Pause::No) => (Stage::Begun, pause),
            (ToAgent::Start(_), Stage::Ready, Pause::No) => (Stage::Asked, pause),
            (ToAgent::Signal(_) | ToAgent::Resize(_), Stage::Asked | Stage::Running, _) => (stage, pause),
            (ToAgent::Freeze, Stage::Greeted | Stage::Running, Pause::No) => (stage, Pause::Asked),
            (ToAgent::Thaw, Stage::Greeted | Stage::Running, Pause::Frozen) => (stage, Pause::No),
            (ToAgent::Thaw, Stage::Greeted | Stage::Running, Pause::Asked) => (stage, Pause::Recalled),
            (ToAgent::Restored(_), Stage::Running, Pause::Frozen) => (stage, Pause::Identifying),
            // It thaws.
            (ToAgent::Shutdown, stage, Pause::Frozen) => (stage, Pause::No),
            (ToAgent::Shutdown, stage, Pause::Asked) => (stage, Pause::Recalled),
            (ToAgent::Shutdown, stage, _) if stage != Stage::Silent => (stage, pause),
            _ => return false,
        };
        *self = Self { stage, pause };
        true
    }
}

/// What every message must keep to, wherever it comes.
fn check(message: &FromAgent) -> Result<(), Violation> {
    let too_long = match message {
        FromAgent::Hello { version } if *version != PROTOCOL_VERSION => {
            return Err(Violation::Version(*version));
        }
        FromAgent::Image { config } => config.as_ref().is_some_and(|config| config.len() > MAX_IMAGE_CONFIG),
        FromAgent::Failed { message, .. } => message.len() > MAX_FAIL_MESSAGE,
        FromAgent::Restored { streams } => streams.len() > MAX_STREAMS,
        FromAgent::Hello { .. } | FromAgent::Started { .. } | FromAgent::Exited(_) | FromAgent::Frozen => {
            false
        }
    };
    if too_long { Err(Violation::TooLong) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
