//! What the host and the agent say to each other, used by both ends: `machine` and `vmm-cli` on the host, `agent` in the guest.
//!
//! The guest makes every connection, to the host (CID 2):
//!
//! * [`CONTROL_PORT`], once, before any process of the container exists. The host refuses a second one. Both directions carry
//!   frames ([`frame`]) of [`FromAgent`] and [`ToAgent`].
//! * [`STREAM_PORT`], once for each stream of stdio. The agent sends a [`StreamHeader`] first, then both directions are raw
//!   bytes. A stream ends when its sender shuts down its side.
//!
//! A session, with the agent on the left:
//!
//! ```text
//! Hello ───────────▶                 the VM is up; no disk was looked at. Templates are taken here
//!       ◀─────────── Begin           who this machine is: clock, seed, machine id; and where its image is
//! Image ───────────▶                 the image is mounted; carries the image's own configuration
//!       ◀─────────── Start           what to run
//! (streams) ───────▶                 one connection for each, each with the token from Start
//! Started ─────────▶                 the command is executing; or Failed, and the session is over
//!       ◀─────────── Signal, Resize  any number
//! Exited ──────────▶                 every byte of stdout and stderr was sent and those streams are shut down
//!       ◀─────────── Shutdown        the host has read them all; it may as well end the VM
//! ```
//!
//! Around a snapshot of a machine, at the left its agent, which is the same in the machine and in its copy:
//!
//! ```text
//!       ◀─────────── Freeze          while the container runs
//! Frozen ──────────▶                 no process of it runs any more; the snapshot is taken
//!       ◀─────────── Thaw            in the machine that was saved
//!       ◀─────────── Restored        in its copy, as the first message: another clock, seed, name, machine id, address
//! Restored ────────▶                 the copy has them, its container runs, and these are its streams
//! ```
//!
//! Connections to these two ports live on in the copy, where they lead to the host that restored it. In a copy of a template, whose
//! agent has said Hello to somebody else, the first message is Begin.
//!
//! The agent is hostile input for the host: [`frame`] bounds what is read, [`Dialogue`] says what may follow what, and
//! [`printable`] takes the escape sequences out of text that is shown to a person.
#![cfg_attr(not(any(feature = "std", test)), no_std)]

extern crate alloc;

mod bytes;
mod dialogue;
pub mod frame;
mod message;
mod stream;

pub use bytes::{ByteString, printable};
pub use dialogue::{Dialogue, Pause, Stage, Violation};
pub use frame::{FrameDecoder, MAX_FRAME, ProtocolError, encode};
#[cfg(feature = "std")]
pub use frame::{read_message, write_message};
pub use message::{
    Begin, Disk, ExitStatus, FailReason, FromAgent, Identity, Ipv4Cidr, Network, ParseCidrError, Root, Seed,
    Start, ToAgent, Token, WindowSize,
};
pub use stream::{StreamHeader, StreamHeaderError, StreamKind};

/// The version of this protocol. The agent says it in [`FromAgent::Hello`]; the two must be equal, since agent and host are built together.
pub const PROTOCOL_VERSION: u32 = 2;

/// vsock port on the host for the control connection.
pub const CONTROL_PORT: u32 = 1024;

/// vsock port on the host for the streams of stdio.
pub const STREAM_PORT: u32 = 1025;

/// The host's vsock address (`VMADDR_CID_HOST`).
pub const HOST_CID: u32 = 2;

/// Most bytes of an image configuration that [`FromAgent::Image`] may carry.
pub const MAX_IMAGE_CONFIG: usize = 64 << 10;

/// Most bytes of the text in [`FromAgent::Failed`].
pub const MAX_FAIL_MESSAGE: usize = 4 << 10;

/// Most streams that a container has.
pub const MAX_STREAMS: usize = 3;

/// Where an image keeps its OCI image configuration (JSON), as a path from the root of its file system.
pub const IMAGE_CONFIG_PATH: &str = "/.vmm/image.json";
