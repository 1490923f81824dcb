//! Facts about the host, as plain data. [`super::system`] reads the host's own, [`super::Host`] adds its KVM's.

use std::fmt;

use crate::config::ByteSize;

/// Everything that a machine's description is compared with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// The machine and its Linux, with or without KVM.
    pub system: SystemFacts,
    /// Its KVM.
    pub kvm: KvmFacts,
}

/// What `/proc` and `/sys` say about the host; readable without KVM and without privileges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemFacts {
    /// CPUs that are online.
    pub cpus: u32,
    /// Whether the CPU can run guests by itself.
    pub virtualization: Virtualization,
    /// Whether the host is a guest itself.
    pub nested: bool,
    /// Whether the CPU has AVX.
    pub avx: bool,
    /// All memory.
    pub memory_total: ByteSize,
    /// Memory that new work can have without swapping.
    pub memory_available: ByteSize,
    /// The pool of reserved huge pages.
    pub huge_pages: HugePages,
    /// Loaded KVM modules, sorted by name.
    pub modules: Vec<Module>,
    /// How the modules translate guest memory.
    pub paging: Paging,
    /// Whether TAPs can be opened (`/dev/net/tun` exists and may be written).
    pub tun: bool,
}

/// What `/dev/kvm` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvmFacts {
    /// `KVM_GET_API_VERSION`; 12 since 2007.
    pub api_version: i32,
    /// Most vCPUs of one machine (`KVM_CAP_MAX_VCPUS`).
    pub max_vcpus: u32,
    /// How guest kernels run.
    pub kernel_mode: KernelMode,
}

/// How guest kernel code (CPL 0) runs on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KernelMode {
    /// On the CPU.
    Hardware,
    /// Instruction by instruction in KVM's emulator, some thousand times slower; user code still runs on the CPU.
    Emulated,
}

/// The CPU's own support for guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Virtualization {
    /// Intel's.
    VtX,
    /// AMD's.
    AmdV,
    /// Neither, or switched off.
    None,
}

/// How guest memory is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paging {
    /// Intel's second level of page tables.
    Ept,
    /// AMD's.
    Npt,
    /// Page tables that KVM keeps in step with the guest's own.
    Shadow,
}

/// The pool of reserved huge pages of the default size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HugePages {
    /// In the pool.
    pub total: u64,
    /// Not in use.
    pub free: u64,
    /// Of one page.
    pub size: ByteSize,
}

/// Something that this host does not offer, or not to us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// What.
    pub what: String,
    /// How to get it.
    pub remedy: String,
}

/// A loaded kernel module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name, such as `kvm_amd`.
    pub name: String,
    /// The hash of its source, where the kernel has it.
    pub srcversion: Option<String>,
}

impl fmt::Display for KernelMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hardware => "hardware",
            Self::Emulated => "emulated",
        })
    }
}

impl fmt::Display for Virtualization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::VtX => "VT-x",
            Self::AmdV => "AMD-V",
            Self::None => "none",
        })
    }
}

impl fmt::Display for Paging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ept => "EPT",
            Self::Npt => "NPT",
            Self::Shadow => "shadow",
        })
    }
}
