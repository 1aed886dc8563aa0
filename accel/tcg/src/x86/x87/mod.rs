//! The x87 floating-point unit: its state, and what its instructions do.
//!
//! ```text
//!   translate/x87 ──► helpers/x87 ──► ops (stack, exceptions, tags) ──► host (80-bit arithmetic)
//! ```
//!
//! Registers are kept by physical number, ten bytes each; TOP and the tags beside them. Arithmetic
//! of a helper runs on the host's x87 under the guest's control word ([`host`]), one operation at a time, so that
//! every bit and every exception is silicon's; nothing of the guest stays in the host's unit. With all
//! exceptions masked, instructions need no helper: see [`image`].

pub mod host;
pub mod image;
pub mod ops;

use super::Cpu;

/// An 80-bit register. (Two scalars, so that copies move them as such: the unit stores and loads the
/// two parts separately, and a wider access would wait for both.)
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct F80 {
    /// Significand, with its integer bit.
    pub sig: u64,
    /// Sign and exponent.
    pub exp: u16,
}

/// Status word: invalid operation.
pub const IE: u16 = 1;
/// Status word: denormal operand.
pub const DE: u16 = 1 << 1;
/// Status word: division by zero.
pub const ZE: u16 = 1 << 2;
/// Status word: overflow.
pub const OE: u16 = 1 << 3;
/// Status word: underflow.
pub const UE: u16 = 1 << 4;
/// Status word: precision.
pub const PE: u16 = 1 << 5;
/// Status word: stack fault.
pub const SF: u16 = 1 << 6;
/// Status word: an unmasked exception is pending.
pub const ES: u16 = 1 << 7;
/// Status word: condition code 0.
pub const C0: u16 = 1 << 8;
/// Status word: condition code 1.
pub const C1: u16 = 1 << 9;
/// Status word: condition code 2.
pub const C2: u16 = 1 << 10;
/// Status word: condition code 3.
pub const C3: u16 = 1 << 14;
/// Status word: busy, a copy of ES.
pub const BUSY: u16 = 1 << 15;
/// The six exceptions.
pub const EXCEPTIONS: u16 = 0x3f;
/// Place of TOP in the status word.
const TOP: u16 = 7 << 11;

/// Control word after FNINIT.
pub const CW_INIT: u16 = 0x37f;
/// Control word bits that can be written.
pub const CW_MASK: u16 = 0x1f3f;
/// Control word bits that read as one.
pub const CW_FIXED: u16 = 0x40;

/// The status word, TOP included.
pub fn status(c: &Cpu) -> u16 {
    c.fsw & !TOP | (c.ftop as u16 & 7) << 11
}

/// Sets status word and TOP. ES and B follow from the exceptions and their masks.
pub fn set_status(c: &mut Cpu, sw: u16) {
    c.fsw = sw & !TOP;
    c.ftop = (sw >> 11 & 7).into();
    update_summary(c);
}

/// Recomputes ES and B after a change of exceptions or masks.
pub fn update_summary(c: &mut Cpu) {
    c.fsw &= !(ES | BUSY);
    if c.fsw & !c.fcw & EXCEPTIONS != 0 {
        c.fsw |= ES | BUSY;
    }
}

/// Physical number of ST(i).
pub fn physical(c: &Cpu, i: usize) -> usize {
    (c.ftop as usize).wrapping_add(i) & 7
}

/// FNINIT; with `registers` also clears the registers, as the initial state of XRSTOR has them.
pub fn init(c: &mut Cpu, registers: bool) {
    c.fcw = CW_INIT;
    c.fsw = 0;
    c.ftop = 0;
    c.ftag_empty = 0xff;
    (c.fop, c.fip, c.fdp) = (0, 0, 0);
    (c.fcs, c.fds) = (0, 0);
    if registers {
        c.fpr = [[0; 16]; 8];
    }
}

/// Class of a register's content, as tags and FXAM tell them apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// Not a supported encoding (unnormal, pseudo-NaN, pseudo-infinity).
    Unsupported,
    /// Not a number.
    Nan,
    /// A finite number with a set integer bit.
    Normal,
    /// Infinity.
    Infinity,
    /// Zero.
    Zero,
    /// A denormal, or a pseudo-denormal.
    Denormal,
}

impl F80 {
    /// From the bytes in memory.
    pub fn from_bytes(b: &[u8]) -> F80 {
        let mut sig = [0; 8];
        sig.copy_from_slice(&b[..8]);
        F80 { sig: u64::from_le_bytes(sig), exp: u16::from_le_bytes([b[8], b[9]]) }
    }

    /// Writes the ten bytes.
    pub fn to_bytes(self, b: &mut [u8]) {
        b[..8].copy_from_slice(&self.sig.to_le_bytes());
        b[8..10].copy_from_slice(&self.exp.to_le_bytes());
    }

    /// What kind of value it is.
    pub fn class(self) -> Class {
        let integer = self.sig >> 63 != 0;
        match (self.exp & 0x7fff, integer) {
            (0, _) if self.sig == 0 => Class::Zero,
            (0, _) => Class::Denormal,
            (_, false) => Class::Unsupported,
            (0x7fff, _) if self.sig << 1 == 0 => Class::Infinity,
            (0x7fff, _) => Class::Nan,
            _ => Class::Normal,
        }
    }
}

/// The tag word with two bits for each register, as FNSTENV stores it.
pub fn full_tags(c: &Cpu) -> u16 {
    (0..8).fold(0, |w, i| {
        let tag = if c.ftag_empty >> i & 1 != 0 {
            3
        } else {
            match F80::from_bytes(&c.fpr[i]).class() {
                Class::Normal => 0,
                Class::Zero => 1,
                _ => 2,
            }
        };
        w | tag << (2 * i)
    })
}

/// The abridged tags of a full tag word: bit n set if register n is empty.
pub fn empty_tags(full: u16) -> u8 {
    (0..8).fold(0, |e, i| e | u8::from(full >> (2 * i) & 3 == 3) << i)
}
