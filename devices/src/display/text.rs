//! Text modes: characters and attributes in planes 0 and 1, fonts in plane 2.

use super::picture::Picture;
use super::vga::Registers;
use tandem_accel::memory::Region;

/// A character and its attribute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cell {
    /// Code, of 256 in the font.
    pub code: u8,
    /// Foreground in the low half, background in the high half.
    pub attribute: u8,
}

/// A screen of text: rows from the top.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Screen {
    /// Characters of a row.
    pub columns: u32,
    /// Rows.
    pub rows: u32,
    /// `columns * rows` cells.
    pub cells: Vec<Cell>,
    /// The cell that the cursor is in.
    pub cursor: Option<(u32, u32)>,
}

/// Height of a row in lines.
fn row_height(r: &Registers) -> u32 {
    u32::from(r.crtc[9] & 0x1f) + 1
}

/// What is written on a display in a text mode.
pub fn screen(r: &Registers, vram: &Region) -> Screen {
    let columns = u32::from(r.crtc[1]) + 1;
    let doubled = u32::from(r.crtc[9] & 0x80 != 0);
    let rows = ((r.lines() >> doubled) / row_height(r)).max(1);
    let stride = u32::from(r.crtc[0x13]) * 2;
    let mut cells = Vec::with_capacity((columns * rows) as usize);
    let mut line = vec![0; columns as usize * 4];
    for y in 0..rows {
        line.fill(0);
        vram.read(u64::from(r.start() + y * stride) * 4, &mut line);
        cells.extend(line.chunks_exact(4).map(|c| Cell { code: c[0], attribute: c[1] }));
    }
    let at = u32::from(r.crtc[0xe]) << 8 | u32::from(r.crtc[0xf]);
    let cursor = at.checked_sub(r.start()).filter(|_| stride > 0 && r.crtc[0xa] & 0x20 == 0);
    let cursor =
        cursor.map(|c| (c % stride, c / stride)).filter(|(x, y)| *x < columns && *y < rows);
    Screen { columns, rows, cells, cursor }
}

/// The line `y` of a character: its pixels from the left, the highest bit first.
fn glyph(r: &Registers, vram: &Region, cell: Cell, y: u32) -> u8 {
    // Character map select: bits 5, 3, 2 are set A, bits 4, 1, 0 set B; A where attribute bit 3 is.
    let map = r.sequencer[3];
    let set = match cell.attribute & 8 != 0 {
        true => map >> 2 & 3 | map >> 3 & 4,
        false => map & 3 | map >> 2 & 4,
    };
    let base = u64::from(set & 3) * 0x4000 + u64::from(set >> 2) * 0x2000;
    let mut b = [0];
    vram.read((base + u64::from(cell.code) * 32 + u64::from(y & 31)) * 4 + 2, &mut b);
    b[0]
}

/// The picture of a text mode.
pub fn take(r: &Registers, wide: bool, vram: &Region) -> Picture {
    let s = screen(r, vram);
    let (height, nine) = (row_height(r), r.sequencer[1] & 1 == 0);
    let double = 1 + u32::from(r.sequencer[1] & 8 != 0);
    let dots = 8 + u32::from(nine);
    let mut picture = Picture::black(s.columns * dots * double, s.rows * height);
    let lines_join = r.attribute[0x10] & 4 != 0;
    let blinks = r.attribute[0x10] & 8 != 0;
    let cursor_lines = u32::from(r.crtc[0xa] & 0x1f)..=u32::from(r.crtc[0xb] & 0x1f);
    for (i, cell) in s.cells.iter().enumerate() {
        let (column, row) = (i as u32 % s.columns, i as u32 / s.columns);
        let back = if blinks { cell.attribute >> 4 & 7 } else { cell.attribute >> 4 };
        let [fore, back] =
            [cell.attribute & 0xf, back].map(|n| r.colour(r.attribute_entry(n), wide));
        for y in 0..height {
            let mut bits = u32::from(glyph(r, vram, *cell, y)) << 1;
            // Characters that draw lines reach into the ninth column.
            if nine && lines_join && (0xc0..=0xdf).contains(&cell.code) {
                bits |= bits >> 1 & 1;
            }
            if s.cursor == Some((column, row)) && cursor_lines.contains(&y) {
                bits = 0x1ff;
            }
            for x in 0..dots {
                let colour = if bits >> (8 - x) & 1 != 0 { fore } else { back };
                for d in 0..double {
                    picture.set((column * dots + x) * double + d, row * height + y, colour);
                }
            }
        }
    }
    picture
}
