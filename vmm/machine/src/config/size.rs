//! Sizes in bytes as people write them: `256M`, `1G`, `64MiB`, `1073741824`. Used by flags and by JSON.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use thiserror::Error;

/// A number of bytes. Units are powers of 1024 and are written `K`, `M`, `G`, `T`, optionally with `B` or `iB` behind them,
/// in any case. It prints the largest unit that divides it, and reads back what it prints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(u64);

const UNITS: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

impl ByteSize {
    /// This many bytes.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// This many mebibytes.
    pub const fn mib(mib: u32) -> Self {
        Self((mib as u64) << 20)
    }

    /// In bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// In mebibytes, rounded down.
    pub const fn whole_mib(self) -> u64 {
        self.0 >> 20
    }
}

/// Why a text is not a size.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs, reason = "the message says it")]
pub enum ParseSizeError {
    #[error("{0:?} is not a size: write a whole number and a unit, such as 256M or 1G")]
    Syntax(String),
    #[error("{0:?} has no unit of size: use K, M, G or T (powers of 1024), or none for bytes")]
    Unit(String),
    #[error("{0:?} does not fit in 64 bits")]
    TooLarge(String),
}

impl FromStr for ByteSize {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        if number.is_empty() || unit.starts_with(['.', ',']) {
            return Err(ParseSizeError::Syntax(text.into()));
        }
        let number: u64 = number.parse().map_err(|_| ParseSizeError::TooLarge(text.into()))?;
        let shift = shift_of(unit).ok_or_else(|| ParseSizeError::Unit(text.into()))?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(|| ParseSizeError::TooLarge(text.into()))
    }
}

fn shift_of(unit: &str) -> Option<u32> {
    let unit = unit.to_ascii_uppercase();
    if unit.is_empty() || unit == "B" {
        return Some(0);
    }
    let (letter, shift) = UNITS.into_iter().find(|(letter, _)| unit.starts_with(*letter))?;
    matches!(unit.strip_prefix(letter)?, "" | "B" | "IB").then_some(shift)
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (letter, shift) in UNITS {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{letter}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl de::Visitor<'_> for Visitor {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"256M\", or a number of bytes")
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(bytes))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}
