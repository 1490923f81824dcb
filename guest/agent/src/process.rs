//! What is executed: arguments, environment, the search along `PATH`. Pure, but for the last step.

use alloc::ffi::CString;
use alloc::vec::Vec;

use protocol::ByteString;
use rustix::io::Errno;

use crate::error::{Error, Reason};
use crate::sys;

/// Docker's default.
const PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The value of `name` in `environment`.
pub fn value<'a>(environment: &'a [ByteString], name: &[u8]) -> Option<&'a [u8]> {
    environment.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix(b"="))
}

/// `given` and what every process may expect, where it is missing.
pub fn environment(given: &[ByteString], home: &[u8], hostname: &[u8], terminal: bool) -> Vec<ByteString> {
    let mut words = given.to_vec();
    let mut add = |name: &[u8], default: &[u8]| {
        if value(given, name).is_none() {
            words.push(ByteString([name, b"=", default].concat()));
        }
    };
    add(b"PATH", PATH);
    add(b"HOME", home);
    add(b"HOSTNAME", hostname);
    if terminal {
        add(b"TERM", b"xterm");
    }
    words
}

/// The files that `command` may mean, in order: itself if it has a slash, otherwise one for each directory of `path`. Empty elements do not
/// mean the working directory here.
pub fn candidates(command: &[u8], path: &[u8]) -> Vec<Vec<u8>> {
    if command.is_empty() {
        return Vec::new();
    }
    if command.contains(&b'/') {
        return Vec::from([command.to_vec()]);
    }
    path.split(|&byte| byte == b':')
        .filter(|dir| !dir.is_empty())
        .map(|dir| [dir, b"/", command].concat())
        .collect()
}

/// Executes the command. Returns only the error.
pub fn execute(arguments: &[ByteString], environment: &[ByteString]) -> Error {
    match try_execute(arguments, environment) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn try_execute(
    arguments: &[ByteString],
    environment: &[ByteString],
) -> Result<core::convert::Infallible, Error> {
    let Some(command) = arguments.first() else {
        return Err(Error::Request("there is no command to run".into()));
    };
    let path = value(environment, b"PATH").unwrap_or(PATH);
    let candidates = candidates(command, path);
    let (arguments, environment) = (c_strings(arguments)?, c_strings(environment)?);
    let mut denied = None;
    for candidate in candidates {
        let file = c_string(&candidate)?;
        match sys::execute(&file, &arguments, &environment) {
            Errno::NOENT | Errno::NOTDIR => (),
            // As a shell does: a file of this name further along may be executable.
            Errno::ACCESS => denied = denied.or(Some(candidate)),
            errno => return Err(Error::NotExecutable { path: candidate.into(), errno: Reason(errno) }),
        }
    }
    Err(match denied {
        Some(path) => Error::NotExecutable { path: path.into(), errno: Reason(Errno::ACCESS) },
        None => Error::NotFound { command: command.clone() },
    })
}

fn c_strings(words: &[ByteString]) -> Result<Vec<CString>, Error> {
    words.iter().map(|word| c_string(word)).collect()
}

/// The system calls take no zero bytes.
pub fn c_string(bytes: &[u8]) -> Result<CString, Error> {
    CString::new(bytes)
        .map_err(|_| Error::Request("an argument, variable or path contains a zero byte".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<ByteString> {
        words.iter().map(|&word| word.into()).collect()
    }

    #[test]
    fn defaults_fill_gaps_only() {
        let path = format!("PATH={}", core::str::from_utf8(PATH).unwrap());
        let all = environment(&[], b"/root", b"box", true);
        assert_eq!(all, words(&[&path, "HOME=/root", "HOSTNAME=box", "TERM=xterm"]));
        assert_eq!(environment(&[], b"/", b"box", false), words(&[&path, "HOME=/", "HOSTNAME=box"]));
        let given = words(&["HOME=", "PATH=/x", "A=b", "TERM=vt100", "HOSTNAME=other"]);
        assert_eq!(environment(&given, b"/root", b"box", true), given);
    }

    #[test]
    fn values() {
        let given = words(&["PATHS=/no", "PATH", "PATH=/a", "PATH=/b"]);
        assert_eq!(value(&given, b"PATH"), Some(&b"/a"[..]));
        assert_eq!(value(&given, b"HOME"), None);
    }

    #[test]
    fn the_search() {
        let found = |command: &str, path: &str| -> Vec<String> {
            let files = candidates(command.as_bytes(), path.as_bytes());
            files.into_iter().map(|file| String::from_utf8(file).unwrap()).collect()
        };
        assert_eq!(found("sh", "/a:/b"), ["/a/sh", "/b/sh"]);
        assert_eq!(found("sh", ":/a::"), ["/a/sh"]);
        assert_eq!(found("./sh", "/a"), ["./sh"]);
        assert_eq!(found("/sh", ""), ["/sh"]);
        assert_eq!(found("", "/a"), [""; 0]);
        assert_eq!(found("sh", ""), [""; 0]);
    }

    #[test]
    fn what_cannot_be_executed() {
        let run = |command: &str| execute(&words(&[command]), &words(&["PATH=/etc:/proc"]));
        assert!(matches!(run("surely-not-there"), Error::NotFound { .. }));
        assert!(matches!(run("/surely/not/there"), Error::NotFound { .. }));
        assert!(matches!(run(""), Error::NotFound { .. }));
        assert!(matches!(run("passwd"), Error::NotExecutable { .. }));
        assert!(matches!(run("/etc"), Error::NotExecutable { .. }));
        assert!(matches!(run("a\0b"), Error::Request(_)));
        assert!(matches!(execute(&[], &[]), Error::Request(_)));
    }
}
