//! What the guest programs and the tests on the host agree about: bytes that both can make, and a checksum of them.

/// An endless sequence of bytes that looks random and is always the same (xorshift64*).
pub struct Pattern(u64);

impl Default for Pattern {
    fn default() -> Self {
        Pattern(0x9e37_79b9_7f4a_7c15)
    }
}

impl Pattern {
    /// Fills `buffer` with what comes next. Its length should be a multiple of 8: the rest of a word is lost.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for word in buffer.chunks_mut(8) {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            let bytes = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
            word.copy_from_slice(bytes.get(..word.len()).unwrap_or_default());
        }
    }

    /// Its first `count` bytes.
    pub fn bytes(count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        Pattern::default().fill(&mut bytes);
        bytes
    }
}

/// A running checksum (FNV-1a, 64 bits).
#[derive(Clone, Copy)]
pub struct Checksum(u64);

impl Default for Checksum {
    fn default() -> Self {
        Checksum(0xcbf2_9ce4_8422_2325)
    }
}

impl Checksum {
    /// Takes in more bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// The checksum of what was taken in.
    pub fn value(self) -> u64 {
        self.0
    }

    /// That of `bytes`.
    pub fn of(bytes: &[u8]) -> u64 {
        let mut checksum = Checksum::default();
        checksum.update(bytes);
        checksum.value()
    }
}
