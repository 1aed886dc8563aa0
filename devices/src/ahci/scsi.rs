//! The SCSI commands of a CD drive with a data disc of one track, or without a disc (SPC-4, MMC-6).
//! A command block and the disc's size go in, a reply comes out; the disc is read by others.

use super::ata::Naming;

/// Bytes of a block.
pub const BLOCK: u64 = 2048;
/// Blocks before address 0 in addresses of minutes, seconds and frames.
const LEAD_IN: u32 = 150;
/// Most bytes of one read: what the port can count.
const MAX_READ: u32 = 1 << 31;

/// Commands.
mod op {
    pub const TEST_UNIT_READY: u8 = 0x00;
    pub const REQUEST_SENSE: u8 = 0x03;
    pub const INQUIRY: u8 = 0x12;
    pub const MODE_SENSE_6: u8 = 0x1a;
    pub const START_STOP: u8 = 0x1b;
    pub const PREVENT_REMOVAL: u8 = 0x1e;
    pub const READ_CAPACITY: u8 = 0x25;
    pub const READ_10: u8 = 0x28;
    pub const SEEK: u8 = 0x2b;
    pub const SYNCHRONIZE: u8 = 0x35;
    pub const READ_TOC: u8 = 0x43;
    pub const GET_CONFIGURATION: u8 = 0x46;
    pub const GET_EVENT: u8 = 0x4a;
    pub const READ_DISC_INFORMATION: u8 = 0x51;
    pub const MODE_SENSE_10: u8 = 0x5a;
    pub const READ_12: u8 = 0xa8;
    pub const SET_SPEED: u8 = 0xbb;
    pub const MECHANISM_STATUS: u8 = 0xbd;
    pub const READ_CD: u8 = 0xbe;
}

/// Sense: key, additional code and its qualifier (SPC-4 §4.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sense {
    /// Key, 4 bits.
    pub key: u8,
    /// Additional code.
    pub code: u8,
    /// Its qualifier.
    pub qualifier: u8,
}

impl Sense {
    const fn new(key: u8, code: u8, qualifier: u8) -> Sense {
        Sense { key, code, qualifier }
    }
    /// There is no disc.
    pub const NO_MEDIUM: Sense = Sense::new(2, 0x3a, 0);
    /// The disc cannot be read there.
    pub const UNREADABLE: Sense = Sense::new(3, 0x11, 0);
    /// There is no such command.
    pub const NO_COMMAND: Sense = Sense::new(5, 0x20, 0);
    /// The address is beyond the disc.
    pub const BEYOND: Sense = Sense::new(5, 0x21, 0);
    /// The command has a field that makes no sense.
    pub const BAD_FIELD: Sense = Sense::new(5, 0x24, 0);
    /// There may be another disc.
    pub const CHANGED: Sense = Sense::new(6, 0x28, 0);
    /// There is no disc, and the tray is open.
    pub const TRAY_OPEN: Sense = Sense::new(2, 0x3a, 2);
    /// The drive has been told not to let the disc go.
    pub const PREVENTED: Sense = Sense::new(5, 0x53, 2);
}

/// What commands leave behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Of the last command that failed.
    pub sense: Sense,
    /// The tray may not open.
    pub locked: bool,
    /// The tray is open.
    pub open: bool,
    /// The next command is told that there may be another disc (SPC-4 §5.14).
    pub attention: bool,
    /// What happened to the disc since somebody has last asked.
    pub event: Event,
}

/// What happens to a disc (MMC-6 §6.5.5, media events).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Event {
    /// Nothing.
    #[default]
    Nothing = 0,
    /// Somebody wants it, and the drive may not let it go.
    EjectRequest = 1,
    /// There is one that was not there before.
    New = 2,
    /// It has gone.
    Removed = 3,
}

impl State {
    /// After a reset: the tray is where it was.
    pub fn after_reset(&self) -> State {
        State { open: self.open, ..State::default() }
    }

    /// Opens or closes the tray, in which there is a disc or not; returns whether it has moved.
    pub fn move_tray(&mut self, open: bool, disc: bool) -> bool {
        if self.open == open {
            return false;
        }
        self.open = open;
        if disc {
            self.event = if open { Event::Removed } else { Event::New };
            self.attention = !open;
        }
        true
    }
}

/// A disc.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Medium {
    /// Number of blocks.
    pub blocks: u32,
}

/// What the drive says of itself.
pub struct Inquiry<'a> {
    /// Names.
    pub naming: &'a Naming,
}

/// What comes of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It is done.
    Done,
    /// These bytes, no more than were asked for.
    Data(Vec<u8>),
    /// These blocks, which the disc has.
    Read {
        /// First.
        block: u32,
        /// Number.
        blocks: u32,
    },
    /// It has failed.
    Check(Sense),
}

fn be16(cdb: &[u8; 16], at: usize) -> u16 {
    u16::from_be_bytes([cdb[at], cdb[at + 1]])
}

fn be32(cdb: &[u8; 16], at: usize) -> u32 {
    u32::from_be_bytes([cdb[at], cdb[at + 1], cdb[at + 2], cdb[at + 3]])
}

/// Data cut to what was asked for.
fn cut(mut data: Vec<u8>, asked: usize) -> Reply {
    data.truncate(asked);
    Reply::Data(data)
}

/// Executes a command.
pub fn execute(
    state: &mut State,
    inquiry: &Inquiry<'_>,
    disc: Option<Medium>,
    cdb: &[u8; 16],
) -> Reply {
    let loaded = disc.is_some();
    let missing = if state.open { Sense::TRAY_OPEN } else { Sense::NO_MEDIUM };
    let disc = disc.filter(|_| !state.open).ok_or(missing);
    let told =
        matches!(cdb[0], op::INQUIRY | op::REQUEST_SENSE | op::GET_CONFIGURATION | op::GET_EVENT);
    if !told && std::mem::take(&mut state.attention) {
        return Reply::Check(Sense::CHANGED);
    }
    let reply = match cdb[0] {
        op::INQUIRY => inquire(inquiry, cdb),
        op::REQUEST_SENSE => {
            let s = std::mem::take(&mut state.sense);
            let mut d = vec![0; 18];
            (d[0], d[2], d[7], d[12], d[13]) = (0x70, s.key, 10, s.code, s.qualifier);
            Ok(cut(d, cdb[4].into()))
        }
        op::TEST_UNIT_READY => disc.map(|_| Reply::Done),
        op::PREVENT_REMOVAL => {
            state.locked = cdb[4] & 1 != 0;
            Ok(Reply::Done)
        }
        op::START_STOP => match cdb[4] & 3 {
            2 if state.locked => Err(Sense::PREVENTED),
            eject @ (2 | 3) => {
                state.move_tray(eject == 2, loaded);
                Ok(Reply::Done)
            }
            _ => Ok(Reply::Done),
        },
        op::READ_CAPACITY => disc.map(|d| {
            let mut b = d.blocks.saturating_sub(1).to_be_bytes().to_vec();
            b.extend((BLOCK as u32).to_be_bytes());
            Reply::Data(b)
        }),
        op::READ_10 => disc.and_then(|d| read(d, be32(cdb, 2), be16(cdb, 7).into())),
        op::READ_12 => disc.and_then(|d| read(d, be32(cdb, 2), be32(cdb, 6))),
        op::READ_CD => disc.and_then(|d| read_cd(d, cdb)),
        op::SEEK => disc.and_then(|d| read(d, be32(cdb, 2), 0)).map(|_| Reply::Done),
        op::SYNCHRONIZE | op::SET_SPEED => Ok(Reply::Done),
        op::READ_TOC => disc.and_then(|d| table_of_contents(d, cdb)),
        op::GET_CONFIGURATION => configuration(disc.ok(), cdb),
        op::GET_EVENT => event(state, disc.is_ok(), cdb),
        op::READ_DISC_INFORMATION => disc.map(|_| {
            let mut d = vec![0; 34];
            // A finished disc of one session and one track; not erasable; its identification does
            // not count.
            (d[1], d[2], d[3], d[4], d[5], d[6], d[7]) = (32, 0x0e, 1, 1, 1, 1, 0x20);
            cut(d, be16(cdb, 7).into())
        }),
        op::MODE_SENSE_6 => mode_pages(cdb[2]).map(|pages| {
            let mut d = vec![pages.len() as u8 + 3, 0, 0, 0];
            d.extend(pages);
            cut(d, cdb[4].into())
        }),
        op::MODE_SENSE_10 => mode_pages(cdb[2]).map(|pages| {
            let mut d = vec![0, pages.len() as u8 + 6, 0, 0, 0, 0, 0, 0];
            d.extend(pages);
            cut(d, be16(cdb, 7).into())
        }),
        op::MECHANISM_STATUS => {
            let mut d = vec![0; 8];
            d[1] = if state.open { 0x10 } else { 0 };
            Ok(cut(d, be16(cdb, 8).into()))
        }
        other => {
            log::debug!("ide-cd: command {other:#04x} is not there");
            Err(Sense::NO_COMMAND)
        }
    };
    if cdb[0] != op::REQUEST_SENSE && reply.is_ok() {
        state.sense = Sense::default();
    }
    reply.unwrap_or_else(Reply::Check)
}

fn read(d: Medium, block: u32, blocks: u32) -> Result<Reply, Sense> {
    let end = block.checked_add(blocks).filter(|e| *e <= d.blocks).ok_or(Sense::BEYOND)?;
    if u64::from(end - block) * BLOCK > u64::from(MAX_READ) {
        return Err(Sense::BAD_FIELD);
    }
    Ok(Reply::Read { block, blocks })
}

/// READ CD: of a data disc only the data (MMC-6 §6.19).
fn read_cd(d: Medium, cdb: &[u8; 16]) -> Result<Reply, Sense> {
    let blocks = be32(cdb, 5) & 0xff_ffff;
    match cdb[9] & 0xf8 {
        0 => Ok(Reply::Done),
        0x10 => read(d, be32(cdb, 2), blocks),
        _ => Err(Sense::BAD_FIELD),
    }
}

fn padded(text: &str, len: usize) -> impl Iterator<Item = u8> {
    let graphic = |b: u8| if (0x20..0x7f).contains(&b) { b } else { b'?' };
    text.bytes()
        .map(graphic)
        .chain(std::iter::repeat(b' '))
        .take(len)
        .collect::<Vec<_>>()
        .into_iter()
}

fn inquire(i: &Inquiry<'_>, cdb: &[u8; 16]) -> Result<Reply, Sense> {
    let asked = be16(cdb, 3).into();
    if cdb[1] & 1 != 0 {
        let page = cdb[2];
        let body: Vec<u8> = match page {
            0x00 => vec![0x00, 0x80, 0x83],
            0x80 => i.naming.serial.bytes().take(20).collect(),
            // Designators: the serial number, made by the vendor.
            0x83 => {
                let serial: Vec<u8> = i.naming.serial.bytes().take(20).collect();
                let mut b = vec![2, 0, 0, serial.len() as u8];
                b.extend(serial);
                b
            }
            _ => return Err(Sense::BAD_FIELD),
        };
        let mut d = vec![5, page, 0, body.len() as u8];
        d.extend(body);
        return Ok(cut(d, asked));
    }
    if cdb[2] != 0 {
        return Err(Sense::BAD_FIELD);
    }
    // CD drive, removable; over ATAPI; 31 more bytes.
    let mut d = vec![5, 0x80, 0, 0x21, 31, 0, 0, 0];
    let (vendor, product) = i.naming.model.split_once(' ').unwrap_or(("", &i.naming.model));
    d.extend(padded(vendor, 8));
    d.extend(padded(product, 16));
    d.extend(padded(&i.naming.version, 4));
    Ok(cut(d, asked))
}

/// An address in a table of contents: a block, or minutes, seconds and frames.
fn address(block: u32, msf: bool) -> [u8; 4] {
    if !msf {
        return block.to_be_bytes();
    }
    let at = block.saturating_add(LEAD_IN);
    [0, (at / 75 / 60).min(255) as u8, (at / 75 % 60) as u8, (at % 75) as u8]
}

fn table_of_contents(d: Medium, cdb: &[u8; 16]) -> Result<Reply, Sense> {
    let msf = cdb[1] & 2 != 0;
    // Drives of old have the format in the last byte.
    let format = if cdb[2] & 0xf != 0 { cdb[2] & 0xf } else { cdb[9] >> 6 };
    let mut b = vec![0, 0, 1, 1];
    match format {
        0 => {
            let first = cdb[6];
            if first > 1 && first != 0xaa {
                return Err(Sense::BAD_FIELD);
            }
            if first <= 1 {
                b.extend([0, 0x14, 1, 0]);
                b.extend(address(0, msf));
            }
            b.extend([0, 0x16, 0xaa, 0]);
            b.extend(address(d.blocks, msf));
        }
        1 => {
            b.extend([0, 0x14, 1, 0]);
            b.extend(address(0, msf));
        }
        2 => {
            let end = address(d.blocks, true);
            for (point, at) in [(0xa0, [0, 1, 0, 0]), (0xa1, [0, 1, 0, 0]), (0xa2, end)] {
                b.extend([1, 0x14, 0, point, 0, 0, 0]);
                b.extend(at);
            }
            b.extend([1, 0x14, 0, 1, 0, 0, 0]);
            b.extend(address(0, true));
        }
        _ => return Err(Sense::BAD_FIELD),
    }
    let len = (b.len() - 2) as u16;
    b[..2].copy_from_slice(&len.to_be_bytes());
    Ok(cut(b, be16(cdb, 7).into()))
}

/// GET CONFIGURATION (MMC-6 §6.6, §5).
fn configuration(disc: Option<Medium>, cdb: &[u8; 16]) -> Result<Reply, Sense> {
    const CD_ROM: u16 = 0x08;
    const DVD_ROM: u16 = 0x10;
    // What does not fit on a CD is a DVD.
    let current = match disc {
        None => 0,
        Some(d) if d.blocks > 80 * 60 * 75 => DVD_ROM,
        Some(_) => CD_ROM,
    };
    let on = |profile: u16| u8::from(profile == current);
    let mut profiles = vec![0, 0, 3, 8];
    for p in [DVD_ROM, CD_ROM] {
        profiles.extend(p.to_be_bytes());
        profiles.extend([on(p), 0]);
    }
    let features: [(u16, Vec<u8>); 3] = [
        (0, profiles),
        // Core: ATAPI. Removable medium: a tray that can be opened and locked.
        (1, vec![0, 1, 0x0b, 8, 0, 0, 0, 2, 1, 0, 0, 0]),
        (3, vec![0, 3, 3, 4, 0x29, 0, 0, 0]),
    ];
    let (from, kind) = (be16(cdb, 2), cdb[1] & 3);
    if kind == 3 {
        return Err(Sense::BAD_FIELD);
    }
    let mut b = vec![0; 6];
    b.extend(current.to_be_bytes());
    for (number, bytes) in &features {
        let shown = match kind {
            // All, or those that are in force; they all are.
            0 | 1 => *number >= from,
            _ => *number == from,
        };
        if shown {
            b.extend(bytes);
        }
    }
    let len = (b.len() - 4) as u32;
    b[..4].copy_from_slice(&len.to_be_bytes());
    Ok(cut(b, be16(cdb, 7).into()))
}

/// GET EVENT STATUS NOTIFICATION, which is only polled (MMC-6 §6.5).
fn event(state: &mut State, there: bool, cdb: &[u8; 16]) -> Result<Reply, Sense> {
    const MEDIA: u8 = 1 << 4;
    if cdb[1] & 1 == 0 {
        return Err(Sense::BAD_FIELD);
    }
    let b = match cdb[4] & MEDIA != 0 {
        true => {
            let happened = std::mem::take(&mut state.event) as u8;
            let now = u8::from(state.open) | u8::from(there) << 1;
            vec![0, 6, 4, MEDIA, happened, now, 0, 0]
        }
        // No class that there is was asked for.
        false => vec![0, 2, 0x80, MEDIA],
    };
    Ok(cut(b, be16(cdb, 7).into()))
}

/// The mode pages: error recovery, power, and what the drive can do (MMC-6 §7).
fn mode_pages(asked: u8) -> Result<Vec<u8>, Sense> {
    const RECOVERY: [u8; 8] = [0x01, 6, 0, 5, 0, 0, 0, 0];
    let mut abilities = vec![0; 22];
    (abilities[0], abilities[1]) = (0x2a, 20);
    // Reads mode 2 form 1 and 2 and several sessions; a tray that can be locked and opened.
    (abilities[4], abilities[6]) = (0x71, 0x29);
    // Speeds, in kilobytes a second, most and now; a buffer of 512 kilobytes.
    abilities[8..10].copy_from_slice(&706u16.to_be_bytes());
    abilities[12..14].copy_from_slice(&512u16.to_be_bytes());
    abilities[14..16].copy_from_slice(&706u16.to_be_bytes());
    // Values that could be changed: none. Saved values there are not.
    let page = match asked >> 6 {
        3 => return Err(Sense::new(5, 0x39, 0)),
        _ => asked & 0x3f,
    };
    let mut pages: Vec<u8> = match page {
        0x01 => RECOVERY.to_vec(),
        0x2a => abilities,
        0x3f => [RECOVERY.to_vec(), abilities].concat(),
        _ => return Err(Sense::BAD_FIELD),
    };
    if asked >> 6 == 1 {
        let mut at = 0;
        while let Some(len) = pages.get(at + 1).map(|l| usize::from(*l)) {
            pages[at + 2..at + 2 + len].fill(0);
            at += 2 + len;
        }
    }
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    fn naming() -> Naming {
        Naming { serial: "S".into(), model: "TANDEM CD".into(), version: "1".into(), wwn: 0 }
    }

    fn run(state: &mut State, disc: Option<Medium>, bytes: &[u8]) -> Reply {
        let mut cdb = [0; 16];
        cdb[..bytes.len()].copy_from_slice(bytes);
        execute(state, &Inquiry { naming: &naming() }, disc, &cdb)
    }

    const GET_EVENT: [u8; 9] = [0x4a, 1, 0, 0, 0x10, 0, 0, 0, 8];

    /// What has happened to the disc, and where it is.
    fn event(state: &mut State, disc: Option<Medium>) -> (u8, u8) {
        match run(state, disc, &GET_EVENT) {
            Reply::Data(d) => (d[4], d[5]),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_new_disc_is_told_once_by_attention_and_by_event() {
        let (mut s, disc) = (State::default(), Some(Medium { blocks: 100 }));
        assert_eq!((run(&mut s, disc, &[0]), event(&mut s, disc)), (Reply::Done, (0, 2)));
        assert!(s.move_tray(true, true) && !s.move_tray(true, true));
        assert_eq!(event(&mut s, disc), (Event::Removed as u8, 1));
        assert_eq!(run(&mut s, disc, &[0]), Reply::Check(Sense::TRAY_OPEN));
        assert!(s.move_tray(false, true));
        // What tells of the drive is not held up.
        assert!(matches!(run(&mut s, disc, &[0x12, 0, 0, 0, 36]), Reply::Data(_)));
        assert_eq!(event(&mut s, disc), (Event::New as u8, 2));
        assert_eq!(event(&mut s, disc), (0, 2));
        assert_eq!(run(&mut s, disc, &[0x25]), Reply::Check(Sense::CHANGED));
        assert!(matches!(run(&mut s, disc, &[0x25]), Reply::Data(_)));
        // A locked tray is asked for; the guest lets it go.
        run(&mut s, disc, &[0x1e, 0, 0, 0, 1]);
        s.event = Event::EjectRequest;
        assert_eq!(event(&mut s, disc), (1, 2));
        assert_eq!(run(&mut s, disc, &[0x1b, 0, 0, 0, 2]), Reply::Check(Sense::PREVENTED));
        run(&mut s, disc, &[0x1e, 0, 0, 0, 0]);
        assert_eq!(run(&mut s, disc, &[0x1b, 0, 0, 0, 2]), Reply::Done);
        assert_eq!((s.open, s.after_reset().open), (true, true));
        assert!(s.move_tray(false, false));
        assert_eq!(run(&mut s, None, &[0]), Reply::Check(Sense::NO_MEDIUM));
    }

    #[test]
    fn a_hostile_guest_ends_nothing() {
        let (mut s, mut r) = (State::default(), Random::default());
        for _ in 0..200_000 {
            let mut cdb = [r.word().to_le_bytes(), r.word().to_le_bytes()].concat();
            if r.next() & 1 == 0 {
                cdb[0] =
                    [0x00, 0x03, 0x12, 0x1a, 0x1b, 0x25, 0x28, 0x43, 0x46, 0x4a, 0x51, 0x5a, 0xbe]
                        [(r.next() >> 8) as usize % 13];
            }
            let blocks = r.word() as u32;
            let disc = (r.next() & 3 != 0).then_some(Medium { blocks });
            match run(&mut s, disc, &cdb) {
                Reply::Read { block, blocks: n } => {
                    assert!(block.checked_add(n).unwrap() <= blocks)
                }
                Reply::Data(d) => assert!(d.len() < 1 << 16),
                Reply::Done | Reply::Check(_) => {}
            }
        }
    }
}
