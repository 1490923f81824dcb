//! The map of an overlay, kept in a file. It lies behind the disk's bytes, where no guest reaches, in a *copy* of the delta: a
//! live delta has none, so what is missing cannot be out of date.
//!
//! ```text
//! 0                      the written blocks at their places, anything (holes, as a rule) between them
//! L = size, rounded up   header: 40 bytes, the rest of 4096 zeros
//!     to 4096              0  "vmmdelta"
//!                          8  u32  version: 1
//!                         12  u32  bytes in a block: 4096
//!                         16  u64  size of the disk in bytes
//!                         24  u64  size of its base in bytes
//!                         32  u64  checksum of the four above and of the map
//! L + 4096               map: u64s, bit b of number w is block 64 w + b; a multiple of 4096 bytes, zeros at its end
//! ```
//!
//! All numbers are little endian. The checksum is FNV-1a over u64s instead of bytes: it finds accidents. Whoever tampers with
//! the file can as well change the disk's bytes: the worst that a map can do is to show blocks of the delta that were not
//! written, which are inside the file and belong to this disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::map::{CHUNK_WORDS, Map};
use super::{BLOCK, OverlayError};

const MAGIC: [u8; 8] = *b"vmmdelta";
const VERSION: u32 = 1;
const PAGE: u64 = 4096;
const CHUNK_BYTES: usize = CHUNK_WORDS * 8;

/// Sizes of the disk and of its base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    pub disk: u64,
    pub base: u64,
}

/// FNV-1a over u64s.
struct Checksum(u64);

impl Checksum {
    fn new(sizes: Sizes) -> Self {
        let mut sum = Checksum(0xcbf2_9ce4_8422_2325);
        let [magic, rest] = [u64::from_le_bytes(MAGIC), u64::from(VERSION) | BLOCK << 32];
        sum.add(&[magic, rest, sizes.disk, sizes.base]);
        sum
    }

    fn add(&mut self, words: &[u64]) {
        for word in words {
            self.0 = (self.0 ^ word).wrapping_mul(0x100_0000_01b3);
        }
    }
}

fn header(sizes: Sizes, checksum: u64) -> [u8; 40] {
    let mut bytes = [0; 40];
    let words = [u64::from(VERSION) | BLOCK << 32, sizes.disk, sizes.base, checksum];
    let all = MAGIC.into_iter().chain(words.into_iter().flat_map(u64::to_le_bytes));
    bytes.iter_mut().zip(all).for_each(|(to, from)| *to = from);
    bytes
}

/// Writes `map` behind the disk's bytes in `file`.
pub fn write(file: &File, sizes: Sizes, map: &Map) -> io::Result<()> {
    let start = sizes.disk.next_multiple_of(PAGE);
    // Away with what may be there, so that what is skipped is zeros.
    file.set_len(sizes.disk)?;
    file.set_len(start + PAGE + (map.chunks() * CHUNK_BYTES) as u64)?;
    let mut sum = Checksum::new(sizes);
    for index in 0..map.chunks() {
        let Some(words) = map.chunk(index) else {
            sum.add(&[0; CHUNK_WORDS]);
            continue;
        };
        sum.add(&words);
        let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        file.write_all_at(&bytes, start + PAGE + (index * CHUNK_BYTES) as u64)?;
    }
    // Last: a file without a header is one that was not finished.
    file.write_all_at(&header(sizes, sum.0), start)
}

/// Reads the map from behind the disk's bytes in `file`, which may come from anybody.
pub fn read(file: &File, sizes: Sizes, map: &Map) -> Result<(), OverlayError> {
    let start = sizes.disk.next_multiple_of(PAGE);
    let expected = start + PAGE + (map.chunks() * CHUNK_BYTES) as u64;
    let len = file.metadata().map_err(OverlayError::Host)?.len();
    if len != expected {
        return Err(OverlayError::Stored(
            "its length does not fit its base: it is another disk's, or was cut off",
        ));
    }
    let mut found = [0; 40];
    file.read_exact_at(&mut found, start).map_err(OverlayError::Host)?;
    let ours = header(sizes, 0);
    let part = |range: std::ops::Range<usize>| (found.get(range.clone()), ours.get(range));
    let same = |(a, b)| a == b;
    if !same(part(0..8)) {
        return Err(OverlayError::Stored("it has no map: it was not finished"));
    }
    if !same(part(8..16)) {
        return Err(OverlayError::Stored("its map is of a version that this program does not know"));
    }
    if !same(part(16..32)) {
        return Err(OverlayError::Stored("its map is of a disk or a base of another size"));
    }
    let mut sum = Checksum::new(sizes);
    let mut bytes = [0; CHUNK_BYTES];
    for index in 0..map.chunks() {
        let at = start + PAGE + (index * CHUNK_BYTES) as u64;
        file.read_exact_at(&mut bytes, at).map_err(OverlayError::Host)?;
        let (words, _) = bytes.as_chunks::<8>();
        let mut numbers = [0; CHUNK_WORDS];
        numbers.iter_mut().zip(words).for_each(|(to, from)| *to = u64::from_le_bytes(*from));
        sum.add(&numbers);
        if !map.add_chunk(index, &numbers) {
            return Err(OverlayError::Stored("its map has blocks behind the disk's end"));
        }
    }
    if header(sizes, sum.0) != found {
        return Err(OverlayError::Stored("its map is damaged: the checksum differs"));
    }
    Ok(())
}
