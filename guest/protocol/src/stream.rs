//! The header with which each connection to [`STREAM_PORT`](crate::STREAM_PORT) begins.

use serde::{Deserialize, Serialize};

use crate::Token;

/// Which part of stdio a connection carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum StreamKind {
    /// Host to guest.
    Stdin = 0,
    /// Guest to host.
    Stdout = 1,
    /// Guest to host.
    Stderr = 2,
    /// Both ways, raw.
    Terminal = 3,
}

/// The first [`StreamHeader::SIZE`] bytes that the agent sends on a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamHeader {
    /// From [`Start`](crate::Start). The host closes a connection that brings another.
    pub token: Token,
    /// What follows.
    pub kind: StreamKind,
}

/// Why bytes are no header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("unknown kind of stream {0}")]
pub struct StreamHeaderError(pub u8);

impl StreamHeader {
    /// Bytes on the wire: the token, then the kind.
    pub const SIZE: usize = 17;

    /// The bytes to send.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[..16].copy_from_slice(&self.token.0);
        bytes[16] = self.kind as u8;
        bytes
    }

    /// Reads a header. Whether the token is right is the caller's to compare.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, StreamHeaderError> {
        let [token @ .., kind] = *bytes;
        let kind = match kind {
            0 => StreamKind::Stdin,
            1 => StreamKind::Stdout,
            2 => StreamKind::Stderr,
            3 => StreamKind::Terminal,
            other => return Err(StreamHeaderError(other)),
        };
        Ok(Self { token: Token(token), kind })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_round_trip() {
        for kind in [StreamKind::Stdin, StreamKind::Stdout, StreamKind::Stderr, StreamKind::Terminal] {
            let header = StreamHeader { token: Token(*b"0123456789abcdef"), kind };
            assert_eq!(StreamHeader::decode(&header.encode()), Ok(header));
        }
    }

    #[test]
    fn unknown_kinds_are_refused() {
        for kind in 4..=255 {
            let mut bytes = [1; StreamHeader::SIZE];
            bytes[16] = kind;
            assert_eq!(StreamHeader::decode(&bytes), Err(StreamHeaderError(kind)));
        }
    }
}
