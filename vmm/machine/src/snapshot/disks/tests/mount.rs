//! File systems of a test's own.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

/// What a program prints, if it is there and succeeds.
pub fn run(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A file system of its own, for as long as the test runs.
pub struct Mount {
    directory: TempDir,
    _image: TempDir,
}

impl Mount {
    /// One of a size.
    pub fn tmpfs(size: &str) -> Option<Self> {
        let directory = TempDir::new().unwrap();
        run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "none", directory.path().to_str()?])?;
        Some(Mount { directory, _image: TempDir::new().unwrap() })
    }

    /// One with reflinks.
    pub fn reflinks() -> Option<Self> {
        let image = TempDir::new().unwrap();
        let path = image.path().join("image");
        File::create(&path).unwrap().set_len(400 << 20).unwrap();
        let path = path.to_str()?;
        run("mkfs.xfs", &["-q", path]).or_else(|| run("mkfs.btrfs", &["-q", path]))?;
        let directory = TempDir::new().unwrap();
        run("mount", &["-o", "loop", path, directory.path().to_str()?])?;
        Some(Mount { directory, _image: image })
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Some(path) = self.directory.path().to_str() {
            let _ = run("umount", &["-l", path]);
        }
    }
}
