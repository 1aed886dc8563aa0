//! Frames on their way out: legacy, context and data descriptors (datasheet §7.2).

use super::frame::{Checksum, Outgoing, Segmentation, Work};
use super::reg::{self, cause};
use super::ring::Ring;
use super::state::State;
use serde::{Deserialize, Serialize};
use tandem_accel::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

/// Longest frame that is put together from descriptors.
const MAX_LEN: usize = 128 << 10;
/// Headers and payload of the shortest segment that makes sense, so that a guest's long frame does
/// not become tens of thousands.
const MIN_PAYLOAD: u16 = 16;

/// Bits of a descriptor's command: end of packet, insert a checksum, segments, report, extended
/// kind, VLAN tag.
mod dcmd {
    pub const END: u8 = 1;
    pub const CHECKSUM: u8 = 1 << 2;
    pub const SEGMENTS: u8 = 1 << 2;
    pub const REPORT: u8 = 1 << 3;
    pub const EXTENDED: u8 = 1 << 5;
    pub const VLAN: u8 = 1 << 6;
}
/// Of a context: TCP, and not UDP; IPv4.
const CONTEXT_TCP: u8 = 1;
const CONTEXT_IPV4: u8 = 1 << 1;
/// Options of a data descriptor: IP checksum, TCP or UDP checksum.
const OPTION_IP: u8 = 1;
const OPTION_PAYLOAD: u8 = 2;
/// Status: done.
const DONE: u8 = 1;

/// What the last context descriptor has said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Context {
    ip: Checksum,
    payload: Checksum,
    command: u8,
    headers: u8,
    mss: u16,
}

/// A frame that is being put together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transmit {
    context: Context,
    data: Vec<u8>,
    /// It is too long, or does not lie in memory.
    bad: bool,
    /// Of its first data descriptor.
    options: u8,
    command: u8,
    begun: bool,
}

/// The context descriptor `d`.
fn context(d: &[u8; 16]) -> Context {
    let word = |at: usize| u16::from_le_bytes([d[at], d[at + 1]]);
    Context {
        ip: Checksum { start: d[0].into(), at: d[1].into(), last: word(2) },
        payload: Checksum { start: d[4].into(), at: d[5].into(), last: word(6) },
        command: d[11],
        headers: d[13],
        mss: word(14),
    }
}

impl Transmit {
    /// Adds `len` bytes at `at`.
    fn gather(&mut self, ram: &GuestRam, at: u64, len: usize) {
        let old = self.data.len();
        if self.bad || old + len > MAX_LEN {
            self.bad = true;
            return;
        }
        self.data.resize(old + len, 0);
        self.bad = ram.read_slice(&mut self.data[old..], GuestAddress(at)).is_err();
    }

    /// The frame that ends with a descriptor of `kind`; nothing of it is kept.
    fn finish(&mut self, work: Work, tag: Option<(u16, u16)>, pad: bool) -> Option<Outgoing> {
        let mut frame = std::mem::take(&mut self.data);
        let bad = std::mem::take(&mut self.bad);
        self.begun = false;
        if bad || frame.is_empty() {
            log::debug!("e1000e: a frame that makes no sense is dropped");
            return None;
        }
        let mut work = work;
        if let Some((kind, tag)) = tag
            && frame.len() >= 12
        {
            let bytes = [kind.to_be_bytes(), tag.to_be_bytes()].concat();
            frame.splice(12..12, bytes);
            work = work.behind_tag();
        }
        if pad && work.segments.is_none() && frame.len() < 60 {
            frame.resize(60, 0);
        }
        Some(Outgoing::new(frame, work))
    }

    /// What is to be done to a frame of data descriptors.
    fn work(&self) -> Work {
        let c = &self.context;
        let when = |bit: u8, sum| (self.options & bit != 0).then_some(sum);
        let segments = (self.command & dcmd::SEGMENTS != 0).then(|| Segmentation {
            headers: c.headers.into(),
            payload: c.mss.max(MIN_PAYLOAD).into(),
            ipv4: c.command & CONTEXT_IPV4 != 0,
            tcp: c.command & CONTEXT_TCP != 0,
        });
        Work {
            ip: when(OPTION_IP, c.ip),
            payload: when(OPTION_PAYLOAD, c.payload),
            starts: (c.ip.start, c.payload.start),
            segments,
        }
    }
}

impl Work {
    /// The same for a frame into which a tag of four bytes was put.
    fn behind_tag(self) -> Work {
        let shift = |c: Checksum| Checksum {
            start: c.start.saturating_add(4),
            at: c.at.saturating_add(4),
            last: if c.last == 0 { 0 } else { c.last.saturating_add(4) },
        };
        Work {
            ip: self.ip.map(shift),
            payload: self.payload.map(shift),
            starts: (self.starts.0.saturating_add(4), self.starts.1.saturating_add(4)),
            segments: self.segments.map(|s| Segmentation { headers: s.headers + 4, ..s }),
        }
    }
}

/// What a look at the ring has given.
pub enum Fetched {
    /// A frame.
    Frame(Outgoing),
    /// A frame that was dropped.
    Dropped,
    /// There is no whole frame.
    Nothing,
}

/// Takes descriptors off the ring up to the end of a frame. Causes are noted in the state.
pub fn fetch(s: &mut State, ram: &GuestRam) -> Fetched {
    if s.get(reg::TCTL) & reg::TCTL_ON == 0 || s.get(reg::CTRL) & reg::CTRL_MASTER_DISABLE != 0 {
        return Fetched::Nothing;
    }
    let ring = Ring::of(s, [reg::TDBAL, reg::TDBAH, reg::TDLEN]);
    // Each descriptor at most once a look.
    for _ in 0..ring.count {
        let head = s.get(reg::TDH);
        if head >= ring.count || head == s.get(reg::TDT) & 0xffff {
            break;
        }
        let at = ring.base.wrapping_add(u64::from(head) * 16);
        let mut d = [0; 16];
        let there = ram.read_slice(&mut d, GuestAddress(at)).is_ok();
        s.set(reg::TDH, (head + 1) % ring.count);
        s.pending |= if s.get(reg::TDH) == s.get(reg::TDT) & 0xffff { cause::TXQE } else { 0 };
        if !there {
            continue;
        }
        let fetched = take(s, ram, &d);
        if d[11] & dcmd::REPORT != 0 {
            let _ = ram.write_obj(d[12] | DONE, GuestAddress(at.wrapping_add(12)));
            s.pending |= cause::TXDW | cause::TXQ0;
        }
        if let Some(f) = fetched {
            return f;
        }
    }
    Fetched::Nothing
}

/// Looks at a descriptor; returns what a frame that it ends has become.
fn take(s: &mut State, ram: &GuestRam, d: &[u8; 16]) -> Option<Fetched> {
    let address = u64::from_le_bytes(d[..8].try_into().unwrap_or_default());
    let word = |at: usize| u16::from_le_bytes([d[at], d[at + 1]]);
    let (command, pad) = (d[11], s.get(reg::TCTL) & reg::TCTL_PAD != 0);
    let vlan = s.get(reg::CTRL) & reg::CTRL_VLAN != 0 && command & dcmd::VLAN != 0;
    let tag = vlan.then(|| (s.get(reg::VET) as u16, word(14)));
    let t = &mut s.transmit;
    let work = if command & dcmd::EXTENDED == 0 {
        t.gather(ram, address, word(8).into());
        let sum = Checksum { start: d[13].into(), at: d[10].into(), last: 0 };
        let payload = (command & dcmd::CHECKSUM != 0).then_some(sum);
        Work { payload, ..Work::default() }
    } else if d[10] >> 4 == 0 {
        t.context = context(d);
        return None;
    } else {
        if !t.begun {
            (t.begun, t.options, t.command) = (true, d[13], command);
        }
        let len = u32::from_le_bytes([d[8], d[9], d[10] & 0xf, 0]);
        t.gather(ram, address, len as usize);
        t.work()
    };
    if command & dcmd::END == 0 {
        return None;
    }
    Some(match t.finish(work, tag, pad) {
        Some(frame) => Fetched::Frame(frame),
        None => Fetched::Dropped,
    })
}
