//! A guest's kernel: recognised by its content, checked, and unpacked when the plan is made; copied to guest memory when
//! the machine is built.
//!
//! Two formats are taken, both for x86-64: an ELF executable (`vmlinux`, or a bare-metal program) and a bzImage. The
//! payload of a bzImage is itself an ELF executable that Linux's build packed; it is unpacked here and entered directly,
//! so that no guest spends time on it. (Unpacking is skipped for the three formats that hardly any kernel uses any more;
//! then the guest does it.) After the ELF, the payload may hold relocations: they serve a kernel that moves itself to a
//! random address, and entered at its link address it needs none.
//!
//! [`Kernel::open`] runs on the controller thread while no VM exists yet and finds every fault in the file.
//! [`Kernel::load`] can then only fail for want of memory, or when the file changes meanwhile. Files are not trusted:
//! every length is checked before it is used, and nothing larger than [`UNPACKED_MAX`](unpack) is allocated.

mod bzimage;
mod elf;
mod source;
mod unpack;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use devices::GuestMemory;
use linux_loader::loader::bootparam::setup_header;
use rustix::fs::OFlags;
use thiserror::Error;
use vm_memory::GuestAddress;

use self::bzimage::BzImage;
use self::elf::Segment;
use self::source::Source;
pub use self::unpack::Compression;
use crate::config::BootProtocol;
use crate::layout;

/// What a kernel file turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// An ELF executable.
    Elf,
    /// A bzImage with this payload.
    BzImage(Compression),
}

/// A kernel file that cannot be used.
#[derive(Debug, Error)]
#[error("kernel {}: {fault}", path.display())]
pub struct KernelError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub fault: KernelFault,
}

/// What is wrong with a kernel file, and what to do about it.
#[derive(Debug, Error)]
pub enum KernelFault {
    /// The file cannot be opened.
    #[error("cannot open it: {0}: check the path given with --kernel")]
    Open(io::Error),
    /// A directory, device, pipe or socket.
    #[error("not a regular file: give a vmlinux or bzImage")]
    NotRegular,
    /// Zero bytes.
    #[error("the file is empty: build or copy it again")]
    Empty,
    /// Neither of the formats.
    #[error("not a kernel: give an x86-64 vmlinux (ELF) or bzImage")]
    NotAKernel,
    /// An ELF program for a running system.
    #[error("a program for user space, not a kernel: give an x86-64 vmlinux or bzImage")]
    Program,
    /// An ELF object, library or core, or a position-independent executable.
    #[error("an ELF file, but not an executable linked to a fixed address: give a vmlinux")]
    NotExecutable,
    /// Cut short.
    #[error("truncated: {what} would end at byte {end}, the file has {length}: build or copy it again")]
    Truncated {
        /// What is cut off.
        what: &'static str,
        /// Where it would end.
        end: u64,
        /// Bytes that there are.
        length: u64,
    },
    /// For another machine.
    #[error("built for {0}: give a kernel for x86-64")]
    Architecture(&'static str),
    /// A bzImage from before 2.6.26.
    #[error("boot protocol {}.{:02} is too old: give Linux 3.8 or newer", version >> 8, version & 0xff)]
    TooOld {
        /// The header's version.
        version: u16,
    },
    /// Its headers contradict themselves.
    #[error("damaged: {0}: build or copy it again")]
    Damaged(&'static str),
    /// A segment where no RAM is, or where our own tables are.
    #[error("wants to be loaded at {address:#x}: kernels go between 1 MiB and 3 GiB")]
    Address {
        /// Start of the segment.
        address: u64,
    },
    /// The payload is of no format that Linux uses.
    #[error(
        "its payload is packed in an unknown way (it starts with {start:02x?}): use gzip, zstd, lz4 or xz"
    )]
    UnknownCompression {
        /// First bytes.
        start: Vec<u8>,
    },
    /// The payload is damaged.
    #[error("its {compression} payload does not unpack: {cause}: build or copy it again")]
    Unpack {
        /// Its format.
        compression: Compression,
        /// What the decoder says.
        cause: String,
    },
    /// The payload announces more than [`unpack::UNPACKED_MAX`] bytes.
    #[error("its payload would unpack to {size} bytes: more than the 512 MiB a kernel may have")]
    Endless {
        /// The announced size.
        size: u64,
    },
    /// What was unpacked is something else.
    #[error("its payload is not an ELF kernel: build or copy it again")]
    PayloadNotElf,
    /// PVH was asked for.
    #[error(
        "has no PVH entry (a Xen PHYS32_ENTRY note): boot it by the Linux protocol, or build it with CONFIG_PVH"
    )]
    NoPvhEntry,
    /// The guest's RAM ends below the kernel's end.
    #[error("needs memory up to {} MiB, the guest has {} MiB: give --memory {needed}M", end.div_ceil(1 << 20), memory >> 20)]
    DoesNotFit {
        /// Where the kernel ends.
        end: u64,
        /// RAM of the guest below its hole.
        memory: u64,
        /// MiB that would do.
        needed: u64,
    },
    /// Reading failed.
    #[error("cannot read it: {0}")]
    Read(io::Error),
    /// Copying to guest memory failed, most likely since the file became shorter meanwhile.
    #[error("cannot copy it to guest memory: {0}")]
    Copy(vm_memory::GuestMemoryError),
}

/// A kernel that has been checked and unpacked, not yet in any guest.
#[derive(Debug)]
pub struct Kernel {
    path: PathBuf,
    source: Source,
    format: Format,
    header: Option<setup_header>,
    segments: Vec<Segment>,
    pvh: bool,
    entry: u64,
}

impl Kernel {
    /// Opens the file, finds out what it is, checks all of it and unpacks a bzImage's payload.
    ///
    /// # Errors
    /// One of [`KernelFault`], with the path.
    pub fn open(path: &Path, protocol: BootProtocol) -> Result<Self, KernelError> {
        let at = |fault| KernelError { path: path.to_owned(), fault };
        // Without NONBLOCK, opening a pipe would wait for its writer.
        let flags = OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(i32::from_ne_bytes(flags.bits().to_ne_bytes()))
            .open(path)
            .map_err(|error| at(KernelFault::Open(error)))?;
        Self::from_file(path, file, protocol).map_err(at)
    }

    fn from_file(path: &Path, file: File, protocol: BootProtocol) -> Result<Self, KernelFault> {
        let metadata = file.metadata().map_err(KernelFault::Read)?;
        if !metadata.is_file() {
            return Err(KernelFault::NotRegular);
        }
        if metadata.len() == 0 {
            return Err(KernelFault::Empty);
        }
        Self::from_source(path, Source::File(file, metadata.len()), protocol)
    }

    fn from_source(path: &Path, source: Source, protocol: BootProtocol) -> Result<Self, KernelFault> {
        let head = source.read(0, source.len().min(bzimage::HEAD_SIZE as u64), "the file")?;
        if head.starts_with(elf::MAGIC) {
            return Self::from_elf(path, source, Format::Elf, None, protocol);
        }
        if bzimage::is_bzimage(&head) {
            let image = BzImage::parse(&head, source.len())?;
            return Self::from_bzimage(path, source, &image, protocol);
        }
        Err(match (head.get(0x30..0x38), head.get(0x38..0x3c)) {
            (_, Some(b"ARM\x64")) => KernelFault::Architecture("ARM64"),
            (Some(b"RISCV\0\0\0"), _) | (_, Some(b"RSC\x05")) => KernelFault::Architecture("RISC-V"),
            // A bzImage with an EFI stub starts so; the rest would tell.
            _ if head.starts_with(b"MZ") && head.len() < bzimage::HEAD_SIZE => KernelFault::Truncated {
                what: "the setup header",
                end: bzimage::HEAD_SIZE as u64,
                length: source.len(),
            },
            _ => KernelFault::NotAKernel,
        })
    }

    fn from_bzimage(
        path: &Path,
        source: Source,
        image: &BzImage,
        protocol: BootProtocol,
    ) -> Result<Self, KernelFault> {
        let (offset, length) = image.payload()?;
        let start = source.read(offset, length.min(8), "the payload")?;
        let Some(compression) = Compression::detect(&start) else {
            return Err(KernelFault::UnknownCompression { start });
        };
        let format = Format::BzImage(compression);
        if let Compression::InGuest(_) = compression {
            if protocol == BootProtocol::Pvh {
                return Err(KernelFault::NoPvhEntry);
            }
            let (segment, entry) = image.in_guest(&source)?;
            let header = Some(image.header);
            return Ok(Kernel {
                path: path.to_owned(),
                source,
                format,
                header,
                segments: vec![segment],
                pvh: false,
                entry,
            });
        }
        if length > unpack::UNPACKED_MAX {
            return Err(KernelFault::Endless { size: length });
        }
        let unpacked = unpack::unpack(&source.read(offset, length, "the payload")?, compression)?;
        if !unpacked.starts_with(elf::MAGIC) {
            return Err(KernelFault::PayloadNotElf);
        }
        let protocol = if protocol == BootProtocol::Auto { BootProtocol::Linux } else { protocol };
        Self::from_elf(path, Source::Bytes(unpacked), format, Some(image.header), protocol)
    }

    fn from_elf(
        path: &Path,
        source: Source,
        format: Format,
        header: Option<setup_header>,
        protocol: BootProtocol,
    ) -> Result<Self, KernelFault> {
        let elf = elf::parse(&source)?;
        let pvh_entry = match protocol {
            BootProtocol::Linux => None,
            BootProtocol::Pvh => Some(elf.pvh_entry.ok_or(KernelFault::NoPvhEntry)?),
            BootProtocol::Auto if elf.linux => None,
            BootProtocol::Auto => elf.pvh_entry,
        };
        Ok(Kernel {
            path: path.to_owned(),
            source,
            format,
            header,
            segments: elf.segments,
            pvh: pvh_entry.is_some(),
            entry: pvh_entry.unwrap_or(elf.entry),
        })
    }

    /// The file it came from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the file is.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Whether it is entered by the PVH protocol instead of Linux's.
    pub fn is_pvh(&self) -> bool {
        self.pvh
    }

    /// Guest-physical address of its first instruction.
    pub fn entry(&self) -> GuestAddress {
        GuestAddress(self.entry)
    }

    /// First guest-physical address after the kernel and its bss.
    pub fn end(&self) -> u64 {
        self.segments.iter().map(Segment::end).max().unwrap_or(layout::HIGH_RAM_START)
    }

    /// A bzImage's setup header; it goes into the zero page.
    pub(super) fn setup_header(&self) -> Option<&setup_header> {
        self.header.as_ref()
    }

    /// Checks that it fits a guest with `memory` bytes of RAM.
    ///
    /// # Errors
    /// [`KernelFault::DoesNotFit`].
    pub fn check_fits(&self, memory: u64) -> Result<(), KernelError> {
        let (end, memory) = (self.end(), layout::low_memory(memory));
        if end > memory {
            // Linux wants some room beyond itself before it can say that it has too little.
            let needed = end.div_ceil(1 << 20).saturating_add(16).next_multiple_of(16);
            return Err(self.fault(KernelFault::DoesNotFit { end, memory, needed }));
        }
        Ok(())
    }

    /// Copies the kernel to `memory`, which is fresh: what the file does not fill (bss) is zero already.
    ///
    /// # Errors
    /// It does not fit, or the file cannot be read any more.
    pub fn load(&self, memory: &GuestMemory) -> Result<(), KernelError> {
        self.check_fits(super::memory_size(memory))?;
        for segment in &self.segments {
            let to = GuestAddress(segment.address);
            self.source
                .copy_to_guest(segment.offset, segment.file_size, memory, to)
                .map_err(|fault| self.fault(fault))?;
        }
        Ok(())
    }

    fn fault(&self, fault: KernelFault) -> KernelError {
        KernelError { path: self.path.clone(), fault }
    }
}

#[cfg(test)]
pub(super) mod testing;
#[cfg(test)]
mod tests;
