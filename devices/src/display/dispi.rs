//! The Bochs display interface (DISPI, "VBE"): sixteen-bit registers that set a linear mode of any
//! size (VBE DISPI 5, as Bochs and QEMU have it).

use serde::{Deserialize, Serialize};

/// Registers.
mod reg {
    pub const ID: usize = 0;
    pub const XRES: usize = 1;
    pub const YRES: usize = 2;
    pub const BPP: usize = 3;
    pub const ENABLE: usize = 4;
    pub const BANK: usize = 5;
    pub const VIRT_WIDTH: usize = 6;
    pub const VIRT_HEIGHT: usize = 7;
    pub const X_OFFSET: usize = 8;
    pub const Y_OFFSET: usize = 9;
    pub const MEMORY_64K: usize = 10;
}

/// Number of registers.
pub const REGISTERS: usize = 11;
/// The newest version; software may set an older one.
const ID: u16 = 0xb0c5;
const OLDEST: u16 = 0xb0c0;
/// Bits of the enable register.
const ENABLED: u16 = 1;
const GET_CAPS: u16 = 2;
const EIGHT_BIT_DAC: u16 = 0x20;
const NO_CLEAR: u16 = 0x80;
/// The largest modes.
const MAX_X: u16 = 16000;
const MAX_Y: u16 = 12000;

/// The registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dispi {
    index: u16,
    regs: [u16; REGISTERS],
}

impl Default for Dispi {
    fn default() -> Dispi {
        let mut regs = [0; REGISTERS];
        regs[reg::ID] = ID;
        Dispi { index: 0, regs }
    }
}

/// A linear mode that is on. What it shows lies wholly in the memory for which it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// Pixels of a line.
    pub width: u32,
    /// Lines.
    pub height: u32,
    /// Bits of a pixel: 4 (planes), 8 (palette), 15, 16, 24 or 32.
    pub bpp: u32,
    /// Bytes from line to line.
    pub stride: u64,
    /// The first byte shown.
    pub start: u64,
}

impl Dispi {
    /// Chooses a register.
    pub fn select(&mut self, index: u16) {
        self.index = index;
    }
    /// The chosen register.
    pub fn selected(&self) -> u16 {
        self.index
    }
    /// Whether a linear mode is on.
    pub fn enabled(&self) -> bool {
        self.regs[reg::ENABLE] & ENABLED != 0
    }
    /// Whether entries of the palette have eight bits a colour instead of six.
    pub fn wide_dac(&self) -> bool {
        self.regs[reg::ENABLE] & EIGHT_BIT_DAC != 0
    }
    /// The first byte of memory that the window at A0000h shows.
    pub fn bank(&self) -> u64 {
        u64::from(self.regs[reg::BANK]) << 16
    }
    /// Whether pixels lie in planes.
    pub fn planar(&self) -> bool {
        self.bpp() == 4
    }

    fn bpp(&self) -> u32 {
        // Nothing said means eight bits, as of old.
        match self.regs[reg::BPP] {
            0 => 8,
            n => n.into(),
        }
    }

    /// Bytes of `pixels` of a line.
    fn bytes(&self, pixels: u64) -> u64 {
        match self.bpp() {
            4 => pixels / 2,
            15 => pixels * 2,
            n => pixels * u64::from(n) / 8,
        }
    }

    /// Reads register `index` of a card with `memory` bytes.
    pub fn read(&self, index: u16, memory: u64) -> u16 {
        let caps = self.regs[reg::ENABLE] & GET_CAPS != 0;
        match usize::from(index) {
            reg::XRES if caps => MAX_X,
            reg::YRES if caps => MAX_Y,
            reg::BPP if caps => 32,
            reg::VIRT_HEIGHT => {
                let line = self.bytes(self.regs[reg::VIRT_WIDTH].into());
                memory.checked_div(line).unwrap_or(0).min(0xffff) as u16
            }
            reg::MEMORY_64K => (memory >> 16).min(0xffff) as u16,
            n => self.regs.get(n).copied().unwrap_or(0),
        }
    }

    /// Writes register `index`. Returns how many bytes of memory become zero, if a mode is turned on
    /// that asks for it.
    pub fn write(&mut self, index: u16, value: u16, memory: u64) -> Option<u64> {
        let index = usize::from(index);
        match index {
            reg::ID if (OLDEST..=ID).contains(&value) => self.regs[reg::ID] = value,
            reg::XRES | reg::YRES | reg::BPP | reg::X_OFFSET | reg::Y_OFFSET | reg::VIRT_WIDTH => {
                self.regs[index] = value;
                self.fit();
            }
            reg::BANK => {
                // Beyond the memory there is nothing to show.
                let banks = (memory >> 16).clamp(1, 0x1_0000);
                self.regs[reg::BANK] = (u64::from(value) % banks) as u16;
            }
            reg::ENABLE => {
                let before = std::mem::replace(&mut self.regs[reg::ENABLE], value);
                if before & ENABLED == 0 && value & ENABLED != 0 {
                    for r in [reg::VIRT_WIDTH, reg::X_OFFSET, reg::Y_OFFSET, reg::BANK] {
                        self.regs[r] = 0;
                    }
                    self.fit();
                    let shown = self.mode(memory).filter(|_| value & NO_CLEAR == 0);
                    return shown.map(|m| m.stride * u64::from(m.height));
                }
            }
            _ => {}
        }
        None
    }

    /// Makes a line of memory at least as long as a line of the screen.
    fn fit(&mut self) {
        if self.enabled() {
            let x = self.regs[reg::XRES].min(MAX_X);
            self.regs[reg::VIRT_WIDTH] = self.regs[reg::VIRT_WIDTH].clamp(x, MAX_X);
        }
    }

    /// The mode that is on, if it makes sense and fits into `memory` bytes.
    pub fn mode(&self, memory: u64) -> Option<Mode> {
        let r = |n: usize| u64::from(self.regs[n]);
        let (width, height, bpp) = (r(reg::XRES) & !7, r(reg::YRES), self.bpp());
        let sized = (8..=u64::from(MAX_X)).contains(&width)
            && (1..=u64::from(MAX_Y)).contains(&height)
            && matches!(bpp, 4 | 8 | 15 | 16 | 24 | 32);
        if !self.enabled() || !sized {
            return None;
        }
        let stride = self.bytes(r(reg::VIRT_WIDTH).max(width));
        let start = r(reg::Y_OFFSET) * stride + self.bytes(r(reg::X_OFFSET));
        let end = start + (height - 1) * stride + self.bytes(width);
        let mode = Mode { width: width as u32, height: height as u32, bpp, stride, start };
        (end <= memory).then_some(mode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY: u64 = 16 << 20;

    fn set(d: &mut Dispi, regs: &[(usize, u16)]) -> Option<u64> {
        regs.iter().filter_map(|(r, v)| d.write(*r as u16, *v, MEMORY)).last()
    }

    #[test]
    fn a_mode_is_set_as_drivers_do() {
        let mut d = Dispi::default();
        assert_eq!((d.read(0, MEMORY), d.read(10, MEMORY)), (ID, 256));
        d.write(4, GET_CAPS, MEMORY);
        assert_eq!([1, 2, 3].map(|r| d.read(r, MEMORY)), [MAX_X, MAX_Y, 32]);
        let mode = [(4, 0), (1, 1024), (2, 768), (3, 32), (6, 1024), (4, 0x41)];
        assert_eq!(set(&mut d, &mode), Some(1024 * 768 * 4));
        assert_eq!(d.read(7, MEMORY), 4096);
        set(&mut d, &[(9, 768)]);
        let m = d.mode(MEMORY).unwrap();
        assert_eq!((m.width, m.height, m.stride, m.start), (1024, 768, 4096, 768 * 4096));
        set(&mut d, &[(9, 3500)]);
        assert_eq!(d.mode(MEMORY), None, "beyond the memory");
        set(&mut d, &[(4, 0), (3, 15), (4, 0xc1)]);
        assert_eq!(d.mode(MEMORY).map(|m| m.stride), Some(2048));
    }

    #[test]
    fn senseless_values_show_nothing() {
        let mut d = Dispi::default();
        for regs in [
            [(1, 0), (2, 768), (3, 32)],
            [(1, 0xffff), (2, 0xffff), (3, 32)],
            [(1, 800), (2, 600), (3, 7)],
            [(1, 16000), (2, 12000), (3, 32)],
        ] {
            set(&mut d, &[(4, 0)]);
            set(&mut d, &regs);
            assert_eq!(set(&mut d, &[(4, 1)]), None, "{regs:?}");
            assert_eq!(d.mode(MEMORY), None, "{regs:?}");
        }
        d.write(5, 0xffff, MEMORY);
        assert!(d.bank() < MEMORY);
        d.write(77, 1, MEMORY);
        assert_eq!(d.read(77, MEMORY), 0);
    }
}
