//! Drives every target for a while without a fuzzer: its seeds, and what becomes of them by chance. `FUZZ_SECONDS` in the environment
//! says for how long each; usually it is one.

use std::path::Path;
use std::time::{Duration, Instant};

struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % sides.max(1)
    }
}

fn drive(name: &str, target: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(name);
    let mut seeds: Vec<Vec<u8>> = std::fs::read_dir(&corpus)
        .unwrap_or_else(|e| panic!("{}: {e}", corpus.display()))
        .map(|entry| std::fs::read(entry.expect("an entry").path()).expect("a seed"))
        .collect();
    assert!(!seeds.is_empty(), "no seeds in {}", corpus.display());
    seeds.sort();
    seeds.iter().for_each(|seed| target(seed));
    seeds.push(Vec::new());
    let seconds = std::env::var("FUZZ_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let mut dice = Dice(0x2545_f491_4f6c_dd1d);
    let (begin, mut runs) = (Instant::now(), 0_u64);
    while begin.elapsed() < Duration::from_secs(seconds) {
        let mut bytes = seeds[dice.roll(seeds.len())].clone();
        for _ in 0..1 + dice.roll(6) {
            let at = dice.roll(bytes.len());
            match dice.roll(5) {
                0 if !bytes.is_empty() => bytes[at] ^= 1 << dice.roll(8),
                1 if !bytes.is_empty() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][dice.roll(5)],
                2 if !bytes.is_empty() => bytes.truncate(at),
                3 => drop(bytes.splice(at..at, std::iter::repeat_n(dice.roll(256) as u8, 1 + dice.roll(40)))),
                _ => {
                    let other = &seeds[dice.roll(seeds.len())];
                    bytes.extend_from_slice(&other[dice.roll(other.len())..]);
                }
            }
        }
        let before = Instant::now();
        target(&bytes);
        assert!(before.elapsed() < Duration::from_secs(10), "{name} took long over {bytes:02x?}");
        runs += 1;
    }
    println!("{name}: {runs} inputs");
}

macro_rules! targets {
    ($($name:ident),*) => { $(#[test] fn $name() { drive(stringify!($name), vmm_fuzz::$name); })* };
}

targets!(api_request, snapshot_manifest, snapshot_state, virtqueue, vsock, kernel, config, protocol);
