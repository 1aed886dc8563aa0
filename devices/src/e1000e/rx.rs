//! Frames on their way in: filters, and legacy, extended and split descriptors (datasheet §7.1).

use super::frame::{Verdict, verify};
use super::reg::{self, cause};
use super::ring::Ring;
use super::state::State;
use tandem_accel::memory::GuestRam;
use tandem_backends::crc32::crc32;
use tandem_backends::net::Delivery;
use vm_memory::{Bytes, GuestAddress};

/// Longest frame without its check sequence, with a VLAN tag; and of long ones.
const MAX_FRAME: usize = 1518;
const MAX_LONG: usize = 16 << 10;
/// Shortest.
const MIN_FRAME: usize = 60;

/// Status of a descriptor.
mod status {
    pub const DONE: u32 = 1;
    pub const END: u32 = 1 << 1;
    pub const IGNORE_SUMS: u32 = 1 << 2;
    pub const VLAN: u32 = 1 << 3;
    pub const UDP_SUM: u32 = 1 << 4;
    pub const TCP_SUM: u32 = 1 << 5;
    pub const IP_SUM: u32 = 1 << 6;
}
/// Errors, from bit 24 of an extended status on: of the payload's checksum, of IP's.
const ERROR_PAYLOAD: u32 = 1 << 5;
const ERROR_IP: u32 = 1 << 6;

/// Whether the filters let a frame through (§7.1.1).
fn wanted(s: &State, frame: &[u8]) -> bool {
    let Some(to) = frame.first_chunk::<6>() else { return false };
    let rctl = s.get(reg::RCTL);
    if rctl & reg::RCTL_VLAN_FILTER != 0
        && let [kind @ .., hi, lo] = frame.get(12..16).unwrap_or_default()
        && kind == (s.get(reg::VET) as u16).to_be_bytes()
    {
        let id = u64::from(u16::from_be_bytes([*hi, *lo]) & 0xfff);
        if s.get(reg::VFTA + id / 32 * 4) >> (id % 32) & 1 == 0 {
            return false;
        }
    }
    if *to == [0xff; 6] {
        return rctl & reg::RCTL_BROADCAST != 0;
    }
    let group = to[0] & 1 != 0;
    if rctl & if group { reg::RCTL_MULTICAST } else { reg::RCTL_UNICAST } != 0 {
        return true;
    }
    let exact = (0..16).any(|n| {
        let (low, high) = (s.get(reg::RA + n * 8), s.get(reg::RA + n * 8 + 4));
        let address = [low.to_le_bytes(), high.to_le_bytes()].concat();
        high & reg::RAH_VALID != 0 && address[..6] == *to
    });
    if exact || !group {
        return exact;
    }
    let shift = [4, 3, 2, 0][(rctl >> 12 & 3) as usize];
    let hash = u64::from(u16::from_le_bytes([to[4], to[5]]) >> shift & 0xfff);
    s.get(reg::MTA + hash / 32 * 4) >> (hash % 32) & 1 != 0
}

/// Bytes of a buffer.
fn buffer(rctl: u32) -> usize {
    let size = 2048usize >> (rctl >> 16 & 3);
    if rctl & reg::RCTL_LARGE != 0 { size * 16 } else { size }.min(16 << 10)
}

/// What a descriptor is told of a frame.
struct Told {
    status: u32,
    errors: u32,
    tag: u16,
    len: u16,
}

fn told(s: &State, v: Verdict) -> (u32, u32) {
    let sums = s.get(reg::RXCSUM);
    let ip = v.ip.filter(|_| sums & reg::RXCSUM_IP != 0);
    let payload = v.payload.filter(|_| sums & reg::RXCSUM_TCP != 0);
    let (mut status, mut errors) = (0, 0);
    if let Some(good) = ip {
        status |= status::IP_SUM;
        errors |= if good { 0 } else { ERROR_IP };
    }
    if let Some(good) = payload {
        status |= if v.udp { status::UDP_SUM | status::TCP_SUM } else { status::TCP_SUM };
        errors |= if good { 0 } else { ERROR_PAYLOAD };
    }
    if status == 0 { (status::IGNORE_SUMS, 0) } else { (status, errors) }
}

/// Writes a descriptor of 16 bytes back.
fn write_back(ram: &GuestRam, at: u64, extended: bool, t: &Told) {
    let mut d = [0; 8];
    if extended {
        d[..4].copy_from_slice(&(t.status | t.errors << 24).to_le_bytes());
        d[4..6].copy_from_slice(&t.len.to_le_bytes());
    } else {
        d[..2].copy_from_slice(&t.len.to_le_bytes());
        (d[4], d[5]) = (t.status as u8, t.errors as u8);
    }
    d[6..].copy_from_slice(&t.tag.to_le_bytes());
    if extended {
        // Hash and identification: none.
        let _ = ram.write_slice(&[0; 8], GuestAddress(at));
    }
    let _ = ram.write_slice(&d, GuestAddress(at.wrapping_add(8)));
}

/// Gives the guest a frame. Causes are noted in the state.
pub fn receive(s: &mut State, ram: &GuestRam, mut frame: Vec<u8>) -> Delivery {
    let rctl = s.get(reg::RCTL);
    let off = rctl & reg::RCTL_ON == 0 || s.get(reg::CTRL) & reg::CTRL_MASTER_DISABLE != 0;
    let most = if rctl & reg::RCTL_LONG != 0 { MAX_LONG } else { MAX_FRAME };
    if off || frame.len() > most || !wanted(s, &frame) {
        return Delivery::Done;
    }
    frame.resize(frame.len().max(MIN_FRAME), 0);
    let (mut status, errors) = told(s, verify(&frame));
    let mut tag = 0;
    if s.get(reg::CTRL) & reg::CTRL_VLAN != 0
        && frame[12..14] == (s.get(reg::VET) as u16).to_be_bytes()
    {
        tag = u16::from_be_bytes([frame[14], frame[15]]);
        status |= status::VLAN;
        frame.drain(12..16);
    }
    let len = frame.len();
    if rctl & reg::RCTL_STRIP == 0 {
        frame.extend(crc32(&frame).to_le_bytes());
    }
    let split = rctl & reg::RCTL_SPLIT != 0;
    let extended = s.get(reg::RFCTL) & reg::RFCTL_EXTENDED != 0;
    let ring = Ring::of(s, [reg::RDBAL, reg::RDBAH, reg::RDLEN]);
    let sizes: Vec<usize> = if split {
        // In units of 128 bytes, then of KiB (§10.2.5.2).
        let p = s.get(reg::PSRCTL);
        let kib = |at: u32| ((p >> at & 0x3f) as usize) << 10;
        vec![((p & 0x7f) as usize) << 7, kib(8), kib(16), kib(24)]
    } else {
        vec![buffer(rctl)]
    };
    let room: usize = sizes.iter().sum();
    let (head, tail) = (s.get(reg::RDH), s.get(reg::RDT) & 0xffff);
    if head >= ring.count || tail >= ring.count || room == 0 {
        return Delivery::Full;
    }
    let free = (tail + ring.count - head) % ring.count;
    // Head and tail count in units of 16 bytes, of which a descriptor for parts takes two.
    let unit = if split { 2 } else { 1 };
    let needed = frame.len().div_ceil(room);
    if needed * unit > free as usize {
        s.pending |= cause::RXO;
        return Delivery::Full;
    }
    for (i, piece) in frame.chunks(room).enumerate() {
        let n = (head + (i * unit) as u32) % ring.count;
        let at = ring.base.wrapping_add(u64::from(n) * 16);
        let last = i + 1 == needed;
        let status = status::DONE | if last { status | status::END } else { 0 };
        let told =
            Told { status, errors: if last { errors } else { 0 }, tag, len: piece.len() as u16 };
        if split {
            into_parts(ram, at, &sizes, piece, told);
        } else {
            let address = ram.read_obj::<u64>(GuestAddress(at)).unwrap_or(u64::MAX);
            let _ = ram.write_slice(piece, GuestAddress(address));
            write_back(ram, at, extended, &told);
        }
    }
    let used = (needed * unit) as u32;
    s.set(reg::RDH, (head + used) % ring.count);
    s.count(reg::GPRC, reg::GORC, len + 4);
    s.pending |= cause::RXT | cause::RXQ0;
    // The ring is short: half, a quarter, an eighth of it is left.
    if free - used <= ring.count >> ((rctl >> 8 & 3) + 1).min(3) {
        s.pending |= cause::RXDMT;
    }
    Delivery::Done
}

/// Spreads a piece over the buffers of a descriptor of 32 bytes: none of it counts as a header.
fn into_parts(ram: &GuestRam, at: u64, sizes: &[usize], piece: &[u8], told: Told) {
    let (mut lengths, mut rest) = ([0u16; 4], piece);
    for (i, size) in sizes.iter().take(4).enumerate() {
        let (now, later) = rest.split_at(rest.len().min(*size));
        let slot = at.wrapping_add(8 * i as u64);
        let address = ram.read_obj::<u64>(GuestAddress(slot)).unwrap_or(u64::MAX);
        if !now.is_empty() {
            let _ = ram.write_slice(now, GuestAddress(address));
        }
        (lengths[i], rest) = (now.len() as u16, later);
    }
    let mut d = [0; 32];
    d[8..12].copy_from_slice(&(told.status | told.errors << 24).to_le_bytes());
    d[12..14].copy_from_slice(&lengths[0].to_le_bytes());
    d[14..16].copy_from_slice(&told.tag.to_le_bytes());
    for (to, l) in d[18..24].chunks_exact_mut(2).zip(&lengths[1..]) {
        to.copy_from_slice(&l.to_le_bytes());
    }
    let _ = ram.write_slice(&d, GuestAddress(at));
}
