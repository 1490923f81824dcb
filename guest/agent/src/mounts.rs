//! The file systems: the agent's own root, and the container's.
//!
//! The container gets its root by `pivot_root`, and what was below it is unmounted: nothing of the agent's is left in the
//! container's mount namespace, so no trick with `chroot`, `fchdir`, `umount` or `setns` leads there. The kernel does not
//! pivot away from an initramfs, which is the bottom of every mount namespace and cannot be unmounted. So the agent first
//! covers it with a tmpfs, and takes its own file from it. Everything of value is in the tmpfs, which can be pivoted away from:
//!
//! ```text
//! initramfs    the bottom, of which only /dev/console is left
//! └ tmpfs      the agent's root: /dev (all devices), /upper and /work (what the container changes), /cgroup, /workshop
//!   └ image    /image, read-only
//!     └ overlay  over it: the container's root
//! ```
//!
//! In the container's namespace, a copy of the agent's, the overlay then lies on the initramfs and the tmpfs is gone. The
//! agent's mounts are private, since nobody shared them.
//!
//! [`cover_initramfs`], [`make_directories`] and [`Furniture::make`] run in the agent before the host is greeted, [`make_overlay`] once there
//! is an image, and everything else in the child.

use alloc::ffi::CString;
use alloc::format;
use core::ffi::CStr;

use protocol::Disk;
use rustix::fd::OwnedFd;
use rustix::fs::{CWD, Dev, FileType, Mode, OFlags, makedev, mkdir, mknodat, openat, stat, symlink, unlink};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_bind, move_mount, open_tree,
    unmount,
};
use rustix::process::{chdir, chroot, pivot_root, umask};

use crate::error::{Error, at};
use crate::image::{IMAGE, disk_path};

/// Where the agent builds what the child mounts.
const WORKSHOP: &CStr = c"/workshop";

/// A file system in the container's `/dev`.
struct Mount {
    fstype: &'static CStr,
    target: &'static CStr,
    flags: MountFlags,
    data: &'static CStr,
}

const NOSUID: MountFlags = MountFlags::NOSUID;
const PLAIN: MountFlags = NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// What is in `/dev`, as in Docker's default specification. An option costs as much as a small system call, so none that says what is so
/// anyway: a tmpfs has mode 1777.
const DEVICE_MOUNTS: [Mount; 3] = [
    Mount { fstype: c"tmpfs", target: c"/workshop/shm", flags: PLAIN, data: c"size=65536k" },
    Mount { fstype: c"mqueue", target: c"/workshop/mqueue", flags: PLAIN, data: c"" },
    // `tty` is group 5 everywhere.
    Mount {
        fstype: c"devpts",
        target: c"/workshop/pts",
        flags: NOSUID.union(MountFlags::NOEXEC),
        data: c"newinstance,ptmxmode=0666,mode=0620,gid=5",
    },
];

/// Character devices that every container has: name, major and minor number.
const DEVICES: [(&CStr, u32, u32); 6] = [
    (c"/workshop/null", 1, 3),
    (c"/workshop/zero", 1, 5),
    (c"/workshop/full", 1, 7),
    (c"/workshop/random", 1, 8),
    (c"/workshop/urandom", 1, 9),
    (c"/workshop/tty", 5, 0),
];

const LINKS: [(&CStr, &CStr); 5] = [
    (c"/proc/self/fd", c"/workshop/fd"),
    (c"/proc/self/fd/0", c"/workshop/stdin"),
    (c"/proc/self/fd/1", c"/workshop/stdout"),
    (c"/proc/self/fd/2", c"/workshop/stderr"),
    (c"pts/ptmx", c"/workshop/ptmx"),
];

/// What a container has of file systems whatever it is, made before the host is greeted and so once for all copies of a template: `/sys`,
/// and `/dev` with all that is in it. Mounted nowhere until the child does it. Not `/proc`, which shows whoever mounts it its own processes.
pub struct Furniture {
    sys: OwnedFd,
    dev: OwnedFd,
}

impl Furniture {
    /// Makes it, in the IPC namespace that the container will have.
    pub fn make() -> Result<Self, Error> {
        make_directory(WORKSHOP)?;
        mount_at(c"sysfs", WORKSHOP, PLAIN | MountFlags::RDONLY, c"")?;
        let sys = detach()?;
        mount_at(c"tmpfs", WORKSHOP, NOSUID, c"mode=755")?;
        for Mount { fstype, target, flags, data } in &DEVICE_MOUNTS {
            make_directory(target)?;
            mount_at(fstype, target, *flags, data)?;
        }
        for (path, major, minor) in DEVICES {
            make_node(path, FileType::CharacterDevice, 0o666, makedev(major, minor))?;
        }
        for (content, path) in LINKS {
            symlink(content, path).map_err(|errno| failed("link", path)(errno))?;
        }
        Ok(Self { sys, dev: detach()? })
    }

    /// The master of the container's terminal.
    pub fn open_terminal(&self, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        openat(&self.dev, c"pts/ptmx", flags, Mode::empty())
    }
}

/// What is mounted at [`WORKSHOP`], to be mounted elsewhere by its descriptor.
fn detach() -> Result<OwnedFd, Error> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::AT_RECURSIVE;
    let tree =
        open_tree(CWD, WORKSHOP, flags).map_err(|errno| failed("open the tree of", WORKSHOP)(errno))?;
    unmount(WORKSHOP, UnmountFlags::DETACH).map_err(|errno| failed("unmount", WORKSHOP)(errno))?;
    Ok(tree)
}

/// Builds the container's tree and makes it the root. `terminal` says that a terminal was opened in its `/dev/pts`. Leaves the working
/// directory at the root.
pub fn enter_root(furniture: &Furniture, disks: &[Disk], terminal: bool) -> Result<(), Error> {
    let disks = disks.iter().map(find_disk).collect::<Result<alloc::vec::Vec<_>, _>>()?;
    pivot()?;
    // From here on every path, and so every symbolic link of the image, is inside the container.
    mount_at(c"proc", c"/proc", PLAIN, c"")?;
    place(&furniture.sys, c"/sys")?;
    place(&furniture.dev, c"/dev")?;
    if terminal {
        make_node(c"/dev/console", FileType::RegularFile, 0o600, 0)?;
        mount_bind(FIRST_TERMINAL, c"/dev/console").map_err(at("mount /dev/console"))?;
    }
    for (path, device) in disks {
        make_node(&path, FileType::BlockDevice, 0o660, device)?;
    }
    Ok(())
}

/// The disk's path in the container and its device number, by the kernel's own node.
fn find_disk(disk: &Disk) -> Result<(CString, Dev), Error> {
    let (path, device) = (disk_path(&disk.name)?, disk_path(&disk.device)?);
    let found = stat(&device).map_err(|errno| failed("find the disk", &device)(errno))?;
    if FileType::from_raw_mode(found.st_mode) == FileType::BlockDevice {
        Ok((path, found.st_rdev))
    } else {
        Err(Error::Request(format!("/dev/{} is not a disk", disk.device)))
    }
}

/// Leaves the initramfs for an empty tmpfs, which is the root and the working directory then. The agent's umask is 0 from here on: modes
/// are meant as they are written.
pub fn cover_initramfs() -> Result<(), Error> {
    umask(Mode::empty());
    // Where it is not this file that the kernel executed, it is not ours to remove.
    let _ = unlink(c"/init");
    mount(c"tmpfs", c"/", c"tmpfs", MountFlags::empty(), None::<&CStr>)
        .map_err(at("mount a tmpfs over /"))?;
    // "/" is still what is covered: a path begins at the root as it is, and only a step takes it to what is mounted there.
    chdir(c"/..").and_then(|()| chroot(c".")).map_err(at("enter the tmpfs over /"))
}

/// Makes what the agent's root holds, as far as it does not take an image.
pub fn make_directories() -> Result<(), Error> {
    // Modes are those of the container's root for the first: an overlay's root has the mode of its upper directory.
    for (path, mode) in [(c"/upper", 0o755), (c"/work", 0o755), (IMAGE, 0o700), (c"/dev", 0o700)] {
        mkdir(path, Mode::from_raw_mode(mode)).map_err(|errno| failed("mkdir", path)(errno))?;
    }
    mount(c"devtmpfs", c"/dev", c"devtmpfs", MountFlags::empty(), None::<&CStr>).map_err(at("mount /dev"))
}

/// Covers the image with an overlay whose changes are kept in memory.
pub fn make_overlay() -> Result<(), Error> {
    let data = c"lowerdir=/image,upperdir=/upper,workdir=/work";
    mount(c"overlay", IMAGE, c"overlay", MountFlags::empty(), data).map_err(at("mount the overlay"))
}

/// Makes the overlay the root, and unmounts all that is not below it.
fn pivot() -> Result<(), Error> {
    chdir(IMAGE).map_err(at("chdir to the overlay"))?;
    // With the same directory twice the old root ends up on top of the new one, where no directory has to be made for it.
    pivot_root(c".", c".").map_err(at("pivot_root to the overlay"))?;
    unmount(c".", UnmountFlags::DETACH).map_err(at("unmount the old root"))
}

/// The terminal of a devpts in which one was opened.
pub const FIRST_TERMINAL: &CStr = c"/dev/pts/0";

/// Mounts, and makes the directory if that is what the image lacks.
fn mount_at(fstype: &CStr, target: &CStr, flags: MountFlags, data: &CStr) -> Result<(), Error> {
    let mut result = mount(fstype, target, fstype, flags, data);
    if result == Err(Errno::NOENT) {
        make_directory(target)?;
        result = mount(fstype, target, fstype, flags, data);
    }
    result.map_err(|errno| failed("mount", target)(errno))
}

/// Mounts a detached tree, and makes the directory if that is what the image lacks.
fn place(tree: &OwnedFd, target: &CStr) -> Result<(), Error> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    let mut result = move_mount(tree, c"", CWD, target, flags);
    if result == Err(Errno::NOENT) {
        make_directory(target)?;
        result = move_mount(tree, c"", CWD, target, flags);
    }
    result.map_err(|errno| failed("mount", target)(errno))
}

fn make_directory(path: &CStr) -> Result<(), Error> {
    mkdir(path, Mode::from_raw_mode(0o755)).map_err(|errno| failed("mkdir", path)(errno))
}

fn make_node(path: &CStr, kind: FileType, mode: u32, device: Dev) -> Result<(), Error> {
    mknodat(CWD, path, kind, Mode::from_raw_mode(mode), device).map_err(|errno| failed("mknod", path)(errno))
}

fn failed(what: &str, path: &CStr) -> impl FnOnce(Errno) -> Error {
    at(format!("{what} {}", path.to_bytes().escape_ascii()))
}
