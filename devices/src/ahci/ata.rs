//! A hard disk: ATA commands (ACS-2), with 28- and 48-bit addresses, DMA, PIO and native command
//! queuing.

use super::identify::Words;
use super::target::{ABRT, Action, Command, ERR, GOOD, Protocol, Registers, Target};
use std::sync::{Arc, Mutex};
use tandem_backends::block::drive::Drive;
use tandem_backends::block::{Error, SECTOR};

/// Commands (ACS-2 §7).
mod op {
    pub const DATA_SET_MANAGEMENT: u8 = 0x06;
    pub const DEVICE_RESET: u8 = 0x08;
    pub const RECALIBRATE: u8 = 0x10;
    pub const READ_SECTORS: u8 = 0x20;
    pub const READ_SECTORS_OLD: u8 = 0x21;
    pub const READ_SECTORS_EXT: u8 = 0x24;
    pub const READ_DMA_EXT: u8 = 0x25;
    pub const READ_NATIVE_MAX_EXT: u8 = 0x27;
    pub const READ_MULTIPLE_EXT: u8 = 0x29;
    pub const READ_LOG_EXT: u8 = 0x2f;
    pub const WRITE_SECTORS: u8 = 0x30;
    pub const WRITE_SECTORS_OLD: u8 = 0x31;
    pub const WRITE_SECTORS_EXT: u8 = 0x34;
    pub const WRITE_DMA_EXT: u8 = 0x35;
    pub const WRITE_MULTIPLE_EXT: u8 = 0x39;
    pub const WRITE_DMA_FUA_EXT: u8 = 0x3d;
    pub const READ_VERIFY: u8 = 0x40;
    pub const READ_VERIFY_OLD: u8 = 0x41;
    pub const READ_VERIFY_EXT: u8 = 0x42;
    pub const READ_FPDMA: u8 = 0x60;
    pub const WRITE_FPDMA: u8 = 0x61;
    pub const SEEK: u8 = 0x70;
    pub const DIAGNOSTIC: u8 = 0x90;
    pub const INIT_PARAMETERS: u8 = 0x91;
    pub const READ_MULTIPLE: u8 = 0xc4;
    pub const WRITE_MULTIPLE: u8 = 0xc5;
    pub const SET_MULTIPLE: u8 = 0xc6;
    pub const READ_DMA: u8 = 0xc8;
    pub const READ_DMA_OLD: u8 = 0xc9;
    pub const WRITE_DMA: u8 = 0xca;
    pub const WRITE_DMA_OLD: u8 = 0xcb;
    pub const WRITE_MULTIPLE_FUA_EXT: u8 = 0xce;
    pub const STANDBY_NOW: u8 = 0xe0;
    pub const IDLE_NOW: u8 = 0xe1;
    pub const STANDBY: u8 = 0xe2;
    pub const IDLE: u8 = 0xe3;
    pub const CHECK_POWER: u8 = 0xe5;
    pub const SLEEP: u8 = 0xe6;
    pub const FLUSH: u8 = 0xe7;
    pub const FLUSH_EXT: u8 = 0xea;
    pub const IDENTIFY: u8 = 0xec;
    pub const SET_FEATURES: u8 = 0xef;
    pub const READ_NATIVE_MAX: u8 = 0xf8;
}

/// Signature of a disk.
const SIGNATURE: u32 = 0x0000_0101;
/// Error: the address is beyond the disk; data cannot be read.
const IDNF: u8 = 0x10;
const UNC: u8 = 0x40;
/// Sectors of one block of READ MULTIPLE, at most.
const MAX_MULTIPLE: u16 = 16;
/// Sectors of ranges that DATA SET MANAGEMENT takes.
const MAX_RANGE_SECTORS: u16 = 8;
/// The log of an error of a queued command.
const LOG_DIRECTORY: u8 = 0;
const LOG_QUEUED_ERROR: u8 = 0x10;
/// Heads, and sectors of a track, as IDENTIFY tells them for addresses of old.
const HEADS: u64 = 16;
const TRACK: u64 = 63;

/// What a disk says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Naming {
    /// Serial number, at most 20 bytes.
    pub serial: String,
    /// Model, at most 40 bytes.
    pub model: String,
    /// Version of the firmware, at most 8 bytes.
    pub version: String,
    /// World-wide name; none if 0.
    pub wwn: u64,
}

/// Shape of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// log2 of logical sectors in a physical one, 0–12.
    pub physical: u8,
    /// Rotations in a minute; 1: it does not rotate; 0: it does not say.
    pub rotation: u16,
}

#[derive(Default)]
struct State {
    /// Sectors of READ MULTIPLE; 0 is off.
    multiple: u16,
    /// The log of the last error of a queued command.
    queued_error: Option<(u8, Registers)>,
}

/// A hard disk.
pub struct Disk {
    drive: Arc<Drive>,
    naming: Naming,
    shape: Shape,
    writeback: bool,
    state: Mutex<State>,
}

impl Disk {
    /// A disk on `drive`.
    pub fn new(drive: Arc<Drive>, naming: Naming, shape: Shape) -> Disk {
        let writeback = drive.writeback();
        Disk { drive, naming, shape, writeback, state: Mutex::default() }
    }

    fn sectors(&self) -> u64 {
        self.drive.size() / SECTOR
    }

    /// Cylinders for software of old.
    fn cylinders(&self) -> u16 {
        (self.sectors() / (HEADS * TRACK)).clamp(1, 16383) as u16
    }

    fn identify(&self) -> Vec<u8> {
        let sectors = self.sectors();
        let multiple = self.state.lock().unwrap().multiple;
        let when = |on: bool, bits: u16| if on { bits } else { 0 };
        let cylinders = self.cylinders();
        let chs = (u64::from(cylinders) * HEADS * TRACK).min(sectors);
        let mut w = Words::new();
        w.set(0, 0x0040).set(1, cylinders).set(3, HEADS as u16).set(6, TRACK as u16);
        w.text(10, 10, &self.naming.serial);
        w.text(23, 4, &self.naming.version).text(27, 20, &self.naming.model);
        // READ MULTIPLE; LBA, DMA, IORDY; words 54–58, 64–70 and 88 are valid.
        w.set(47, 0x8000 | MAX_MULTIPLE).set(49, 0x0f00).set(50, 0x4000).set(53, 7);
        w.set(54, cylinders).set(55, HEADS as u16).set(56, TRACK as u16).wide(57, chs, 2);
        w.set(59, when(multiple > 0, 0x100 | multiple));
        w.wide(60, sectors.min(0x0fff_ffff), 2);
        // Multiword DMA 0–2, PIO 3 and 4, cycles of 120 ns.
        w.set(63, 7).set(64, 3).set(65, 120).set(66, 120).set(67, 120).set(68, 120);
        // 32 queued commands; 1.5 and 3 Gbit/s, native command queuing.
        w.set(75, 31).set(76, 0x0106).set(80, 0x01f0);
        // Write cache, NOP; flushes, 48-bit addresses; logs, FUA, a world-wide name. Then what of it
        // is on.
        let cache = when(self.drive.writeback(), 0x20);
        let wwn = when(self.naming.wwn != 0, 0x100);
        w.set(82, 0x4020).set(83, 0x7400).set(84, 0x4060 | wwn);
        w.set(85, 0x4000 | cache).set(86, 0x3400).set(87, 0x4060 | wwn);
        // Ultra DMA 0–5, 5 is selected.
        w.set(88, 0x203f);
        w.wide(100, sectors, 4);
        w.set(106, 0x4000 | when(self.shape.physical > 0, 0x2000 | u16::from(self.shape.physical)));
        if self.naming.wwn != 0 {
            for i in 0..4 {
                w.set(108 + i, (self.naming.wwn >> (48 - 16 * i)) as u16);
            }
        }
        if self.drive.discards() {
            w.set(105, MAX_RANGE_SECTORS).set(169, 1);
        }
        w.set(217, self.shape.rotation).set(222, 0x1020);
        w.sector()
    }

    /// First sector and number of sectors of a command with a 28-bit (or older) or 48-bit address.
    fn range(&self, c: &Command, wide: bool) -> (u64, u64) {
        if wide {
            return (c.lba, if c.count == 0 { 0x1_0000 } else { c.count.into() });
        }
        let count = if c.count & 0xff == 0 { 256 } else { u64::from(c.count & 0xff) };
        let high = u64::from(c.device & 0xf);
        let lba = if c.device & 0x40 != 0 {
            c.lba & 0xff_ffff | high << 24
        } else {
            let (sector, cylinder) = (c.lba & 0xff, c.lba >> 8 & 0xffff);
            ((cylinder * HEADS + high) * TRACK + sector).wrapping_sub(1)
        };
        (lba, count)
    }

    /// The bytes of a range of sectors, if the disk has them.
    fn bytes(&self, (first, count): (u64, u64)) -> Option<(u64, u64)> {
        let end = first.checked_add(count)?;
        (end <= self.sectors()).then(|| (first * SECTOR, count * SECTOR))
    }

    fn read(&self, c: &Command, range: (u64, u64)) -> Action {
        match self.bytes(range) {
            Some((offset, len)) => Action::Read { offset, len },
            None => Action::Done(Registers::failed(c, IDNF | ABRT)),
        }
    }

    fn write(&self, c: &Command, range: (u64, u64), fua: bool) -> Action {
        match self.bytes(range) {
            _ if self.drive.read_only() => Action::Done(Registers::failed(c, ABRT)),
            Some((offset, len)) => Action::Write { offset, len, fua },
            None => Action::Done(Registers::failed(c, IDNF | ABRT)),
        }
    }

    fn set_features(&self, c: &Command) -> bool {
        match c.features as u8 {
            // The write cache on and off.
            0x02 => self.drive.set_writeback(true),
            0x82 => self.drive.set_writeback(false),
            // Transfer mode: any that there is. Look-ahead, power management, and what happens at a
            // reset mean nothing.
            0x03 => return matches!(c.count as u8, 0..=1 | 8..=12 | 0x20..=0x22 | 0x40..=0x45),
            0x05 | 0x85 | 0x42 | 0xc2 | 0x55 | 0xaa | 0x66 | 0xcc => {}
            _ => return false,
        }
        true
    }

    fn log(&self, c: &Command) -> Action {
        let (page, first) = (c.lba as u8, c.lba >> 8 & 0xff | c.lba >> 24 & 0xff00);
        if c.count != 1 || first != 0 {
            return Action::Done(Registers::failed(c, ABRT));
        }
        let mut b = vec![0; SECTOR as usize];
        match page {
            LOG_DIRECTORY => {
                b[0] = 1;
                b[2 * usize::from(LOG_QUEUED_ERROR)] = 1;
            }
            LOG_QUEUED_ERROR => {
                // Reading it ends the error (ACS-2 §A.7).
                match self.state.lock().unwrap().queued_error.take() {
                    Some((tag, r)) => {
                        let lba = r.lba.to_le_bytes();
                        (b[0], b[2], b[3], b[7]) = (tag & 0x1f, r.status, r.error, r.device);
                        b[4..7].copy_from_slice(&lba[..3]);
                        b[8..11].copy_from_slice(&lba[3..6]);
                    }
                    None => b[0] = 0x80,
                }
                let sum = b[..511].iter().fold(0u8, |a, x| a.wrapping_add(*x));
                b[511] = sum.wrapping_neg();
            }
            _ => return Action::Done(Registers::failed(c, ABRT)),
        }
        Action::Answer(b)
    }

    fn queue(&self, c: &Command) -> (Protocol, Action) {
        let tag = (c.count >> 3 & 0x1f) as u8;
        let count = if c.features == 0 { 0x1_0000 } else { c.features.into() };
        let action = match c.code {
            op::READ_FPDMA => self.read(c, (c.lba, count)),
            _ => self.write(c, (c.lba, count), c.device & 0x80 != 0),
        };
        if let Action::Done(r) = action {
            self.state.lock().unwrap().queued_error = Some((tag, r));
        }
        (Protocol::Queued(tag), action)
    }
}

impl Target for Disk {
    fn signature(&self) -> u32 {
        SIGNATURE
    }

    fn after_reset(&self) -> Registers {
        Registers { status: GOOD, error: 1, lba: 1, count: 1, device: 0 }
    }

    fn queued(&self, c: &Command) -> bool {
        matches!(c.code, op::READ_FPDMA | op::WRITE_FPDMA)
    }

    fn start(&self, c: &Command) -> (Protocol, Action) {
        let done = || (Protocol::NonData, Action::Done(Registers::good(c)));
        let abort = || (Protocol::NonData, Action::Done(Registers::failed(c, ABRT)));
        let (low, wide) = (|| self.range(c, false), || self.range(c, true));
        match c.code {
            op::READ_FPDMA | op::WRITE_FPDMA => self.queue(c),
            op::READ_DMA | op::READ_DMA_OLD => (Protocol::Dma, self.read(c, low())),
            op::READ_DMA_EXT => (Protocol::Dma, self.read(c, wide())),
            op::WRITE_DMA | op::WRITE_DMA_OLD => (Protocol::Dma, self.write(c, low(), false)),
            op::WRITE_DMA_EXT => (Protocol::Dma, self.write(c, wide(), false)),
            op::WRITE_DMA_FUA_EXT => (Protocol::Dma, self.write(c, wide(), true)),
            op::READ_SECTORS | op::READ_SECTORS_OLD | op::READ_MULTIPLE => {
                (Protocol::PioIn, self.read(c, low()))
            }
            op::READ_SECTORS_EXT | op::READ_MULTIPLE_EXT => (Protocol::PioIn, self.read(c, wide())),
            op::WRITE_SECTORS | op::WRITE_SECTORS_OLD | op::WRITE_MULTIPLE => {
                (Protocol::PioOut, self.write(c, low(), false))
            }
            op::WRITE_SECTORS_EXT | op::WRITE_MULTIPLE_EXT => {
                (Protocol::PioOut, self.write(c, wide(), false))
            }
            op::WRITE_MULTIPLE_FUA_EXT => (Protocol::PioOut, self.write(c, wide(), true)),
            op::READ_VERIFY | op::READ_VERIFY_OLD | op::SEEK if self.bytes(low()).is_some() => {
                done()
            }
            op::READ_VERIFY_EXT if self.bytes(wide()).is_some() => done(),
            op::FLUSH | op::FLUSH_EXT => (Protocol::NonData, Action::Flush),
            op::IDENTIFY => (Protocol::PioIn, Action::Answer(self.identify())),
            op::READ_LOG_EXT => (Protocol::PioIn, self.log(c)),
            op::DATA_SET_MANAGEMENT
                if c.features & 1 != 0
                    && self.drive.discards()
                    && (1..=MAX_RANGE_SECTORS).contains(&c.count) =>
            {
                (Protocol::Dma, Action::Wants(u32::from(c.count) * SECTOR as u32))
            }
            op::SET_FEATURES if self.set_features(c) => done(),
            op::SET_MULTIPLE => {
                let n = c.count & 0xff;
                if n != 0 && (n > MAX_MULTIPLE || !n.is_power_of_two()) {
                    return abort();
                }
                self.state.lock().unwrap().multiple = n;
                done()
            }
            op::CHECK_POWER => {
                let r = Registers { count: 0xff, ..Registers::good(c) };
                (Protocol::NonData, Action::Done(r))
            }
            op::READ_NATIVE_MAX | op::READ_NATIVE_MAX_EXT => {
                let last = self.sectors().saturating_sub(1);
                let mut r = Registers::good(c);
                if c.code == op::READ_NATIVE_MAX {
                    let last = last.min(0x0fff_fffe);
                    (r.lba, r.device) = (last & 0xff_ffff, 0x40 | (last >> 24) as u8);
                } else {
                    r.lba = last;
                }
                (Protocol::NonData, Action::Done(r))
            }
            op::DIAGNOSTIC => (Protocol::NonData, Action::Done(self.after_reset())),
            op::RECALIBRATE
            | op::INIT_PARAMETERS
            | op::STANDBY_NOW
            | op::IDLE_NOW
            | op::STANDBY
            | op::IDLE
            | op::SLEEP => done(),
            // Of packet devices.
            op::DEVICE_RESET => abort(),
            _ => abort(),
        }
    }

    /// Ranges of DATA SET MANAGEMENT: 48 bits of address, 16 of length (ACS-2 §7.9).
    fn take(&self, c: &Command, data: &[u8]) -> Action {
        let mut ranges = Vec::new();
        for entry in data.chunks_exact(8) {
            let e = u64::from_le_bytes(entry.try_into().unwrap_or_default());
            let (first, count) = (e & 0xffff_ffff_ffff, e >> 48);
            if count == 0 {
                continue;
            }
            match self.bytes((first, count)) {
                Some(r) => ranges.push(r),
                None => return Action::Done(Registers::failed(c, IDNF | ABRT)),
            }
        }
        Action::Discard(ranges)
    }

    fn failed(&self, c: &Command, _error: &Error) -> Registers {
        let (protocol, action) = self.start(c);
        let error = if matches!(action, Action::Read { .. }) { UNC } else { ABRT };
        let r = Registers { status: GOOD | ERR, error, ..Registers::good(c) };
        if let Protocol::Queued(tag) = protocol {
            self.state.lock().unwrap().queued_error = Some((tag, r));
        }
        r
    }

    fn reset(&self) {
        *self.state.lock().unwrap() = State::default();
        self.drive.set_writeback(self.writeback);
    }

    fn drive(&self) -> Option<Arc<Drive>> {
        Some(self.drive.clone())
    }

    fn name(&self) -> &str {
        "ide-hd"
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.drive.give_back();
    }
}
