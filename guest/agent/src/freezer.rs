//! Holds the container's processes, for a snapshot: by the freezer of cgroup v2, of which they notice nothing.
//!
//! The container is cloned into a cgroup of its own, so none of its processes can be missed, and it has a cgroup namespace of its own, so
//! none can leave. The cgroup is made before the host is greeted, and then a template has it already.
//! (Documentation/admin-guide/cgroup-v2.rst, "cgroup.freeze".)

use core::ffi::CStr;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{CWD, Mode, OFlags, mkdir, openat};
use rustix::io::{Result, pread, write};
use rustix::mount::{MountFlags, mount};

/// The container's cgroup.
pub struct Freezer {
    directory: OwnedFd,
}

impl Freezer {
    /// Makes the cgroup.
    ///
    /// # Errors
    /// Whatever keeps a kernel from it, such as having no cgroups. A container can do without.
    pub fn new() -> Result<Self> {
        mkdir(c"/cgroup", Mode::RWXU)?;
        mount(c"cgroup2", c"/cgroup", c"cgroup2", MountFlags::empty(), None::<&CStr>)?;
        mkdir(c"/cgroup/container", Mode::from_raw_mode(0o755))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { directory: openat(CWD, c"/cgroup/container", flags, Mode::empty())? })
    }

    /// What a process is cloned into.
    pub fn cgroup(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Begins to hold the container.
    pub fn freeze(&self) -> Result<Frost> {
        self.set(b"1")?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(Frost { events: openat(&self.directory, c"cgroup.events", flags, Mode::empty())? })
    }

    /// Lets the container run.
    pub fn thaw(&self) -> Result<()> {
        self.set(b"0")
    }

    fn set(&self, state: &[u8]) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = openat(&self.directory, c"cgroup.freeze", flags, Mode::empty())?;
        write(&file, state).map(drop)
    }
}

/// A freeze that has begun. Its descriptor has an exceptional condition (`POLLPRI`) when it is time to look again.
pub struct Frost {
    events: OwnedFd,
}

impl Frost {
    /// Whether every process is held now.
    pub fn is_complete(&self) -> Result<bool> {
        let mut content = [0; 128];
        let count = pread(&self.events, &mut content, 0)?;
        Ok(says_frozen(content.get(..count).unwrap_or_default()))
    }
}

impl AsFd for Frost {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

fn says_frozen(events: &[u8]) -> bool {
    events.split(|&byte| byte == b'\n').any(|line| line == b"frozen 1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events() {
        assert!(says_frozen(b"populated 1\nfrozen 1\n"));
        for other in [&b"populated 1\nfrozen 0\n"[..], b"populated 1\n", b"", b"frozen 10\n"] {
            assert!(!says_frozen(other));
        }
    }
}
