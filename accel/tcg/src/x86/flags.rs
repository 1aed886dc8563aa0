//! The arithmetic flags, kept lazily: which operation set them, and with what.
//!
//! [`CcState`] describes CF, PF, AF, ZF, SF and OF in three layers, so that any instruction can
//! update it without knowing what it held before:
//!
//! 1. the last operation that set all six flags ([`CcKind`] and width in bits 0–7 of the operation
//!    word; operands in `dst`, `src`, `src2`),
//! 2. over it, the last INC or DEC, which leaves CF alone (result in `inc`),
//! 3. over that, CF and OF from an instruction that touches only those (`over`).
//!
//! An operation of layer 1 replaces the whole word and so drops the others. INC drops an
//! overriding OF of layer 3 but keeps its CF. Flags that the architecture leaves undefined get the
//! values that current AMD and Intel processors agree on, or else those of AMD's.
//!
//! The image of the flags has them at their RFLAGS places (SDM vol. 1 §3.4.3).

use super::Env;
use super::bits::rflags::*;
use super::cpu::CcState;
use tandem_jit::ir::Width;

/// The bits that [`super::Cpu::eflags`] holds itself.
pub const SYSTEM: u64 = TF | IF | IOPL | NT | RF | VM | AC | VIF | VIP | ID;

/// An operation that sets all six flags (layer 1). `d`, `s`, `s2` are the low `w` bits of `dst`,
/// `src`, `src2`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum CcKind {
    /// `src` is the image.
    Eflags,
    /// `d` = x + `s`.
    Add,
    /// `d` = x + `s` + `src2`, where `src2` is the carry in, 0 or 1.
    Adc,
    /// `d` = x - `s`; also CMP.
    Sub,
    /// `d` = x - `s` - `src2`.
    Sbb,
    /// `d` is the result of AND, OR, XOR or TEST.
    Logic,
    /// `d` = `s` << `src2`; the count is not zero. Also SHLD.
    Shl,
    /// `d` = `s` >> `src2`; the count is not zero. Also SHRD.
    Shr,
    /// As `Shr`, arithmetic.
    Sar,
    /// A multiplication: CF = OF = `src` is not zero.
    Mul,
    /// BLSI: `d` is the result; CF = `s` is not zero.
    Blsi,
    /// BLSR and BLSMSK: `d` is the result; CF = `s` is zero.
    Blsr,
    /// LZCNT and TZCNT: `d` is the result; CF = `s` is zero.
    Count,
    /// BSF and BSR: ZF = `s` is zero.
    Scan,
    /// `dst` is a quotient or nothing: all flags clear but ZF = `d` is zero (POPCNT).
    ZeroOnly,
}

/// Operation word of a layer 1 operation.
pub const fn op(kind: CcKind, w: Width) -> u64 {
    (kind as u64) << 2 | w as u64
}

/// Bits of the operation word: layer 1.
pub const OP_BASE: u64 = 0xff;
/// Bits of the operation word: layer 2.
pub const OP_INC: u64 = 0xf00;
/// Bits of the operation word: CF of layer 3.
pub const OP_OVER_CF: u64 = 0x7000;
/// Bits of the operation word: OF of layer 3.
pub const OP_OVER_OF: u64 = 0xf_0000;

/// Layer 2: an INC of this width.
pub const fn inc(w: Width) -> u64 {
    0x400 | (w as u64) << 8
}
/// Layer 2: a DEC of this width.
pub const fn dec(w: Width) -> u64 {
    0x800 | (w as u64) << 8
}
/// Layer 3: CF is bit 0 of `over`.
pub const OVER_CF: u64 = 0x1000;
/// Layer 3: OF is bit 11 of `over`.
pub const OVER_OF: u64 = 0x1_0000;
/// Layer 3: `over` is the result of ROL at this width, with a count that was not zero.
pub const fn rol(w: Width) -> u64 {
    OVER_CF | (4 | w as u64) << 16
}
/// Layer 3: `over` is the result of ROR.
pub const fn ror(w: Width) -> u64 {
    (4 | w as u64) << 12 | (8 | w as u64) << 16
}

const fn width(code: u64) -> Width {
    match code & 3 {
        0 => Width::W8,
        1 => Width::W16,
        2 => Width::W32,
        _ => Width::W64,
    }
}

const fn flag(set: bool, bit: u64) -> u64 {
    if set { bit } else { 0 }
}

const fn bit(v: u64, n: u32) -> bool {
    v.wrapping_shr(n) & 1 != 0
}

/// ZF, SF and PF of a result.
const fn zsp(d: u64, w: Width) -> u64 {
    flag(d == 0, ZF)
        | flag(bit(d, w.bits() - 1), SF)
        | flag((d as u8).count_ones().is_multiple_of(2), PF)
}

/// The image of the flags that `cc` describes.
pub fn compute(cc: &CcState) -> u64 {
    let mut image = base(cc);
    if cc.op & OP_INC != 0 {
        let w = width(cc.op >> 8);
        let d = cc.inc & w.mask();
        let sign = 1 << (w.bits() - 1);
        let (half, over) = if cc.op & 0x400 != 0 {
            (d & 15 == 0, d == sign)
        } else {
            (d & 15 == 15, d == sign - 1)
        };
        image = image & CF | zsp(d, w) | flag(half, AF) | flag(over, OF);
    }
    let cf = cc.op >> 12 & 7;
    if cf != 0 {
        let set = if cf & 4 != 0 { bit(cc.over, width(cf).bits() - 1) } else { bit(cc.over, 0) };
        image = image & !CF | flag(set, CF);
    }
    let of = cc.op >> 16 & 15;
    if of != 0 {
        let top = width(of).bits() - 1;
        let set = if of & 8 != 0 {
            bit(cc.over, top) != bit(cc.over, top - 1)
        } else if of & 4 != 0 {
            bit(cc.over, top) != bit(cc.over, 0)
        } else {
            bit(cc.over, 11)
        };
        image = image & !OF | flag(set, OF);
    }
    image
}

/// Layer 1.
fn base(cc: &CcState) -> u64 {
    let w = width(cc.op);
    let m = w.mask();
    let top = w.bits() - 1;
    let (d, s) = (cc.dst & m, cc.src & m);
    let kind = (cc.op & OP_BASE) >> 2;
    if kind == CcKind::Eflags as u64 {
        return cc.src & ARITH;
    }
    // Carries out of each bit of an addition or subtraction.
    let arith = |x: u64, carries: u64| {
        zsp(d, w)
            | flag(bit(carries, top), CF)
            | flag(bit(d ^ x ^ s, 4), AF)
            | flag(bit(carries, top) != bit(d ^ x ^ s, top), OF)
    };
    let add = |cin: u64| {
        let x = d.wrapping_sub(s).wrapping_sub(cin) & m;
        arith(x, x & s | (x | s) & !d)
    };
    let sub = |cin: u64| {
        let x = d.wrapping_add(s).wrapping_add(cin) & m;
        arith(x, !x & s | (!x | s) & d)
    };
    // The last bit shifted out, and OF as shifters compute it for every count.
    let n = cc.src2 as u32;
    match kind {
        k if k == CcKind::Add as u64 => add(0),
        k if k == CcKind::Adc as u64 => add(cc.src2 & 1),
        k if k == CcKind::Sub as u64 => sub(0),
        k if k == CcKind::Sbb as u64 => sub(cc.src2 & 1),
        k if k == CcKind::Logic as u64 => zsp(d, w),
        k if k == CcKind::Shl as u64 => {
            let cf = n <= w.bits() && n > 0 && bit(s, w.bits() - n);
            zsp(d, w) | flag(cf, CF) | flag(cf != bit(d, top), OF)
        }
        k if k == CcKind::Shr as u64 => {
            let cf = n > 0 && n <= 64 && bit(s, n - 1);
            zsp(d, w) | flag(cf, CF) | flag(bit(d, top) != bit(d, top - 1), OF)
        }
        k if k == CcKind::Sar as u64 => {
            let sx = ((s << (63 - top)) as i64 >> (63 - top)) as u64;
            zsp(d, w) | flag(n > 0 && bit(sx, (n - 1).min(63)), CF)
        }
        k if k == CcKind::Mul as u64 => zsp(d, w) | flag(cc.src != 0, CF | OF),
        k if k == CcKind::Blsi as u64 => zsp(d, w) | flag(s != 0, CF),
        k if k == CcKind::Blsr as u64 => zsp(d, w) | flag(s == 0, CF),
        k if k == CcKind::Count as u64 => flag(d == 0, ZF) | flag(s == 0, CF),
        k if k == CcKind::Scan as u64 => flag(s == 0, ZF),
        _ => flag(d == 0, ZF),
    }
}

impl Env {
    /// RFLAGS.
    pub fn eflags(&self) -> u64 {
        compute(&self.cpu.cc) | flag(self.cpu.df as i64 == -1, DF) | self.cpu.eflags & SYSTEM | 2
    }

    /// Replaces the bits `mask` of RFLAGS. Does not recompute the mode word.
    pub fn set_eflags(&mut self, value: u64, mask: u64) {
        if mask & ARITH != 0 {
            let image = compute(&self.cpu.cc) & !mask | value & mask & ARITH;
            self.set_arith_flags(image);
        }
        if mask & DF != 0 {
            self.cpu.df = if value & DF != 0 { u64::MAX } else { 1 };
        }
        let mask = mask & SYSTEM;
        self.cpu.eflags = self.cpu.eflags & !mask | value & mask | 2;
    }

    /// Sets the six arithmetic flags from an image.
    pub fn set_arith_flags(&mut self, image: u64) {
        self.cpu.cc = CcState { src: image & ARITH, ..CcState::default() };
    }
}
