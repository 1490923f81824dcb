//! A packet's header, to and from bytes (section 5.10.6). Pure; used on the device loop.

/// Bytes of a header; the payload follows.
pub const HEADER_SIZE: usize = 44;
/// The host's address: `VMADDR_CID_HOST` (`include/uapi/linux/vm_sockets.h`).
pub const HOST_CID: u64 = 2;
/// No port: what a program asks for when any will do (`VMADDR_PORT_ANY`).
pub const PORT_ANY: u32 = u32::MAX;
/// The socket type of a stream (section 5.10.6), the only one served.
pub const STREAM: u16 = 1;
/// The most bytes of payload in a packet that Linux makes or is made (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`).
pub const MAX_PAYLOAD: u32 = 64 * 1024;

/// Flags of a [`Op::Shutdown`] packet: what its sender will not do any more (section 5.10.6.5). They add up.
pub mod shutdown {
    /// It receives nothing more.
    pub const RECEIVE: u32 = 1;
    /// It sends nothing more.
    pub const SEND: u32 = 2;
    /// Neither.
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// What a packet says (section 5.10.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Asks for a connection.
    Request,
    /// Accepts it.
    Response,
    /// Ends or refuses it.
    Reset,
    /// Closes one or both directions.
    Shutdown,
    /// Carries data.
    Data,
    /// Tells how much room there is.
    CreditUpdate,
    /// Asks for that.
    CreditRequest,
    /// Something that the specification does not know.
    Unknown(u16),
}

impl From<u16> for Op {
    fn from(code: u16) -> Self {
        match code {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Reset,
            4 => Op::Shutdown,
            5 => Op::Data,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            other => Op::Unknown(other),
        }
    }
}

impl From<Op> for u16 {
    fn from(op: Op) -> Self {
        match op {
            Op::Request => 1,
            Op::Response => 2,
            Op::Reset => 3,
            Op::Shutdown => 4,
            Op::Data => 5,
            Op::CreditUpdate => 6,
            Op::CreditRequest => 7,
            Op::Unknown(other) => other,
        }
    }
}

/// A header, field by field in the order of the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Who sends. The upper 32 bits are reserved and zero.
    pub src_cid: u64,
    /// To whom.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// Bytes of payload that follow.
    pub len: u32,
    /// The type of socket: [`STREAM`].
    pub kind: u16,
    /// What it says.
    pub op: Op,
    /// For [`Op::Shutdown`] only.
    pub flags: u32,
    /// Bytes that the sender of this packet can buffer for this connection.
    pub buf_alloc: u32,
    /// Bytes that it has passed on since the connection began, modulo 2³².
    pub fwd_cnt: u32,
}

/// The two ports of a connection; the guest's CID is the device's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The port in the guest.
    pub guest: u32,
    /// The port on the host.
    pub host: u32,
}

impl Ports {
    /// Those of a packet from the guest.
    pub fn of(packet: &Header) -> Self {
        Ports { guest: packet.src_port, host: packet.dst_port }
    }
}

impl Header {
    /// Reads a header. Any bytes are one.
    pub fn parse(raw: &[u8; HEADER_SIZE]) -> Self {
        let mut fields = Fields(raw);
        Header {
            src_cid: u64::from_le_bytes(fields.take()),
            dst_cid: u64::from_le_bytes(fields.take()),
            src_port: u32::from_le_bytes(fields.take()),
            dst_port: u32::from_le_bytes(fields.take()),
            len: u32::from_le_bytes(fields.take()),
            kind: u16::from_le_bytes(fields.take()),
            op: u16::from_le_bytes(fields.take()).into(),
            flags: u32::from_le_bytes(fields.take()),
            buf_alloc: u32::from_le_bytes(fields.take()),
            fwd_cnt: u32::from_le_bytes(fields.take()),
        }
    }

    /// The header as it goes to the guest.
    pub fn to_bytes(&self) -> Vec<u8> {
        [
            &self.src_cid.to_le_bytes()[..],
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &u16::from(self.op).to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ]
        .concat()
    }

    /// The reset that answers this packet when it belongs to no connection; none answers a reset (section 5.10.6.4).
    pub fn refusal(&self) -> Option<Header> {
        (self.op != Op::Reset).then_some(Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            len: 0,
            op: Op::Reset,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
            ..*self
        })
    }
}

/// Walks over a header's bytes.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    /// The next `N` bytes; zeros past the end, which no caller reaches: the fields add up to [`HEADER_SIZE`].
    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fields_lie_where_the_specification_says() {
        let raw: [u8; HEADER_SIZE] = std::array::from_fn(|i| u8::try_from(i).unwrap());
        let header = Header::parse(&raw);
        assert_eq!(header.src_cid, 0x0706_0504_0302_0100);
        assert_eq!((header.src_port, header.dst_port), (0x1312_1110, 0x1716_1514));
        assert_eq!((header.len, header.kind), (0x1b1a_1918, 0x1d1c));
        assert_eq!((header.op, header.flags), (Op::Unknown(0x1f1e), 0x2322_2120));
        assert_eq!((header.buf_alloc, header.fwd_cnt), (0x2726_2524, 0x2b2a_2928));
    }

    #[test]
    fn a_reset_is_not_answered() {
        let mut header = Header::parse(&[0; HEADER_SIZE]);
        (header.src_port, header.dst_port, header.op) = (7, 9, Op::Data);
        let answer = header.refusal().unwrap();
        assert_eq!((answer.src_port, answer.dst_port, answer.op), (9, 7, Op::Reset));
        assert_eq!(answer.refusal(), None);
    }

    proptest! {
        #[test]
        fn bytes_come_back(raw in prop::collection::vec(any::<u8>(), HEADER_SIZE)) {
            let raw: [u8; HEADER_SIZE] = raw.try_into().unwrap();
            prop_assert_eq!(Header::parse(&raw).to_bytes(), raw);
        }
    }
}
