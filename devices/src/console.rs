//! What the guest prints: the last of it kept in memory, all of it passed on to a file or a terminal where one is wanted.
//!
//! Written on vCPU threads, a character at a time. The host's side is written by a thread of its own, so that a terminal
//! that is stopped with ^S, or a pipe that nobody reads, holds a vCPU up once and briefly; what comes then is dropped and
//! counted.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How many bytes are remembered.
const MOST_KEPT: usize = 64 << 10;
/// How many bytes wait for the host's side.
const MOST_QUEUED: usize = 64 << 10;
/// How long a vCPU waits for the host's side before it begins to drop.
const PATIENCE: Duration = Duration::from_millis(100);
/// How long the writing thread waits for a line to be completed.
const GATHER: Duration = Duration::from_millis(2);
/// More than this is written without waiting for the end of a line.
const PLENTY: usize = 1024;

/// What Linux prints when it gives up (`panic` in `kernel/panic.c`).
const PANIC: &[u8] = b"Kernel panic - not syncing";

/// The console of one guest. Clones write to the same one.
#[derive(Clone)]
pub struct Console(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// There is something to write, or no more to come.
    fed: Condvar,
    /// Something was written.
    drained: Condvar,
    panicked: AtomicBool,
}

struct State {
    kept: VecDeque<u8>,
    /// How many bytes of [`PANIC`] the last bytes match.
    matched: usize,
    on_panic: Option<Box<dyn FnOnce() + Send>>,
    forward: Option<Forward>,
}

/// The way to the host's side.
#[derive(Default)]
struct Forward {
    queued: VecDeque<u8>,
    /// Worth waking the writer for before it wakes by itself.
    urgent: bool,
    /// The writer has something in hand.
    writing: bool,
    /// A vCPU waited in vain; nobody waits again before there is room.
    stalled: bool,
    dropped: u64,
}

impl Default for Console {
    fn default() -> Self {
        Self::new()
    }
}

impl Console {
    /// A console that only remembers.
    pub fn new() -> Self {
        let state =
            State { kept: VecDeque::with_capacity(MOST_KEPT), matched: 0, on_panic: None, forward: None };
        Console(Arc::new(Shared {
            state: Mutex::new(state),
            fed: Condvar::new(),
            drained: Condvar::new(),
            panicked: AtomicBool::new(false),
        }))
    }

    /// Passes everything from now on to `writer` too, on a thread of its own, until that fails. Only one writer is served:
    /// a second call is refused with `AlreadyExists`.
    ///
    /// # Errors
    /// Also when the host refuses the thread.
    pub fn forward_to(&self, mut writer: Box<dyn Write + Send>) -> io::Result<()> {
        let mut state = self.0.lock();
        if state.forward.is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let shared = self.0.clone();
        std::thread::Builder::new().name("console".into()).spawn(move || {
            if let Err(error) = shared.pump(&mut *writer) {
                log::warn!("console: {error}; the guest's output goes nowhere from now on");
            }
        })?;
        state.forward = Some(Forward::default());
        Ok(())
    }

    /// Calls `f` on a vCPU's thread, once, at the end of the first line in which the guest's kernel says that it panicked.
    pub fn on_panic(&self, f: impl FnOnce() + Send + 'static) {
        self.0.lock().on_panic = Some(Box::new(f));
    }

    /// Whether the words of a kernel panic were printed. A hint, no proof: all who may print in the guest can print them.
    pub fn saw_panic(&self) -> bool {
        self.0.panicked.load(Ordering::Acquire)
    }

    /// What was printed last: up to 64 KiB, byte for byte.
    pub fn tail(&self) -> Vec<u8> {
        self.0.lock().kept.iter().copied().collect()
    }

    /// The last `count` lines, fit to be shown on a terminal: the guest's control characters are made visible.
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        let tail = self.tail();
        let text = String::from_utf8_lossy(&tail);
        let mut lines: Vec<String> = text.lines().rev().take(count).map(show).collect();
        lines.reverse();
        lines
    }

    /// How many bytes the host's side was too slow for.
    pub fn dropped(&self) -> u64 {
        self.0.lock().forward.as_ref().map_or(0, |f| f.dropped)
    }

    /// Waits until everything printed so far was written out, for at most `patience`; `false` if that was too short.
    pub fn flush(&self, patience: Duration) -> bool {
        let mut state = self.0.lock();
        if let Some(forward) = &mut state.forward {
            forward.urgent = true;
            self.0.fed.notify_one();
        }
        let busy = |s: &mut State| s.forward.as_ref().is_some_and(|f| f.writing || !f.queued.is_empty());
        let waited = self.0.drained.wait_timeout_while(state, patience, busy);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

fn show(line: &str) -> String {
    let plain = |c: char| c == '\t' || !c.is_control();
    let line = line.trim_end_matches('\r');
    line.chars().map(|c| if plain(c) { c.to_string() } else { c.escape_default().to_string() }).collect()
}

impl Write for Console {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut state = self.0.lock();
        let mut panicked = None;
        for &byte in data {
            if state.kept.len() >= MOST_KEPT {
                state.kept.pop_front();
            }
            state.kept.push_back(byte);
            if state.scan(byte) {
                self.0.panicked.store(true, Ordering::Release);
            }
            if byte == b'\n' && self.saw_panic() {
                panicked = panicked.or(state.on_panic.take());
            }
            if state.forward.is_some() {
                state = self.0.queue(state, byte);
            }
        }
        drop(state);
        if let Some(tell) = panicked {
            tell();
        }
        Ok(data.len())
    }

    /// Nothing: the writer's thread decides when to write, and [`Console::flush`] waits for it.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl State {
    /// Whether `byte` completes the words of a panic. Their first letter comes up in them only once, so a mismatch can only
    /// be the beginning of another attempt.
    fn scan(&mut self, byte: u8) -> bool {
        self.matched = match PANIC.get(self.matched) {
            Some(&wanted) if wanted == byte => self.matched + 1,
            _ => usize::from(PANIC.first() == Some(&byte)),
        };
        self.matched == PANIC.len()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing here panics with the lock held, and plain data cannot be left half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a byte for the writer, waiting for room when that may help.
    fn queue<'a>(&self, mut state: MutexGuard<'a, State>, byte: u8) -> MutexGuard<'a, State> {
        let full = |s: &mut State| s.forward.as_ref().is_some_and(|f| f.queued.len() >= MOST_QUEUED);
        if full(&mut state) && state.forward.as_ref().is_some_and(|f| !f.stalled) {
            let waited = self.drained.wait_timeout_while(state, PATIENCE, full);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        // The writer may have given up meanwhile.
        let Some(forward) = &mut state.forward else { return state };
        forward.stalled = forward.queued.len() >= MOST_QUEUED;
        if forward.stalled {
            forward.dropped += 1;
            return state;
        }
        let first = forward.queued.is_empty();
        forward.queued.push_back(byte);
        let urgent = byte == b'\n' || forward.queued.len() >= PLENTY;
        // Wake the writer at the first character and at the end of a line, not for each.
        if first || urgent && !forward.urgent {
            self.fed.notify_one();
        }
        forward.urgent |= urgent;
        state
    }

    /// The writer's thread.
    fn pump(&self, writer: &mut dyn Write) -> io::Result<()> {
        let mut batch = VecDeque::new();
        loop {
            let idle = |s: &mut State| s.forward.as_ref().is_some_and(|f| f.queued.is_empty());
            let partial = |s: &mut State| s.forward.as_ref().is_some_and(|f| !f.urgent);
            let state = self.fed.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner);
            let mut state =
                self.fed.wait_timeout_while(state, GATHER, partial).unwrap_or_else(PoisonError::into_inner).0;
            let Some(forward) = &mut state.forward else { return Ok(()) };
            std::mem::swap(&mut batch, &mut forward.queued);
            (forward.urgent, forward.writing) = (false, true);
            drop(state);
            self.drained.notify_all();

            let (head, tail) = batch.as_slices();
            let outcome =
                writer.write_all(head).and_then(|()| writer.write_all(tail)).and_then(|()| writer.flush());
            batch.clear();

            let mut state = self.lock();
            match &outcome {
                Ok(()) => state.forward.iter_mut().for_each(|f| f.writing = false),
                Err(_) => state.forward = None,
            }
            drop(state);
            self.drained.notify_all();
            outcome?;
        }
    }
}

#[cfg(test)]
#[path = "console_tests.rs"]
mod tests;
