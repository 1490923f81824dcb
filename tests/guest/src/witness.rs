//! A process that would notice if its machine were not the same any more: for snapshots. It keeps all that it knows in memory, and
//! says `count: N` every now and then.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prober::Checksum;

use crate::Outcome;

const BLOCK: usize = 4096;
/// Blocks of each writer: few, so that a write which came late would be over a newer one.
const BLOCKS: u64 = 8;
const WRITERS: u64 = 3;

/// What O_DIRECT takes.
#[repr(align(4096))]
struct Page([u8; BLOCK]);

struct Witness {
    nonce: u64,
    /// How many blocks each writer has written and read again.
    done: [AtomicU64; WRITERS as usize],
}

impl Witness {
    fn count(&self) -> u64 {
        self.done.iter().map(|done| done.load(Ordering::Relaxed)).sum()
    }

    /// The block that is `number`th of `writer`'s.
    fn fill(&self, page: &mut Page, writer: u64, number: u64) {
        for (i, word) in page.0.chunks_mut(8).enumerate() {
            let i = i as u64;
            let value = match i {
                0 => number,
                1 => writer,
                _ => self.nonce.wrapping_mul(i | 1) ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            };
            word.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Writes blocks, and looks after each whether another one is still as it was written last.
    fn write(&self, disk: &File, writer: u64) -> Result<(), String> {
        let failed = |what: &str, number, error: &dyn std::fmt::Display| {
            format!("writer {writer}, {what} block {number}: {error}")
        };
        let place = |number: u64| (writer * BLOCKS + number % BLOCKS) * BLOCK as u64;
        let (mut page, mut expected) = (Page([0; BLOCK]), Page([0; BLOCK]));
        for number in 0.. {
            self.fill(&mut page, writer, number);
            disk.write_all_at(&page.0, place(number)).map_err(|e| failed("writing", number, &e))?;
            // The oldest that is still there, and so the one after this next time: each is looked at just before it goes.
            let old = number.saturating_sub(BLOCKS - 1);
            disk.read_exact_at(&mut page.0, place(old)).map_err(|e| failed("reading", old, &e))?;
            self.fill(&mut expected, writer, old);
            if page.0 != expected.0 {
                let word = |page: &Page| page.0.first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
                let found = format!("it is {}, checksum {:x}", word(&page), Checksum::of(&page.0));
                return Err(failed("comparing", old, &found));
            }
            if let Some(done) = self.done.get(writer as usize) {
                done.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Answers what it is asked, a line each.
    fn answer(&self, connection: TcpStream) -> Outcome {
        let mut to = connection.try_clone()?;
        for line in BufReader::new(connection).lines() {
            let line = line?;
            let answer = match line.as_str() {
                "count" => self.count().to_string(),
                "nonce" => format!("{:016x}", self.nonce),
                "time" => SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs().to_string(),
                // By our own clock.
                "sleep" => {
                    let begun = Instant::now();
                    std::thread::sleep(Duration::from_secs(1));
                    begun.elapsed().as_millis().to_string()
                }
                other => format!("echo {other}"),
            };
            writeln!(to, "{answer}")?;
        }
        Ok(())
    }
}

/// Uses `disk` for blocks of its own, and answers on TCP `port` unless that is 0. Ends when something is not as it should be.
pub fn run(disk: &str, port: u64) -> Outcome {
    let witness = Arc::new(Witness { nonce: random()?, done: Default::default() });
    let disk = Arc::new(OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(disk)?);
    let failure = Arc::new(Mutex::new(None));
    for writer in 0..WRITERS {
        let (witness, disk, failure) = (witness.clone(), disk.clone(), failure.clone());
        std::thread::spawn(move || {
            if let Err(error) = witness.write(&disk, writer) {
                failure.lock().map(|mut failure| *failure = Some(error)).ok();
            }
        });
    }
    if port > 0 {
        let listener = TcpListener::bind(("0.0.0.0", u16::try_from(port)?))?;
        let witness = witness.clone();
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let witness = witness.clone();
                std::thread::spawn(move || witness.answer(connection).map_err(|error| error.to_string()));
            }
        });
    }
    println!("nonce: {:016x}", witness.nonce);
    let mut last = [0; WRITERS as usize];
    loop {
        std::thread::sleep(Duration::from_millis(50));
        let failed = failure.lock().map_err(|_| "a writer panicked")?.take();
        if let Some(error) = failed {
            println!("broken: {error}");
            return Err(error.into());
        }
        // All writers have gone on: none waits for a request that was lost.
        let now = std::array::from_fn(|i| witness.done.get(i).map_or(0, |done| done.load(Ordering::Relaxed)));
        if now.iter().zip(last).all(|(now, last)| *now > last) {
            last = now;
            println!("count: {} nonce: {:016x}", witness.count(), witness.nonce);
        }
    }
}

/// Says, when its host name changes, what it is then: before anything else asks for random numbers.
pub fn changed() -> Outcome {
    let nonce = random()?;
    let before = std::fs::read_to_string("/proc/sys/kernel/hostname")?;
    println!("original: {nonce:016x}");
    loop {
        let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname")?;
        if hostname != before {
            let first = random()?;
            let id = std::fs::read_to_string("/etc/machine-id")?;
            println!("changed: {} {} {first:016x} {nonce:016x}", hostname.trim(), id.trim());
            loop {
                std::thread::sleep(Duration::from_secs(1000));
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Eight bytes of `getrandom`.
fn random() -> std::io::Result<u64> {
    let mut bytes = [0; 8];
    // SAFETY: the length is the buffer's.
    let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if count == 8 { Ok(u64::from_ne_bytes(bytes)) } else { Err(std::io::Error::last_os_error()) }
}
