//! What tells this machine from its doubles: random numbers, time, names. Given to a machine that begins, and to one that was copied while its
//! container was frozen.

use core::ffi::CStr;

use protocol::{Identity, Seed};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, ftruncate, lstat, open, openat, openat2};
use rustix::io::{Errno, write};
use rustix::system::sethostname;
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::error::{Error, at};
use crate::image::IMAGE;
use crate::sys;

/// 32 hexadecimal digits and the end of a line (machine-id(5)).
const MACHINE_ID: &CStr = c"/etc/machine-id";

/// Mixes `seed` into the kernel's random numbers, and has every generator begin anew from them.
pub fn reseed(seed: &Seed) -> Result<(), Error> {
    let pool = openat(CWD, c"/dev/urandom", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    pool.and_then(|pool| sys::reseed(&pool, seed)).map_err(at("seed the random numbers"))
}

/// Sets the time of day: nanoseconds since 1970.
pub fn set_clock(nanoseconds: u64) -> Result<(), Error> {
    const SECOND: u64 = 1_000_000_000;
    // Both fit: the first ends in the year 2554, the second below a second.
    let time = Timespec { tv_sec: (nanoseconds / SECOND) as i64, tv_nsec: (nanoseconds % SECOND) as i64 };
    clock_settime(ClockId::Realtime, time).map_err(at("set the clock"))
}

/// Gives the container its new names, while it is frozen.
pub fn rename(identity: &Identity) -> Result<(), Error> {
    if let Some(hostname) = &identity.hostname {
        // The agent is in the container's namespace.
        sethostname(hostname.as_bytes()).map_err(at("set the host's name"))?;
    }
    // What the container has made of its files since it was started is its own affair.
    if let Err(error) = rewrite_machine_id(&identity.machine_id) {
        crate::log(&alloc::format!("vmm-agent: {error}\n"));
    }
    Ok(())
}

/// Writes the machine id into the container's root as the agent has it mounted, so that no process has to be sent there. Symbolic links of
/// the container's lead nowhere else, and what else may have taken the file's place is left alone.
fn rewrite_machine_id(id: &[u8; 16]) -> Result<(), Error> {
    let failed = at("write the container's /etc/machine-id");
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = match openat(CWD, IMAGE, flags, Mode::empty()) {
        Ok(root) => root,
        Err(errno) => return Err(failed(errno)),
    };
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let written = match openat2(&root, c"etc/machine-id", flags, Mode::empty(), resolve) {
        Ok(file) => fstat(&file).and_then(|found| match FileType::from_raw_mode(found.st_mode) {
            FileType::RegularFile => {
                ftruncate(&file, 0).and_then(|()| write(&file, &machine_id_line(id)).map(drop))
            }
            _ => Ok(()),
        }),
        // A symbolic link, a pipe that nobody reads.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NXIO) => Ok(()),
        Err(errno) => Err(errno),
    };
    written.map_err(failed)
}

/// Writes the container's machine id where its image keeps one. To be called in the container's root.
pub fn write_machine_id(id: &[u8; 16]) -> Result<(), Error> {
    match lstat(MACHINE_ID) {
        Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::RegularFile => (),
        _ => return Ok(()),
    }
    let flags = OFlags::WRONLY | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    open(MACHINE_ID, flags, Mode::empty())
        .and_then(|file| write(&file, &machine_id_line(id)).map(drop))
        .map_err(at("write /etc/machine-id"))
}

fn machine_id_line(id: &[u8; 16]) -> [u8; 33] {
    let mut line = [b'\n'; 33];
    for (digits, byte) in line.chunks_exact_mut(2).zip(id) {
        digits.copy_from_slice(&[digit(byte >> 4), digit(byte & 15)]);
    }
    line
}

fn digit(value: u8) -> u8 {
    if value < 10 { b'0' + value } else { b'a' + (value - 10) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_ids() {
        let mut id = [0xa7; 16];
        id[15] = 0x09;
        assert_eq!(&machine_id_line(&id), b"a7a7a7a7a7a7a7a7a7a7a7a7a7a7a709\n");
    }
}
