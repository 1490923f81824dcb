//! Signals sent to `vmm`: passed on to the container, or the end of the machine.
//!
//! Read on a thread of their own from `signal-hook`'s pipe, so that none of our code runs in a signal handler.

use std::io;
use std::time::{Duration, Instant};

use machine::control::{Control, Reply, Request, State};
use machine::controller::Handle;
use protocol::ToAgent;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};

use crate::exit_code;
use crate::session::Guest;
use crate::terminal;

/// Signals that end a process that has no handler for them: the third of them in [`FORCE_WITHIN`] is not for the container.
const ENDING: [i32; 4] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM];
const FORCE_WITHIN: Duration = Duration::from_secs(5);
const FORCE_COUNT: usize = 3;

/// What is said when mapped memory is gone. The only such files are those of snapshots and templates.
const GONE: &[u8] = b"vmm: the guest's memory is gone: the memory file of its snapshot or template was cut short, or cannot be read\n";

/// Lets the process end with a reason where the kernel would end it by `SIGBUS`: memory is mapped from a file which somebody cut
/// short, or whose disk fails. Nothing can prevent that: a mapping has no lock, and who owns the file may write it.
///
/// # Errors
/// When the host refuses the handler.
pub fn explain_lost_memory() -> io::Result<()> {
    let explain = || {
        terminal::restore_in_handler();
        let _ = rustix::io::write(rustix::stdio::stderr(), GONE);
        // SAFETY: ends the process; runs no code of ours, which may hold locks.
        unsafe { libc::_exit(exit_code::VMM.into()) }
    };
    // SAFETY: what it does is allowed in a signal handler (signal-safety(7)): an attempt at a lock, an ioctl, a write, an exit.
    unsafe { signal_hook::low_level::register(signal_hook::consts::SIGBUS, explain) }.map(drop)
}

/// What to do about a signal.
#[derive(Debug, PartialEq, Eq)]
enum Action {
    Forward,
    Resize,
    End,
}

/// Remembers when signals came that should have ended the container.
#[derive(Default)]
struct Insistence(Vec<Instant>);

impl Insistence {
    fn heard(&mut self, signal: i32, now: Instant) -> Action {
        if signal == SIGWINCH {
            return Action::Resize;
        }
        if !ENDING.contains(&signal) {
            return Action::Forward;
        }
        self.0.retain(|at| now.duration_since(*at) < FORCE_WITHIN);
        self.0.push(now);
        if self.0.len() >= FORCE_COUNT { Action::End } else { Action::Forward }
    }
}

/// The signals of this process, from now on. Until somebody forwards them they wait.
pub struct Signals {
    caught: signal_hook::iterator::Signals,
    ended: Ended,
}

impl Signals {
    /// Catches signals; a machine that one of them ends is noted in `ended`.
    ///
    /// # Errors
    /// When the host refuses the handlers.
    pub fn catch(ended: Ended) -> io::Result<Self> {
        let signals = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH];
        Ok(Signals { caught: signal_hook::iterator::Signals::new(signals)?, ended })
    }

    /// Passes signals on, on a thread of their own. With a `guest`, the container gets them; when it cannot, and without one, they end
    /// the machine, and `vmm` exits as a process does that was killed by that signal.
    ///
    /// # Errors
    /// When the host refuses the thread.
    pub fn forward(mut self, guest: Option<Guest>, machine: Handle) -> io::Result<()> {
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            let mut insistence = Insistence::default();
            for signal in self.caught.forever() {
                let heeded = match (insistence.heard(signal, Instant::now()), &guest) {
                    (Action::Resize, Some(guest)) => {
                        // Before there is a container there is nothing to resize: it will be told the size it has then.
                        guest.send(&ToAgent::Resize(terminal::size()));
                        true
                    }
                    (Action::Resize, None) => true,
                    (Action::Forward, Some(_)) if ENDING.contains(&signal) && stands_still(&machine) => false,
                    (Action::Forward, Some(guest)) => {
                        guest.send(&ToAgent::Signal(signal)) || !ENDING.contains(&signal)
                    }
                    (Action::Forward, None) => !ENDING.contains(&signal),
                    (Action::End, _) => false,
                };
                if !heeded {
                    self.ended.set(exit_code::signal(signal));
                    machine.stop();
                }
            }
        })?;
        Ok(())
    }
}

/// Whether the machine is paused, or was not started: its container hears nothing then.
fn stands_still(machine: &Handle) -> bool {
    match machine.ask(Request::Describe) {
        Ok(Reply::Description(description)) => description.state != State::Running,
        _ => false,
    }
}

/// The exit code of a machine that a signal ended.
#[derive(Clone, Default)]
pub struct Ended(std::sync::Arc<std::sync::OnceLock<u8>>);

impl Ended {
    /// Sets the exit code; the first one counts.
    pub fn set(&self, code: u8) {
        let _ = self.0.set(code);
    }

    /// The exit code, if a signal ended the machine.
    pub fn get(&self) -> Option<u8> {
        self.0.get().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_insists_is_heard() {
        let mut insistence = Insistence::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(insistence.heard(SIGUSR1, at(0)), Action::Forward);
        assert_eq!(insistence.heard(SIGWINCH, at(0)), Action::Resize);
        assert_eq!(insistence.heard(SIGTERM, at(0)), Action::Forward);
        assert_eq!(insistence.heard(SIGINT, at(1)), Action::Forward);
        assert_eq!(insistence.heard(SIGINT, at(6)), Action::Forward, "the others are long ago");
        assert_eq!(insistence.heard(SIGTERM, at(7)), Action::Forward);
        assert_eq!(insistence.heard(SIGTERM, at(8)), Action::End);
    }
}
