//! A vCPU's counters, read from KVM's binary statistics file (`KVM_GET_STATS_FD`, Linux 5.14; api.rst 4.133).
//!
//! Opened on the thread that makes the vCPU; a [`Counter`] may be read from any thread while the vCPU runs. The file's
//! layout comes from the kernel and is still checked: a length from a file is a length from a file.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vmm_sys_util::ioctl::ioctl;

#[allow(missing_docs, reason = "the macro makes a public function")]
mod number {
    vmm_sys_util::ioctl_io_nr!(KVM_GET_STATS_FD, kvm_bindings::KVMIO, 0xce);
}
use number::KVM_GET_STATS_FD;

/// `struct kvm_stats_header`: six 32-bit fields.
const HEADER: usize = 24;
/// `struct kvm_stats_desc` without the name that follows it.
const DESCRIPTOR: usize = 16;
/// Far above what any kernel has (some 60 counters, names of 48 bytes).
const MAX_DESCRIPTORS: u32 = 4096;
const MAX_NAME: u32 = 256;

/// Why a vCPU's counters cannot be read.
#[derive(Debug, Error)]
pub enum StatsError {
    /// KVM is older than Linux 5.14, or the file cannot be read.
    #[error("cannot read the vCPU's statistics: {0}")]
    Io(#[from] std::io::Error),
    /// The file is not laid out as api.rst says.
    #[error("the vCPU's statistics have an unknown layout: {0}")]
    Layout(&'static str),
}

/// The counters of one vCPU, by name. Clones share the file.
#[derive(Clone, Debug)]
pub struct VcpuStats {
    file: Arc<File>,
    offsets: Arc<HashMap<String, u64>>,
}

/// One counter of one vCPU.
#[derive(Clone, Debug)]
pub struct Counter {
    file: Arc<File>,
    offset: u64,
}

impl VcpuStats {
    /// Opens the statistics of `vcpu` and reads the counters' names.
    pub fn open(vcpu: &VcpuFd) -> Result<Self, StatsError> {
        // SAFETY: the descriptor is a vCPU's for the whole call, and this ioctl takes no argument.
        let fd = unsafe { ioctl(vcpu, KVM_GET_STATS_FD()) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        // SAFETY: the ioctl has just made this descriptor for us, and nobody else knows it.
        let file = unsafe { File::from_raw_fd(fd) };

        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0)?;
        let header = Header::parse(&header)?;
        let mut descriptors = vec![0; header.descriptors_len()];
        file.read_exact_at(&mut descriptors, header.descriptors_at)?;
        Ok(Self { file: file.into(), offsets: header.offsets(&descriptors)?.into() })
    }

    /// The counter of this name, such as `exits` or `halt_exits`; `None` when this kernel does not keep it.
    pub fn counter(&self, name: &str) -> Option<Counter> {
        Some(Counter { file: self.file.clone(), offset: *self.offsets.get(name)? })
    }

    /// How many instructions KVM has emulated for this vCPU so far; `None` when this kernel does not count them. On a host
    /// that emulates kernel mode that is all the kernel code that ran.
    pub fn insn_emulation(&self) -> Option<u64> {
        self.counter("insn_emulation")?.read().ok()
    }
}

impl Counter {
    /// Its value now.
    pub fn read(&self) -> std::io::Result<u64> {
        let mut value = [0; 8];
        self.file.read_exact_at(&mut value, self.offset)?;
        Ok(u64::from_ne_bytes(value))
    }
}

#[derive(Debug)]
struct Header {
    name_len: usize,
    count: usize,
    descriptors_at: u64,
    data_at: u64,
}

impl Header {
    fn parse(bytes: &[u8; HEADER]) -> Result<Self, StatsError> {
        let field = |n: usize| u32_at(bytes, n * 4).ok_or(StatsError::Layout("the header is short"));
        let (name_len, count) = (field(1)?, field(2)?);
        if name_len == 0 || name_len > MAX_NAME || count > MAX_DESCRIPTORS {
            return Err(StatsError::Layout("too many counters, or names too long"));
        }
        Ok(Self {
            name_len: name_len as usize,
            count: count as usize,
            descriptors_at: field(4)?.into(),
            data_at: field(5)?.into(),
        })
    }

    /// At most 4096 × 272 bytes.
    fn descriptors_len(&self) -> usize {
        self.count * (DESCRIPTOR + self.name_len)
    }

    /// Where each counter's first value is in the file.
    fn offsets(&self, descriptors: &[u8]) -> Result<HashMap<String, u64>, StatsError> {
        descriptors
            .chunks_exact(DESCRIPTOR + self.name_len)
            .map(|descriptor| {
                // flags u32, exponent s16, size u16, offset u32, bucket size u32, name.
                let offset = u32_at(descriptor, 8).ok_or(StatsError::Layout("a descriptor is short"))?;
                let name = descriptor.get(DESCRIPTOR..).unwrap_or_default();
                let name = name.split(|b| *b == 0).next().unwrap_or_default();
                let name = std::str::from_utf8(name).map_err(|_| StatsError::Layout("a name is not text"))?;
                Ok((name.to_string(), self.data_at + u64::from(offset)))
            })
            .collect()
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*field))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(name_size: u32, count: u32, descriptors: u32, data: u32) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        for (chunk, field) in bytes.chunks_exact_mut(4).zip([0, name_size, count, 24, descriptors, data]) {
            chunk.copy_from_slice(&field.to_ne_bytes());
        }
        bytes
    }

    fn descriptor(name: &[u8; 8], offset: u32) -> Vec<u8> {
        let mut bytes = vec![0; DESCRIPTOR];
        bytes[8..12].copy_from_slice(&offset.to_ne_bytes());
        bytes.extend(name);
        bytes
    }

    #[test]
    fn counters_are_found_by_name() {
        let header = Header::parse(&header(8, 2, 72, 200)).unwrap();
        let bytes = [descriptor(b"exits\0\0\0", 0), descriptor(b"insn_emu", 16)].concat();
        assert_eq!(header.descriptors_len(), bytes.len());
        let offsets = header.offsets(&bytes).unwrap();
        assert_eq!((offsets["exits"], offsets["insn_emu"], offsets.len()), (200, 216, 2));
    }

    #[test]
    fn absurd_layouts_are_refused() {
        for bad in [header(0, 1, 72, 200), header(257, 1, 72, 200), header(48, 4097, 72, 200)] {
            assert!(Header::parse(&bad).is_err());
        }
        let header = Header::parse(&header(8, 1, 72, u32::MAX)).unwrap();
        assert!(header.offsets(&descriptor(b"\xff\xfe\0\0\0\0\0\0", 1)).is_err());
        assert_eq!(
            header.offsets(&descriptor(b"far\0\0\0\0\0", u32::MAX)).unwrap()["far"],
            2 * u64::from(u32::MAX)
        );
        assert!(header.offsets(b"short").unwrap().is_empty());
    }
}
