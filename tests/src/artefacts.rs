//! Where the things under test are. `VMM_BIN` and `VMM_IMAGES` in the environment choose others.

use std::path::{Path, PathBuf};

/// The workspace's root.
pub fn workspace() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_path_buf()
}

/// Where cargo builds.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// The `vmm` binary.
pub fn vmm() -> PathBuf {
    let path = std::env::var_os("VMM_BIN").map_or_else(|| target().join("release/vmm"), PathBuf::from);
    existing(path, "./scripts/setup")
}

/// A file of `images/out/`.
pub fn artefact(name: &str, made_by: &str) -> PathBuf {
    let images = std::env::var_os("VMM_IMAGES").map_or_else(|| workspace().join("images/out"), PathBuf::from);
    existing(images.join(name), made_by)
}

/// The kernel for this host, unpacked.
pub fn vmlinux() -> PathBuf {
    artefact("vmlinux", "./scripts/setup")
}

/// The kernel for this host, packed as the kernel's build packs it (LZ4).
pub fn bzimage() -> PathBuf {
    artefact("bzImage", "./scripts/setup")
}

/// The kernel for this host, packed by another compression.
pub fn bzimage_of(compression: &str) -> PathBuf {
    let flavour = if crate::require::kernel_mode_is_emulated() { "emulated" } else { "hardened" };
    artefact(
        &format!("kernel-{flavour}/bzImage.{compression}"),
        &format!("images/kernel/build {flavour} --compression {compression}"),
    )
}

/// Address of a symbol of the kernel for this host, as it was linked.
pub fn kernel_symbol(name: &str) -> u64 {
    let path = artefact("System.map", "./scripts/setup");
    let map = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let line = map.lines().find(|line| line.split_whitespace().nth(2) == Some(name));
    let address = line.and_then(|line| u64::from_str_radix(line.split_whitespace().next()?, 16).ok());
    address.unwrap_or_else(|| panic!("{} has no symbol {name}", path.display()))
}

/// The sample container's image, EROFS.
pub fn sample() -> PathBuf {
    artefact("ctr.img", "images/rootfs/build")
}

/// The sample container's image, ext4.
pub fn sample_ext4() -> PathBuf {
    artefact("ctr.ext4.img", "images/rootfs/build --format ext4")
}

/// The tests' own image: busybox and the guest programs of `tests/guest`.
pub fn guest_programs() -> PathBuf {
    artefact("tests.img", "tests/guest/build")
}

fn existing(path: PathBuf, made_by: &str) -> PathBuf {
    assert!(
        path.exists(),
        "{} is missing: {made_by} makes it (./scripts/test makes everything)",
        path.display()
    );
    path
}
