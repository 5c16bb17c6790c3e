//! The header of a vsock packet (`struct virtio_vsock_hdr`, virtio 1.2 §5.10.6).

/// Length of the header (bytes).
pub const HEADER: usize = 44;
/// The host's CID.
pub const HOST_CID: u64 = 2;
/// The only type of socket here: stream.
pub const TYPE_STREAM: u16 = 1;

/// SHUTDOWN: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// SHUTDOWN: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// SHUTDOWN: neither.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Accepts one.
    Response = 2,
    /// Refuses or ends one.
    Reset = 3,
    /// Says what the sender will no longer do; see the flags.
    Shutdown = 4,
    /// Data.
    Data = 5,
    /// Tells how much the sender has room for.
    CreditUpdate = 6,
    /// Asks for a credit update.
    CreditRequest = 7,
}

impl Op {
    fn parse(op: u16) -> Option<Self> {
        [
            Self::Request,
            Self::Response,
            Self::Reset,
            Self::Shutdown,
            Self::Data,
            Self::CreditUpdate,
            Self::CreditRequest,
        ]
        .into_iter()
        .find(|o| *o as u16 == op)
    }
}

/// A packet's header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Sender.
    pub src_cid: u64,
    /// Receiver.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// Bytes of data that follow.
    pub len: u32,
    /// Type of socket.
    pub kind: u16,
    /// Operation, unchecked; see [`Header::operation`].
    pub op: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// Size of the sender's buffer (bytes).
    pub buf_alloc: u32,
    /// Bytes that have left the sender's buffer since the beginning, modulo 2³².
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header; every pattern is one.
    pub fn decode(b: &[u8; HEADER]) -> Self {
        let at = |from: usize, len: usize| {
            b[from..from + len]
                .iter()
                .rev()
                .fold(0, |n, &x| n << 8 | u64::from(x))
        };
        Self {
            src_cid: at(0, 8),
            dst_cid: at(8, 8),
            src_port: at(16, 4) as u32,
            dst_port: at(20, 4) as u32,
            len: at(24, 4) as u32,
            kind: at(28, 2) as u16,
            op: at(30, 2) as u16,
            flags: at(32, 4) as u32,
            buf_alloc: at(36, 4) as u32,
            fwd_cnt: at(40, 4) as u32,
        }
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut b = [0; HEADER];
        let mut put = |at: usize, bytes: &[u8]| b[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.src_cid.to_le_bytes());
        put(8, &self.dst_cid.to_le_bytes());
        put(16, &self.src_port.to_le_bytes());
        put(20, &self.dst_port.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &self.op.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buf_alloc.to_le_bytes());
        put(40, &self.fwd_cnt.to_le_bytes());
        b
    }

    /// The operation, if there is such a one.
    pub fn operation(&self) -> Option<Op> {
        Op::parse(self.op)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_has_its_place() {
        let bytes: [u8; HEADER] = std::array::from_fn(|n| n as u8 + 1);
        let h = Header::decode(&bytes);
        assert_eq!(h.src_cid, 0x0807_0605_0403_0201);
        assert_eq!(
            (h.src_port, h.dst_port, h.len),
            (0x1413_1211, 0x1817_1615, 0x1c1b_1a19)
        );
        assert_eq!((h.kind, h.op, h.flags), (0x1e1d, 0x201f, 0x2423_2221));
        assert_eq!((h.buf_alloc, h.fwd_cnt), (0x2827_2625, 0x2c2b_2a29));
        assert_eq!(h.encode(), bytes);
        assert_eq!([0, 8, 0x201f].map(Op::parse), [None; 3]);
        assert_eq!(Op::parse(5), Some(Op::Data));
    }
}
