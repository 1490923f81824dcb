//! The container's image: a disk, read-only; and the wait for the medium of a disk.

use alloc::ffi::CString;
use alloc::format;
use core::ffi::CStr;

use protocol::{ByteString, MAX_IMAGE_CONFIG, Root};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::thread::nanosleep;
use rustix::time::Timespec;

use crate::error::{Error, Reason, at};
use crate::file::read_bounded;
use crate::{mounts, sys};

/// Where the image is mounted, and later, in the container's namespace, the overlay over it.
pub const IMAGE: &CStr = c"/image";

/// How often the capacity of a disk without a medium is looked at, and how long apart: ten seconds in all.
const LOOKS: usize = 1000;
const APART: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };

/// Mounts the image, reads its configuration if it has one, and makes the container's root of it.
pub fn open(root: &Root) -> Result<Option<ByteString>, Error> {
    mount_disk(root)?;
    let config = read_config(c"/image/.vmm/image.json")?;
    mounts::make_overlay()?;
    Ok(config)
}

/// Mounts the disk as the type that the host names, or else as the first that fits.
fn mount_disk(root: &Root) -> Result<(), Error> {
    let disk = disk_path(&root.device)?;
    let named = CString::new(root.file_system.as_str()).unwrap_or_default();
    let known = [c"erofs", c"ext4", c"squashfs"];
    let candidates = if named.is_empty() { &known[..] } else { &[named.as_c_str()][..] };
    // Nearly always the medium is there, so it is only looked for when it turns out that it is not.
    // Then it may have come since: so it is tried again in any case.
    if mount_as(&disk, candidates).is_ok() {
        return Ok(());
    }
    wait_for_medium(&disk)?;
    mount_as(&disk, candidates)
}

fn mount_as(disk: &CStr, candidates: &[&CStr]) -> Result<(), Error> {
    let mut failure = Error::Ended;
    for &fstype in candidates {
        // No device nodes: what the overlay shows of the image is not bound by this.
        let flags = MountFlags::RDONLY | MountFlags::NODEV;
        match mount(disk, IMAGE, fstype, flags, None::<&CStr>) {
            Ok(()) => return Ok(()),
            Err(errno) => failure = Error::Image { fstype: fstype.to_bytes().into(), errno: Reason(errno) },
        }
    }
    Err(failure)
}

/// The path of a disk by its name, as the kernel's own /dev has it: virtio-blk's major number is dynamic.
pub fn disk_path(name: &str) -> Result<CString, Error> {
    let valid = !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let path = CString::new(format!("/dev/{name}")).ok().filter(|_| valid);
    path.ok_or_else(|| Error::Request(format!("{name:?} is not the name of a disk")))
}

/// Waits until the disk has a medium: a spare one gets it when the host has said what for.
pub fn wait_for_medium(disk: &CStr) -> Result<(), Error> {
    let failed = |errno| at(format!("open {}", disk.to_bytes().escape_ascii()))(errno);
    let file = openat(CWD, disk, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
    for _ in 0..LOOKS {
        if sys::capacity(&file).map_err(failed)? > 0 {
            return Ok(());
        }
        // Woken early it looks early.
        let _ = nanosleep(&APART);
    }
    Err(failed(Errno::NOMEDIUM))
}

/// The file's content; `None` if there is no file. The image may be hostile, so no symbolic link is followed: it would lead out of it.
pub fn read_config(path: &CStr) -> Result<Option<ByteString>, Error> {
    let config = read_bounded(path, ResolveFlags::NO_SYMLINKS, MAX_IMAGE_CONFIG);
    Ok(config.map_err(at("read the image's /.vmm/image.json"))?.map(ByteString))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config_of(prepare: impl FnOnce(&std::path::Path)) -> Result<Option<ByteString>, Error> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.json");
        prepare(&path);
        read_config(&CString::new(path.into_os_string().into_encoded_bytes()).unwrap())
    }

    #[test]
    fn configurations() {
        // The protocol's names are those that are used here.
        assert_eq!(protocol::IMAGE_CONFIG_PATH, "/.vmm/image.json");
        assert_eq!(config_of(|_| ()).unwrap(), None);
        let long = vec![b'x'; MAX_IMAGE_CONFIG];
        assert_eq!(config_of(|path| std::fs::write(path, &long).unwrap()).unwrap(), Some(long.into()));
    }

    #[test]
    fn names_of_disks() {
        assert_eq!(disk_path("vdb").unwrap().as_c_str(), c"/dev/vdb");
        for bad in ["", "../x", "vd/a", "VDA", "vd\0"] {
            assert!(disk_path(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn hostile_configurations() {
        assert!(config_of(|path| std::fs::write(path, vec![0; MAX_IMAGE_CONFIG + 1]).unwrap()).is_err());
        assert!(config_of(|path| std::os::unix::fs::symlink("/etc/passwd", path).unwrap()).is_err());
        assert!(config_of(|path| std::fs::create_dir(path).unwrap()).is_err());
        let fifo = |path: &std::path::Path| rustix::fs::mkfifoat(CWD, path, Mode::RWXU).unwrap();
        assert_eq!(config_of(fifo).unwrap(), Some(Vec::new().into()));
    }
}
