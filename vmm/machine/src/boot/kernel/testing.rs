//! Small kernels for tests, put together byte by byte: what they say of themselves is independent of the parsers.

use std::io::Write;
use std::path::Path;

use super::{Kernel, KernelFault, Source};
use crate::config::BootProtocol;

/// Where a test kernel starts.
pub const ADDRESS: u64 = 16 << 20;

/// An ELF executable under construction.
#[derive(Clone)]
pub struct ElfImage {
    pub entry: u64,
    pub machine: u16,
    pub kind: u16,
    /// Address, content, size in memory.
    pub segments: Vec<(u64, Vec<u8>, u64)>,
    /// Content of one note segment.
    pub notes: Vec<u8>,
}

impl Default for ElfImage {
    fn default() -> Self {
        ElfImage {
            entry: ADDRESS + 4,
            machine: 62,
            kind: 2,
            segments: vec![(ADDRESS, (0..=255).cycle().take(5000).collect(), 9000)],
            notes: Vec::new(),
        }
    }
}

impl ElfImage {
    pub fn with_note(mut self, name: &str, kind: u32, descriptor: &[u8]) -> Self {
        self.notes.extend(note(name, kind, descriptor));
        self
    }

    pub fn build(&self) -> Vec<u8> {
        let count = self.segments.len() + usize::from(!self.notes.is_empty());
        let mut offset = (64 + count * 56) as u64;
        let mut headers = Vec::new();
        let mut content = Vec::new();
        let loads = self.segments.iter().map(|(address, bytes, size)| (1u32, *address, bytes, *size));
        let notes = (!self.notes.is_empty()).then_some((4, 0, &self.notes, self.notes.len() as u64));
        for (kind, address, bytes, memory_size) in loads.chain(notes) {
            let file_size = bytes.len() as u64;
            headers.extend(kind.to_le_bytes());
            headers.extend(7u32.to_le_bytes());
            for field in [offset, !0xffff_ffff_u64 | address, address, file_size, memory_size, 4] {
                headers.extend(field.to_le_bytes());
            }
            content.extend(bytes);
            offset += file_size;
        }
        let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        image.extend(self.kind.to_le_bytes());
        image.extend(self.machine.to_le_bytes());
        image.extend(1u32.to_le_bytes());
        for field in [self.entry, 64, 0] {
            image.extend(field.to_le_bytes());
        }
        image.extend([0; 4]);
        for field in [64u16, 56, u16::try_from(count).unwrap(), 64, 0, 0] {
            image.extend(field.to_le_bytes());
        }
        [image, headers, content].concat()
    }
}

/// One note with its padding.
pub fn note(name: &str, kind: u32, descriptor: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend((u32::try_from(name.len()).unwrap() + 1).to_le_bytes());
    bytes.extend(u32::try_from(descriptor.len()).unwrap().to_le_bytes());
    bytes.extend(kind.to_le_bytes());
    bytes.extend(name.as_bytes());
    bytes.push(0);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(descriptor);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// A bzImage of protocol 2.15 around `payload`.
pub fn bzimage(payload: &[u8]) -> Vec<u8> {
    const STUB: usize = 0x400;
    let mut image = vec![0u8; 0x400];
    let put =
        |image: &mut Vec<u8>, at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    let mut system = vec![0xcc; STUB];
    system.extend(payload);
    system.resize(system.len().next_multiple_of(16), 0);
    put(&mut image, 0x1f1, &[1]);
    put(&mut image, 0x1f4, &u32::try_from(system.len() / 16).unwrap().to_le_bytes());
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x20f_u16.to_le_bytes());
    put(&mut image, 0x211, &[1]);
    put(&mut image, 0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(&mut image, 0x236, &1u16.to_le_bytes());
    put(&mut image, 0x238, &2047u32.to_le_bytes());
    put(&mut image, 0x248, &u32::try_from(STUB).unwrap().to_le_bytes());
    put(&mut image, 0x24c, &u32::try_from(payload.len()).unwrap().to_le_bytes());
    put(&mut image, 0x258, &ADDRESS.to_le_bytes());
    put(&mut image, 0x260, &0x10_0000_u32.to_le_bytes());
    image.extend(system);
    image
}

/// Packs as Linux's build does, with the size at the end.
pub fn pack(compression: &str, content: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    match compression {
        "gzip" => {
            let mut encoder = flate2::write::GzEncoder::new(&mut packed, flate2::Compression::best());
            encoder.write_all(content).unwrap();
            encoder.finish().unwrap();
            return packed; // its own size field is last
        }
        "zstd" => {
            ruzstd::encoding::compress(content, &mut packed, ruzstd::encoding::CompressionLevel::Fastest);
        }
        "lz4" => {
            packed.extend(0x184c_2102_u32.to_le_bytes());
            for block in content.chunks(8 << 20) {
                let block = lz4_flex::block::compress(block);
                packed.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
                packed.extend(block);
            }
        }
        "xz" => {
            let mut options = lzma_rust2::XzOptions::with_preset(1);
            options.set_check_sum_type(lzma_rust2::CheckType::Crc32);
            options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
            let mut encoder = lzma_rust2::XzWriter::new(&mut packed, options).unwrap();
            encoder.write_all(content).unwrap();
            encoder.finish().unwrap();
        }
        other => panic!("no packer for {other}"),
    }
    packed.extend(u32::try_from(content.len()).unwrap().to_le_bytes());
    packed
}

/// A kernel from bytes instead of a file.
pub fn kernel(bytes: Vec<u8>, protocol: BootProtocol) -> Result<Kernel, KernelFault> {
    Kernel::from_source(Path::new("test"), Source::Bytes(bytes), protocol)
}
