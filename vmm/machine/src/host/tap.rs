//! Opens the host's end of a network card: a TAP that exists already. vmm makes no interfaces.
//!
//! The thin wrapper of the `TUN*` ioctls (Linux's Documentation/networking/tuntap.rst). Used on the main thread by
//! [`crate::plan::Plan`]; the device then reads and writes frames with a virtio-net header before each.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use libc::{c_int, c_short, c_uint};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};
use thiserror::Error;

/// `struct virtio_net_hdr_v1`: what a modern virtio-net device has before each frame.
pub const HEADER: u8 = 12;
const DEVICE: &str = "/dev/net/tun";

/// An attached TAP: frames in and out, never blocking. Detached when dropped.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

/// Why a TAP cannot be used. Each message is one line: what, where, and what to do.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the message says it")]
pub enum TapError {
    #[error("cannot open {DEVICE}: {0}: modprobe tun, or run as a user who may open it")]
    Device(std::io::Error),
    #[error(
        "the TAP {name:?} does not exist: make it with `ip tuntap add {name} mode tap`, and `ip link set {name} up`"
    )]
    Missing { name: String },
    #[error(
        "the interface {name:?} is not a TAP with one queue: make one with `ip tuntap add NAME mode tap`"
    )]
    NotTap { name: String },
    #[error("the TAP {name:?} is in use by another process: give each machine its own")]
    Busy { name: String },
    #[error(
        "no permission for the TAP {name:?}: make it yours with `ip tuntap add {name} mode tap user $USER`"
    )]
    Permission { name: String },
    #[error("cannot set up the TAP {name:?}: {source}")]
    Setup { name: String, source: std::io::Error },
}

impl Tap {
    /// Attaches to the TAP of this name in the current network namespace, with a header of [`HEADER`] bytes before each
    /// frame and all offloads off.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let setup = |source: std::io::Error| TapError::Setup { name: name.into(), source };
        // TUNSETIFF makes what it does not find, so look first.
        let any = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
            .map_err(|e| setup(e.into()))?;
        match netdevice::name_to_index(&any, name) {
            Ok(_) => {}
            Err(Errno::NODEV) => return Err(TapError::Missing { name: name.into() }),
            Err(e) => return Err(setup(e.into())),
        }
        let mut options = OpenOptions::new();
        let file =
            options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(DEVICE);
        let tap = Self { file: file.map_err(TapError::Device)?, name: name.into() };
        tap.attach().map_err(|e| attach_error(name, e))?;
        if tap.flags().map_err(setup)? & libc::IFF_PERSIST == 0 {
            // A TAP that lives only as long as its descriptor, and the descriptor is ours: it went away after we looked,
            // and TUNSETIFF made it anew. Closing it takes it away again.
            return Err(TapError::Missing { name: name.into() });
        }
        tap.reset_framing().map_err(setup)?;
        Ok(tap)
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The open file: one frame with its header per read and write.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives the open file away.
    pub fn into_file(self) -> File {
        self.file
    }

    fn attach(&self) -> std::io::Result<()> {
        let mut request = self.request()?;
        request.ifr_ifru.ifru_flags = flags_field(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
        // SAFETY: the file is /dev/net/tun's, and TUNSETIFF reads and writes one `ifreq`, which lives through the call.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })
    }

    fn flags(&self) -> std::io::Result<c_int> {
        let mut request = self.request()?;
        // SAFETY: as above; TUNGETIFF writes one `ifreq`.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNGETIFF as _, &raw mut request) })?;
        // SAFETY: TUNGETIFF has set this member of the union, and any bits are a valid `c_short`.
        Ok(c_int::from(unsafe { request.ifr_ifru.ifru_flags }))
    }

    /// A TAP keeps the last user's choices.
    fn reset_framing(&self) -> std::io::Result<()> {
        let size = c_int::from(HEADER);
        // SAFETY: TUNSETVNETHDRSZ reads one `int`, which lives through the call.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const size) })?;
        let none: c_uint = 0;
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD as _, none) })
    }

    fn request(&self) -> std::io::Result<libc::ifreq> {
        // SAFETY: `ifreq` is plain data of the C API, for which zero bytes are an empty name and empty members.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // One byte stays zero behind the name.
        if self.name.is_empty() || self.name.len() >= request.ifr_name.len() {
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        for (to, from) in request.ifr_name.iter_mut().zip(self.name.bytes()) {
            *to = from.cast_signed();
        }
        Ok(request)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The name of the interface that `tap`, which somebody else attached, is the host's end of; `None` when it is no TAP.
pub fn name(tap: &impl AsFd) -> Option<String> {
    // SAFETY: `ifreq` is plain data of the C API, for which zero bytes are an empty name and empty members.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF writes one `ifreq`, which lives through the call. A file that is something else does not know the request, or has
    // one of the same number that writes an `ifreq` too or less: the number says how much.
    check(unsafe { libc::ioctl(tap.as_fd().as_raw_fd(), libc::TUNGETIFF as _, &raw mut request) }).ok()?;
    let bytes = request.ifr_name.iter().map(|byte| byte.cast_unsigned()).take_while(|byte| *byte != 0);
    String::from_utf8(bytes.collect()).ok().filter(|name| !name.is_empty())
}

#[allow(clippy::cast_possible_truncation, reason = "the flags have 16 bits in the kernel's interface")]
fn flags_field(flags: c_int) -> c_short {
    flags as c_short
}

fn check(result: c_int) -> std::io::Result<()> {
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

fn attach_error(name: &str, source: std::io::Error) -> TapError {
    let name = name.to_string();
    match Errno::from_io_error(&source) {
        Some(Errno::BUSY) => TapError::Busy { name },
        Some(Errno::PERM | Errno::ACCESS) => TapError::Permission { name },
        Some(Errno::INVAL) => TapError::NotTap { name },
        _ => TapError::Setup { name, source },
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use rustix::thread::{UnshareFlags, unshare_unsafe};

    use super::*;

    /// Moves this thread, and what it starts, into a network namespace of its own; `false` where we may not.
    fn in_own_network(test: &str) -> bool {
        // SAFETY: the network namespace is the thread's own, and nothing of this process depends on it.
        match unsafe { unshare_unsafe(UnshareFlags::NEWNET) } {
            Ok(()) => true,
            Err(e) if std::env::var_os("CI").is_none() => {
                eprintln!("skipped: {test}: no network namespace: {e}");
                false
            }
            Err(e) => panic!("{e}"),
        }
    }

    fn ip(arguments: &str) {
        assert!(Command::new("ip").args(arguments.split(' ')).status().unwrap().success(), "ip {arguments}");
    }

    #[test]
    fn only_an_existing_free_tap_is_opened() {
        if !in_own_network("only_an_existing_free_tap_is_opened") {
            return;
        }
        let message = |name: &str| Tap::open(name).map(|_| ()).unwrap_err().to_string();
        assert!(message("absent0").starts_with("the TAP \"absent0\" does not exist: "));
        assert!(message("lo").starts_with("the interface \"lo\" is not a TAP"));
        assert!(!Command::new("ip").args(["link", "show", "absent0"]).output().unwrap().status.success());

        ip("tuntap add tun0 mode tun");
        assert!(message("tun0").contains("is not a TAP"));
        ip("tuntap add many0 mode tap multi_queue");
        assert!(message("many0").contains("is not a TAP with one queue"));

        ip("tuntap add tap0 mode tap");
        let tap = Tap::open("tap0").unwrap();
        assert_eq!(tap.name(), "tap0");
        assert_eq!(name(&tap).as_deref(), Some("tap0"));
        assert_eq!(name(&std::fs::File::open("/dev/null").unwrap()), None);
        assert!(message("tap0").starts_with("the TAP \"tap0\" is in use"));
        drop(tap);
        Tap::open("tap0").unwrap();
    }

    #[test]
    fn a_frame_has_a_header_and_reading_does_not_block() {
        if !in_own_network("a_frame_has_a_header_and_reading_does_not_block") {
            return;
        }
        ip("tuntap add tap0 mode tap");
        ip("link set tap0 up");
        let tap = Tap::open("tap0").unwrap();
        let mut frame = [0; 2048];
        // The interface may send a few frames of its own (IPv6 looks for routers); then there is nothing more to read.
        let end = (0..100).find_map(|_| rustix::io::read(&tap, &mut frame).err());
        assert_eq!(end, Some(Errno::AGAIN));
        let mut frame = vec![0_u8; usize::from(HEADER) + 60];
        frame[12..18].fill(0xff);
        assert_eq!(rustix::io::write(&tap, &frame), Ok(frame.len()));
        assert_eq!(rustix::io::write(&tap, &frame[..12]), Err(Errno::INVAL));
    }

    #[test]
    fn a_name_that_does_not_fit_is_an_error() {
        assert!(Tap::open("sixteen-letters-").is_err());
        assert!(Tap::open("").is_err());
    }
}
