//! What an x86-64 guest expects of its machine: CPU features and topology, registers at the first instruction, MSRs as a
//! firmware leaves them, and the table that tells where the other CPUs are.
//!
//! Pure functions over KVM's structures: the builder calls them on the controller thread and makes the ioctls itself.
//! Intel SDM and AMD APM are cited by chapter; leaves, registers and table entries keep their names from there.

pub mod cpuid;
pub mod entry;
pub mod lapic;
pub mod mptable;
pub mod msrs;

pub use entry::EntryPoint;
