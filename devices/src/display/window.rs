//! The window on memory from A0000h to BFFFFh: bytes, pairs or planes of it, with the graphics
//! controller's functions on the way.
//!
//! Memory holds the four planes side by side: byte `p` of each group of four is plane `p`. So a
//! chained byte lies where its address says, and text is character, attribute, font, nothing.

use super::dispi::Dispi;
use super::vga::Registers;
use tandem_accel::memory::Region;

/// First address.
pub const START: u64 = 0xa_0000;
/// Length in bytes.
pub const LEN: u64 = 0x2_0000;

/// How an address leads to memory.
enum Way {
    /// To one byte.
    Byte { at: u64, plane: u8 },
    /// To a byte of each plane.
    Planes { at: u64 },
}

/// Where `offset` in the window leads; `None` where nothing shows.
fn way(r: &Registers, d: &Dispi, offset: u64) -> Option<Way> {
    let (base, len) = match r.graphics[6] >> 2 & 3 {
        0 => (0, 0x2_0000),
        1 => (0, 0x1_0000),
        2 => (0x1_0000, 0x8000),
        _ => (0x1_8000, 0x8000),
    };
    let offset = offset.checked_sub(base).filter(|o| *o < len)?;
    if d.enabled() && !d.planar() {
        return Some(Way::Byte { at: d.bank() + offset, plane: 4 });
    }
    let bank = if d.enabled() { d.bank() } else { 0 };
    Some(if r.sequencer[4] & 8 != 0 {
        Way::Byte { at: bank + offset, plane: (offset & 3) as u8 }
    } else if r.graphics[5] & 0x10 != 0 {
        let plane = r.graphics[4] & 2 | (offset & 1) as u8;
        Way::Byte { at: ((bank + offset) & !1) << 1 | u64::from(plane), plane }
    } else {
        Way::Planes { at: (bank + offset) * 4 }
    })
}

/// Reads a byte.
pub fn read(r: &mut Registers, d: &Dispi, vram: &Region, offset: u64) -> u8 {
    let mut byte = [0xff];
    match way(r, d, offset) {
        None => {}
        Some(Way::Byte { at, .. }) => drop(vram.read(at, &mut byte)),
        Some(Way::Planes { at }) => {
            if !vram.read(at, &mut r.latch) {
                return 0xff;
            }
            byte[0] = match r.graphics[5] & 8 == 0 {
                true => r.latch[usize::from(r.graphics[4] & 3)],
                // Bits are set where all planes that count have the colour compared with.
                false => (0..4).fold(0xff, |same, p| {
                    let wanted = spread(r.graphics[2] >> p);
                    same & !((r.latch[p] ^ wanted) & spread(r.graphics[7] >> p))
                }),
            };
        }
    }
    byte[0]
}

/// A byte of bit 0.
fn spread(bit: u8) -> u8 {
    if bit & 1 != 0 { 0xff } else { 0 }
}

/// Writes a byte.
pub fn write(r: &Registers, d: &Dispi, vram: &Region, offset: u64, value: u8) {
    match way(r, d, offset) {
        None => {}
        Some(Way::Byte { plane: plane @ 0..=3, .. }) if r.sequencer[2] & 1 << plane == 0 => {}
        Some(Way::Byte { at, .. }) => drop(vram.load(at, &[value])),
        Some(Way::Planes { at }) => {
            let mut bytes = [0; 4];
            if !vram.read(at, &mut bytes) {
                return;
            }
            for (p, byte) in bytes.iter_mut().enumerate() {
                if r.sequencer[2] & 1 << p != 0 {
                    *byte = through(r, p, value);
                }
            }
            vram.load(at, &bytes);
        }
    }
}

/// What plane `p` gets when `value` is written: set/reset, rotation, logic and bit mask, as the
/// write mode says.
fn through(r: &Registers, p: usize, value: u8) -> u8 {
    let g = &r.graphics;
    let rotated = value.rotate_right(u32::from(g[3] & 7));
    let set_reset = spread(g[0] >> p);
    let (data, mask) = match g[5] & 3 {
        1 => return r.latch[p],
        0 if g[1] >> p & 1 != 0 => (set_reset, g[8]),
        0 => (rotated, g[8]),
        2 => (spread(value >> p), g[8]),
        _ => (set_reset, rotated & g[8]),
    };
    let old = r.latch[p];
    let data = match g[3] >> 3 & 3 {
        0 => data,
        1 => data & old,
        2 => data | old,
        _ => data ^ old,
    };
    data & mask | old & !mask
}
