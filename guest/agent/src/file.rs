//! Reads small files that may be hostile: the image's configuration, the container's `/etc/passwd`.

use alloc::vec::Vec;
use core::ffi::CStr;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::{Errno, read};

/// The whole content; `None` if there is no such file, `EFBIG` if it is longer than `max` bytes. Does not wait for a FIFO, nor take a terminal.
pub fn read_bounded(path: &CStr, resolve: ResolveFlags, max: usize) -> Result<Option<Vec<u8>>, Errno> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = match openat2(CWD, path, flags, Mode::empty(), resolve) {
        Ok(file) => file,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        Err(errno) => return Err(errno),
    };
    let mut content = Vec::new();
    // On the stack, which has its pages already: memory from the heap would be a mapping and a fault.
    let mut piece = [0; 4 << 10];
    loop {
        let count = read(&file, &mut piece)?;
        if count == 0 {
            return Ok(Some(content));
        }
        content.extend_from_slice(piece.get(..count).unwrap_or_default());
        if content.len() > max {
            return Err(Errno::FBIG);
        }
    }
}
