// SPDX-License-Identifier: GPL-2.0-or-later
//! The numbers and layouts of the NBD protocol (proto.md of the nbd project). All integers are big-endian.

pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

pub const FLAG_FIXED_NEWSTYLE: u16 = 1;
pub const FLAG_NO_ZEROES: u16 = 2;

pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

pub mod reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    pub const ERR_INVALID: u32 = 0x8000_0003;
    pub const ERR_UNKNOWN: u32 = 0x8000_0006;
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
}

pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags of an export.
pub mod export {
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

pub mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISCONNECT: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

pub mod flag {
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
}

pub mod chunk {
    pub const DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = 0x8001;
}

/// Extent flags of `base:allocation`.
pub mod state {
    pub const DATA: u32 = 0;
    pub const HOLE_AND_ZERO: u32 = 3;
}
/// Extent flag of `blksnap:since:N`.
pub const STATE_DIRTY: u32 = 1;

/// The most bytes of a READ or WRITE (advertised; also what clients assume that do not ask).
pub const MAX_PAYLOAD: u32 = 32 << 20;

pub const REQUEST_LEN: usize = 28;

/// A request of the transmission phase, without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub length: u32,
}

impl Request {
    /// None when the magic is wrong: the stream is lost and the client has to go.
    pub fn parse(bytes: &[u8; REQUEST_LEN]) -> Option<Self> {
        if be32(&bytes[0..]) != REQUEST_MAGIC {
            return None;
        }
        Some(Self {
            flags: be16(&bytes[4..]),
            command: be16(&bytes[6..]),
            cookie: be64(&bytes[8..]),
            offset: be64(&bytes[16..]),
            length: be32(&bytes[24..]),
        })
    }
}

/// The leading integers of `bytes`. They panic on fewer bytes: callers have checked the length.
pub fn be16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes(bytes[..2].try_into().expect("two bytes"))
}

pub fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().expect("four bytes"))
}

pub fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"))
}

/// The longest header of a reply: structured, with the offset of data behind it.
pub const HEADER_LEN: usize = 28;

/// A reply header of up to [`HEADER_LEN`] bytes, without allocation.
#[derive(Clone, Copy, Debug, Default)]
pub struct Header {
    pub bytes: [u8; HEADER_LEN],
    pub len: u8,
}

impl Header {
    fn put(&mut self, bytes: &[u8]) {
        let at = usize::from(self.len);
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len() as u8;
    }

    pub fn simple(cookie: u64, errno: i32) -> Self {
        let mut header = Self::default();
        header.put(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        header.put(&error(errno).to_be_bytes());
        header.put(&cookie.to_be_bytes());
        header
    }

    fn structured(cookie: u64, kind: u16, done: bool, length: u32) -> Self {
        let mut header = Self::default();
        header.put(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
        header.put(&(if done { chunk::DONE } else { 0 }).to_be_bytes());
        header.put(&kind.to_be_bytes());
        header.put(&cookie.to_be_bytes());
        header.put(&length.to_be_bytes());
        header
    }

    /// `length` bytes of data at `offset` follow.
    pub fn data(cookie: u64, done: bool, offset: u64, length: u32) -> Self {
        let mut header = Self::structured(cookie, chunk::OFFSET_DATA, done, length + 8);
        header.put(&offset.to_be_bytes());
        header
    }

    /// An error without a message ends the request.
    pub fn error(cookie: u64, errno: i32) -> Self {
        let mut header = Self::structured(cookie, chunk::ERROR, true, 6);
        header.put(&error(errno).to_be_bytes());
        header.put(&0_u16.to_be_bytes());
        header
    }

    /// The extents of one context (`length` bytes: its id and 8 per extent) follow.
    pub fn block_status(cookie: u64, done: bool, length: u32) -> Self {
        Self::structured(cookie, chunk::BLOCK_STATUS, done, length)
    }

    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// The protocol's error for an errno. The protocol has its own numbers (equal to Linux's) and no others may be sent.
pub fn error(errno: i32) -> u32 {
    let known = match errno {
        0
        | libc::EPERM
        | libc::EIO
        | libc::ENOMEM
        | libc::EINVAL
        | libc::ENOSPC
        | libc::EOVERFLOW
        | libc::ENOTSUP
        | libc::ESHUTDOWN => errno,
        libc::EROFS => libc::EPERM,
        libc::EDQUOT | libc::EFBIG => libc::ENOSPC,
        _ => libc::EIO,
    };
    known as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_field_by_field() {
        let mut bytes = [0_u8; REQUEST_LEN];
        bytes[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&flag::FUA.to_be_bytes());
        bytes[6..8].copy_from_slice(&command::WRITE.to_be_bytes());
        bytes[8..16].copy_from_slice(&7_u64.to_be_bytes());
        bytes[16..24].copy_from_slice(&(1_u64 << 40).to_be_bytes());
        bytes[24..28].copy_from_slice(&512_u32.to_be_bytes());
        let request = Request::parse(&bytes).expect("request");
        let expected = Request {
            flags: flag::FUA,
            command: command::WRITE,
            cookie: 7,
            offset: 1 << 40,
            length: 512,
        };
        assert_eq!(request, expected);
        bytes[3] ^= 1;
        assert_eq!(Request::parse(&bytes), None);
    }

    #[test]
    fn headers_have_the_lengths_of_the_specification() {
        assert_eq!(Header::simple(1, 0).as_slice().len(), 16);
        assert_eq!(Header::data(1, true, 0, 4096).as_slice().len(), 28);
        assert_eq!(Header::error(1, libc::EIO).as_slice().len(), 26);
        assert_eq!(Header::block_status(1, true, 12).as_slice().len(), 20);
    }

    #[test]
    fn only_errors_of_the_protocol_are_sent() {
        assert_eq!(error(libc::ENODEV), libc::EIO as u32);
        assert_eq!(error(libc::EROFS), libc::EPERM as u32);
        assert_eq!(error(0), 0);
    }
}
