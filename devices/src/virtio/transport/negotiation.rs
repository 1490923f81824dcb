//! The conversation between driver and device before the device is live (sections 2.1, 2.2 and 3.1), as plain data.
//!
//! No locks, no guest memory, no file descriptors: the transport feeds register writes in and carries out the [`Effect`].

use virtio_queue::{Queue as Ring, QueueT};

use super::state::{NegotiationState, QueueState, RestoreError};
use crate::virtio::device::Profile;

/// Status bits (section 2.1).
pub mod status {
    /// The driver has seen the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u32 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u32 = 4;
    /// Features are agreed on.
    pub const FEATURES_OK: u32 = 8;
    /// The device is beyond use until it is reset.
    pub const DEVICE_NEEDS_RESET: u32 = 64;
    /// The driver has given up.
    pub const FAILED: u32 = 128;
}

/// The values that the status register can have, but for `DEVICE_NEEDS_RESET` and `FAILED`, which come on top of any.
const STEPS: [u32; 5] = [
    0,
    status::ACKNOWLEDGE,
    status::ACKNOWLEDGE | status::DRIVER,
    status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK,
    status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK,
];

/// Feature bits that belong to the transport and the queues (section 6).
pub mod feature {
    /// Indirect descriptors.
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    /// Event suppression by index.
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    /// Not a legacy device.
    pub const VERSION_1: u64 = 1 << 32;
}

const TRANSPORT_FEATURES: u64 = feature::RING_INDIRECT_DESC | feature::RING_EVENT_IDX | feature::VERSION_1;

/// Which of a queue's three rings an address is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RingPart {
    /// Descriptor table.
    Descriptors,
    /// Available ring.
    Driver,
    /// Used ring.
    Device,
}

/// What the transport has to do after a status write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Effect {
    /// Nothing.
    None,
    /// Hand the queues to the device.
    Activate,
    /// Take the queues back from the device; everything is as after power-on.
    Reset,
}

/// The state of the conversation.
pub struct Negotiation {
    offered: u64,
    accepted: u64,
    offered_page: u32,
    accepted_page: u32,
    status: u32,
    selected: u32,
    rings: Vec<Ring>,
}

impl Negotiation {
    /// Before the driver's first word. A queue size that is no power of two is taken down to one.
    pub fn new(profile: &Profile) -> Self {
        Negotiation {
            offered: profile.features | TRANSPORT_FEATURES,
            accepted: 0,
            offered_page: 0,
            accepted_page: 0,
            status: 0,
            selected: 0,
            rings: fresh_rings(profile),
        }
    }

    /// The status register.
    pub fn status(&self) -> u32 {
        self.status
    }

    /// All feature bits that both sides agreed on.
    pub fn features(&self) -> u64 {
        self.accepted
    }

    /// The 32 offered feature bits of the selected page.
    pub fn offered_features(&self) -> u32 {
        page(self.offered, self.offered_page)
    }

    /// Selects which 32 feature bits are read.
    pub fn select_offered(&mut self, page: u32) {
        self.offered_page = page;
    }

    /// Selects which 32 feature bits are written.
    pub fn select_accepted(&mut self, page: u32) {
        self.accepted_page = page;
    }

    /// The driver takes features. After `FEATURES_OK` it is too late (section 3.1.1), and the write is ignored.
    pub fn accept_features(&mut self, bits: u32) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        match self.accepted_page {
            0 => self.accepted = self.accepted & !0xffff_ffff | u64::from(bits),
            1 => self.accepted = self.accepted & 0xffff_ffff | u64::from(bits) << 32,
            _ => {}
        }
    }

    /// Selects the queue that the queue registers mean.
    pub fn select_queue(&mut self, index: u32) {
        self.selected = index;
    }

    /// The most entries that the selected queue may have; 0 where there is no such queue.
    pub fn queue_max_size(&self) -> u16 {
        self.selected_ring().map_or(0, QueueT::max_size)
    }

    /// Whether the driver enabled the selected queue.
    pub fn queue_ready(&self) -> bool {
        self.selected_ring().is_some_and(QueueT::ready)
    }

    /// Sets the size of the selected queue. A size that the queue cannot have is ignored.
    pub fn set_queue_size(&mut self, size: u32) {
        if let (Some(ring), Ok(size)) = (self.configurable_ring(), u16::try_from(size)) {
            ring.set_size(size);
        }
    }

    /// Enables or disables the selected queue.
    pub fn set_queue_ready(&mut self, ready: bool) {
        // A queue may be taken back one by one only with RING_RESET, which is not offered; before DRIVER_OK all is free.
        if self.status & status::DRIVER_OK == 0
            && let Some(ring) = self.selected_ring_mut()
        {
            ring.set_ready(ready);
        }
    }

    /// Sets one half of the address of one part of the selected queue.
    pub fn set_ring_address(&mut self, part: RingPart, low: Option<u32>, high: Option<u32>) {
        if let Some(ring) = self.configurable_ring() {
            match part {
                RingPart::Descriptors => ring.set_desc_table_address(low, high),
                RingPart::Driver => ring.set_avail_ring_address(low, high),
                RingPart::Device => ring.set_used_ring_address(low, high),
            }
        }
    }

    /// Takes a write to the status register. The steps must come in order (section 3.1.1); bits never go away but by a reset,
    /// and what is out of order is ignored, as is everything after `FAILED`.
    pub fn write_status(&mut self, value: u32) -> Effect {
        use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK};
        if value == 0 {
            return Effect::Reset;
        }
        if value & FAILED != 0 {
            self.status |= FAILED;
            return Effect::None;
        }
        let next = match self.status {
            0 => ACKNOWLEDGE,
            ACKNOWLEDGE => ACKNOWLEDGE | DRIVER,
            s if s == ACKNOWLEDGE | DRIVER => s | FEATURES_OK,
            s if s == ACKNOWLEDGE | DRIVER | FEATURES_OK => s | DRIVER_OK,
            _ => return Effect::None,
        };
        if value != next {
            return Effect::None;
        }
        if next & FEATURES_OK != 0 && self.status & FEATURES_OK == 0 && !self.features_are_valid() {
            // The driver reads the register back and finds the bit missing (section 2.2).
            return Effect::None;
        }
        self.status = next;
        if next & DRIVER_OK != 0 { Effect::Activate } else { Effect::None }
    }

    /// Moves the rings out for activation, with what was agreed on applied to them. They are gone until the reset.
    pub fn take_rings(&mut self) -> Vec<Ring> {
        let event_idx = self.accepted & feature::RING_EVENT_IDX != 0;
        let mut rings = std::mem::take(&mut self.rings);
        rings.iter_mut().for_each(|r| r.set_event_idx(event_idx));
        rings
    }

    /// Everything as after power-on.
    pub fn reset(&mut self, profile: &Profile) {
        *self = Negotiation::new(profile);
    }

    /// Everything, to go on elsewhere. `live` are the rings of a device that has them: after activation they are not here.
    pub fn save<'a>(&'a self, live: impl Iterator<Item = &'a Ring>) -> NegotiationState {
        NegotiationState {
            offered: self.offered,
            accepted: self.accepted,
            offered_page: self.offered_page,
            accepted_page: self.accepted_page,
            status: self.status,
            selected: self.selected,
            queues: self.rings.iter().chain(live).map(QueueState::from).collect(),
        }
    }

    /// Goes on with a conversation that was saved with a device like `profile`, which has `failed` or not. Where it was live,
    /// the rings are returned too, to be handed to the device.
    ///
    /// # Errors
    /// [`RestoreError`] for what no driver can have brought about.
    pub fn restore(
        profile: &Profile,
        state: &NegotiationState,
        failed: bool,
    ) -> Result<(Self, Option<Vec<Ring>>), RestoreError> {
        use status::{DRIVER_OK, FAILED, FEATURES_OK};
        let fresh = Negotiation::new(profile);
        if state.offered != fresh.offered {
            return Err(RestoreError::Offered { saved: state.offered, here: fresh.offered });
        }
        if !STEPS.contains(&(state.status & !FAILED)) {
            return Err(RestoreError::Status(state.status));
        }
        let started = state.status & DRIVER_OK != 0;
        if failed && !started {
            return Err(RestoreError::Failed);
        }
        let mut restored = Negotiation {
            accepted: state.accepted,
            offered_page: state.offered_page,
            accepted_page: state.accepted_page,
            status: state.status,
            selected: state.selected,
            ..Negotiation::new(profile)
        };
        if state.status & FEATURES_OK != 0 && !restored.features_are_valid() {
            return Err(RestoreError::Accepted(state.accepted));
        }
        let here = if failed { 0 } else { fresh.rings.len() };
        if state.queues.len() != here {
            return Err(RestoreError::QueueCount { saved: state.queues.len(), here });
        }
        let event_idx = started && state.accepted & feature::RING_EVENT_IDX != 0;
        let rings = state.queues.iter().zip(&fresh.rings).enumerate().map(|(index, (queue, fresh))| {
            restored_ring(queue, fresh, started, event_idx)
                .map_err(|problem| RestoreError::Queue { index, problem })
        });
        let rings = rings.collect::<Result<Vec<_>, _>>()?;
        if !started {
            restored.rings = rings;
            return Ok((restored, None));
        }
        restored.rings.clear();
        Ok((restored, (!failed).then_some(rings)))
    }

    fn features_are_valid(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & feature::VERSION_1 != 0
    }

    fn selected_ring(&self) -> Option<&Ring> {
        self.rings.get(usize::try_from(self.selected).ok()?)
    }

    fn selected_ring_mut(&mut self) -> Option<&mut Ring> {
        self.rings.get_mut(usize::try_from(self.selected).ok()?)
    }

    /// The selected queue while it may still be changed: before it is enabled.
    fn configurable_ring(&mut self) -> Option<&mut Ring> {
        self.selected_ring_mut().filter(|r| !r.ready())
    }
}

fn page(bits: u64, page: u32) -> u32 {
    let [low, high] = [bits & 0xffff_ffff, bits >> 32].map(|half| u32::try_from(half).unwrap_or(0));
    match page {
        0 => low,
        1 => high,
        _ => 0,
    }
}

fn fresh_rings(profile: &Profile) -> Vec<Ring> {
    let largest_power = |n: u16| if n == 0 { 1 } else { 1u16 << (15 - n.leading_zeros()) };
    // `Ring::new` refuses only sizes that are no power of two.
    profile.queue_sizes.iter().filter_map(|&n| Ring::new(largest_power(n)).ok()).collect()
}

/// One ring out of a saved state, or what is wrong with it. `fresh` is the same queue after power-on.
fn restored_ring(queue: &QueueState, fresh: &Ring, started: bool, event_idx: bool) -> Result<Ring, String> {
    if queue.max_size != fresh.max_size() {
        return Err(format!("it may have {} entries there and {} here", queue.max_size, fresh.max_size()));
    }
    // What a device has taken it has given back before it is quiesced; and a queue that is not in use stands at 0.
    if queue.next_avail != queue.next_used || (queue.next_avail != 0 && !(started && queue.ready)) {
        return Err(format!("indices {} and {} do not agree", queue.next_avail, queue.next_used));
    }
    queue.ring(event_idx).map_err(|error| error.to_string())
}

#[cfg(test)]
#[path = "negotiation_tests.rs"]
mod tests;
