//! Finds the agent's initramfs, which the binary carries: `images/initramfs/build` makes it, and the scripts call that first.
//!
//! Without it the binary still builds, so that `cargo check` works in a fresh clone; it then says at run time what is missing.

use std::path::Path;

fn main() {
    let out = std::env::var("OUT_DIR").unwrap_or_default();
    let root = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    let archive = Path::new(&root).join("../../images/out/initramfs.cpio");
    println!("cargo::rerun-if-changed={}", archive.display());
    let bytes = std::fs::read(&archive).unwrap_or_default();
    if bytes.is_empty() {
        println!("cargo::warning=no agent inside: run images/initramfs/build first");
    }
    if let Err(error) = std::fs::write(Path::new(&out).join("initramfs.cpio"), bytes) {
        println!("cargo::error=cannot write to {out}: {error}");
    }
}
