//! Vectored I/O between file descriptors and guest memory, without a copy on the way.
//!
//! The only place in this crate where guest memory becomes a pointer. The kernel's writes pass vm-memory by, so they are marked
//! as dirty here: as many bytes as the system call says.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::bitmap::Bitmap;

use crate::memory::Slice;

/// `IOV_MAX`: how many buffers one system call takes (`include/uapi/linux/uio.h`). The rest is left for the next call.
const MOST_BUFFERS: usize = 1024;

fn iovecs(slices: &[Slice<'_>]) -> Vec<libc::iovec> {
    let vector =
        |s: &Slice<'_>| libc::iovec { iov_base: s.ptr_guard_mut().as_ptr().cast(), iov_len: s.len() };
    slices.iter().take(MOST_BUFFERS).map(vector).collect()
}

fn count(vectors: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(vectors.len()).unwrap_or(0)
}

/// Marks the first `written` bytes of `slices` as written to.
fn mark(slices: &[Slice<'_>], written: usize) {
    let mut left = written;
    for slice in slices {
        if left == 0 {
            break;
        }
        let here = left.min(slice.len());
        slice.bitmap().mark_dirty(0, here);
        left -= here;
    }
}

fn result(returned: isize) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}

/// `preadv(2)`: fills `slices` from `offset` of a file. Returns how many bytes were read; 0 at its end.
///
/// # Errors
/// That of the system call, or `InvalidInput` where the offset is beyond what a file can have.
pub fn read_at(fd: impl AsFd, slices: &[Slice<'_>], offset: u64) -> io::Result<usize> {
    let offset = libc::off64_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let vectors = iovecs(slices);
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: every vector is the extent of a live `VolatileSlice` of mapped guest memory, which outlives the call. The guest
    // may change that memory meanwhile; no reference to it exists.
    let read = result(unsafe { libc::preadv64(fd, vectors.as_ptr(), count(&vectors), offset) })?;
    mark(slices, read);
    Ok(read)
}

/// `pwritev(2)`: writes `slices` at `offset` of a file. Returns how many bytes were written.
///
/// # Errors
/// As for [`read_at`].
pub fn write_at(fd: impl AsFd, slices: &[Slice<'_>], offset: u64) -> io::Result<usize> {
    let offset = libc::off64_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let vectors = iovecs(slices);
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: as in `read_at`; the kernel only reads from the vectors here.
    result(unsafe { libc::pwritev64(fd, vectors.as_ptr(), count(&vectors), offset) })
}

/// `readv(2)`: fills `slices` from a stream or a packet.
///
/// # Errors
/// That of the system call.
pub fn read(fd: impl AsFd, slices: &[Slice<'_>]) -> io::Result<usize> {
    read_spilling(fd, slices, &mut [])
}

/// `readv(2)`: fills `slices`, and `spill` with what does not fit. Returns how many bytes were read into both.
///
/// # Errors
/// That of the system call.
pub fn read_spilling(fd: impl AsFd, slices: &[Slice<'_>], spill: &mut [u8]) -> io::Result<usize> {
    let mut vectors = iovecs(slices);
    if vectors.len() < MOST_BUFFERS && !spill.is_empty() {
        vectors.push(libc::iovec { iov_base: spill.as_mut_ptr().cast(), iov_len: spill.len() });
    }
    // SAFETY: as in `read_at`; the last vector is `spill`, borrowed for longer than the call.
    let read = result(unsafe { libc::readv(fd.as_fd().as_raw_fd(), vectors.as_ptr(), count(&vectors)) })?;
    mark(slices, read);
    Ok(read)
}

/// `writev(2)`: writes `slices` to a stream or as a packet.
///
/// # Errors
/// That of the system call.
pub fn write(fd: impl AsFd, slices: &[Slice<'_>]) -> io::Result<usize> {
    let vectors = iovecs(slices);
    // SAFETY: as in `write_at`.
    result(unsafe { libc::writev(fd.as_fd().as_raw_fd(), vectors.as_ptr(), count(&vectors)) })
}

#[cfg(test)]
#[path = "vectored_tests.rs"]
mod tests;
