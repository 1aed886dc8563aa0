//! The registers of a VGA (IBM VGA Technical Reference; Intel OSRC "VGA registers"): miscellaneous
//! output, sequencer, CRT controller, graphics and attribute controllers, palette.

use serde::{Deserialize, Serialize};

/// Ports, as offsets from 3B0h.
pub mod port {
    /// The first.
    pub const FIRST: u16 = 0x3b0;
    /// CRT controller of a monochrome display: index and data.
    pub const MONO_CRTC: u16 = 0x3b4;
    /// Its status.
    pub const MONO_STATUS: u16 = 0x3ba;
    /// Attribute controller: index and data in turn.
    pub const ATTRIBUTE: u16 = 0x3c0;
    /// Attribute controller: data, to be read.
    pub const ATTRIBUTE_READ: u16 = 0x3c1;
    /// Miscellaneous output; reads the status of the inputs.
    pub const MISC: u16 = 0x3c2;
    /// Sequencer: index.
    pub const SEQUENCER: u16 = 0x3c4;
    /// Sequencer: data.
    pub const SEQUENCER_DATA: u16 = 0x3c5;
    /// Palette: mask of pixels.
    pub const MASK: u16 = 0x3c6;
    /// Palette: entry to be read; reads the state.
    pub const PALETTE_READ: u16 = 0x3c7;
    /// Palette: entry to be written.
    pub const PALETTE_WRITE: u16 = 0x3c8;
    /// Palette: red, green, blue in turn.
    pub const PALETTE: u16 = 0x3c9;
    /// Reads miscellaneous output.
    pub const MISC_READ: u16 = 0x3cc;
    /// Graphics controller: index.
    pub const GRAPHICS: u16 = 0x3ce;
    /// Graphics controller: data.
    pub const GRAPHICS_DATA: u16 = 0x3cf;
    /// CRT controller: index.
    pub const CRTC: u16 = 0x3d4;
    /// CRT controller: data.
    pub const CRTC_DATA: u16 = 0x3d5;
    /// Status of the display.
    pub const STATUS: u16 = 0x3da;
}

/// Registers of the CRT controller.
const CRTC_REGISTERS: usize = 0x19;
/// Status: no pixels are shown; vertical retrace.
const STATUS_BLANK: u8 = 1;
const STATUS_RETRACE: u8 = 8;
/// Attribute index: the palette is the display's.
const PALETTE_ON: u8 = 0x20;

/// The registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    /// Miscellaneous output.
    pub misc: u8,
    feature: u8,
    status: u8,
    sequencer_index: u8,
    /// Sequencer.
    pub sequencer: [u8; 8],
    graphics_index: u8,
    /// Graphics controller.
    pub graphics: [u8; 16],
    attribute_index: u8,
    /// The attribute port takes data next.
    attribute_data: bool,
    /// Attribute controller.
    pub attribute: [u8; 32],
    crtc_index: u8,
    /// CRT controller.
    pub crtc: [u8; CRTC_REGISTERS],
    mask: u8,
    palette_read: u8,
    palette_write: u8,
    palette_reading: bool,
    /// Which colour of an entry is next: 0 red, 1 green, 2 blue.
    palette_part: u8,
    palette_entry: [u8; 3],
    /// Red, green and blue of 256 entries.
    palette: Vec<[u8; 3]>,
    /// What the last read of memory left, a byte of each plane.
    pub latch: [u8; 4],
}

impl Default for Registers {
    fn default() -> Registers {
        Registers {
            misc: 0,
            feature: 0,
            status: 0,
            sequencer_index: 0,
            sequencer: [0; 8],
            graphics_index: 0,
            graphics: [0; 16],
            attribute_index: 0,
            attribute_data: false,
            attribute: [0; 32],
            crtc_index: 0,
            crtc: [0; CRTC_REGISTERS],
            mask: 0xff,
            palette_read: 0,
            palette_write: 0,
            palette_reading: false,
            palette_part: 0,
            palette_entry: [0; 3],
            palette: vec![[0; 3]; 256],
            latch: [0; 4],
        }
    }
}

impl Registers {
    /// Whether the lists have the lengths that they must have, for what comes from outside.
    pub fn sound(&self) -> bool {
        self.palette.len() == 256 && self.palette_part < 3
    }

    /// Whether `port` is one of the two places of the CRT controller that is not in use.
    fn elsewhere(&self, port: u16) -> bool {
        let colour = self.misc & 1 != 0;
        match port {
            port::FIRST..=port::MONO_STATUS => colour,
            port::CRTC..=port::STATUS => !colour,
            _ => false,
        }
    }

    /// Where the CRT controller is with a monochrome display, as with one in colour.
    fn in_colour(port: u16) -> u16 {
        if port <= port::MONO_STATUS { port + (port::CRTC - port::MONO_CRTC) } else { port }
    }

    /// Whether anything is shown.
    pub fn visible(&self) -> bool {
        self.attribute_index & PALETTE_ON != 0 && self.sequencer[1] & 0x20 == 0
    }

    /// Reads a port from 3B0h to 3DFh. Status and palette move on.
    pub fn read(&mut self, port: u16) -> u8 {
        if self.elsewhere(port) {
            return 0xff;
        }
        match Registers::in_colour(port) {
            port::ATTRIBUTE if self.attribute_data => 0,
            port::ATTRIBUTE => self.attribute_index,
            port::ATTRIBUTE_READ => self.attribute[usize::from(self.attribute_index & 0x1f)],
            port::SEQUENCER => self.sequencer_index,
            port::SEQUENCER_DATA => self.sequencer[usize::from(self.sequencer_index & 7)],
            port::MASK => self.mask,
            port::PALETTE_READ => 3 * u8::from(self.palette_reading),
            port::PALETTE_WRITE => self.palette_write,
            port::PALETTE => {
                let value = self.palette[usize::from(self.palette_read)]
                    [usize::from(self.palette_part % 3)];
                self.palette_part += 1;
                if self.palette_part >= 3 {
                    self.palette_part = 0;
                    self.palette_read = self.palette_read.wrapping_add(1);
                }
                value
            }
            0x3ca => self.feature,
            port::MISC_READ => self.misc,
            port::GRAPHICS => self.graphics_index,
            port::GRAPHICS_DATA => self.graphics[usize::from(self.graphics_index & 0xf)],
            port::CRTC => self.crtc_index,
            port::CRTC_DATA => self.crtc.get(usize::from(self.crtc_index)).copied().unwrap_or(0),
            port::STATUS => {
                self.attribute_data = false;
                // Whoever waits for a retrace sees one with every other look.
                self.status ^= STATUS_BLANK | STATUS_RETRACE;
                self.status
            }
            _ => 0,
        }
    }

    /// Writes a port from 3B0h to 3DFh.
    pub fn write(&mut self, port: u16, value: u8) {
        if self.elsewhere(port) {
            return;
        }
        match Registers::in_colour(port) {
            port::ATTRIBUTE => {
                if !self.attribute_data {
                    self.attribute_index = value & 0x3f;
                } else {
                    self.attribute[usize::from(self.attribute_index & 0x1f)] = value;
                }
                self.attribute_data = !self.attribute_data;
            }
            port::MISC => self.misc = value,
            port::SEQUENCER => self.sequencer_index = value & 7,
            port::SEQUENCER_DATA => self.sequencer[usize::from(self.sequencer_index & 7)] = value,
            port::MASK => self.mask = value,
            port::PALETTE_READ => {
                (self.palette_read, self.palette_part, self.palette_reading) = (value, 0, true);
            }
            port::PALETTE_WRITE => {
                (self.palette_write, self.palette_part, self.palette_reading) = (value, 0, false);
            }
            port::PALETTE => {
                self.palette_entry[usize::from(self.palette_part % 3)] = value;
                self.palette_part += 1;
                if self.palette_part >= 3 {
                    self.palette[usize::from(self.palette_write)] = self.palette_entry;
                    self.palette_part = 0;
                    self.palette_write = self.palette_write.wrapping_add(1);
                }
            }
            port::GRAPHICS => self.graphics_index = value & 0xf,
            port::GRAPHICS_DATA => self.graphics[usize::from(self.graphics_index & 0xf)] = value,
            port::CRTC => self.crtc_index = value,
            port::CRTC_DATA => self.write_crtc(value),
            port::STATUS => self.feature = value,
            _ => {}
        }
    }

    fn write_crtc(&mut self, value: u8) {
        let index = usize::from(self.crtc_index);
        let protected = self.crtc[0x11] & 0x80 != 0;
        let Some(r) = self.crtc.get_mut(index) else { return };
        match index {
            // Of the protected registers one bit can be written: the line compare's.
            7 if protected => *r = *r & !0x10 | value & 0x10,
            0..=7 if protected => {}
            _ => *r = value,
        }
    }

    /// The colour of entry `n` of the palette.
    pub fn colour(&self, n: u8, wide: bool) -> [u8; 3] {
        let entry = self.palette[usize::from(n & self.mask)];
        if wide { entry } else { entry.map(|c| (c & 0x3f) << 2 | (c & 0x3f) >> 4) }
    }

    /// The entry of the palette that attribute `n`, of 16, leads to.
    pub fn attribute_entry(&self, n: u8) -> u8 {
        let v = self.attribute[usize::from(n & 0xf)];
        match self.attribute[0x10] & 0x80 != 0 {
            true => v & 0xf | (self.attribute[0x14] & 0xf) << 4,
            false => v & 0x3f | (self.attribute[0x14] & 0xc) << 4,
        }
    }

    /// The first address shown, in units of four planes.
    pub fn start(&self) -> u32 {
        u32::from(self.crtc[0xc]) << 8 | u32::from(self.crtc[0xd])
    }

    /// Lines of the display, before they are doubled or put into rows.
    pub fn lines(&self) -> u32 {
        let overflow = u32::from(self.crtc[7]);
        let high = (overflow & 2) << 7 | (overflow & 0x40) << 3;
        (u32::from(self.crtc[0x12]) | high) + 1
    }

    /// The line from which on memory is shown from its beginning.
    pub fn line_compare(&self) -> u32 {
        let (low, seven, nine) = (self.crtc[0x18], self.crtc[7], self.crtc[9]);
        u32::from(low) | u32::from(seven & 0x10) << 4 | u32::from(nine & 0x40) << 3
    }
}
