//! A connection as a snapshot carries it, and back. Pure; used on the device loop while the device is quiesced.

use super::{Announce, Connection, Phase};
use crate::virtio::vsock::packet::{Ports, shutdown};
use crate::virtio::vsock::state::{ConnectionState, PhaseState};

impl Connection {
    /// Whether the guest knows of it: it is to hear when the connection does not go on.
    pub fn is_known(&self) -> bool {
        matches!(self.phase, Phase::Requested { sent: true } | Phase::Open { .. })
    }

    /// Whether what the host sends can still reach the guest.
    pub fn is_heard(&self) -> bool {
        self.is_open() && self.host_shut & shutdown::SEND == 0 && self.guest_shut & shutdown::RECEIVE == 0
    }

    /// What a snapshot carries of a connection that the guest asked for, but for the bytes. `None` when nothing is left to
    /// go on with.
    pub fn save(&self) -> Option<ConnectionState> {
        let phase = match self.phase {
            Phase::Open { announce: Announce::Guest } => PhaseState::Asked,
            Phase::Open { announce: Announce::Host | Announce::Nobody } => PhaseState::Open,
            Phase::Flushing => PhaseState::Flushing,
            Phase::Requested { .. } | Phase::Leaving { .. } | Phase::Over => return None,
        };
        let Ports { guest, host } = self.ports;
        Some(ConnectionState {
            guest_port: guest,
            host_port: host,
            phase,
            guest_shut: self.guest_shut,
            host_shut: self.host_shut,
            told: self.told,
            asked: self.asked,
            credit: self.credit,
            to_host: Vec::new(),
            to_guest: Vec::new(),
            to_guest_ends: false,
        })
    }

    /// The connection that `state`, which was checked, was saved from. Its socket is a fresh one: what the guest closed is
    /// asked for again.
    pub fn restore(cid: u64, state: &ConnectionState) -> Self {
        let phase = match state.phase {
            PhaseState::Asked => Phase::Open { announce: Announce::Guest },
            PhaseState::Open => Phase::Open { announce: Announce::Nobody },
            PhaseState::Flushing => Phase::Flushing,
        };
        Connection {
            guest_shut: state.guest_shut,
            host_shut: state.host_shut,
            told: state.told,
            readable: !state.to_guest.is_empty() || state.to_guest_ends,
            asked: state.asked,
            credit: state.credit,
            ..Connection::new(cid, state.ports(), phase)
        }
    }
}
