//! What this host can do: its CPUs, its memory, its KVM, and whether that KVM runs guest kernels on the CPU or emulates
//! them. Asked once, on the main thread, before a machine is planned.

mod cache;
mod detect;
mod facts;
mod probe;
pub mod pvm;
mod system;
pub mod tap;

pub use detect::{Host, HostError};
pub use facts::{
    HostFacts, HugePages, KernelMode, KvmFacts, Missing, Module, Paging, SystemFacts, Virtualization,
};
pub use probe::ProbeError;
