//! Socket device (section 5.10): stream sockets between programs in the guest and unix sockets on the host.
//!
//! ```text
//! guest: connect(CID 2, port)   → a `Listener` of this process, or the unix socket `PATH_port`, or a reset
//! host:  connect(PATH), "CONNECT port\n" → the guest's port; "OK n\n" comes back when the guest has accepted
//! host:  Connector::connect(port)        → the same from within this process, without a path
//! ```
//!
//! * [`packet`]: the 44-byte header.
//! * [`connection`]: one connection as a pure state machine: half-closes, what is owed to whom. [`credit`]: its counters.
//! * [`state`]: what a snapshot carries of all this.
//! * [`backend`]: who is behind a port on the host's side.
//! * [`device`]: the queues and the event loop's side; `streams` holds the host's sockets (`stream`), and `client`
//!   those that still say where they want to go.
//!
//! Bytes travel between the host's sockets and guest memory in one system call. What a slow reader on the host does not
//! take at once waits here, up to [`credit::BUF_ALLOC`] a connection and [`device::BUFFER_BUDGET`] for all. What the
//! guest has no buffer for stays in the host's socket.
//!
//! A pause keeps every connection. A snapshot carries those to listeners of this process: the process that restores it gets
//! a fresh socket for each through its own listener of that port, told by the guest's port. The guest gets a reset for every
//! other one, or a transport reset when it is restored with another address.

pub mod backend;
mod client;
pub mod connection;
pub mod credit;
pub mod device;
pub mod packet;
pub mod state;
mod stream;
mod streams;

pub use backend::{Backend, Connector, Listener};
pub use device::Vsock;
pub use state::VsockState;

#[cfg(test)]
mod tests;
