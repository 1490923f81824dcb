//! The messages of the control connection. Data only: the order in which they may come is in `dialogue`.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::net::Ipv4Addr;
use core::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{ByteString, StreamKind};

/// What the agent tells the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromAgent {
    /// The first message: the agent runs, and has not looked at any disk. A template is taken here.
    Hello {
        /// The agent's [`PROTOCOL_VERSION`](crate::PROTOCOL_VERSION).
        version: u32,
    },
    /// The answer to `Begin`: the image is mounted.
    Image {
        /// The bytes of [`IMAGE_CONFIG_PATH`](crate::IMAGE_CONFIG_PATH), if the image has it; at most [`MAX_IMAGE_CONFIG`](crate::MAX_IMAGE_CONFIG).
        config: Option<ByteString>,
    },
    /// The command was executed.
    Started {
        /// Its process id as the agent sees it, outside of the container.
        pid: u32,
    },
    /// Nothing was or will be executed. The last message.
    Failed {
        /// What kind of failure; decides the exit code.
        reason: FailReason,
        /// One line for a person, at most [`MAX_FAIL_MESSAGE`](crate::MAX_FAIL_MESSAGE) bytes. Untrusted: pass it through [`printable`](crate::printable).
        message: String,
    },
    /// The command ended and its output is delivered. The last message. It does not come between `Frozen` and the thaw.
    Exited(ExitStatus),
    /// The answer to `Freeze`, one for each: no process of the container runs, if there is a container, until it is thawed. After a `Thaw`
    /// that overtook it, it only says that the `Freeze` is done with.
    Frozen,
    /// The answer to `Restored`: this machine is nobody's double any more, and the container runs again.
    Restored {
        /// The streams of the container and the guest's vsock port of each; at most [`MAX_STREAMS`](crate::MAX_STREAMS). Those that
        /// have ended are among them, since their last bytes may still be on the host's side.
        streams: Vec<(StreamKind, u32)>,
    },
}

/// Why nothing was executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailReason {
    /// The command is not in the container.
    NotFound,
    /// The command is there but cannot be executed.
    NotExecutable,
    /// The image's file system cannot be used.
    RootFs,
    /// Anything else: a bad request, a missing user or device, no memory, an error of the agent.
    Setup,
}

impl FailReason {
    /// The exit code of `vmm`: 127, 126, or 125 for what is not the command's fault.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::NotFound => 127,
            Self::NotExecutable => 126,
            Self::RootFs | Self::Setup => 125,
        }
    }
}

/// How the command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// By `exit` with this code.
    Code(u8),
    /// By this signal.
    Signal(u8),
}

impl ExitStatus {
    /// The exit code of `vmm`: the command's own, or 128 + n for signal n.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => signal.saturating_add(128),
        }
    }
}

/// What the host tells the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToAgent {
    /// Be this machine, and mount this image. Once, after `Hello`.
    Begin(Box<Begin>),
    /// Run this. Once, after `Image`.
    Start(Box<Start>),
    /// Send this signal (Linux x86-64 number, 1 to 64) to the command. As everywhere with pid namespaces, the command is PID 1 in its own: a
    /// signal that it has no handler for is ignored, other than SIGKILL and SIGSTOP.
    Signal(i32),
    /// The terminal has a new size. Ignored without a terminal.
    Resize(WindowSize),
    /// Let no process of the container run. Streams and this connection are served all the while.
    Freeze,
    /// Let the container run again. Also takes back a `Freeze` that was not answered yet.
    Thaw,
    /// In a copy of a machine whose container was frozen: be another machine from now on, and let the container run again.
    Restored(Box<Identity>),
    /// End the command (SIGTERM, then SIGKILL) if it runs, frozen or not, then end the VM. Losing the connection means the same.
    Shutdown,
}

/// What makes a machine that was only booted, or copied from a template, one of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begin {
    /// The time: nanoseconds since 1970, UTC.
    pub clock: u64,
    /// New and random for each VM.
    pub seed: Seed,
    /// New and random for each VM. What an image's `/etc/machine-id` says in the container, if it has that file.
    pub machine_id: [u8; 16],
    /// The image's disk.
    pub root: Root,
}

/// The disk with the container's image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// Its name in the guest's `/dev`, such as `vda`. Its medium may still be on its way: the agent waits for it.
    pub device: String,
    /// The type of its file system, such as `erofs`; empty to try those that are known.
    pub file_system: String,
}

/// What has to change in the copy of a machine that runs a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The time: nanoseconds since 1970, UTC.
    pub clock: u64,
    /// New and random for each copy.
    pub seed: Seed,
    /// The container's new name, if it gets one.
    pub hostname: Option<String>,
    /// As in [`Begin`].
    pub machine_id: [u8; 16],
    /// The network interface's new addresses, if it gets some. An address that is not given stays.
    pub network: Option<Network>,
}

/// What to run and in what surroundings.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// Proves a stream's connection to be the agent's. New and random for each VM.
    pub token: Token,
    /// The command and its arguments. A command without a slash is looked for in the `PATH` of `env`, inside the container.
    pub args: Vec<ByteString>,
    /// `KEY=value` words. The agent adds `PATH`, `HOME`, `HOSTNAME` and, with a terminal, `TERM` where they are missing.
    pub env: Vec<ByteString>,
    /// Absolute path to start in, made if it is missing; empty for `/`.
    pub cwd: ByteString,
    /// `user[:group]`, each a name from the container's `/etc/passwd` or `/etc/group`, or a number; empty for root.
    pub user: String,
    /// The name in the container's own uts namespace; empty for `vmm`.
    pub hostname: String,
    /// With a size: stdio is a terminal of this size, and the only stream is [`StreamKind::Terminal`](crate::StreamKind::Terminal).
    pub terminal: Option<WindowSize>,
    /// The host has input. Otherwise stdin is `/dev/null`, or a terminal that nobody types on.
    pub stdin: bool,
    /// Block devices for the container's `/dev`.
    pub disks: Vec<Disk>,
    /// The network interface to configure, if there is one.
    pub network: Option<Network>,
    /// The container may use `AF_VSOCK`, and so reach whatever the host offers on vsock.
    pub vsock: bool,
}

/// A block device of the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Its name in the container's `/dev`, such as `vdb`.
    pub name: String,
    /// Its name in the guest's `/dev`: another where some of the guest's disks have no medium.
    pub device: String,
    /// Whether it may get its medium later, or never. Without this the agent waits for it.
    pub spare: bool,
}

/// One network interface of the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// The guest's name for it, such as `eth0`; at most 15 bytes.
    pub interface: String,
    /// The hardware address that it is to have, where that may be another than the one it was found with.
    pub mac: Option<[u8; 6]>,
    /// Its address; without one the interface is only brought up.
    pub address: Option<Ipv4Cidr>,
    /// The default route's gateway.
    pub gateway: Option<Ipv4Addr>,
}

/// An IPv4 address and the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ipv4Cidr {
    /// The address of the interface, not of the network.
    pub address: Ipv4Addr,
    /// 0 to 32.
    pub prefix: u8,
}

impl Ipv4Cidr {
    /// The network mask; all ones for a prefix above 32.
    pub fn netmask(self) -> Ipv4Addr {
        let host_bits = 32u32.saturating_sub(u32::from(self.prefix));
        Ipv4Addr::from_bits(u32::MAX.checked_shl(host_bits).unwrap_or(0))
    }
}

/// Why a text is no [`Ipv4Cidr`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an IPv4 address with a prefix length, such as 10.0.0.2/24")]
pub struct ParseCidrError;

impl FromStr for Ipv4Cidr {
    type Err = ParseCidrError;

    fn from_str(text: &str) -> Result<Self, ParseCidrError> {
        let (address, prefix) = text.split_once('/').ok_or(ParseCidrError)?;
        // `u8::from_str` takes a sign.
        if prefix.is_empty() || prefix.len() > 2 || !prefix.bytes().all(|b| b.is_ascii_digit()) {
            return Err(ParseCidrError);
        }
        let address = address.parse().map_err(|_| ParseCidrError)?;
        let prefix = prefix.parse().map_err(|_| ParseCidrError)?;
        if prefix > 32 {
            return Err(ParseCidrError);
        }
        Ok(Self { address, prefix })
    }
}

impl fmt::Display for Ipv4Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// The size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// The secret that a stream's header carries. Debug output does not show it.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
pub struct Token(pub [u8; 16]);

impl PartialEq for Token {
    /// Takes the same time wherever the two differ.
    fn eq(&self, other: &Self) -> bool {
        self.0.iter().zip(other.0).fold(0, |acc, (a, b)| acc | (a ^ b)) == 0
    }
}

impl Eq for Token {}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// What the kernel's random numbers are seeded with. Debug output does not show it.
#[derive(Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seed(pub [u8; 32]);

impl fmt::Debug for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seed(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cidr() {
        let cidr: Ipv4Cidr = "10.1.2.3/24".parse().expect("valid");
        assert_eq!(cidr.netmask(), Ipv4Addr::new(255, 255, 255, 0));
        assert_eq!(alloc::format!("{cidr}"), "10.1.2.3/24");
        for (prefix, mask) in [
            (0, "0.0.0.0"),
            (1, "128.0.0.0"),
            (30, "255.255.255.252"),
            (32, "255.255.255.255"),
            (200, "255.255.255.255"),
        ] {
            assert_eq!(
                Ipv4Cidr { prefix, ..cidr }.netmask(),
                mask.parse::<Ipv4Addr>().expect("valid"),
                "/{prefix}"
            );
        }
        for bad in [
            "",
            "/",
            "10.1.2.3",
            "10.1.2.3/",
            "10.1.2.3/33",
            "10.1.2.3/+4",
            "10.1.2/24",
            "10.1.2.3/024",
            "10.1.2.3/24/1",
            "::1/64",
        ] {
            assert_eq!(bad.parse::<Ipv4Cidr>(), Err(ParseCidrError), "{bad}");
        }
    }

    #[test]
    fn exit_codes() {
        assert_eq!(ExitStatus::Code(3).exit_code(), 3);
        assert_eq!(ExitStatus::Signal(9).exit_code(), 137);
        assert_eq!(ExitStatus::Signal(255).exit_code(), 255);
        assert_eq!(FailReason::NotFound.exit_code(), 127);
        assert_eq!(FailReason::NotExecutable.exit_code(), 126);
        assert_eq!(FailReason::RootFs.exit_code(), 125);
    }

    #[test]
    fn tokens_compare_and_hide() {
        let mut other = Token([7; 16]);
        assert_eq!(other, Token([7; 16]));
        other.0[15] = 6;
        assert_ne!(other, Token([7; 16]));
        assert!(!alloc::format!("{other:?} {:?}", Seed([7; 32])).contains('7'));
    }
}
