//! What a display shows, as pixels.

use super::dispi::{Dispi, Mode};
use super::text;
use super::vga::Registers;
use tandem_accel::memory::Region;

/// A picture: lines from the top, each from the left, three bytes a pixel: red, green, blue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Pixels of a line, at least 1.
    pub width: u32,
    /// Lines, at least 1.
    pub height: u32,
    /// `width * height * 3` bytes.
    pub rgb: Vec<u8>,
}

impl Picture {
    /// A black one.
    pub fn black(width: u32, height: u32) -> Picture {
        Picture { width, height, rgb: vec![0; width as usize * height as usize * 3] }
    }

    /// Sets a pixel; nothing happens outside.
    pub fn set(&mut self, x: u32, y: u32, colour: [u8; 3]) {
        if x < self.width && y < self.height {
            let at = (y as usize * self.width as usize + x as usize) * 3;
            self.rgb[at..at + 3].copy_from_slice(&colour);
        }
    }
}

/// Size of a display that shows nothing.
const DARK: (u32, u32) = (640, 480);

/// The picture of a card with registers `vga` (if it is a VGA) and `dispi`.
pub fn take(vga: Option<&Registers>, dispi: &Dispi, vram: &Region) -> Picture {
    let mode = dispi.mode(vram.len());
    if vga.is_some_and(|r| !r.visible()) {
        let (width, height) = mode.map_or(DARK, |m| (m.width, m.height));
        return Picture::black(width, height);
    }
    match (mode, vga) {
        (Some(m), _) => linear(&m, vga, dispi.wide_dac(), vram),
        (None, Some(r)) if r.graphics[6] & 1 == 0 => text::take(r, dispi.wide_dac(), vram),
        (None, Some(r)) => graphics(r, dispi.wide_dac(), vram),
        (None, None) => Picture::black(DARK.0, DARK.1),
    }
}

/// Eight bits of the low `bits` bits of `v`.
fn widen(v: u32, bits: u32) -> u8 {
    let v = v & ((1 << bits) - 1);
    (v << (8 - bits) | v >> (2 * bits - 8)) as u8
}

/// The colour of a pixel in `bytes`, of 15 bits and more.
fn direct(bpp: u32, bytes: &[u8]) -> [u8; 3] {
    let b = |i: usize| u32::from(bytes.get(i).copied().unwrap_or(0));
    let v = b(0) | b(1) << 8;
    match bpp {
        15 => [widen(v >> 10, 5), widen(v >> 5, 5), widen(v, 5)],
        16 => [widen(v >> 11, 5), widen(v >> 5, 6), widen(v, 5)],
        _ => [b(2) as u8, b(1) as u8, b(0) as u8],
    }
}

fn linear(m: &Mode, vga: Option<&Registers>, wide: bool, vram: &Region) -> Picture {
    let mut picture = Picture::black(m.width, m.height);
    let size = m.bpp.div_ceil(8) as usize;
    let mut line = vec![0; if m.bpp == 4 { m.width as usize / 2 } else { m.width as usize * size }];
    // Without a VGA there is no palette: grey.
    let entry = |n: u8| vga.map_or([n; 3], |r| r.colour(n, wide));
    for y in 0..m.height {
        if !vram.read(m.start + u64::from(y) * m.stride, &mut line) {
            break;
        }
        for x in 0..m.width {
            let at = x as usize;
            let colour = match m.bpp {
                4 => {
                    let n = planes(&line, at);
                    entry(vga.map_or(n, |r| r.attribute_entry(n)))
                }
                8 => entry(line[at]),
                bpp => direct(bpp, &line[at * size..(at + 1) * size]),
            };
            picture.set(x, y, colour);
        }
    }
    picture
}

/// The four bits of pixel `x` in groups of four planes.
fn planes(line: &[u8], x: usize) -> u8 {
    let bit = 7 - (x & 7);
    let group = line.get(x / 8 * 4..x / 8 * 4 + 4).unwrap_or(&[0; 4]);
    group.iter().rev().fold(0, |n, b| n << 1 | b >> bit & 1)
}

/// Graphics modes of the VGA: 16 colours in planes, 4 colours of the CGA, 256 colours.
fn graphics(r: &Registers, wide: bool, vram: &Region) -> Picture {
    let g = r.graphics[5];
    let wide_pixels = r.sequencer[1] & 8 != 0;
    let columns = u32::from(r.crtc[1]) + 1;
    // 256 colours take two dots each.
    let width = match g & 0x40 != 0 {
        true => columns * 4,
        false => columns * 8,
    };
    // The CGA has odd lines 8 KiB after even ones, and no line twice.
    let cga = r.crtc[0x17] & 1 == 0;
    let rows = if cga { 1 } else { u32::from(r.crtc[9] & 0x1f) + 1 };
    let repeat = rows << u32::from(r.crtc[9] & 0x80 != 0);
    let height = (r.lines() / repeat).max(1);
    let odd = if g & 0x20 != 0 { 0x4000 } else { 0x8000 };
    let offset = u64::from(r.crtc[0x13]) * 8;
    let compare = r.line_compare() / repeat;
    let double = 1 + u32::from(wide_pixels);
    let mut picture = Picture::black(width * double, height);
    let mut line = vec![0; columns as usize * 8];
    for y in 0..picture.height {
        let (start, row) = if y > compare { (0, y - compare - 1) } else { (r.start(), y) };
        let mut at = u64::from(start) * 4 + u64::from(row) * offset;
        if cga {
            at = u64::from(start) * 4 + u64::from(row / 2) * offset + u64::from(row & 1) * odd;
        }
        line.fill(0);
        vram.read(at, &mut line);
        for x in 0..width {
            let at = x as usize;
            let n = match g & 0x60 {
                0x00 => r.attribute_entry(planes(&line, at) & r.attribute[0x12]),
                // Two planes with two bits a pixel.
                0x20 => {
                    let byte = line.get(at / 8 * 4 + ((at / 4) & 1)).copied().unwrap_or(0);
                    r.attribute_entry(byte >> (6 - 2 * (at & 3)) & 3)
                }
                _ => line.get(at).copied().unwrap_or(0),
            };
            for i in 0..double {
                picture.set(x * double + i, y, r.colour(n, wide));
            }
        }
    }
    picture
}
