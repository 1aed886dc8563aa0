//! What a port has at the other end of its cable: a device that understands ATA commands. It knows
//! nothing of registers and guest memory: a command comes as data and leaves as an [`Action`].

use std::sync::Arc;
use tandem_backends::block::Error;
use tandem_backends::block::drive::Drive;

/// Status: an error (see the error register).
pub const ERR: u8 = 0x01;
/// Status: data is to be moved.
pub const DRQ: u8 = 0x08;
/// Status: the device is there and ready.
pub const DRDY: u8 = 0x40;
/// Status: seek complete, which software of old looks at.
pub const DSC: u8 = 0x10;
/// Status: busy.
pub const BSY: u8 = 0x80;
/// Status of a command that has gone well.
pub const GOOD: u8 = DRDY | DSC;
/// Error: the command was aborted.
pub const ABRT: u8 = 0x04;

/// A command as the host wrote it (ATA/ATAPI-8 §6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Command {
    /// Which.
    pub code: u8,
    /// Features; with the extended half.
    pub features: u16,
    /// Address, 48 bits.
    pub lba: u64,
    /// Count; with the extended half.
    pub count: u16,
    /// Device: bit 6 says that the address is an LBA.
    pub device: u8,
    /// The SCSI command of PACKET.
    pub cdb: [u8; 16],
}

/// Registers as the device leaves them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// Status.
    pub status: u8,
    /// Error.
    pub error: u8,
    /// Address, 48 bits.
    pub lba: u64,
    /// Count.
    pub count: u16,
    /// Device.
    pub device: u8,
}

impl Registers {
    /// After `c` has gone well.
    pub fn good(c: &Command) -> Registers {
        Registers { status: GOOD, error: 0, lba: c.lba, count: c.count, device: c.device }
    }
    /// After `c` has failed with these error bits.
    pub fn failed(c: &Command, error: u8) -> Registers {
        Registers { status: GOOD | ERR, error, ..Registers::good(c) }
    }
    /// Whether they tell of an error.
    pub fn is_error(&self) -> bool {
        self.status & ERR != 0
    }
}

/// How data moves, which decides what the host is told at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// No data.
    NonData,
    /// The host reads by PIO.
    PioIn,
    /// The host writes by PIO.
    PioOut,
    /// DMA.
    Dma,
    /// Native command queuing, under this tag (0–31).
    Queued(u8),
    /// A packet command, whose data comes by PIO or DMA.
    Packet,
}

/// What is to be done for a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing more: these are the registers.
    Done(Registers),
    /// These bytes are for the host.
    Answer(Vec<u8>),
    /// So many bytes from the host are needed first, for [`Target::take`].
    Wants(u32),
    /// Reads bytes of the drive.
    Read {
        /// First byte.
        offset: u64,
        /// Number of bytes, at most 2^32.
        len: u64,
    },
    /// Writes bytes of the drive.
    Write {
        /// First byte.
        offset: u64,
        /// Number of bytes, at most 2^32.
        len: u64,
        /// They are durable before the command is done.
        fua: bool,
    },
    /// Makes what was written durable.
    Flush,
    /// Gives ranges (offset, length) up.
    Discard(Vec<(u64, u64)>),
}

/// A device on a port. Any thread; it locks its own state, and calls nobody under that lock.
pub trait Target: Send + Sync {
    /// What the port's signature register shows.
    fn signature(&self) -> u32;
    /// Registers after a reset of the device.
    fn after_reset(&self) -> Registers;
    /// Whether `c` is a queued command.
    fn queued(&self, c: &Command) -> bool;
    /// Looks at a command.
    fn start(&self, c: &Command) -> (Protocol, Action);
    /// Goes on with a command that wanted bytes from the host.
    fn take(&self, c: &Command, data: &[u8]) -> Action;
    /// Registers of a command after data has moved.
    fn done(&self, c: &Command) -> Registers {
        Registers::good(c)
    }
    /// Registers of a command whose work on the drive has failed.
    fn failed(&self, c: &Command, error: &Error) -> Registers;
    /// Back to the state after power-on, or after a reset over the cable.
    fn reset(&self);
    /// What it reads and writes; a CD drive without a medium has none.
    fn drive(&self) -> Option<Arc<Drive>>;
    /// Its name in messages.
    fn name(&self) -> &str;
}
