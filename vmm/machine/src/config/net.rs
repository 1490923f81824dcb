//! The network's own vocabulary: hardware addresses, IPv4 addresses with a prefix, interface names.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A network card's hardware address, written `02:00:5e:10:00:01`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// The address with these bytes, in the order in which they are sent.
    pub const fn new(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    /// A locally administered unicast address (IEEE 802: bit 1 of the first byte set, bit 0 clear) made of these bits.
    pub const fn local(mut bytes: [u8; 6]) -> Self {
        bytes[0] = bytes[0] & !1 | 2;
        Self(bytes)
    }

    /// The bytes in the order in which they are sent.
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// Whether a card can have it: neither a group's address nor zero.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Why a text is not a hardware address or an IPv4 network address.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs, reason = "the message says it")]
pub enum ParseAddressError {
    #[error("{0:?} is not a hardware address: write six bytes in hexadecimal, such as 02:00:00:00:00:01")]
    Mac(String),
    #[error("{0:?} is not an IPv4 address with a prefix length: write it as 10.0.0.2/24")]
    Cidr(String),
}

impl FromStr for MacAddress {
    type Err = ParseAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let mut bytes = [0; 6];
            let mut parts = text.split(':');
            for byte in &mut bytes {
                let part =
                    parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))?;
                *byte = u8::from_str_radix(part, 16).ok()?;
            }
            parts.next().is_none().then_some(Self(bytes))
        };
        parse().ok_or_else(|| ParseAddressError::Mac(text.into()))
    }
}

impl TryFrom<String> for MacAddress {
    type Error = ParseAddressError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

/// An IPv4 address of a host with its network's prefix length, written `10.0.0.2/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ipv4Cidr {
    address: Ipv4Addr,
    prefix: u8,
}

impl Ipv4Cidr {
    /// The host's address.
    pub const fn address(self) -> Ipv4Addr {
        self.address
    }

    /// Length of the network's prefix, 0 to 32.
    pub const fn prefix(self) -> u8 {
        self.prefix
    }

    /// The network's mask.
    pub fn netmask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0))
    }

    /// Whether `other` is another host on the same network.
    pub fn reaches(self, other: Ipv4Addr) -> bool {
        let mask = self.netmask().to_bits();
        other != self.address && other.to_bits() & mask == self.address.to_bits() & mask
    }
}

impl fmt::Display for Ipv4Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl FromStr for Ipv4Cidr {
    type Err = ParseAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (address, prefix) = text.split_once('/')?;
            let prefix = Some(prefix).filter(|p| p.bytes().all(|b| b.is_ascii_digit()))?.parse().ok()?;
            (prefix <= 32).then_some(Self { address: address.parse().ok()?, prefix })
        };
        parse().ok_or_else(|| ParseAddressError::Cidr(text.into()))
    }
}

impl TryFrom<String> for Ipv4Cidr {
    type Error = ParseAddressError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Ipv4Cidr> for String {
    fn from(cidr: Ipv4Cidr) -> Self {
        cidr.to_string()
    }
}

/// Whether Linux could have an interface of this name (`dev_valid_name`), and one that is not a pattern: `%d` asks for a
/// number.
pub(super) fn is_interface_name(name: &str) -> bool {
    // IFNAMSIZ is 16 with the terminating zero.
    (1..=15).contains(&name.len())
        && name != "."
        && name != ".."
        && name.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%'))
}
