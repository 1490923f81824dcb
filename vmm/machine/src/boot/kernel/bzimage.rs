//! The setup header of a bzImage: where the packed kernel lies in it, and how to enter it when we cannot unpack it.
//!
//! linux-loader's `BzImage::load` copies the protected-mode part as it is, for a guest that unpacks itself: seconds to
//! minutes where kernel mode is emulated. We take the payload out, so only its `setup_header` structure is used.
//!
//! Source: Linux's Documentation/arch/x86/boot.rst.

use linux_loader::loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use vm_memory::ByteValued;

use super::KernelFault;
use super::elf::Segment;
use super::source::Source;

/// Where the setup header starts in the file, and in the zero page.
const HEADER_OFFSET: usize = 0x1f1;
/// `boot_flag`.
const BOOT_FLAG_OFFSET: usize = 0x1fe;
/// The header's length minus [`MAGIC_OFFSET`]: the operand of the jump that skips it.
const JUMP_OPERAND_OFFSET: usize = 0x201;
/// "HdrS".
const MAGIC_OFFSET: usize = 0x202;
/// Bytes at the start of the file that tell a bzImage: boot sector and all of the header.
pub(super) const HEAD_SIZE: usize = HEADER_OFFSET + size_of::<setup_header>();
/// The 64-bit entry point lies this far into the protected-mode part.
const ENTRY_64: u64 = 0x200;
/// Protocol 2.08 (Linux 2.6.26) tells where the payload is.
const VERSION_PAYLOAD: u16 = 0x208;
/// Protocol 2.12 (Linux 3.8) tells whether there is a 64-bit entry.
const VERSION_XLOADFLAGS: u16 = 0x20c;

/// A bzImage whose header has been checked against the file's length.
#[derive(Debug)]
pub(super) struct BzImage {
    /// The header, with zeros after the end that it gives for itself.
    pub header: setup_header,
    /// Start of the protected-mode part in the file.
    system_offset: u64,
    /// Length of the protected-mode part.
    system_size: u64,
}

/// Whether these first bytes of a file are those of a bzImage.
pub(super) fn is_bzimage(head: &[u8]) -> bool {
    head.get(BOOT_FLAG_OFFSET..).is_some_and(|rest| rest.starts_with(&[0x55, 0xaa]))
        && head.get(MAGIC_OFFSET..).is_some_and(|rest| rest.starts_with(b"HdrS"))
}

impl BzImage {
    /// Reads and checks the header in `head`, the start of a file of `length` bytes.
    pub fn parse(head: &[u8], length: u64) -> Result<Self, KernelFault> {
        let truncated = || KernelFault::Truncated { what: "the setup header", end: HEAD_SIZE as u64, length };
        // The header may be shorter than our structure: fields after its end are not there.
        let header_end = MAGIC_OFFSET + usize::from(*head.get(JUMP_OPERAND_OFFSET).ok_or_else(truncated)?);
        let mut bytes = [0; size_of::<setup_header>()];
        let present =
            head.get(HEADER_OFFSET..header_end.clamp(MAGIC_OFFSET, HEAD_SIZE)).ok_or_else(truncated)?;
        bytes[..present.len()].copy_from_slice(present);
        let mut header = setup_header::default();
        header.as_mut_slice().copy_from_slice(&bytes);

        if header.version < VERSION_PAYLOAD {
            return Err(KernelFault::TooOld { version: header.version });
        }
        if header.loadflags & LOADED_HIGH == 0 {
            return Err(KernelFault::Damaged("it is a zImage, not a bzImage"));
        }
        if header.version >= VERSION_XLOADFLAGS && header.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(KernelFault::Architecture("32-bit x86"));
        }
        let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
        let image = BzImage {
            header,
            system_offset: (sectors + 1) * 512,
            system_size: u64::from(header.syssize) * 16,
        };
        let end = image.system_offset + image.system_size;
        if end > length {
            return Err(KernelFault::Truncated { what: "the kernel", end, length });
        }
        Ok(image)
    }

    /// Offset and length in the file of the packed kernel.
    pub fn payload(&self) -> Result<(u64, u64), KernelFault> {
        let (offset, length) = (u64::from(self.header.payload_offset), u64::from(self.header.payload_length));
        if length == 0 || offset + length > self.system_size {
            return Err(KernelFault::Damaged("its header places the payload outside the kernel"));
        }
        Ok((self.system_offset + offset, length))
    }

    /// The protected-mode part as one segment with the room it needs to unpack itself, and its 64-bit entry.
    pub fn in_guest(&self, source: &Source) -> Result<(Segment, u64), KernelFault> {
        if self.header.version < VERSION_XLOADFLAGS {
            return Err(KernelFault::TooOld { version: self.header.version });
        }
        let segment = Segment {
            offset: self.system_offset,
            file_size: self.system_size,
            address: self.header.pref_address,
            memory_size: self.system_size.max(self.header.init_size.into()),
        };
        segment.check(source.len())?;
        if segment.file_size <= ENTRY_64 {
            return Err(KernelFault::Damaged("it is too short for a 64-bit entry point"));
        }
        Ok((segment, segment.address + ENTRY_64))
    }
}

#[cfg(test)]
mod tests;
