//! Commands as the host writes them, where their data lies, and how they end (NVM Express Base 1.4
//! §4.2, §4.3, §4.5).

use crate::spans::Spans;
use tandem_accel::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

/// Bytes of a submission queue entry.
pub const LEN: usize = 64;
/// Bytes of a page: the only size offered.
pub const PAGE: u64 = 4096;

/// How a command ends: type and code, as they stand in a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u16);

impl Status {
    /// It went well.
    pub const OK: Status = Status(0);
    /// There is no such command.
    pub const OPCODE: Status = Status(0x01);
    /// A field makes no sense.
    pub const FIELD: Status = Status(0x02);
    /// Data could not be moved.
    pub const TRANSFER: Status = Status(0x04);
    /// There is no such namespace.
    pub const NAMESPACE: Status = Status(0x0b);
    /// An address of data has an offset where it may have none.
    pub const PRP_OFFSET: Status = Status(0x13);
    /// Beyond the namespace.
    pub const LBA_RANGE: Status = Status(0x80);
    /// There is no such completion queue.
    pub const NO_CQ: Status = Status(0x100);
    /// There is no such queue, or it is there already.
    pub const QUEUE_ID: Status = Status(0x101);
    /// A queue cannot be so long.
    pub const QUEUE_SIZE: Status = Status(0x102);
    /// There are too many requests for events.
    pub const EVENTS: Status = Status(0x105);
    /// There is no such interrupt vector.
    pub const VECTOR: Status = Status(0x108);
    /// There is no such log page.
    pub const LOG_PAGE: Status = Status(0x109);
    /// The completion queue is in use.
    pub const DELETION: Status = Status(0x10c);
    /// Nothing can be written.
    pub const READ_ONLY: Status = Status(0x182);
    /// Writing failed.
    pub const WRITE_FAULT: Status = Status(0x280);
    /// Reading failed.
    pub const READ_ERROR: Status = Status(0x281);

    /// The status field of a completion; after what will not go well next time either, with "do not
    /// retry".
    pub fn field(self) -> u16 {
        let media = self.0 >> 8 == 2 || self == Status::TRANSFER;
        if self == Status::OK || media { self.0 } else { self.0 | 0x4000 }
    }
}

/// A command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// Which.
    pub opcode: u8,
    /// Flags: fused operation and kind of data pointer.
    pub flags: u8,
    /// The host's name for it.
    pub id: u16,
    /// Namespace.
    pub namespace: u32,
    prp: [u64; 2],
    /// Double words 10 to 15.
    pub words: [u32; 6],
}

impl Command {
    /// Reads a command.
    pub fn new(b: &[u8; LEN]) -> Command {
        let word = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let wide = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Command {
            opcode: b[0],
            flags: b[1],
            id: u16::from_le_bytes([b[2], b[3]]),
            namespace: word(4),
            prp: [wide(24), wide(32)],
            words: std::array::from_fn(|i| word(40 + 4 * i)),
        }
    }

    /// The first address of its data, which some commands use for something else.
    pub fn address(&self) -> u64 {
        self.prp[0]
    }

    /// Words 10 and 11 as one.
    pub fn wide(&self) -> u64 {
        u64::from(self.words[0]) | u64::from(self.words[1]) << 32
    }

    /// Where `len` bytes of its data lie (§4.3). Reads at most as many entries as there are pages.
    pub fn data(&self, ram: &GuestRam, len: u64) -> Result<Spans, Status> {
        let mut spans = Spans::default();
        let [first, second] = self.prp;
        if first & 3 != 0 {
            return Err(Status::PRP_OFFSET);
        }
        let n = (PAGE - first % PAGE).min(len);
        spans.push(GuestAddress(first), n as u32);
        let mut left = len - n;
        if left == 0 {
            return Ok(spans);
        }
        if left <= PAGE {
            if second % PAGE != 0 {
                return Err(Status::PRP_OFFSET);
            }
            spans.push(GuestAddress(second), left as u32);
            return Ok(spans);
        }
        // The first list may begin within a page, those behind it may not, so that each has entries.
        let mut list = second;
        if list & 7 != 0 {
            return Err(Status::PRP_OFFSET);
        }
        loop {
            let entries = (PAGE - list % PAGE) / 8;
            let pages = left.div_ceil(PAGE);
            let here = entries.min(pages) as usize;
            let mut raw = vec![0; here * 8];
            ram.read_slice(&mut raw, GuestAddress(list)).map_err(|_| Status::TRANSFER)?;
            let mut entry = raw.chunks_exact(8).map(|e| {
                let e = u64::from_le_bytes(e.try_into().unwrap_or_default());
                if e % PAGE == 0 { Ok(e) } else { Err(Status::PRP_OFFSET) }
            });
            // The last entry of a list that does not end the data is the next list.
            let more = pages > entries;
            for e in entry.by_ref().take(here - usize::from(more)) {
                let n = left.min(PAGE);
                spans.push(GuestAddress(e?), n as u32);
                left -= n;
            }
            match entry.next() {
                Some(next) if more => list = next?,
                _ => return Ok(spans),
            }
        }
    }
}
