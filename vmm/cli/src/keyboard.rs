//! What is typed goes to the guest's serial port: `--init`.

use std::io::{self, Read};
use std::time::Duration;

use machine::Machine;

use crate::terminal::{self, RawMode};

/// Ctrl-A, and after it x: the end. As other programs do that lend their terminal to a serial port.
const ESCAPE: u8 = 0x01;
/// How often input that is not a person's is offered again to a guest that is slow to read it.
const RETRY: Duration = Duration::from_millis(10);

/// What the keys mean.
#[derive(Debug, Default)]
struct Keys {
    escaped: bool,
}

impl Keys {
    /// What of `typed` is for the guest; `None` when it is the end.
    fn heard(&mut self, typed: &[u8]) -> Option<Vec<u8>> {
        let mut keys = Vec::with_capacity(typed.len());
        for &key in typed {
            match (std::mem::take(&mut self.escaped), key) {
                (true, b'x') => return None,
                (false, ESCAPE) => self.escaped = true,
                _ => keys.push(key),
            }
        }
        Some(keys)
    }
}

/// Passes standard input to the guest's serial port from now on, on a thread of its own. A terminal is in raw mode as long as the
/// result lives.
///
/// # Errors
/// When the host refuses the thread.
pub fn connect(machine: &Machine) -> io::Result<Option<RawMode>> {
    let (serial, handle) = (machine.serial().clone(), machine.handle());
    let person = terminal::is_terminal();
    std::thread::Builder::new().name("keyboard".into()).spawn(move || {
        let mut keys = Keys::default();
        let mut buffer = [0; 256];
        while let Ok(count @ 1..) = io::stdin().read(&mut buffer) {
            let typed = buffer.get(..count).unwrap_or_default();
            if person {
                let Some(keys) = keys.heard(typed) else { return handle.stop() };
                // Keys that a guest does not read are lost, as on any serial line; the next may be the end.
                let _ = serial.input(&keys);
                continue;
            }
            let mut rest = typed;
            while !rest.is_empty() {
                rest = rest.get(serial.input(rest)..).unwrap_or_default();
                if !rest.is_empty() {
                    std::thread::sleep(RETRY);
                }
            }
        }
    })?;
    Ok(if person { RawMode::enter() } else { None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_escape_ends() {
        let mut keys = Keys::default();
        assert_eq!(keys.heard(b"ab"), Some(b"ab".to_vec()));
        assert_eq!(keys.heard(b"a\x01"), Some(b"a".to_vec()));
        assert_eq!(keys.heard(b"b"), Some(b"b".to_vec()));
        assert_eq!(keys.heard(b"\x01\x01x"), Some(b"\x01x".to_vec()), "twice is once, to the guest");
        assert_eq!(keys.heard(b"\x01"), Some(vec![]));
        assert_eq!(keys.heard(b"x"), None);
    }
}
