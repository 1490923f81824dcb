//! The network card (section 5.1), on a TAP interface of the host; or on none, like one whose cable is not plugged in, until a
//! TAP is attached.
//!
//! Built by whoever opened the TAP; then everything happens on the device loop's thread. Packets move between the TAP and guest
//! memory without a copy, 64 KiB at a time and without checksums where the driver agrees: the kernel behind the TAP
//! understands virtio's header, so we never look into a packet.

mod receive;
mod tap;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use receive::{Receiver, Turn};
use tap::Tap;
pub use tap::TapError;
use vmm_sys_util::epoll::EventSet;

use super::device::{AttachError, Backend, DeviceState, StateError};
use super::queue::Served;
use super::{Chain, DeviceError, DeviceKind, Profile, Queue, VirtioDevice};
use crate::device_loop::{Source, Watch};

/// Feature bits (section 5.1.3). GUEST: what the driver takes; HOST: what it gives.
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const MRG_RXBUF: u64 = 1 << 15;
}

/// Bytes of `struct virtio_net_hdr_v1`, before each packet (section 5.1.6).
const HEADER_LEN: usize = 12;
/// The longest packet: 64 KiB of IP behind an Ethernet header with a VLAN tag, and virtio's header.
const LONGEST: usize = HEADER_LEN + 18 + 65535;
/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;
const RX: usize = 0;
const TX: usize = 1;
const TAP: Source = 0;

/// What the card has done. Read on any thread.
#[derive(Debug, Default)]
pub struct Counters {
    /// Packets given to the driver.
    pub rx_packets: AtomicU64,
    /// Their bytes.
    pub rx_bytes: AtomicU64,
    /// Packets from the TAP that the driver's buffers were too small for.
    pub rx_dropped: AtomicU64,
    /// Packets that the TAP took.
    pub tx_packets: AtomicU64,
    /// Their bytes.
    pub tx_bytes: AtomicU64,
    /// Packets that the TAP refused: the interface is down, or the driver's header is wrong.
    pub tx_dropped: AtomicU64,
}

/// What a snapshot carries of a network card.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct NetState {
    /// The address that the driver was told.
    pub mac: [u8; 6],
}

/// A network card.
pub struct Net {
    /// Nothing, in a card that is not plugged in.
    tap: Option<Tap>,
    /// The TAP may hold packets from before the driver came.
    stale: bool,
    mac: [u8; 6],
    counters: Arc<Counters>,
    receiver: Option<Receiver>,
    transmit: Option<Queue>,
    state: State,
}

/// What is known of the TAP.
struct State {
    /// What wakes us. Nothing at all while empty: an interface that goes away would not stop waking us.
    watched: EventSet,
    /// There may be packets, and there is room for them.
    receiving: bool,
    /// It takes no packets for now.
    congested: bool,
}

impl Default for State {
    fn default() -> Self {
        State { watched: EventSet::empty(), receiving: false, congested: false }
    }
}

impl Net {
    /// A card with the address `mac` on an attached TAP.
    ///
    /// # Errors
    /// [`TapError`] when the descriptor is no TAP opened for virtio's header, or `mac` is a group address.
    pub fn new(tap: OwnedFd, mac: [u8; 6]) -> Result<Self, TapError> {
        let mut card = Net::unplugged(mac)?;
        card.tap = Some(Tap::new(tap)?);
        Ok(card)
    }

    /// A card with the address `mac` and no TAP: what is sent is dropped, and nothing is received.
    ///
    /// # Errors
    /// [`TapError::Multicast`] when `mac` is a group address.
    pub fn unplugged(mac: [u8; 6]) -> Result<Self, TapError> {
        if is_group(mac) {
            return Err(TapError::Multicast);
        }
        let counters = Arc::default();
        let state = State::default();
        Ok(Net { tap: None, stale: true, mac, counters, receiver: None, transmit: None, state })
    }

    /// What the card does from now on, counted.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// Drops what the TAP holds from before the driver came: it may be in a shape that this driver did not agree to.
    fn discard_stale(&mut self) {
        let Some(tap) = self.tap.as_ref().filter(|_| std::mem::take(&mut self.stale)) else { return };
        let mut packet = [0u8; 64];
        // As many as an interface queues by default, twice over. Errors show again, and count, later.
        for _ in 0..2000 {
            if tap.read(&[], &mut packet).is_err() {
                break;
            }
        }
    }

    fn receive(&mut self) -> Result<(), DeviceError> {
        if let (Some(receiver), Some(tap)) = (&mut self.receiver, &self.tap) {
            self.state.receiving = receiver.run(tap, &self.counters)? == Turn::Over;
        }
        Ok(())
    }

    fn transmit(&mut self) -> Result<(), DeviceError> {
        let Some(queue) = &mut self.transmit else { return Ok(()) };
        self.state.congested = false;
        queue.drain(|chain| {
            let served = send(self.tap.as_ref(), &self.counters, chain);
            self.state.congested = served == Served::Later;
            Ok(served)
        })
    }

    /// Watches the TAP for what is of use now.
    fn watch_tap(&mut self, watch: &mut Watch) {
        let Some(tap) = &self.tap else { return };
        let mut wanted = EventSet::empty();
        wanted.set(EventSet::IN, self.state.receiving);
        wanted.set(EventSet::OUT, self.state.congested);
        let watched = std::mem::replace(&mut self.state.watched, wanted);
        if watched == wanted {
        } else if wanted.is_empty() {
            watch.remove(tap, TAP);
        } else if watched.is_empty() {
            watch.add(tap, TAP, wanted);
        } else {
            watch.modify(tap, TAP, wanted);
        }
    }
}

/// Sends one packet, or loses it: as on any network, nobody is told.
fn send(tap: Option<&Tap>, counters: &Counters, chain: &mut Chain) -> Served {
    let len = chain.reader.remaining();
    let outcome = match tap {
        // The kernel never takes a part of a packet.
        Some(tap) if len > HEADER_LEN && len <= LONGEST => {
            retry(|| chain.reader.read_with(len, |slices| tap.write(slices)))
        }
        _ => Err(io::ErrorKind::InvalidInput.into()),
    };
    match outcome {
        Ok(_) => {
            counters.tx_packets.fetch_add(1, Relaxed);
            counters.tx_bytes.fetch_add(len.saturating_sub(HEADER_LEN) as u64, Relaxed);
            Served::Done
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Served::Later,
        Err(_) => {
            counters.tx_dropped.fetch_add(1, Relaxed);
            chain.fail();
            Served::Done
        }
    }
}

/// Whether `mac` stands for many cards (IEEE 802: the first bit on the wire).
fn is_group(mac: [u8; 6]) -> bool {
    mac.first().is_some_and(|first| first & 1 != 0)
}

/// Calls `f` again when a signal interrupted it.
fn retry<T>(mut f: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match f() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

/// The packets that the driver takes unfinished, in the TAP's words (`TUN_F_*`).
fn offloads(features: u64) -> libc::c_uint {
    let takes = |feature, flag| if features & feature != 0 { flag } else { 0 };
    match takes(feature::GUEST_CSUM, libc::TUN_F_CSUM) {
        // Segments without checksums are of no use to who wants checksums (section 5.1.3.1).
        0 => 0,
        checksum => {
            checksum
                | takes(feature::GUEST_TSO4, libc::TUN_F_TSO4)
                | takes(feature::GUEST_TSO6, libc::TUN_F_TSO6)
        }
    }
}

impl VirtioDevice for Net {
    fn profile(&self) -> Profile {
        use feature::*;
        let guest = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | MRG_RXBUF;
        let host = CSUM | HOST_TSO4 | HOST_TSO6;
        Profile {
            kind: DeviceKind::Net,
            features: MAC | guest | host,
            queue_sizes: vec![QUEUE_SIZE; 2],
            // `struct virtio_net_config` (section 5.1.4) as far as it is offered.
            config: self.mac.to_vec(),
        }
    }

    fn activate(&mut self, features: u64, queues: Vec<Queue>, watch: &mut Watch) -> Result<(), DeviceError> {
        let queues: Result<[Queue; 2], _> = queues.try_into();
        let [receive, transmit] =
            queues.map_err(|_| DeviceError::Protocol("a network card has two queues".into()))?;
        self.receiver = Some(Receiver::new(receive, features & feature::MRG_RXBUF != 0));
        self.transmit = Some(transmit);
        if let Some(tap) = &self.tap {
            tap.set_offloads(offloads(features))
                .map_err(|source| DeviceError::Host { what: "TUNSETOFFLOAD", source })?;
            self.discard_stale();
            self.state.receiving = true;
        }
        self.watch_tap(watch);
        Ok(())
    }

    fn kicked(&mut self, queue: usize, watch: &mut Watch) -> Result<(), DeviceError> {
        match queue {
            // New buffers. While the TAP is watched they are found when they are needed.
            RX if !self.state.receiving => self.receive()?,
            TX => self.transmit()?,
            _ => {}
        }
        self.watch_tap(watch);
        Ok(())
    }

    fn ready(&mut self, _: Source, watch: &mut Watch) -> Result<(), DeviceError> {
        if self.state.congested {
            self.transmit()?;
        }
        if self.state.receiving {
            self.receive()?;
        }
        self.watch_tap(watch);
        Ok(())
    }

    fn quiesce(&mut self, watch: &mut Watch) -> Vec<Queue> {
        (self.state.receiving, self.state.congested) = (false, false);
        self.watch_tap(watch);
        let receive = self.receiver.take().map(Receiver::into_queue);
        receive.into_iter().chain(self.transmit.take()).collect()
    }

    fn reset(&mut self, _: &mut Watch) {
        self.stale = true;
    }

    fn save(&self) -> DeviceState {
        DeviceState::Net(NetState { mac: self.mac })
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        match state {
            DeviceState::Net(NetState { mac }) if is_group(mac) => {
                Err(StateError::Mismatch(TapError::Multicast.to_string()))
            }
            DeviceState::Net(NetState { mac }) => {
                self.mac = mac;
                Ok(())
            }
            _ => Err(StateError::Mismatch("not a network card's".into())),
        }
    }

    fn attach(&mut self, backend: Backend) -> Result<Vec<u8>, AttachError> {
        let Backend::Tap(tap) = backend else { return Err(AttachError::Kind(DeviceKind::Net)) };
        self.tap = Some(Tap::new(tap).map_err(|error| AttachError::Refused(error.to_string()))?);
        self.stale = true;
        Ok(self.profile().config)
    }
}

#[cfg(test)]
mod tests;
