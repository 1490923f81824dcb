//! Starts the container's process: PID 1 of its own pid, mount and cgroup namespaces, with the VM's network. The uts and ipc namespaces are
//! those that the agent has made for it and uses for nothing itself: so a template has them.
//!
//! The child shares the agent's memory until it executes the command, and the agent waits for that, as with `vfork`: no page is copied, and an
//! error is just written where the agent finds it. It has its own descriptor table, and every descriptor of the agent's is close-on-exec.
//!
//! Capabilities: all, but for those that reach past the namespaces to the kernel's memory or its end. Docker's list is to come.

use alloc::vec::Vec;
use core::ffi::CStr;

use protocol::Start;
use rustix::fd::BorrowedFd;
use rustix::fs::{Mode, OFlags, ResolveFlags, fchown, mkdir, open};
use rustix::io::Errno;
use rustix::process::{Pid, chdir, ioctl_tiocsctty, setsid, umask};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::system::sethostname;
use rustix::thread::{
    CapabilitySet, Gid, Uid, remove_capability_from_bounding_set, set_thread_gid, set_thread_groups,
    set_thread_uid,
};

use crate::error::{Error, at};
use crate::file::read_bounded;
use crate::mounts::{FIRST_TERMINAL, Furniture};
use crate::stdio::Ends;
use crate::user::{Identity, identify};
use crate::{identity, mounts, process, seccomp, sys};

/// Those that the agent has not made already.
const NAMESPACES: i32 = libc::CLONE_NEWPID | libc::CLONE_NEWNS;

/// The name of a host that was given none; the kernel's own is "(none)".
const HOSTNAME: &[u8] = b"vmm";

/// Kernel modules; I/O ports and physical memory; another kernel.
const DROPPED: [CapabilitySet; 3] =
    [CapabilitySet::SYS_MODULE, CapabilitySet::SYS_RAWIO, CapabilitySet::SYS_BOOT];

/// Most bytes of the container's `/etc/passwd` and `/etc/group` that are read.
const MAX_USERS: usize = 1 << 20;

/// What is to be started, and with what.
pub struct Plan<'a> {
    /// What the host has said.
    pub start: &'a Start,
    /// Its stdio.
    pub ends: &'a Ends,
    /// What its `/etc/machine-id` says.
    pub machine_id: &'a [u8; 16],
    /// Its /sys and /dev.
    pub furniture: &'a Furniture,
    /// Its cgroup, if this kernel has cgroups.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// Starts the command. When this returns it is executing.
pub fn spawn(plan: &Plan<'_>) -> Result<Pid, Error> {
    let mut failure = None;
    let mut child = || failure = Some(enter(plan));
    let pid = sys::vfork(NAMESPACES, plan.cgroup, &mut child).map_err(at("clone the container's process"))?;
    // The child has either replaced itself, or written why it could not.
    match failure {
        None => Ok(pid),
        Some(error) => Err(error),
    }
}

/// In the child. Returns only with an error.
fn enter(plan: &Plan<'_>) -> Error {
    match prepare(plan) {
        Ok(environment) => process::execute(&plan.start.args, &environment),
        Err(error) => error,
    }
}

/// Everything before `execve`. Returns the environment.
fn prepare(plan: &Plan<'_>) -> Result<Vec<protocol::ByteString>, Error> {
    let start = plan.start;
    if plan.cgroup.is_some() {
        sys::unshare_cgroup().map_err(at("unshare the cgroups"))?;
    }
    mounts::enter_root(plan.furniture, &start.disks, start.terminal.is_some())?;
    identity::write_machine_id(plan.machine_id)?;
    let hostname = if start.hostname.is_empty() { HOSTNAME } else { start.hostname.as_bytes() };
    sethostname(hostname).map_err(at("set the host's name"))?;
    setsid().map_err(at("start a session"))?;
    let user = find_user(&start.user)?;
    attach(plan.ends, &user)?;
    umask(Mode::WGRP | Mode::WOTH);
    enter_directory(&start.cwd)?;
    become_user(&user, start.vsock)?;
    Ok(process::environment(&start.env, &user.home, hostname, start.terminal.is_some()))
}

/// Makes `ends` descriptors 0 to 2, and those that were made for this container its user's, so that it can open /dev/stdout again.
fn attach(ends: &Ends, user: &Identity) -> Result<(), Error> {
    let opened;
    let [stdin, stdout, stderr] = match ends {
        Ends::Pipes { stdin: Some(stdin), stdout, stderr } => [stdin, stdout, stderr],
        Ends::Pipes { stdin: None, stdout, stderr } => {
            opened = open(c"/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                .map_err(at("open /dev/null"))?;
            [&opened, stdout, stderr]
        }
        Ends::Terminal(_) => {
            // By its path in the container, where `ttyname` looks for it.
            let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
            opened = open(FIRST_TERMINAL, flags, Mode::empty()).map_err(at("open the terminal"))?;
            ioctl_tiocsctty(&opened).map_err(at("take the terminal"))?;
            [&opened; 3]
        }
    };
    if user.uid != 0 {
        for fd in [stdin, stdout, stderr] {
            fchown(fd, Some(Uid::from_raw(user.uid)), None).map_err(at("give stdio to the user"))?;
        }
    }
    dup2_stdin(stdin)
        .and_then(|()| dup2_stdout(stdout))
        .and_then(|()| dup2_stderr(stderr))
        .map_err(at("attach stdio"))
}

fn find_user(spec: &str) -> Result<Identity, Error> {
    if spec.is_empty() {
        return Ok(Identity::root());
    }
    identify(spec, &read_users(c"/etc/passwd")?, &read_users(c"/etc/group")?)
}

/// A file of users; nothing if the image has none.
fn read_users(path: &CStr) -> Result<Vec<u8>, Error> {
    let failed = |errno| at(alloc::format!("read the container's {}", path.to_bytes().escape_ascii()))(errno);
    Ok(read_bounded(path, ResolveFlags::empty(), MAX_USERS).map_err(failed)?.unwrap_or_default())
}

/// Enters the working directory, and makes it if it is missing.
fn enter_directory(path: &[u8]) -> Result<(), Error> {
    if path.is_empty() || path == b"/" {
        return Ok(());
    }
    if !path.starts_with(b"/") {
        return Err(Error::Request("the working directory is not an absolute path".into()));
    }
    let whole = process::c_string(path)?;
    let mut result = chdir(&whole);
    if result == Err(Errno::NOENT) {
        for (end, _) in path.iter().enumerate().skip(1).filter(|&(_, &byte)| byte == b'/') {
            make_directory(path.get(..end).unwrap_or_default())?;
        }
        make_directory(path)?;
        result = chdir(&whole);
    }
    result.map_err(at(alloc::format!("enter the working directory {}", path.escape_ascii())))
}

fn make_directory(path: &[u8]) -> Result<(), Error> {
    match mkdir(&process::c_string(path)?, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(at(alloc::format!("make the directory {}", path.escape_ascii()))(errno)),
    }
}

/// Gives up what the command is not to have, and becomes its user.
fn become_user(user: &Identity, vsock: bool) -> Result<(), Error> {
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    for capability in DROPPED {
        remove_capability_from_bounding_set(capability).map_err(at("drop a capability"))?;
    }
    if !vsock {
        sys::install_filter(&seccomp::NO_VSOCK).map_err(at("install the seccomp filter"))?;
    }
    // The kernel starts us, and so the child, as root and with no groups.
    if !user.groups.is_empty() {
        let groups: Vec<Gid> = user.groups.iter().map(|&group| Gid::from_raw(group)).collect();
        set_thread_groups(&groups).map_err(at("set the groups"))?;
    }
    if user.gid != 0 {
        set_thread_gid(gid).map_err(at("set the group"))?;
    }
    if user.uid != 0 {
        set_thread_uid(uid).map_err(at("set the user"))?;
    }
    Ok(())
}
