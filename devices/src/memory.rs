//! Which of vm-memory's types stands for the guest's memory, decided in one place.

/// All RAM of one guest: anonymous or file-backed mappings, one region on each side of the hole below 4 GiB.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
