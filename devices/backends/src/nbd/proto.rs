//! Names for the numbers of the NBD protocol. All fields on the wire are big-endian.

use std::io::{self, Read};

/// What a server says first: "NBDMAGIC".
pub const GREETING: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT": newstyle, and the mark of each option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Mark of a reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Mark of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Mark of a simple reply.
pub const SIMPLE_MAGIC: u32 = 0x6744_6698;
/// Mark of a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags, the server's and the client's alike: unknown options are answered.
pub const FIXED_NEWSTYLE: u32 = 1;
/// The reply to EXPORT_NAME ends without padding.
pub const NO_ZEROES: u32 = 2;

/// Names and descriptions are at most this many bytes.
pub const MAX_STRING: usize = 4096;
/// Data of one request.
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// Options that a client haggles with.
pub mod opt {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Types of replies to options.
pub mod rep {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 1 << 31 | 1;
    pub const ERR_INVALID: u32 = 1 << 31 | 3;
    pub const ERR_UNKNOWN: u32 = 1 << 31 | 6;
    pub const ERR_TOO_BIG: u32 = 1 << 31 | 9;
}

/// Kinds of information about an export.
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// What an export can do.
pub mod can {
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const FLUSH: u16 = 1 << 2;
    pub const FUA: u16 = 1 << 3;
    pub const TRIM: u16 = 1 << 5;
    pub const WRITE_ZEROES: u16 = 1 << 6;
    pub const DF: u16 = 1 << 7;
    pub const MULTI_CONN: u16 = 1 << 8;
    pub const CACHE: u16 = 1 << 10;
}

/// Requests.
pub mod cmd {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of requests.
pub mod flag {
    /// Durable before it is answered.
    pub const FUA: u16 = 1;
    /// Zeros keep their room.
    pub const NO_HOLE: u16 = 1 << 1;
    /// One chunk of data.
    pub const DF: u16 = 1 << 2;
    /// One extent of status.
    pub const REQ_ONE: u16 = 1 << 3;
}

/// Chunks of structured replies.
pub mod chunk {
    /// Flag: the last one.
    pub const DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = 1 << 15 | 1;
}

/// Error numbers.
pub mod errno {
    pub const EPERM: u32 = 1;
    pub const EIO: u32 = 5;
    pub const EINVAL: u32 = 22;
    pub const ENOSPC: u32 = 28;
    pub const ENOTSUP: u32 = 95;
}

/// What a client may ask about parts of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    /// `base:allocation`.
    Allocation,
    /// `qemu:allocation-depth`.
    Depth,
}

impl Context {
    /// All.
    pub const ALL: [Context; 2] = [Context::Allocation, Context::Depth];
    /// Flags of `base:allocation`: takes no room; reads as zeros.
    pub const HOLE: u32 = 1;
    pub const ZERO: u32 = 2;

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Context::Allocation => "base:allocation",
            Context::Depth => "qemu:allocation-depth",
        }
    }
    /// Its number on the wire.
    pub fn id(self) -> u32 {
        self as u32
    }
}

/// Reads a number.
pub fn read_u16(from: &mut impl Read) -> io::Result<u16> {
    let mut b = [0; 2];
    from.read_exact(&mut b)?;
    Ok(u16::from_be_bytes(b))
}

/// Reads a number.
pub fn read_u32(from: &mut impl Read) -> io::Result<u32> {
    let mut b = [0; 4];
    from.read_exact(&mut b)?;
    Ok(u32::from_be_bytes(b))
}

/// Reads a number.
pub fn read_u64(from: &mut impl Read) -> io::Result<u64> {
    let mut b = [0; 8];
    from.read_exact(&mut b)?;
    Ok(u64::from_be_bytes(b))
}
