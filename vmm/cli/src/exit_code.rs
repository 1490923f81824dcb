//! What the exit code of `vmm` says, in one place. Below 125 it is the container's own.

/// A running machine was asked, and refused.
pub const REFUSED: u8 = 1;
/// `vmm` refused or failed: bad flags, bad files, a host that lacks something.
pub const VMM: u8 = 125;
/// The guest's kernel panicked.
pub const GUEST_PANIC: u8 = 250;
/// The VM ended before the container did, in another way than by a panic.
pub const GUEST_LOST: u8 = 251;

/// Ended by a signal that `vmm` got while there was no container yet, or by force: as a shell counts.
pub fn signal(number: i32) -> u8 {
    u8::try_from(number).ok().and_then(|n| n.checked_add(128)).unwrap_or(VMM)
}
