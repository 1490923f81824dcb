//! A unix socket that vmm listens on: made for its owner only, and gone when it is dropped.

use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, fchmod, lstat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use thiserror::Error;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;
/// `sun_path` has 108 bytes with its terminating zero; `_4294967295` must fit behind the name.
const MAX_PATH: usize = 107 - 11;

/// A bound socket, listening and never blocking. Its path is removed when it is dropped, if it is still this socket's.
#[derive(Debug)]
pub struct ListeningSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode, to know it by.
    identity: (u64, u64),
}

/// Why a socket cannot be bound. Each message is one line: what, where, and what to do.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the message says it")]
pub enum SocketError {
    #[error("socket {}: the path is longer than {MAX_PATH} bytes: choose a shorter one", path.display())]
    TooLong { path: PathBuf },
    #[error("socket {}: there is no such directory: make it first", path.display())]
    NoDirectory { path: PathBuf },
    #[error("socket {}: something else has this name: remove it, or choose another", path.display())]
    Exists { path: PathBuf },
    #[error("socket {}: another process listens there: stop it, or choose another path", path.display())]
    InUse { path: PathBuf },
    #[error("socket {}: {source}: choose a path in a directory that may be written", path.display())]
    Bind { path: PathBuf, source: std::io::Error },
}

impl ListeningSocket {
    /// Binds and listens. A socket that nobody listens on any more is replaced.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let error = |source: std::io::Error| SocketError::Bind { path: path.into(), source };
        if path.as_os_str().len() > MAX_PATH {
            return Err(SocketError::TooLong { path: path.into() });
        }
        remove_stale(path)?;
        let address = SocketAddrUnix::new(path).map_err(|e| error(e.into()))?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(|e| error(e.into()))?;
        // Who may connect may enter the guest. The file that `bind` makes has the mode of the socket's own inode (and never more
        // than the umask leaves), so there is no moment in which it had another.
        fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(|e| error(e.into()))?;
        bind(&socket, &address).map_err(|errno| match errno {
            Errno::NOENT | Errno::NOTDIR => SocketError::NoDirectory { path: path.into() },
            Errno::ADDRINUSE => SocketError::Exists { path: path.into() },
            other => error(other.into()),
        })?;
        let stat = lstat(path).map_err(|e| error(e.into()))?;
        // From here on a failure removes it.
        let bound = Self { listener: socket.into(), path: path.into(), identity: (stat.st_dev, stat.st_ino) };
        listen(&bound.listener, BACKLOG).map_err(|e| error(e.into()))?;
        Ok(bound)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The listening socket.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for ListeningSocket {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.identity);
        if ours && let Err(e) = std::fs::remove_file(&self.path) {
            log::warn!("cannot remove the socket {}: {e}", self.path.display());
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let stat = match lstat(path) {
        Ok(stat) => stat,
        // Nothing there, or nothing that can be seen: binding tells.
        Err(_) => return Ok(()),
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(SocketError::Exists { path: path.into() });
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|source| SocketError::Bind { path: path.into(), source })
        }
        _ => Err(SocketError::InUse { path: path.into() }),
    }
}
