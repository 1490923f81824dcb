//! A machine's state in files, and a machine from them.
//!
//! * [`disks`]: what its disks held.

pub mod disks;
