//! Kernels for tests: of a few instructions, or broken in a chosen way.

use std::path::Path;

/// Where the tiny kernels lie.
const ADDRESS: u64 = 16 << 20;

/// An ELF kernel that consists of `code`. It is entered in 64-bit mode, with interrupts off and no tables of its own.
pub fn tiny(code: &[u8]) -> Vec<u8> {
    elf(code, 62)
}

/// An ELF executable for another machine: `EM_…` of the ELF specification.
pub fn elf(code: &[u8], machine: u16) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend(2u16.to_le_bytes());
    file.extend(machine.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    for field in [ADDRESS, 64, 0] {
        file.extend(field.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    for field in [64u16, 56, 1, 64, 0, 0] {
        file.extend(field.to_le_bytes());
    }
    // One segment to load: readable and executable.
    file.extend(1u32.to_le_bytes());
    file.extend(5u32.to_le_bytes());
    for field in [0x1000, ADDRESS, ADDRESS, code.len() as u64, code.len() as u64, 0x1000] {
        file.extend(field.to_le_bytes());
    }
    file.resize(0x1000, 0);
    file.extend(code);
    file
}

/// A bzImage with its payload at hand (Documentation/arch/x86/boot.rst).
pub struct BzImage {
    bytes: Vec<u8>,
    payload: std::ops::Range<usize>,
}

impl BzImage {
    /// Reads a good one.
    pub fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let word = |at: usize| {
            let word = bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).expect("a setup header");
            usize::try_from(u32::from_le_bytes(word)).expect("64 bits")
        };
        let sectors = usize::from(*bytes.get(0x1f1).expect("a setup header"));
        let start = (sectors + 1) * 512 + word(0x248);
        let payload = start..start + word(0x24c);
        BzImage { bytes, payload }
    }

    /// The whole file with another payload of the same length: `content`, and as it was behind that. The last 4 bytes, which tell the
    /// unpacked size, stay.
    pub fn with_payload(&self, content: &[u8]) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        let room = bytes.get_mut(self.payload.start..self.payload.end - 4).expect("a payload");
        for (place, byte) in room.iter_mut().zip(content) {
            *place = *byte;
        }
        bytes
    }

    /// The whole file with some bytes in the middle of its payload turned over.
    pub fn damaged(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        let middle = self.payload.start + self.payload.len() / 2;
        for byte in bytes.get_mut(middle..middle + 4096).expect("a payload") {
            *byte = !*byte;
        }
        bytes
    }

    /// The file up to the middle of its payload.
    pub fn truncated(&self) -> Vec<u8> {
        self.bytes.get(..self.payload.start + self.payload.len() / 2).expect("a payload").to_vec()
    }

    /// The whole file, packed in a way that unpacks to thousands of times its size, and says nothing of it: zstd (RFC 8878), every
    /// block of it 4 bytes that stand for 128 KiB of zeros.
    pub fn bomb(&self) -> Vec<u8> {
        // No checksum, no content size; a window of 8 MiB.
        let mut content = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x68];
        let block = [(128u32 << 10) << 3 | 1 << 1].map(u32::to_le_bytes).concat();
        while content.len() + 8 < self.payload.len() {
            content.extend(&block[..3]);
            content.push(0);
        }
        self.with_payload(&content)
    }
}
