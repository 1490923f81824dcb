//! How many bytes of a connection may be on their way, in each direction (section 5.10.6.3). Pure.
//!
//! The guest never has more than [`BUF_ALLOC`] bytes with us that the host's socket has not taken, and we never have more
//! with the guest than it said it has room for. Counters are modulo 2³², as on the wire.

use serde::{Deserialize, Serialize};

use super::packet::Header;

/// Bytes that we take from the guest for a connection before the host's socket takes them. Four of Linux's largest packets.
pub const BUF_ALLOC: u32 = 256 * 1024;

/// The counters of one connection. A snapshot carries them as they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credit {
    /// Bytes that came from the guest.
    pub(super) received: u32,
    /// How many of them the host's socket took.
    pub(super) forwarded: u32,
    /// How many of those the guest knows of.
    pub(super) told: u32,
    /// Bytes that went to the guest.
    pub(super) sent: u32,
    /// How much it can buffer.
    pub(super) peer_alloc: u32,
    /// How many it has consumed.
    pub(super) peer_forwarded: u32,
}

impl Credit {
    /// Bytes from the guest that the host's socket has not taken: at most [`BUF_ALLOC`].
    pub fn buffered(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Bytes from the guest that it has taken.
    pub fn forwarded(&self) -> u32 {
        self.forwarded
    }

    /// `len` bytes came from the guest. `false`, and not counted, when it had no credit for them.
    #[must_use]
    pub fn receive(&mut self, len: u32) -> bool {
        let in_bounds = len <= BUF_ALLOC.saturating_sub(self.buffered());
        if in_bounds {
            self.received = self.received.wrapping_add(len);
        }
        in_bounds
    }

    /// The host's socket took `count` of the buffered bytes.
    pub fn forward(&mut self, count: u32) {
        self.forwarded = self.forwarded.wrapping_add(count.min(self.buffered()));
    }

    /// All that is buffered is taken, or given up.
    pub fn forward_all(&mut self) {
        self.forwarded = self.received;
    }

    /// A packet goes to the guest; every one tells how much room there is.
    pub fn told(&mut self) {
        self.told = self.forwarded;
    }

    /// Whether the guest ought to hear how much room there is: when it thinks that there is less than half, and would
    /// gain a quarter. Each packet costs it thousands of instructions; running dry costs it more.
    pub fn is_worth_telling(&self) -> bool {
        let view = BUF_ALLOC.saturating_sub(self.received.wrapping_sub(self.told));
        view < BUF_ALLOC / 2 && self.forwarded.wrapping_sub(self.told) >= BUF_ALLOC / 4
    }

    /// A packet came from the guest; every one tells how much room it has.
    pub fn heard(&mut self, header: &Header) {
        self.peer_alloc = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
    }

    /// Bytes that the guest has room for. One that claims to have consumed more than it got has none, and harms itself
    /// alone.
    pub fn room(&self) -> u32 {
        self.peer_alloc.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// `count` bytes go to the guest.
    pub fn send(&mut self, count: u32) {
        self.sent = self.sent.wrapping_add(count);
    }
}
