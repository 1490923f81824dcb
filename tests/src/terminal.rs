//! A pseudo-terminal, with the test in the place of the person.

use std::cell::Cell;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

/// A terminal.
pub struct Terminal {
    master: File,
    /// Until a process has it: its output ends when nobody has it open any more.
    slave: Cell<Option<OwnedFd>>,
}

impl Terminal {
    /// Opens one of that size.
    pub fn open(rows: u16, columns: u16) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).expect("a terminal");
        grantpt(&master).and_then(|()| unlockpt(&master)).expect("a terminal of ours");
        let slave = ioctl_tiocgptpeer(&master, flags).expect("the terminal's other end");
        let terminal = Terminal { master: File::from(master), slave: Cell::new(Some(slave)) };
        terminal.resize(rows, columns);
        terminal
    }

    /// Gives it another size, of which the processes on it hear by SIGWINCH.
    pub fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.master, size).expect("a terminal has a size");
    }

    /// Types.
    pub fn type_keys(&self, keys: &str) {
        (&self.master).write_all(keys.as_bytes()).expect("a terminal takes keys");
    }

    /// Whether it edits lines and makes signals of keys, as a shell wants it.
    pub fn is_cooked(&self) -> bool {
        let modes = tcgetattr(&self.master).expect("a terminal has modes").local_modes;
        modes.contains(LocalModes::ICANON | LocalModes::ISIG | LocalModes::ECHO)
    }

    pub(crate) fn attach(&self, command: &mut Command) {
        let slave = self.slave.take().expect("nobody has taken the terminal yet");
        let end = || Stdio::from(slave.try_clone().expect("a descriptor"));
        command.stdin(end()).stdout(end()).stderr(end());
    }

    pub(crate) fn output(&self) -> File {
        self.master.try_clone().expect("a descriptor")
    }
}
