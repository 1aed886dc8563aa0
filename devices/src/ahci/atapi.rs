//! A CD drive: the ATA commands that a packet device has, and PACKET with the SCSI commands of
//! [`super::scsi`] (ATA8-ACS §7, MMC-6).

use super::ata::Naming;
use super::identify::Words;
use super::scsi::{self, BLOCK, Medium, Reply, Sense};
use super::target::{ABRT, Action, Command, DRDY, ERR, GOOD, Protocol, Registers, Target};
use std::sync::{Arc, Mutex, OnceLock};
use tandem_backends::block::Error;
use tandem_backends::block::drive::Drive;

/// Commands.
mod op {
    pub const NOP: u8 = 0x00;
    pub const DEVICE_RESET: u8 = 0x08;
    pub const DIAGNOSTIC: u8 = 0x90;
    pub const PACKET: u8 = 0xa0;
    pub const IDENTIFY_PACKET: u8 = 0xa1;
    pub const STANDBY_NOW: u8 = 0xe0;
    pub const IDLE_NOW: u8 = 0xe1;
    pub const CHECK_POWER: u8 = 0xe5;
    pub const SLEEP: u8 = 0xe6;
    pub const IDENTIFY: u8 = 0xec;
    pub const SET_FEATURES: u8 = 0xef;
}

/// Signature of a packet device.
const SIGNATURE: u32 = 0xeb14_0101;
/// What it leaves in the address registers, which tells packet devices from disks.
const SIGNATURE_LBA: u64 = 0xeb_1401;
/// The interrupt reason of a packet command that is done: to the host, a command.
const REASON: u16 = 3;

/// A CD drive.
pub struct CdDrive {
    medium: Mutex<Option<Arc<Drive>>>,
    naming: Naming,
    state: Mutex<scsi::State>,
    /// Called when the guest has moved the tray; says whether it is open.
    moved: OnceLock<Moved>,
}

type Moved = Box<dyn Fn(bool) + Send + Sync>;

impl CdDrive {
    /// A drive with the medium of `drive`, or empty.
    pub fn new(drive: Option<Arc<Drive>>, naming: Naming) -> CdDrive {
        let (medium, state) = (Mutex::new(drive), Mutex::default());
        CdDrive { medium, naming, state, moved: OnceLock::new() }
    }

    /// Installs what is called when the guest has moved the tray.
    pub fn on_moved(&self, f: impl Fn(bool) + Send + Sync + 'static) {
        let _ = self.moved.set(Box::new(f));
    }

    /// Whether the tray is open, and whether the guest has locked it.
    pub fn tray(&self) -> (bool, bool) {
        let s = self.state.lock().unwrap();
        (s.open, s.locked)
    }

    /// Opens or closes the tray as by its button or by force; returns whether it has moved.
    pub fn move_tray(&self, open: bool) -> bool {
        let disc = self.drive().is_some();
        self.state.lock().unwrap().move_tray(open, disc)
    }

    /// Presses the button of a tray that is locked: the guest may open it.
    pub fn request_eject(&self) {
        self.state.lock().unwrap().event = scsi::Event::EjectRequest;
    }

    /// Puts another disc in, or none; returns the old one.
    pub fn exchange(&self, medium: Option<Arc<Drive>>) -> Option<Arc<Drive>> {
        std::mem::replace(&mut *self.medium.lock().unwrap(), medium)
    }

    fn medium(&self) -> Option<Medium> {
        let blocks = self.drive()?.size() / BLOCK;
        Some(Medium { blocks: u32::try_from(blocks).unwrap_or(u32::MAX) })
    }

    fn identify(&self) -> Vec<u8> {
        let mut w = Words::new();
        // Packet device, CD-ROM, removable, packets of 12 bytes, answers within 50 µs.
        w.set(0, 0x85c0);
        w.text(10, 10, &self.naming.serial);
        w.text(23, 4, &self.naming.version).text(27, 20, &self.naming.model);
        w.set(49, 0x0f00).set(50, 0x4000).set(53, 6);
        w.set(63, 7).set(64, 3).set(65, 120).set(66, 120).set(67, 120).set(68, 120);
        w.set(76, 0x0006).set(80, 0x01f0);
        // PACKET, NOP and DEVICE RESET.
        w.set(82, 0x4210).set(83, 0x4000).set(84, 0x4000);
        w.set(85, 0x4210).set(86, 0).set(87, 0x4000);
        w.set(88, 0x203f).set(222, 0x1020);
        w.sector()
    }

    /// Registers after a packet command that has ended with `sense`.
    fn checked(&self, c: &Command, sense: Sense) -> Registers {
        self.state.lock().unwrap().sense = sense;
        let error = sense.key << 4 | ABRT;
        Registers { status: DRDY | ERR, error, count: REASON, ..Registers::good(c) }
    }

    fn packet(&self, c: &Command) -> Action {
        let naming = scsi::Inquiry { naming: &self.naming };
        let medium = self.medium();
        let (reply, moved) = {
            let state = &mut *self.state.lock().unwrap();
            let before = state.open;
            let reply = scsi::execute(state, &naming, medium, &c.cdb);
            (reply, (state.open != before).then_some(state.open))
        };
        if let (Some(open), Some(tell)) = (moved, self.moved.get()) {
            tell(open);
        }
        match reply {
            Reply::Done => Action::Done(self.done(c)),
            Reply::Data(data) if data.is_empty() => Action::Done(self.done(c)),
            Reply::Data(data) => Action::Answer(data),
            Reply::Read { block, blocks: 0 } => {
                log::trace!("ide-cd: nothing is read at {block}");
                Action::Done(self.done(c))
            }
            Reply::Read { block, blocks } => {
                Action::Read { offset: u64::from(block) * BLOCK, len: u64::from(blocks) * BLOCK }
            }
            Reply::Check(sense) => Action::Done(self.checked(c, sense)),
        }
    }
}

impl Target for CdDrive {
    fn signature(&self) -> u32 {
        SIGNATURE
    }

    fn after_reset(&self) -> Registers {
        Registers { status: 0, error: 1, lba: SIGNATURE_LBA, count: 1, device: 0 }
    }

    fn queued(&self, _: &Command) -> bool {
        false
    }

    fn start(&self, c: &Command) -> (Protocol, Action) {
        let done = |r| (Protocol::NonData, Action::Done(r));
        match c.code {
            op::PACKET => (Protocol::Packet, self.packet(c)),
            op::IDENTIFY_PACKET => (Protocol::PioIn, Action::Answer(self.identify())),
            // Who asks for a disk finds the signature of a packet device.
            op::IDENTIFY => {
                done(Registers { lba: SIGNATURE_LBA, count: 1, ..Registers::failed(c, ABRT) })
            }
            op::DEVICE_RESET | op::DIAGNOSTIC => {
                self.reset();
                done(self.after_reset())
            }
            op::CHECK_POWER => done(Registers { count: 0xff, ..Registers::good(c) }),
            op::SET_FEATURES if matches!(c.features as u8, 3 | 5 | 0x85 | 0x66 | 0xcc) => {
                done(Registers::good(c))
            }
            op::STANDBY_NOW | op::IDLE_NOW | op::SLEEP => done(Registers::good(c)),
            op::NOP => done(Registers::failed(c, ABRT)),
            _ => done(Registers::failed(c, ABRT)),
        }
    }

    fn take(&self, c: &Command, _: &[u8]) -> Action {
        // No command asks for data.
        Action::Done(Registers::failed(c, ABRT))
    }

    fn done(&self, c: &Command) -> Registers {
        if c.code != op::PACKET {
            return Registers::good(c);
        }
        Registers { status: GOOD, count: REASON, ..Registers::good(c) }
    }

    fn failed(&self, c: &Command, _: &Error) -> Registers {
        self.checked(c, Sense::UNREADABLE)
    }

    fn reset(&self) {
        let mut s = self.state.lock().unwrap();
        *s = s.after_reset();
    }

    fn drive(&self) -> Option<Arc<Drive>> {
        self.medium.lock().unwrap().clone()
    }

    fn name(&self) -> &str {
        "ide-cd"
    }
}

impl Drop for CdDrive {
    fn drop(&mut self) {
        if let Some(d) = self.drive() {
            d.give_back();
        }
    }
}
