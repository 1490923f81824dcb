//! How a driver reaches a device: status, features, queue set-up ([`negotiation`], pure) behind registers ([`mmio`]). What of
//! it a snapshot carries is in [`state`].

pub mod mmio;
pub mod negotiation;
pub mod state;

pub use mmio::{AttachFailed, Held, MmioTransport};
pub use state::{RestoreError, TransportState};
