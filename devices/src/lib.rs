//! The devices of the machine, and what they stand on: buses, the 16550, the i8042, and virtio.
//!
//! Nothing here knows KVM, containers or an async runtime. A device sees guest memory, its queues and file
//! descriptors of the host; interrupts and doorbells are eventfds that somebody else connects to a VM.
//!
//! * [`bounded`]: lists in saved state, which may come from anybody.
//! * [`bus`]: finds the device behind an address, on vCPU threads.
//! * [`serial`], [`i8042`]: the two legacy devices, served on vCPU threads.
//! * [`console`]: where the serial port's output goes.
//! * [`device_loop`]: the one thread on which virtio devices run.
//! * [`virtio`]: queue, chain, transport, and a module a device.
#![deny(clippy::cast_possible_truncation)]

pub mod bounded;
pub mod bus;
pub mod console;
pub mod device_loop;
pub mod i8042;
pub mod memory;
pub mod serial;
#[cfg(test)]
pub mod testing;
pub mod virtio;

pub use memory::GuestMemory;
