//! The edge to `/dev/kvm`: what kvm-ioctls leaves out, each in a small safe wrapper.

pub mod kick;
pub mod memory;
pub mod run;
pub mod stats;
pub mod tsc;
