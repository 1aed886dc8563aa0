//! What host and device exchange in memory: the command list, command tables with their regions of
//! data, and the frames that the device sends (Serial ATA AHCI 1.3.1 §4.2; Serial ATA 3.0 §10.3).

use super::target::{Command, Registers};
use crate::spans::Spans;
use tandem_accel::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

/// Bytes of a command header.
const HEADER: u64 = 32;
/// Where a command table has the SCSI command, and where its regions start.
const ACMD: u64 = 0x40;
const REGIONS: u64 = 0x80;
/// Bytes of a description of a region.
const REGION: u64 = 16;
/// Descriptions that are read at once.
const BATCH: usize = 64;

/// Types of frames.
const HOST_TO_DEVICE: u8 = 0x27;
const DEVICE_TO_HOST: u8 = 0x34;
const SET_BITS: u8 = 0xa1;
const PIO_SETUP: u8 = 0x5f;
/// Where the area of received frames has each.
const AT_PIO_SETUP: u64 = 0x20;
const AT_DEVICE_TO_HOST: u64 = 0x40;
const AT_SET_BITS: u64 = 0x58;
/// A frame asks for an interrupt.
const INTERRUPT: u8 = 0x40;
/// A PIO set-up frame announces data for the host.
const TO_HOST: u8 = 0x20;

/// A command header.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// Where it is.
    at: u64,
    /// There is a SCSI command.
    pub atapi: bool,
    /// Regions of the command's data.
    regions: u16,
    /// The command table.
    table: u64,
}

/// What a command table asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A command.
    Command(Command),
    /// The control register was written: this is its software reset bit.
    Control(bool),
    /// Nothing that a device understands.
    Unknown,
}

impl Header {
    /// The header of `slot` (0–31) in the command list at `list`; `None` if it is not in memory.
    pub fn read(ram: &GuestRam, list: u64, slot: u8) -> Option<Header> {
        let at = list.checked_add(u64::from(slot) * HEADER)?;
        let mut b = [0; 16];
        ram.read_slice(&mut b, GuestAddress(at)).ok()?;
        let word = |i: usize| u32::from_le_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
        Some(Header {
            at,
            atapi: word(0) & 1 << 5 != 0,
            regions: (word(0) >> 16) as u16,
            table: u64::from(word(8) & !0x7f) | u64::from(word(12)) << 32,
        })
    }

    /// The frame for the device; `None` if it is not in memory.
    pub fn frame(&self, ram: &GuestRam) -> Option<Frame> {
        let mut f = [0; 20];
        ram.read_slice(&mut f, GuestAddress(self.table)).ok()?;
        if f[0] != HOST_TO_DEVICE {
            return Some(Frame::Unknown);
        }
        if f[1] & 0x80 == 0 {
            return Some(Frame::Control(f[15] & 4 != 0));
        }
        let mut cdb = [0; 16];
        if self.atapi {
            let at = self.table.checked_add(ACMD)?;
            ram.read_slice(&mut cdb, GuestAddress(at)).ok()?;
        }
        Some(Frame::Command(Command {
            code: f[2],
            features: u16::from_le_bytes([f[3], f[11]]),
            lba: u64::from_le_bytes([f[4], f[5], f[6], f[8], f[9], f[10], 0, 0]),
            count: u16::from_le_bytes([f[12], f[13]]),
            device: f[7],
            cdb,
        }))
    }

    /// The first `len` bytes of the command's data, fewer if there are not as many, and whether a
    /// region asks for an interrupt; `None` if the descriptions are not in memory.
    pub fn data(&self, ram: &GuestRam, len: u64) -> Option<(Spans, bool)> {
        let (mut spans, mut interrupt) = (Spans::default(), false);
        let mut at = self.table.checked_add(REGIONS)?;
        let mut left = usize::from(self.regions);
        while left > 0 && spans.len() < len {
            let mut batch = [0; BATCH * REGION as usize];
            let now = left.min(BATCH);
            let bytes = &mut batch[..now * REGION as usize];
            ram.read_slice(bytes, GuestAddress(at)).ok()?;
            for r in bytes.chunks_exact(REGION as usize) {
                let word = |i: usize| u32::from_le_bytes([r[i], r[i + 1], r[i + 2], r[i + 3]]);
                let addr = u64::from(word(0)) | u64::from(word(4)) << 32;
                let more = u64::from((word(12) & 0x3f_ffff) + 1).min(len - spans.len());
                if more == 0 {
                    break;
                }
                interrupt |= word(12) >> 31 != 0;
                spans.push(GuestAddress(addr), more as u32);
            }
            left -= now;
            at = at.checked_add(now as u64 * REGION)?;
        }
        Some((spans, interrupt))
    }

    /// Notes how many bytes were moved.
    pub fn moved(&self, ram: &GuestRam, bytes: u32) {
        let _ = ram.write_obj(bytes.to_le(), GuestAddress(self.at.wrapping_add(4)));
    }
}

/// The area of received frames at `area`, if there is one.
#[derive(Clone, Copy, Debug)]
pub struct Received<'a> {
    /// Guest memory.
    pub ram: &'a GuestRam,
    /// Its address; `None` while frames are not received.
    pub area: Option<u64>,
}

impl Received<'_> {
    fn put(&self, at: u64, frame: &[u8]) {
        let Some(at) = self.area.and_then(|a| a.checked_add(at)) else { return };
        if self.ram.write_slice(frame, GuestAddress(at)).is_err() {
            log::debug!("ahci: the area of received frames at {at:#x} is not in memory");
        }
    }

    fn registers(kind: u8, flags: u8, r: &Registers) -> [u8; 20] {
        let (lba, count) = (r.lba.to_le_bytes(), r.count.to_le_bytes());
        let mut f = [0; 20];
        f[..8].copy_from_slice(&[kind, flags, r.status, r.error, lba[0], lba[1], lba[2], r.device]);
        f[8..11].copy_from_slice(&lba[3..6]);
        f[12..14].copy_from_slice(&count);
        f
    }

    /// Registers at the end of a command.
    pub fn device_to_host(&self, interrupt: bool, r: &Registers) {
        let flags = if interrupt { INTERRUPT } else { 0 };
        self.put(AT_DEVICE_TO_HOST, &Self::registers(DEVICE_TO_HOST, flags, r));
    }

    /// Announces data by PIO: `r` with the status while it moves, and the one after.
    pub fn pio_setup(&self, interrupt: bool, to_host: bool, r: &Registers, after: u8, bytes: u64) {
        let flags = if interrupt { INTERRUPT } else { 0 } | if to_host { TO_HOST } else { 0 };
        let mut f = Self::registers(PIO_SETUP, flags, r);
        f[15] = after;
        f[16..18].copy_from_slice(&(bytes.min(0xfffe) as u16).to_le_bytes());
        self.put(AT_PIO_SETUP, &f);
    }

    /// The commands of these tags are done.
    pub fn set_bits(&self, status: u8, error: u8, done: u32) {
        let mut f = [SET_BITS, INTERRUPT, status & 0x77, error, 0, 0, 0, 0];
        f[4..].copy_from_slice(&done.to_le_bytes());
        self.put(AT_SET_BITS, &f);
    }
}
