//! Where a kernel's bytes come from: the file itself, or what was unpacked from it.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::KernelFault;

/// Random access to an image of a kernel.
#[derive(Debug)]
pub(super) enum Source {
    /// A regular file with its length when it was opened.
    File(File, u64),
    /// An unpacked image.
    Bytes(Vec<u8>),
}

impl Source {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Source::File(_, len) => *len,
            Source::Bytes(bytes) => bytes.len() as u64,
        }
    }

    /// `size` bytes from `offset`, after checking that they exist: nothing is allocated for a header that lies.
    pub fn read(&self, offset: u64, size: u64, what: &'static str) -> Result<Vec<u8>, KernelFault> {
        let truncated =
            || KernelFault::Truncated { what, end: offset.saturating_add(size), length: self.len() };
        if offset.checked_add(size).is_none_or(|end| end > self.len()) {
            return Err(truncated());
        }
        let mut buffer = vec![0; usize::try_from(size).map_err(|_| truncated())?];
        match self {
            Source::File(file, _) => file.read_exact_at(&mut buffer, offset).map_err(KernelFault::Read)?,
            Source::Bytes(bytes) => {
                let start = usize::try_from(offset).map_err(|_| truncated())?;
                let from = bytes.get(start..).and_then(|rest| rest.get(..buffer.len()));
                buffer.copy_from_slice(from.ok_or_else(truncated)?);
            }
        }
        Ok(buffer)
    }

    /// Copies `size` bytes from `offset` to guest memory at `to`; a file is read straight into it.
    pub fn copy_to_guest(
        &self,
        offset: u64,
        size: u64,
        memory: &GuestMemory,
        to: GuestAddress,
    ) -> Result<(), KernelFault> {
        let truncated = || KernelFault::Truncated {
            what: "a segment",
            end: offset.saturating_add(size),
            length: self.len(),
        };
        let count = usize::try_from(size).map_err(|_| truncated())?;
        match self {
            Source::File(file, _) => {
                let mut file: &File = file;
                file.seek(SeekFrom::Start(offset)).map_err(KernelFault::Read)?;
                memory.read_exact_volatile_from(to, &mut file, count).map_err(KernelFault::Copy)
            }
            Source::Bytes(bytes) => {
                let start = usize::try_from(offset).map_err(|_| truncated())?;
                let from = bytes.get(start..).and_then(|rest| rest.get(..count)).ok_or_else(truncated)?;
                memory.write_slice(from, to).map_err(KernelFault::Copy)
            }
        }
    }
}
