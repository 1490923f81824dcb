//! The entropy device (section 5.4): answers each buffer with random bytes of the host's kernel.
//!
//! Everything happens on the device loop's thread. The host's generator never blocks once it is seeded, which it is long
//! before anybody starts a virtual machine.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

use super::device::{DeviceState, StateError};
use super::queue::Served;
use super::{Chain, DeviceError, DeviceKind, Profile, Queue, VirtioDevice};
use crate::device_loop::{Source, Watch};

/// Entries of the queue: Linux has one request in flight.
const QUEUE_SIZE: u16 = 16;
/// The most bytes that one request gets: a driver asks again when it wants more (section 5.4.6).
const MOST_BYTES: usize = 64 << 10;
/// Bytes that `getrandom(2)` yields whole, whatever signals arrive.
const PIECE: usize = 256;

/// A source of entropy.
#[derive(Default)]
pub struct Rng {
    queue: Option<Queue>,
}

impl Rng {
    /// An entropy device.
    pub fn new() -> Self {
        Self::default()
    }
}

fn fill(chain: &mut Chain) -> Result<Served, DeviceError> {
    let mut left = chain.writer.remaining().min(MOST_BYTES);
    if left == 0 {
        return Err(DeviceError::Protocol("a request for entropy has no room for it".into()));
    }
    let mut bytes = [0; PIECE];
    while left > 0 {
        let host = |error| DeviceError::Host { what: "getrandom", source: io::Error::from(error) };
        let got = getrandom(&mut bytes, GetRandomFlags::empty()).map_err(host)?;
        let piece = bytes.get(..got.min(left)).unwrap_or_default();
        chain.writer.write_all(piece)?;
        left -= piece.len();
    }
    Ok(Served::Done)
}

impl VirtioDevice for Rng {
    fn profile(&self) -> Profile {
        Profile { kind: DeviceKind::Rng, features: 0, queue_sizes: vec![QUEUE_SIZE], config: vec![] }
    }

    fn activate(&mut self, _: u64, queues: Vec<Queue>, _: &mut Watch) -> Result<(), DeviceError> {
        self.queue = queues.into_iter().next();
        Ok(())
    }

    fn kicked(&mut self, _: usize, _: &mut Watch) -> Result<(), DeviceError> {
        self.queue.as_mut().map_or(Ok(()), |queue| queue.drain(fill))
    }

    fn ready(&mut self, _: Source, _: &mut Watch) -> Result<(), DeviceError> {
        Ok(())
    }

    fn quiesce(&mut self, _: &mut Watch) -> Vec<Queue> {
        self.queue.take().into_iter().collect()
    }

    fn save(&self) -> DeviceState {
        DeviceState::Rng
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        match state {
            DeviceState::Rng => Ok(()),
            _ => Err(StateError::Mismatch("not an entropy device's".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, Guest};

    #[test]
    fn fills_what_it_is_given_up_to_a_limit() {
        let mut guest = Guest::start(Box::new(Rng::new()), 0);
        let (_, small) = guest.drivers[0].send(&[], &[32, 33]);
        let (_, large) = guest.drivers[0].send(&[], &[MOST_BYTES + 1000]);
        testing::marking(&guest.drivers[0].memory.clone(), || {
            guest.kick(0);
            assert_eq!(guest.receive(0), (0, 65));
            assert_eq!(guest.receive(0), (2, 65536));
        });
        let driver = &guest.drivers[0];
        assert_ne!(driver.bytes(small[0], 32), [0; 32]);
        assert_ne!(driver.bytes(small[1], 32), driver.bytes(small[0], 32));
        assert_ne!(driver.bytes(large[0] + 65500, 36), [0; 36], "to the last byte");
        assert_eq!(driver.bytes(large[0] + 65536, 1000), [0; 1000], "and no further");
    }

    #[test]
    fn a_request_without_room_fails_the_device() {
        let mut guest = Guest::start(Box::new(Rng::new()), 0);
        guest.drivers[0].send(&[b"give me some"], &[]);
        guest.kick(0);
        guest.wait_for_failure();
    }
}
