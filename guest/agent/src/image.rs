//! The container's image: `/dev/vda`, read-only. Runs once, before the host is greeted.

use alloc::ffi::CString;
use core::ffi::CStr;

use protocol::{ByteString, MAX_IMAGE_CONFIG};
use rustix::fs::{Mode, ResolveFlags, mkdir};
use rustix::mount::{MountFlags, mount};

use crate::error::{Error, Reason, at};
use crate::file::read_bounded;
use crate::{mounts, sys};

/// Where the image is mounted, and later, in the container's namespace, the overlay over it.
pub const IMAGE: &CStr = c"/image";

/// Mounts the image, reads its configuration if it has one, and makes the container's root of it.
pub fn open() -> Result<Option<ByteString>, Error> {
    mounts::cover_initramfs()?;
    // virtio-blk's major number is dynamic, so the kernel's own /dev is the cheapest way to name disks.
    mkdir(c"/dev", Mode::RWXU).map_err(at("mkdir /dev"))?;
    mount(c"devtmpfs", c"/dev", c"devtmpfs", MountFlags::empty(), None::<&CStr>).map_err(at("mount /dev"))?;
    mkdir(IMAGE, Mode::RWXU).map_err(at("mkdir /image"))?;
    mount_disk(sys::environment(c"VMM_ROOTFS"))?;
    let config = read_config(c"/image/.vmm/image.json")?;
    mounts::make_overlay()?;
    Ok(config)
}

/// Mounts the disk as the type that the kernel's command line names, or else as the first that fits.
fn mount_disk(fstype: Option<CString>) -> Result<(), Error> {
    let known = [c"erofs", c"ext4", c"squashfs"];
    let candidates = match &fstype {
        Some(named) => &[named.as_c_str()][..],
        None => &known[..],
    };
    let mut failure = Error::Ended;
    for &fstype in candidates {
        // No device nodes: what the overlay shows of the image is not bound by this.
        let flags = MountFlags::RDONLY | MountFlags::NODEV;
        match mount(c"/dev/vda", IMAGE, fstype, flags, None::<&CStr>) {
            Ok(()) => return Ok(()),
            Err(errno) => failure = Error::Image { fstype: fstype.to_bytes().into(), errno: Reason(errno) },
        }
    }
    Err(failure)
}

/// The file's content; `None` if there is no file. The image may be hostile, so no symbolic link is followed: it would lead out of it.
pub fn read_config(path: &CStr) -> Result<Option<ByteString>, Error> {
    let config = read_bounded(path, ResolveFlags::NO_SYMLINKS, MAX_IMAGE_CONFIG);
    Ok(config.map_err(at("read the image's /.vmm/image.json"))?.map(ByteString))
}

#[cfg(test)]
mod tests {
    use rustix::fs::CWD;

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
        assert_eq!(protocol::ROOTFS_VARIABLE, "VMM_ROOTFS");
        assert_eq!(config_of(|_| ()).unwrap(), None);
        let long = vec![b'x'; MAX_IMAGE_CONFIG];
        assert_eq!(config_of(|path| std::fs::write(path, &long).unwrap()).unwrap(), Some(long.into()));
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
