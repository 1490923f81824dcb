//! How a driver reaches a device: status, features, queue set-up ([`negotiation`], pure) behind registers ([`mmio`]).

pub mod mmio;
pub mod negotiation;

pub use mmio::MmioTransport;
