//! A TAP interface of the host (`include/uapi/linux/if_tun.h`), opened and attached by somebody else. Used on the device
//! loop's thread.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::fs::OFlags;
use thiserror::Error;

use super::HEADER_LEN;
use crate::memory::Slice;
use crate::virtio::vectored;

/// What an interface must be: an Ethernet one, without the old packet information, with virtio's header before each packet.
pub(super) const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Why an interface cannot be used.
#[derive(Debug, Error)]
pub enum TapError {
    /// The kernel refuses.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// It is not a TAP, or was opened without virtio's header.
    #[error("the descriptor is not a TAP opened with IFF_NO_PI and IFF_VNET_HDR")]
    Flags,
    /// The address is for groups, not for one card.
    #[error("a network card's address must have bit 0 of its first byte clear")]
    Multicast,
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> TapError {
    move |source| TapError::Host { what, source }
}

pub(super) fn ifreq() -> libc::ifreq {
    // SAFETY: plain data of the C ABI, for which all zeros is valid.
    unsafe { std::mem::zeroed() }
}

fn check(returned: libc::c_int) -> io::Result<()> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// An open TAP whose packets have virtio's header of 12 bytes before them.
pub struct Tap(OwnedFd);

impl Tap {
    /// Takes a descriptor that somebody attached to an interface.
    ///
    /// # Errors
    /// [`TapError`] when it is no TAP, or attached without what is needed.
    pub fn new(fd: OwnedFd) -> Result<Self, TapError> {
        let mut request = ifreq();
        // SAFETY: TUNGETIFF writes one `ifreq`, which `request` is; the kernel checks that the descriptor is of its kind.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })
            .map_err(|_| TapError::Flags)?;
        // SAFETY: a successful TUNGETIFF filled in this member of the union.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        if libc::c_int::from(flags) & FLAGS != FLAGS {
            return Err(TapError::Flags);
        }
        let header = libc::c_int::try_from(HEADER_LEN).unwrap_or_default();
        // SAFETY: TUNSETVNETHDRSZ reads one `int`.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) })
            .map_err(host("the TAP takes no header of 12 bytes (TUNSETVNETHDRSZ)"))?;
        let non_blocking = rustix::fs::fcntl_getfl(&fd)
            .and_then(|flags| rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK));
        non_blocking.map_err(|e| host("the TAP cannot be made non-blocking")(e.into()))?;
        Ok(Tap(fd))
    }

    /// Says which packets the other side can take unfinished: `TUN_F_*`.
    ///
    /// # Errors
    /// That of the ioctl.
    pub fn set_offloads(&self, flags: libc::c_uint) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
    }

    /// Reads one packet into `slices`, and what does not fit into `spill`; what does not fit there either is lost.
    ///
    /// # Errors
    /// That of `readv(2)`; `WouldBlock` when there is none.
    pub fn read(&self, slices: &[Slice<'_>], spill: &mut [u8]) -> io::Result<usize> {
        vectored::read_spilling(&self.0, slices, spill)
    }

    /// Writes one packet.
    ///
    /// # Errors
    /// That of `writev(2)`: `WouldBlock` when the interface is congested, `EIO` when it is down, `EINVAL` when header and
    /// packet do not agree.
    pub fn write(&self, slices: &[Slice<'_>]) -> io::Result<usize> {
        vectored::write(&self.0, slices)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
