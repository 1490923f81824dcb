//! Directories packed as root images, for tests that need one of their own.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::artefacts;

/// Makes a root image in `directory` whose `/sbin/init` is a busybox shell script, for `--init`.
pub fn with_init(directory: &Path, format: &str, script: &str) -> PathBuf {
    let tree = directory.join("tree");
    for folder in ["bin", "sbin", "dev", "proc", "sys", "tmp", "mnt"] {
        std::fs::create_dir_all(tree.join(folder)).expect("a directory");
    }
    std::fs::copy(busybox(), tree.join("bin/busybox")).expect("busybox can be copied");
    symlink("busybox", tree.join("bin/sh")).expect("a link");
    let init = tree.join("sbin/init");
    std::fs::write(&init, format!("#!/bin/sh\n{script}\n")).expect("a file");
    std::fs::set_permissions(&init, std::fs::Permissions::from_mode(0o755)).expect("our file");
    pack(&tree, &directory.join("root.img"), format)
}

/// Packs `tree` as the image `file`.
pub fn pack(tree: &Path, file: &Path, format: &str) -> PathBuf {
    let output = Command::new(artefacts::workspace().join("images/rootfs/build"))
        .arg("--from")
        .arg(tree)
        .arg("--out")
        .arg(file)
        .args(["--format", format])
        .output()
        .expect("images/rootfs/build can be run");
    assert!(output.status.success(), "images/rootfs/build: {}", String::from_utf8_lossy(&output.stderr));
    file.to_path_buf()
}

fn busybox() -> PathBuf {
    let places = ["/usr/bin/busybox", "/bin/busybox"].map(PathBuf::from);
    places.into_iter().find(|path| path.exists()).expect("busybox-static is installed (images/packages.txt)")
}
