//! The harness of the integration tests: real guests on the real `/dev/kvm`, driven through the `vmm` command as a person
//! would drive it. The tests themselves are in `tests/tests/`, one file a subject.
//!
//! * [`Vmm`] builds a command line and runs it; [`Ended`] is what came of it, [`Running`] one that still runs.
//! * [`artefacts`] knows where the binary, the kernels and the images are, and who makes them.
//! * [`kernel`] makes kernels of a few instructions, and bzImages that are broken in a chosen way.
//! * [`machine`]: machines with a control API, their snapshots and copies.
//! * [`templates`]: guests start from templates unless they are to be [cold](Vmm::cold).
//! * [`TapNetwork`] is a network namespace with a TAP in it; [`Terminal`] a pseudo-terminal; [`image`] packs directories.
//!
//! A test that needs KVM begins with [`require_kvm!`]. Where it is not to be had the test says that it was skipped, and with
//! `CI=true` it fails. No test depends on speed: the limits of time here only end what would never end.

pub mod artefacts;
pub mod image;
pub mod kernel;
pub mod machine;
mod network;
mod process;
pub mod require;
pub mod templates;
mod terminal;
mod vmm;

pub use network::TapNetwork;
pub use process::{Ended, Running};
pub use terminal::Terminal;
pub use vmm::Vmm;
