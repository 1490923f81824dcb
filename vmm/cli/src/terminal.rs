//! The person's terminal: its size, and raw mode that is given back whatever happens.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, PoisonError};

use protocol::WindowSize;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

/// What the terminal was like before we changed it, for [`restore`].
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

fn stdin() -> BorrowedFd<'static> {
    rustix::stdio::stdin()
}

/// Whether standard input is a terminal.
pub fn is_terminal() -> bool {
    isatty(stdin())
}

/// The terminal's size, of whichever of our standard streams is one; 80 by 24 if none is.
pub fn size() -> WindowSize {
    let streams = [stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
    streams
        .iter()
        .find_map(|fd| tcgetwinsize(fd.as_fd()).ok())
        .map(|size| WindowSize { rows: size.ws_row, columns: size.ws_col })
        .filter(|size| size.rows > 0 && size.columns > 0)
        .unwrap_or(WindowSize { rows: 24, columns: 80 })
}

/// Raw mode, until it is dropped or [`restore`] is called: every key goes to the guest.
pub struct RawMode(());

impl RawMode {
    /// Switches raw mode on, where standard input is a terminal.
    pub fn enter() -> Option<Self> {
        let before = tcgetattr(stdin()).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        tcsetattr(stdin(), OptionalActions::Now, &raw).ok()?;
        Some(RawMode(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal back as it was. May be called at any time, also by a panic.
pub fn restore() {
    if let Some(before) = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take() {
        let _ = tcsetattr(stdin(), OptionalActions::Drain, &before);
    }
}

/// As [`restore`], in a signal handler: waits for nobody, and frees nothing.
pub fn restore_in_handler() {
    if let Ok(before) = BEFORE.try_lock()
        && let Some(before) = before.as_ref()
    {
        let _ = tcsetattr(stdin(), OptionalActions::Now, before);
    }
}
