//! Vectored I/O between file descriptors and guest memory, without a copy on the way.
//!
//! The only place in this crate where guest memory becomes a pointer.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::VolatileSlice;

/// `IOV_MAX`: how many buffers one system call takes (`include/uapi/linux/uio.h`). The rest is left for the next call.
const MOST_BUFFERS: usize = 1024;

fn iovecs(slices: &[VolatileSlice<'_>]) -> (Vec<libc::iovec>, libc::c_int) {
    let vectors: Vec<_> = slices
        .iter()
        .take(MOST_BUFFERS)
        .map(|s| libc::iovec { iov_base: s.ptr_guard_mut().as_ptr().cast(), iov_len: s.len() })
        .collect();
    let count = libc::c_int::try_from(vectors.len()).unwrap_or(0);
    (vectors, count)
}

fn result(returned: isize) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}

/// `preadv(2)`: fills `slices` from `offset` of a file. Returns how many bytes were read; 0 at its end.
///
/// # Errors
/// That of the system call, or `InvalidInput` where the offset is beyond what a file can have.
pub fn read_at(fd: impl AsFd, slices: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
    let offset = libc::off64_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let (vectors, count) = iovecs(slices);
    // SAFETY: every vector is the extent of a live `VolatileSlice` of mapped guest memory, which outlives the call. The guest
    // may change that memory meanwhile; no reference to it exists.
    result(unsafe { libc::preadv64(fd.as_fd().as_raw_fd(), vectors.as_ptr(), count, offset) })
}

/// `pwritev(2)`: writes `slices` at `offset` of a file. Returns how many bytes were written.
///
/// # Errors
/// As for [`read_at`].
pub fn write_at(fd: impl AsFd, slices: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
    let offset = libc::off64_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let (vectors, count) = iovecs(slices);
    // SAFETY: as in `read_at`; the kernel only reads from the vectors here.
    result(unsafe { libc::pwritev64(fd.as_fd().as_raw_fd(), vectors.as_ptr(), count, offset) })
}

/// `readv(2)`: fills `slices` from a stream or a packet.
///
/// # Errors
/// That of the system call.
pub fn read(fd: impl AsFd, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let (vectors, count) = iovecs(slices);
    // SAFETY: as in `read_at`.
    result(unsafe { libc::readv(fd.as_fd().as_raw_fd(), vectors.as_ptr(), count) })
}

/// `writev(2)`: writes `slices` to a stream or as a packet.
///
/// # Errors
/// That of the system call.
pub fn write(fd: impl AsFd, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let (vectors, count) = iovecs(slices);
    // SAFETY: as in `write_at`.
    result(unsafe { libc::writev(fd.as_fd().as_raw_fd(), vectors.as_ptr(), count) })
}
