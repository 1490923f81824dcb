//! What a container does that wants out of its root. Runs in the container, as its PID 1 and with all that it may do.

use std::fs;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, mkdir, open};
use rustix::mount::{UnmountFlags, mount_move, unmount};
use rustix::process::{chdir, chroot, fchdir};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// In the environment of a container that is meant to do this.
pub const VARIABLE: &str = "AGENT_TEST_ESCAPE=1";

fn directory(path: &str) -> OwnedFd {
    open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

/// The names in a directory, in order, without this program's doing.
fn names(path: &str) -> String {
    let mut names: Vec<_> =
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names.join(" ")
}

/// Panics when something works.
pub fn try_everything() {
    if std::env::var_os("AGENT_TEST_ESCAPE").is_none() {
        return;
    }
    let root = directory("/");
    let namespace = open("/proc/self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    mkdir("/cell", Mode::RWXU).unwrap();
    let own = names("/");
    assert!(own.starts_with(".vmm bin cell dev etc"), "{own}");

    assert_eq!(names("/proc/1/root/../.."), own);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert_eq!(mounts.lines().count(), 7, "{mounts}");

    // A root that the working directory is not below does not stop "..".
    chroot("/cell").unwrap();
    fchdir(&root).unwrap();
    (0..64).for_each(|_| chdir("..").unwrap());
    assert_eq!(names("."), own);
    chroot(".").unwrap();

    // What is moved or unmounted shows what it has covered.
    assert!(mount_move("/", "/cell").is_err());
    unmount("/", UnmountFlags::DETACH).unwrap();
    (0..64).for_each(|_| chdir("..").unwrap());
    assert_eq!(names("."), own);

    // Entering a namespace leads to its very bottom. The thread needs a working directory of its own for that.
    std::thread::spawn(move || {
        use rustix::thread::{UnshareFlags, unshare_unsafe};
        // SAFETY: concerns the working directory and the root, not descriptors.
        unsafe { unshare_unsafe(UnshareFlags::FS) }.unwrap();
        move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), Some(LinkNameSpaceType::Mount))
            .unwrap();
        println!("below: {}", names("/"));
        println!("above: {}", names("/.."));
    })
    .join()
    .unwrap();
}
