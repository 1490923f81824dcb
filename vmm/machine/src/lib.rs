//! One virtual machine: KVM, guest memory, boot, vCPUs. It knows nothing of containers.
//!
//! The way through: [`config::MachineConfig`] describes a machine, [`host::Host`] says what there is to run it on,
//! [`plan::Plan`] has every file open and every mistake found, [`builder::build`] makes a paused [`Machine`] of it, and
//! [`Machine::run`] stays with it until its end.

#![deny(clippy::cast_possible_truncation)]

pub mod api;
pub mod arch;
pub mod boot;
pub mod builder;
pub mod channels;
pub mod config;
pub mod control;
pub mod controller;
pub mod host;
pub mod kvm;
pub mod layout;
pub mod metrics;
pub mod plan;
pub mod snapshot;
pub mod timeline;
pub mod vcpu;

mod machine;

pub use machine::{Guest, Machine, Own};
