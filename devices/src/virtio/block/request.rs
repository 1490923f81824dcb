//! What a driver asks of a disk (section 5.2.6), read from a chain and checked against the disk. No I/O.

use crate::virtio::{Chain, ChainError, Writer};

/// Bytes in a sector: the unit of the protocol, whatever the disk is made of.
pub const SECTOR: u64 = 512;
/// The same as a length in memory.
pub const SECTOR_LEN: usize = 512;
/// How many bytes the answer to [`Request::Identify`] has.
pub const ID_LEN: usize = 20;

/// Request types (section 5.2.6).
mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
}

/// How a request ended: the byte that the driver looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// It was done.
    Ok = 0,
    /// It cannot be done, or the host failed.
    IoError = 1,
    /// There is no such request.
    Unsupported = 2,
}

/// A request that the disk can carry out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Fill the chain's `len` writable bytes from byte `offset` on.
    Read {
        /// Byte offset in the disk.
        offset: u64,
        /// Length in bytes.
        len: usize,
    },
    /// Put the chain's `len` readable bytes at byte `offset`.
    Write {
        /// Byte offset in the disk.
        offset: u64,
        /// Length in bytes.
        len: usize,
    },
    /// Make what was written last.
    Flush,
    /// Say the disk's name.
    Identify,
}

/// What of a disk decides whether a request is valid.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Capacity in sectors.
    pub sectors: u64,
    /// Nothing may be written.
    pub read_only: bool,
    /// The most bytes that one request may move.
    pub most_bytes: usize,
}

/// Takes the header off a chain and cuts the status byte off its end, wherever the driver's descriptors begin and end
/// (section 2.7.4.1). What remains in the chain is data.
///
/// # Errors
/// [`ChainError::Short`] when the chain has no room for a status: the driver could not be told of anything. Otherwise an
/// invalid request is an `Err` inside, to be answered.
pub fn take(chain: &mut Chain, shape: &Shape) -> Result<(Result<Request, Status>, Writer), ChainError> {
    let data = chain.writer.remaining().checked_sub(1).ok_or(ChainError::Short { missing: 1 })?;
    let status = chain.writer.split_off(data)?;
    let mut header = [0; 16];
    let request = match chain.reader.read_exact(&mut header) {
        Ok(()) => parse(header, chain.reader.remaining(), data, shape),
        Err(_) => Err(Status::IoError),
    };
    Ok((request, status))
}

/// What a header asks for, given how many bytes of data come with it and how many there is room for.
fn parse(header: [u8; 16], readable: usize, writable: usize, shape: &Shape) -> Result<Request, Status> {
    let [a, b, c, d, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    match u32::from_le_bytes([a, b, c, d]) {
        kind::IN => Ok(Request::Read { offset: offset(sector, writable, shape)?, len: writable }),
        // A device that offers RO must fail every write (section 5.2.6.2).
        kind::OUT if shape.read_only => Err(Status::IoError),
        kind::OUT => Ok(Request::Write { offset: offset(sector, readable, shape)?, len: readable }),
        kind::FLUSH => Ok(Request::Flush),
        kind::GET_ID if writable < ID_LEN => Err(Status::IoError),
        kind::GET_ID => Ok(Request::Identify),
        _ => Err(Status::Unsupported),
    }
}

/// Byte offset of `sector`, when `len` bytes from there are whole sectors of the disk and not too many.
fn offset(sector: u64, len: usize, shape: &Shape) -> Result<u64, Status> {
    let bytes = len as u64;
    let end = sector.checked_add(bytes / SECTOR).ok_or(Status::IoError)?;
    if !bytes.is_multiple_of(SECTOR) || end > shape.sectors || len > shape.most_bytes {
        return Err(Status::IoError);
    }
    sector.checked_mul(SECTOR).ok_or(Status::IoError)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { sectors: 100, read_only: false, most_bytes: 8 * 512 };

    fn header(kind: u32, sector: u64) -> [u8; 16] {
        let mut header = [0xee; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header
    }

    #[test]
    fn every_rule() {
        use Request::*;
        use Status::{IoError, Unsupported};
        let cases = [
            // type, sector, readable, writable
            ((0, 3, 0, 1024), Ok(Read { offset: 1536, len: 1024 })),
            ((0, 99, 9, 512), Ok(Read { offset: 99 * 512, len: 512 })),
            ((0, 99, 0, 1024), Err(IoError)),
            ((0, 100, 0, 512), Err(IoError)),
            ((0, 100, 0, 0), Ok(Read { offset: 51200, len: 0 })),
            ((0, 101, 0, 0), Err(IoError)),
            ((0, u64::MAX, 0, 512), Err(IoError)),
            ((0, u64::MAX / 512 + 1, 0, 512), Err(IoError)),
            ((0, 0, 0, 511), Err(IoError)),
            ((0, 0, 0, 8 * 512), Ok(Read { offset: 0, len: 8 * 512 })),
            ((0, 0, 0, 9 * 512), Err(IoError)),
            ((1, 3, 512, 0), Ok(Write { offset: 1536, len: 512 })),
            ((1, 3, 513, 512), Err(IoError)),
            ((1, 99, 1024, 0), Err(IoError)),
            ((4, 77, 0, 0), Ok(Flush)),
            ((8, 0, 0, 20), Ok(Identify)),
            ((8, 0, 0, 19), Err(IoError)),
            ((2, 0, 0, 512), Err(Unsupported)),
            ((11, 0, 16, 0), Err(Unsupported)),
            ((13, 0, 16, 0), Err(Unsupported)),
            ((u32::MAX, 0, 512, 512), Err(Unsupported)),
        ];
        for ((kind, sector, readable, writable), expected) in cases {
            let parsed = parse(header(kind, sector), readable, writable, &SHAPE);
            assert_eq!(parsed, expected, "{kind} {sector} {readable} {writable}");
        }
        let read_only = Shape { read_only: true, ..SHAPE };
        assert_eq!(parse(header(1, 0), 512, 0, &read_only), Err(IoError));
        assert_eq!(parse(header(1, 0), 0, 0, &read_only), Err(IoError));
        assert!(parse(header(0, 0), 0, 512, &read_only).is_ok());
    }
}
