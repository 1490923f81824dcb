//! What the binary carries for its guests.

use machine::plan::Assets;

/// The agent, as `images/initramfs/build` packed it.
pub const ASSETS: Assets = Assets { initramfs: include_bytes!(concat!(env!("OUT_DIR"), "/initramfs.cpio")) };
