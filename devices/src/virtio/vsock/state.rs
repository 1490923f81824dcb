//! What a snapshot carries of a socket device, as plain data, and what is wrong with data that only claims to be that.
//!
//! Written by a device that is quiesced, checked by the fresh device that is to go on with it: the file may be anybody's.
//!
//! Carried are the connections to listeners of this process, for which the process that restores has listeners of its own.
//! The other end of every other connection stays behind, so what is carried of it is the reset that the guest gets.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::credit::{BUF_ALLOC, Credit};
use super::device::{BUFFER_BUDGET, MAX_CONNECTIONS};
use super::packet::{HOST_CID, Header, Op, PORT_ANY, Ports, shutdown};
use super::streams::{FIRST_HOST_PORT, MAX_REPLIES};

/// Each reply, and each connection that ends, is one.
const MOST_RESETS: usize = MAX_REPLIES + MAX_CONNECTIONS;

/// What a snapshot carries of a socket device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's address.
    pub cid: u64,
    /// The guest has yet to hear that its connections are gone (section 5.10.6.7).
    pub reset_owed: bool,
    /// The port of the host that the next connection into the guest gets.
    pub next_port: u32,
    /// Connections to listeners of the process, in the order in which they began.
    #[serde(deserialize_with = "crate::bounded::list::<_, _, MAX_CONNECTIONS>")]
    pub connections: Vec<ConnectionState>,
    /// Resets that the guest has yet to get.
    #[serde(deserialize_with = "crate::bounded::list::<_, _, MOST_RESETS>")]
    pub resets: Vec<ResetState>,
}

/// How far a carried connection has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PhaseState {
    /// The guest waits for the answer to its request.
    Asked,
    /// Both sides know of it.
    Open,
    /// The guest has forgotten it; the host has yet to take what the guest sent.
    Flushing,
}

/// A carried connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionState {
    /// The port in the guest.
    pub guest_port: u32,
    /// The port on the host, which says whose connection it is.
    pub host_port: u32,
    /// How far it has come.
    pub phase: PhaseState,
    /// What the guest will not do any more: flags of [`shutdown`].
    pub guest_shut: u32,
    /// What the host will not do any more.
    pub host_shut: u32,
    /// What the guest knows of that.
    pub told: u32,
    /// The guest asked how much room there is.
    pub asked: bool,
    /// Bytes counted in both directions.
    pub credit: Credit,
    /// What the guest sent and the host has not taken.
    pub to_host: Vec<u8>,
    /// What the host sent and the guest has had no room for.
    pub to_guest: Vec<u8>,
    /// The host sends nothing after that.
    pub to_guest_ends: bool,
}

/// A reset that the guest has yet to get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetState {
    /// The port in the guest.
    pub guest_port: u32,
    /// The port on the host.
    pub host_port: u32,
    /// The type of socket: what the guest named in the packet that is refused.
    pub kind: u16,
}

impl ResetState {
    /// What is to be remembered of `packet`, a reset. Nobody looks at its counters.
    pub(super) fn of(packet: &Header) -> Self {
        ResetState { guest_port: packet.dst_port, host_port: packet.src_port, kind: packet.kind }
    }

    /// The packet for the guest with address `cid`.
    pub(super) fn packet(&self, cid: u64) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: cid,
            src_port: self.host_port,
            dst_port: self.guest_port,
            len: 0,
            kind: self.kind,
            op: Op::Reset,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

/// Whether a guest may have address `cid`: 0 to 2 are the hypervisor, the guest itself and the host; the last is "any"
/// (`include/uapi/linux/vm_sockets.h`), and larger ones are reserved.
pub(super) fn is_guest_cid(cid: u64) -> bool {
    cid > HOST_CID && cid < u64::from(u32::MAX)
}

impl ConnectionState {
    /// Which ports it joins.
    pub(super) fn ports(&self) -> Ports {
        Ports { guest: self.guest_port, host: self.host_port }
    }

    /// Whether the guest knows of it.
    pub(super) fn is_known(&self) -> bool {
        self.phase != PhaseState::Flushing
    }

    fn check(&self) -> Result<(), &'static str> {
        let buffered = self.credit.buffered();
        let flags = self.guest_shut | self.host_shut | self.told;
        let none_to_guest = self.to_guest.is_empty() && !self.to_guest_ends;
        let guest_listens = self.is_known()
            && self.guest_shut & shutdown::RECEIVE == 0
            && self.host_shut & shutdown::SEND == 0;
        let rules = [
            (self.guest_port != PORT_ANY && self.host_port != PORT_ANY, "a port is reserved"),
            (buffered <= BUF_ALLOC, "the guest sent more than it had credit for"),
            (usize::try_from(buffered) == Ok(self.to_host.len()), "its bytes are not as many as counted"),
            (flags & !shutdown::BOTH == 0, "a direction is closed that does not exist"),
            (self.told & !self.host_shut == 0, "the guest was told of an end that is none"),
            (self.host_shut & shutdown::RECEIVE == 0 || buffered == 0, "bytes wait for a host that is gone"),
            (self.is_known() || buffered > 0, "nothing is left of it"),
            (none_to_guest || guest_listens, "bytes wait for a guest that does not listen"),
        ];
        rules.into_iter().find(|(kept, _)| !kept).map_or(Ok(()), |(_, broken)| Err(broken))
    }
}

impl VsockState {
    /// What is wrong with it, in one line. Nothing that a device saves is.
    pub(super) fn check(&self) -> Result<(), String> {
        if !is_guest_cid(self.cid) {
            return Err(format!("no guest has the vsock address {}", self.cid));
        }
        if self.next_port < FIRST_HOST_PORT {
            return Err(format!(
                "the next vsock port is {}, which is not the device's to give",
                self.next_port
            ));
        }
        if self.connections.len() > MAX_CONNECTIONS {
            return Err(format!("{} vsock connections, {MAX_CONNECTIONS} at most", self.connections.len()));
        }
        if self.resets.len() > MOST_RESETS {
            return Err(format!("{} vsock resets, {MOST_RESETS} at most", self.resets.len()));
        }
        let to_host: usize = self.connections.iter().map(|c| c.to_host.len()).sum();
        let to_guest: usize = self.connections.iter().map(|c| c.to_guest.len()).sum();
        if to_host.max(to_guest) > BUFFER_BUDGET {
            return Err(format!(
                "vsock connections hold {to_host} and {to_guest} bytes, {BUFFER_BUDGET} at most"
            ));
        }
        let mut known = HashSet::new();
        for connection in &self.connections {
            let Ports { guest, host } = connection.ports();
            let mut unique = || match connection.is_known() && !known.insert(connection.ports()) {
                true => Err("it exists already"),
                false => Ok(()),
            };
            connection
                .check()
                .and_then(|()| unique())
                .map_err(|broken| format!("vsock connection {guest} to {host}: {broken}"))?;
        }
        Ok(())
    }
}
