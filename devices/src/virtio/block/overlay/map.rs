//! Which blocks of a disk were written: a set that only grows. No I/O.
//!
//! One thread adds, any thread may look. Memory is taken for those parts of the disk that were written: a page for 128 MiB.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Words in a chunk: a page.
pub const CHUNK_WORDS: usize = 512;
/// Blocks in a word.
const WORD_BLOCKS: u64 = 64;

type Chunk = [AtomicU64; CHUNK_WORDS];

/// A bit for each block.
pub struct Map {
    blocks: u64,
    chunks: Box<[OnceLock<Box<Chunk>>]>,
}

impl Map {
    /// An empty set of blocks below `blocks`, of which there are no more than fit in memory: the caller sees to it.
    pub fn new(blocks: u64) -> Self {
        let chunks = blocks.div_ceil(WORD_BLOCKS * CHUNK_WORDS as u64);
        Map { blocks, chunks: (0..chunks).map(|_| OnceLock::new()).collect() }
    }

    /// How many chunks the map has.
    pub fn chunks(&self) -> usize {
        self.chunks.len()
    }

    /// The words of a chunk; `None` when no block of it was written.
    pub fn chunk(&self, index: usize) -> Option<[u64; CHUNK_WORDS]> {
        let chunk = self.chunks.get(index)?.get()?;
        Some(std::array::from_fn(|i| chunk.get(i).map_or(0, |word| word.load(Ordering::Acquire))))
    }

    /// Adds the blocks of a chunk's words. Returns whether all of them exist; where not, none is added.
    #[must_use]
    pub fn add_chunk(&self, index: usize, words: &[u64; CHUNK_WORDS]) -> bool {
        let first = (index * CHUNK_WORDS) as u64;
        let fits = (first..).zip(words).all(|(at, &word)| {
            let below = self.blocks.saturating_sub(at * WORD_BLOCKS).min(WORD_BLOCKS);
            below == WORD_BLOCKS || word >> below == 0
        });
        if fits {
            (first..)
                .zip(words)
                .filter(|(_, word)| **word != 0)
                .for_each(|(at, &word)| self.add_word(at, word));
        }
        fits
    }

    fn word(&self, index: u64) -> u64 {
        let Some((chunk, word)) = place(index) else { return 0 };
        let chunk = self.chunks.get(chunk).and_then(OnceLock::get);
        chunk.and_then(|chunk| chunk.get(word)).map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn add_word(&self, index: u64, bits: u64) {
        let Some((chunk, word)) = place(index) else { return };
        let Some(chunk) = self.chunks.get(chunk) else { return };
        let chunk = chunk.get_or_init(|| Box::new([const { AtomicU64::new(0) }; CHUNK_WORDS]));
        if let Some(word) = chunk.get(word) {
            // What was written to the delta is there for whoever sees the bit.
            word.fetch_or(bits, Ordering::Release);
        }
    }

    /// Adds blocks.
    pub fn add(&self, blocks: Range<u64>) {
        let end = blocks.end.min(self.blocks);
        let mut at = blocks.start;
        while at < end {
            let first = at % WORD_BLOCKS;
            let count = (end - at).min(WORD_BLOCKS - first);
            self.add_word(at / WORD_BLOCKS, (u64::MAX >> (WORD_BLOCKS - count)) << first);
            at += count;
        }
    }

    /// Whether `block` is in the set, and up to which block, or `end`, the same is true.
    pub fn run(&self, block: u64, end: u64) -> (bool, u64) {
        let end = end.min(self.blocks);
        let inside = self.word(block / WORD_BLOCKS) >> (block % WORD_BLOCKS) & 1 == 1;
        let mut at = block;
        while at < end {
            let word = self.word(at / WORD_BLOCKS);
            let other = if inside { !word } else { word } >> (at % WORD_BLOCKS);
            if other != 0 {
                at += u64::from(other.trailing_zeros());
                break;
            }
            at = (at / WORD_BLOCKS + 1) * WORD_BLOCKS;
        }
        (inside, at.min(end))
    }
}

/// Chunk and word within it.
fn place(word: u64) -> Option<(usize, usize)> {
    let word = usize::try_from(word).ok()?;
    Some((word / CHUNK_WORDS, word % CHUNK_WORDS))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn is_a_set(blocks in 1..40_000u64, adds in prop::collection::vec((0..40_000u64, 0..3000u64), 0..8)) {
            let map = Map::new(blocks);
            let mut model = vec![false; usize::try_from(blocks).unwrap()];
            for (start, len) in adds {
                map.add(start..start + len);
                for block in start..(start + len).min(blocks) {
                    model[usize::try_from(block).unwrap()] = true;
                }
            }
            let mut at = 0;
            while at < blocks {
                let (inside, end) = map.run(at, blocks);
                prop_assert!(end > at && end <= blocks);
                for block in at..end {
                    prop_assert_eq!(model[usize::try_from(block).unwrap()], inside);
                }
                if end < blocks {
                    prop_assert_ne!(model[usize::try_from(end).unwrap()], inside, "runs are as long as can be");
                }
                at = end;
            }
            let copy = Map::new(blocks);
            for index in 0..map.chunks() {
                if let Some(words) = map.chunk(index) {
                    prop_assert!(copy.add_chunk(index, &words));
                }
            }
            prop_assert!((0..map.chunks()).all(|index| copy.chunk(index) == map.chunk(index)));
        }
    }

    #[test]
    fn blocks_beyond_the_end_are_refused() {
        let map = Map::new(70);
        let mut words = [0; CHUNK_WORDS];
        words[1] = 1 << 5;
        assert!(map.add_chunk(0, &words));
        words[1] = 1 << 6;
        assert!(!map.add_chunk(0, &words));
        words[1] = 0;
        words[2] = 1;
        assert!(!map.add_chunk(0, &words));
        assert_eq!(map.run(69, 70), (true, 70));
    }
}
