//! Frames: a message in postcard's encoding behind its length as 32 bits, little endian.
//!
//! The length is checked before anything is kept for it, and a frame must be used up by its message.

use alloc::vec::Vec;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Most bytes of a frame after its length: 1 MiB.
pub const MAX_FRAME: usize = 1 << 20;

/// Bytes of the length in front.
const PREFIX: usize = 4;

/// What can go wrong with a frame. None of it can be recovered from: close the connection.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// The connection failed.
    #[cfg(feature = "std")]
    #[error("control connection: {0}")]
    Io(#[from] std::io::Error),
    /// The connection ended within a frame.
    #[error("the control connection ended within a message")]
    Truncated,
    /// A frame is longer than [`MAX_FRAME`].
    #[error("a control message of {0} bytes is longer than the {MAX_FRAME} that are allowed")]
    TooLong(usize),
    /// The bytes of a frame are not a message.
    #[error("a control message that cannot be decoded: {0}")]
    Malformed(postcard::Error),
    /// A frame goes on after its message.
    #[error("{0} bytes follow a control message in its frame")]
    Trailing(usize),
    /// A message cannot be written down.
    #[error("a control message that cannot be encoded: {0}")]
    Encode(postcard::Error),
}

/// `message` as a frame, ready to send.
pub fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, ProtocolError> {
    let mut frame = postcard::to_extend(message, Vec::from([0; PREFIX])).map_err(ProtocolError::Encode)?;
    let length = frame.len().saturating_sub(PREFIX);
    match u32::try_from(length) {
        Ok(prefix) if length <= MAX_FRAME => {
            frame[..PREFIX].copy_from_slice(&prefix.to_le_bytes());
            Ok(frame)
        }
        _ => Err(ProtocolError::TooLong(length)),
    }
}

fn decode<M: DeserializeOwned>(payload: &[u8]) -> Result<M, ProtocolError> {
    match postcard::take_from_bytes(payload) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(ProtocolError::Trailing(rest.len())),
        Err(error) => Err(ProtocolError::Malformed(error)),
    }
}

fn payload_length(prefix: [u8; PREFIX]) -> Result<usize, ProtocolError> {
    let length = usize::try_from(u32::from_le_bytes(prefix)).unwrap_or(usize::MAX);
    if length > MAX_FRAME { Err(ProtocolError::TooLong(length)) } else { Ok(length) }
}

/// Reads one message, blocking. `None` at the end of the connection.
///
/// Reads no byte beyond the message, so a call may follow another on the same connection.
#[cfg(feature = "std")]
pub fn read_message<M: DeserializeOwned>(
    reader: &mut impl std::io::Read,
) -> Result<Option<M>, ProtocolError> {
    use std::io::Read;

    let mut prefix = Vec::with_capacity(PREFIX);
    reader.by_ref().take(PREFIX as u64).read_to_end(&mut prefix)?;
    if prefix.is_empty() {
        return Ok(None);
    }
    let prefix = prefix.try_into().map_err(|_| ProtocolError::Truncated)?;
    let length = payload_length(prefix)?;
    // Grows with what arrives, not with what is announced.
    let mut payload = Vec::new();
    reader.by_ref().take(length as u64).read_to_end(&mut payload)?;
    if payload.len() < length {
        return Err(ProtocolError::Truncated);
    }
    decode(&payload).map(Some)
}

/// Writes one message, blocking, in one `write_all`.
#[cfg(feature = "std")]
pub fn write_message<M: Serialize>(
    writer: &mut impl std::io::Write,
    message: &M,
) -> Result<(), ProtocolError> {
    writer.write_all(&encode(message)?)?;
    writer.flush()?;
    Ok(())
}

/// Takes messages out of bytes that arrive in any pieces, for readers that do not block.
///
/// Call [`next_message`](Self::next_message) until it gives `None` after each [`push`](Self::push): then the decoder holds less than one frame
/// beside what was pushed last.
#[derive(Debug, Default)]
pub struct FrameDecoder {
    buffer: Vec<u8>,
    /// How much of the front of `buffer` is taken.
    taken: usize,
}

impl FrameDecoder {
    /// An empty decoder.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes from the connection.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, or `None` until more is pushed. After an error the decoder has lost its place: drop it and the connection.
    pub fn next_message<M: DeserializeOwned>(&mut self) -> Result<Option<M>, ProtocolError> {
        let waiting = self.buffer.get(self.taken..).unwrap_or_default();
        let Some((prefix, rest)) = waiting.split_first_chunk() else { return Ok(None) };
        let length = payload_length(*prefix)?;
        let Some(payload) = rest.get(..length) else { return Ok(None) };
        let message = decode(payload)?;
        self.taken = self.taken.saturating_add(PREFIX).saturating_add(length);
        Ok(Some(message))
    }

    /// To be called at the end of the connection: an error if it ended within a message.
    pub fn finish(&self) -> Result<(), ProtocolError> {
        if self.taken == self.buffer.len() { Ok(()) } else { Err(ProtocolError::Truncated) }
    }
}

#[cfg(test)]
mod tests;
