//! ELF executables: which segments go where, where to enter, and what the notes say.
//!
//! linux-loader's `Elf::load` reads the same headers, but it copies before it has checked (a segment over our own
//! tables, or past the end of the file, is noticed late or not at all), takes any machine and any number of headers,
//! and has one error for all of it. So its structures are used and the walk is ours: every header is validated first,
//! against bounds, and copying comes later.
//!
//! Sources: System V ABI, "Program Header" and "Note Section"; Xen's public/elfnote.h; Linux's include/linux/elfnote.h.

use linux_loader::elf::{
    ELFCLASS64, ELFDATA2LSB, EM_X86_64, ET_EXEC, Elf64_Ehdr, Elf64_Phdr, PT_INTERP, PT_LOAD, PT_NOTE,
};
use vm_memory::ByteValued;

use super::KernelFault;
use super::source::Source;
use crate::layout::{HIGH_RAM_START, LOW_MEMORY_END};

/// First bytes of an ELF file.
pub(super) const MAGIC: &[u8] = b"\x7fELF";

/// Kernels have about five program headers; more than this is no kernel.
const MAX_HEADERS: u16 = 64;
/// A kernel's notes are a few hundred bytes; what lies beyond is not looked at.
const MAX_NOTES: u64 = 64 << 10;

/// `XEN_ELFNOTE_PHYS32_ENTRY`: the physical address of the PVH entry.
const XEN_PHYS32_ENTRY: u32 = 18;
/// `NT_GNU_ABI_TAG`: written by the C library's start-up code, so the file is a program.
const GNU_ABI_TAG: u32 = 1;

/// A stretch of the image that goes to guest memory. Checked: it lies inside the source, above our tables and below
/// the hole, and overlaps no other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    /// Where it starts in the source.
    pub offset: u64,
    /// Bytes to copy.
    pub file_size: u64,
    /// Guest-physical address.
    pub address: u64,
    /// Bytes that it takes in the guest; those after `file_size` are zero.
    pub memory_size: u64,
}

impl Segment {
    /// First address after it. Cannot overflow once checked.
    pub fn end(&self) -> u64 {
        self.address.saturating_add(self.memory_size)
    }

    /// Checks what the type promises of one segment.
    pub fn check(&self, source_length: u64) -> Result<(), KernelFault> {
        let end = self.offset.saturating_add(self.file_size);
        if end > source_length {
            return Err(KernelFault::Truncated { what: "a segment", end, length: source_length });
        }
        if self.file_size > self.memory_size {
            return Err(KernelFault::Damaged("a segment is larger in the file than in memory"));
        }
        if self.address < HIGH_RAM_START {
            return Err(KernelFault::Address { address: self.address });
        }
        match self.address.checked_add(self.memory_size) {
            Some(end) if end <= LOW_MEMORY_END => Ok(()),
            _ => Err(KernelFault::Address { address: self.address }),
        }
    }
}

/// What an ELF kernel says of itself.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Elf {
    /// `e_entry`, inside one of the segments.
    pub entry: u64,
    /// In ascending order of address.
    pub segments: Vec<Segment>,
    /// The 32-bit entry of the PVH protocol, inside one of the segments.
    pub pvh_entry: Option<u64>,
    /// It carries a note of Linux's build (since 4.19).
    pub linux: bool,
}

/// Reads and checks the headers of the ELF file in `source`.
pub(super) fn parse(source: &Source) -> Result<Elf, KernelFault> {
    let mut header = Elf64_Ehdr::default();
    let header_size = size_of::<Elf64_Ehdr>() as u64;
    let bytes = source.read(0, header_size.min(source.len()), "the ELF header")?;
    check_ident(&bytes)?;
    if (bytes.len() as u64) < header_size {
        return Err(KernelFault::Truncated {
            what: "the ELF header",
            end: header_size,
            length: source.len(),
        });
    }
    header.as_mut_slice().copy_from_slice(&bytes);
    if header.e_machine != EM_X86_64 {
        return Err(KernelFault::Architecture(machine_name(header.e_machine)));
    }
    if header.e_type != ET_EXEC {
        return Err(KernelFault::NotExecutable);
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() || header.e_phnum == 0 {
        return Err(KernelFault::Damaged("it has no program headers of the right size"));
    }
    if header.e_phnum > MAX_HEADERS {
        return Err(KernelFault::Damaged("it has more program headers than a kernel has"));
    }

    let table_size = u64::from(header.e_phnum) * size_of::<Elf64_Phdr>() as u64;
    let table = source.read(header.e_phoff, table_size, "the program headers")?;
    let mut segments = Vec::new();
    let mut notes = Notes::default();
    for bytes in table.chunks_exact(size_of::<Elf64_Phdr>()) {
        let mut program = Elf64_Phdr::default();
        program.as_mut_slice().copy_from_slice(bytes);
        match program.p_type {
            PT_LOAD if program.p_memsz > 0 => {
                let segment = Segment {
                    offset: program.p_offset,
                    file_size: program.p_filesz,
                    address: program.p_paddr,
                    memory_size: program.p_memsz,
                };
                segment.check(source.len())?;
                segments.push(segment);
            }
            PT_NOTE => {
                let size = program.p_filesz.min(MAX_NOTES);
                notes.read(&source.read(program.p_offset, size, "the notes")?, program.p_align);
            }
            PT_INTERP => return Err(KernelFault::Program),
            _ => {}
        }
    }
    if notes.program {
        return Err(KernelFault::Program);
    }

    segments.sort_by_key(|segment| segment.address);
    if segments.windows(2).any(|pair| matches!(pair, [a, b] if a.end() > b.address)) {
        return Err(KernelFault::Damaged("its segments overlap"));
    }
    let loaded =
        |address: u64| segments.iter().any(|s| address >= s.address && address - s.address < s.file_size);
    if !loaded(header.e_entry) {
        return Err(KernelFault::Damaged("its entry point is in none of its segments"));
    }
    if notes.pvh_entry.is_some_and(|entry| !loaded(entry)) {
        return Err(KernelFault::Damaged("its PVH entry point is in none of its segments"));
    }
    Ok(Elf { entry: header.e_entry, segments, pvh_entry: notes.pvh_entry, linux: notes.linux })
}

/// Checks the 16 bytes that tell width and byte order, which everything else depends on.
fn check_ident(bytes: &[u8]) -> Result<(), KernelFault> {
    if !bytes.starts_with(MAGIC) {
        return Err(KernelFault::NotAKernel);
    }
    match (bytes.get(4), bytes.get(5)) {
        (Some(&class), Some(&data)) => {
            if data != ELFDATA2LSB {
                return Err(KernelFault::Architecture("a big-endian machine"));
            }
            if class != ELFCLASS64 {
                return Err(KernelFault::Architecture("a 32-bit machine"));
            }
            Ok(())
        }
        _ => Err(KernelFault::Truncated { what: "the ELF header", end: 64, length: bytes.len() as u64 }),
    }
}

fn machine_name(machine: u16) -> &'static str {
    match machine {
        3 => "32-bit x86",
        8 => "MIPS",
        20 | 21 => "PowerPC",
        22 => "s390",
        40 => "32-bit ARM",
        183 => "ARM64",
        243 => "RISC-V",
        258 => "LoongArch",
        _ => "another machine",
    }
}

/// What the notes that matter to us say.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Notes {
    pub pvh_entry: Option<u64>,
    pub linux: bool,
    pub program: bool,
}

impl Notes {
    /// Walks one note segment. A malformed note ends the walk: notes are hints, and a kernel without them is one too.
    pub fn read(&mut self, bytes: &[u8], alignment: u64) {
        let alignment: usize = if alignment == 8 { 8 } else { 4 };
        let mut rest = bytes;
        while let Some((note, next)) = Note::split(rest, alignment) {
            match (note.name, note.kind) {
                (b"Xen\0", XEN_PHYS32_ENTRY) => {
                    let entry = note.descriptor.first_chunk();
                    self.pvh_entry = entry.map(|entry| u32::from_le_bytes(*entry).into());
                }
                (b"Linux\0", _) => self.linux = true,
                (b"GNU\0", GNU_ABI_TAG) => self.program = true,
                _ => {}
            }
            rest = next;
        }
    }
}

/// One note.
struct Note<'a> {
    name: &'a [u8],
    kind: u32,
    descriptor: &'a [u8],
}

impl<'a> Note<'a> {
    /// The note at the start of `bytes` and what follows it, which is shorter by twelve bytes or more: a walk ends.
    fn split(bytes: &'a [u8], alignment: usize) -> Option<(Self, &'a [u8])> {
        let word = |at: usize| {
            bytes
                .get(at..)
                .and_then(|rest| rest.first_chunk())
                .map(|word: &[u8; 4]| u32::from_le_bytes(*word))
        };
        let name_size = usize::try_from(word(0)?).ok()?;
        let descriptor_size = usize::try_from(word(4)?).ok()?;
        let kind = word(8)?;
        let name_end = 12usize.checked_add(name_size)?;
        let start = name_end.checked_next_multiple_of(alignment)?;
        let end = start.checked_add(descriptor_size)?;
        let note = Note { name: bytes.get(12..name_end)?, kind, descriptor: bytes.get(start..end)? };
        // The last note may lack its padding.
        let next = end.checked_next_multiple_of(alignment)?.min(bytes.len());
        Some((note, bytes.get(next..)?))
    }
}

#[cfg(test)]
mod tests;
