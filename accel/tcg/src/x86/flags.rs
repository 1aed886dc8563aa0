//! The arithmetic flags, kept lazily: which operation set them, and with what.
//!
//! [`CcState`] describes CF, PF, AF, ZF, SF and OF in three layers, so that any instruction can
//! update it without knowing what it held before:
//!
//! 1. the last operation that set all six flags ([`CcKind`] and width in bits 0–7 of the operation
//!    word; operands in `dst`, `src`, `src2`),
//! 2. over it, the last INC or DEC, which leaves CF alone (result in `inc`),
//! 3. over that, CF and OF from instructions that touch only those (`over`, `over_of`).
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

/// An operation that sets all six flags (layer 1). `d`, `s`, `x` are the low `w` bits of `dst`,
/// `src`, `src2`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum CcKind {
    /// `src` is the image.
    Eflags,
    /// `d` = a + `s`.
    Add,
    /// `d` = `x` + `s` + carry.
    Adc,
    /// `d` = a - `s`. Also NEG, with a = 0.
    Sub,
    /// `d` = `x` - `s` - carry.
    Sbb,
    /// CMP of `d` with `s`.
    Cmp,
    /// `d` is the result of AND, OR or XOR.
    Logic,
    /// TEST of `d` and `s`.
    Test,
    /// `d` = `s` << `src2`; the count is not zero. Also SHLD.
    Shl,
    /// `d` = `s` >> `src2`; the count is not zero. Also SHRD.
    Shr,
    /// As `Shr`, arithmetic.
    Sar,
    /// MUL: `d` and `s` are the low and the high half.
    Mul,
    /// One-operand IMUL: as `Mul`.
    Imul,
    /// `d` is the low half of the signed product of `s` and `x`.
    Imul2,
    /// ZF and SF from `d`; CF = `s` is not zero; OF = 0 (BLSI).
    CarryIf,
    /// ZF and SF from `d`; CF = `s` is zero; OF = 0 (BLSR, BLSMSK).
    CarryIfNot,
    /// `d` is the result of LZCNT, TZCNT of `s`: ZF from `d`; CF = `s` is zero.
    Count,
    /// All clear but ZF = `d` is zero (BSF and BSR, of their source; POPCNT).
    Zero,
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
/// Layer 3: OF is bit 0 of `over_of`.
pub const OVER_OF_ALONE: u64 = 0x2_0000;
/// Layer 3: `over` is the result of ROL at this width, with a count that was not zero.
pub const fn rol(w: Width) -> u64 {
    OVER_CF | (4 | w as u64) << 16
}
/// Layer 3: `over` is the result of ROR.
pub const fn ror(w: Width) -> u64 {
    (4 | w as u64) << 12 | (8 | w as u64) << 16
}

/// Which words of [`CcState`] mean something beside an operation word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub struct Words {
    pub dst: bool,
    pub src: bool,
    pub src2: bool,
    pub inc: bool,
    pub over: bool,
    pub over_of: bool,
}

/// What [`compute`] looks at where the operation word is `op`.
pub fn words(op: u64) -> Words {
    use CcKind::*;
    let kind = (op & OP_BASE) >> 2;
    let is = |kinds: &[CcKind]| kinds.iter().any(|&k| k as u64 == kind);
    Words {
        dst: !is(&[Eflags]),
        src: !is(&[Logic, Zero]),
        src2: is(&[Adc, Sbb, Shl, Shr, Sar, Imul2]),
        inc: op & OP_INC != 0,
        over: op & OP_OVER_CF != 0 || op & OP_OVER_OF & !OVER_OF_ALONE != 0,
        over_of: op & OP_OVER_OF == OVER_OF_ALONE,
    }
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
    flag(d == 0, ZF) | flag(bit(d, w.bits() - 1), SF) | flag((d as u8).count_ones() & 1 == 0, PF)
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
        } else if of & 2 != 0 {
            bit(cc.over_of, 0)
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
    let x = cc.src2 & m;
    let n = cc.src2 as u32;
    match kind {
        k if k == CcKind::Add as u64 => added(d, d.wrapping_sub(s) & m, s, w),
        k if k == CcKind::Adc as u64 => added(d, x, s, w),
        k if k == CcKind::Sub as u64 => subtracted(d, d.wrapping_add(s) & m, s, w),
        k if k == CcKind::Sbb as u64 => subtracted(d, x, s, w),
        k if k == CcKind::Cmp as u64 => subtracted(d.wrapping_sub(s) & m, d, s, w),
        k if k == CcKind::Logic as u64 => zsp(d, w),
        k if k == CcKind::Test as u64 => zsp(d & s, w),
        // OF is CF ^ SF after a left shift and the XOR of the two top bits after a right shift,
        // whatever the count; AF is set.
        k if k == CcKind::Shl as u64 => {
            let cf = n <= w.bits() && n > 0 && bit(s, w.bits() - n);
            zsp(d, w) | AF | flag(cf, CF) | flag(cf != bit(d, top), OF)
        }
        k if k == CcKind::Shr as u64 => {
            let cf = n > 0 && n <= 64 && bit(s, n - 1);
            zsp(d, w) | AF | flag(cf, CF) | flag(bit(d, top) != bit(d, top - 1), OF)
        }
        k if k == CcKind::Sar as u64 => {
            zsp(d, w) | AF | flag(n > 0 && bit(sext(s, w) as u64, (n - 1).min(63)), CF)
        }
        k if k == CcKind::Mul as u64 => zsp(d, w) | flag(s != 0, CF | OF),
        k if k == CcKind::Imul as u64 => {
            zsp(d, w) | flag(s != (sext(d, w) >> 63) as u64 & m, CF | OF)
        }
        k if k == CcKind::Imul2 as u64 => {
            let product = i128::from(sext(s, w)) * i128::from(sext(x, w));
            zsp(d, w) | flag(product != i128::from(sext(d, w)), CF | OF)
        }
        k if k == CcKind::CarryIf as u64 => zsp(d, w) | flag(s != 0, CF),
        k if k == CcKind::CarryIfNot as u64 => zsp(d, w) | flag(s == 0, CF),
        k if k == CcKind::Count as u64 => flag(d == 0, ZF) | flag(s == 0, CF),
        _ => flag(d == 0, ZF),
    }
}

const fn sext(v: u64, w: Width) -> i64 {
    let up = 64 - w.bits();
    (v << up) as i64 >> up
}

/// The image after `d` = `a` + `b` (+ carry).
const fn added(d: u64, a: u64, b: u64, w: Width) -> u64 {
    arithmetic(d, a, b, a & b | (a | b) & !d, w)
}

/// The image after `d` = `a` - `b` (- borrow).
const fn subtracted(d: u64, a: u64, b: u64, w: Width) -> u64 {
    arithmetic(d, a, b, !a & b | (!a | b) & d, w)
}

/// The image from result, operands and the carries out of each bit.
const fn arithmetic(d: u64, a: u64, b: u64, carries: u64, w: Width) -> u64 {
    let top = w.bits() - 1;
    let out = bit(carries, top);
    let of = out != bit(d ^ a ^ b, top);
    zsp(d, w) | flag(out, CF) | flag(bit(carries, 3), AF) | flag(of, OF)
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

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use std::arch::asm;

    const VALUES: [u64; 22] = [
        0,
        1,
        2,
        0xf,
        0x10,
        0x7f,
        0x80,
        0x81,
        0xff,
        0x100,
        0x7fff,
        0x8000,
        0xffff,
        0x7fff_ffff,
        0x8000_0000,
        0x8000_0001,
        0xffff_ffff,
        0x1_0000_0000,
        0x7fff_ffff_ffff_ffff,
        0x8000_0000_0000_0000,
        u64::MAX,
        0x1234_5678_9abc_def0,
    ];

    #[test]
    fn words_that_mean_nothing_change_nothing() {
        let mut x = 1u64;
        let mut random = || {
            x = x.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            x.rotate_left(29)
        };
        let both = OVER_CF | OVER_OF_ALONE;
        let upper = [0, inc(Width::W8), dec(Width::W64), OVER_CF, OVER_OF, both, rol(Width::W32)];
        for (base, upper) in (0..=op(CcKind::Zero, Width::W64)).flat_map(|b| upper.map(|u| (b, u)))
        {
            for _ in 0..50 {
                let op = base | upper;
                let [dst, src, src2, inc, over, over_of] = std::array::from_fn(|_| random());
                let cc = CcState { op, dst, src, src2, inc, over, over_of };
                let w = words(op);
                let junk = CcState {
                    op,
                    dst: if w.dst { dst } else { random() },
                    src: if w.src { src } else { random() },
                    src2: if w.src2 { src2 } else { random() },
                    inc: if w.inc { inc } else { random() },
                    over: if w.over { over } else { random() },
                    over_of: if w.over_of { over_of } else { random() },
                };
                assert_eq!(compute(&cc), compute(&junk), "{op:#x}");
            }
        }
    }

    /// Calls `f` with pairs of operands: all pairs of bytes, then edges of all widths.
    fn pairs(mut f: impl FnMut(u64, u64)) {
        for a in 0..256 {
            for b in 0..256 {
                f(a, b);
            }
        }
        for a in VALUES {
            for b in VALUES {
                f(a, b);
            }
        }
    }

    /// Runs a two-operand instruction at each width: (result, flags) by width.
    macro_rules! host {
        ($op:literal, $a:expr, $b:expr, $cf:expr) => {{
            let (a, b, cf): (u64, u64, u64) = ($a, $b, $cf);
            let mut out = [(0u64, 0u64); 4];
            host!(@one out, 0, concat!($op, " {a:l}, {b:l}"), reg_abcd, a, b, cf);
            host!(@one out, 1, concat!($op, " {a:x}, {b:x}"), reg_abcd, a, b, cf);
            host!(@one out, 2, concat!($op, " {a:e}, {b:e}"), reg_abcd, a, b, cf);
            host!(@one out, 3, concat!($op, " {a:r}, {b:r}"), reg_abcd, a, b, cf);
            out
        }};
        (@one $out:ident, $i:literal, $text:expr, $class:ident, $a:ident, $b:ident, $cf:ident) => {{
            let (mut r, f): (u64, u64);
            r = $a;
            // SAFETY: touches its operands, the flags and 16 bytes of stack.
            unsafe {
                asm!(
                    "push {cf}",
                    "popfq",
                    $text,
                    "pushfq",
                    "pop {cf}",
                    a = inout($class) r,
                    b = in($class) $b,
                    cf = inout(reg) 0x202 | $cf => f,
                );
            }
            $out[$i] = (r, f & ARITH);
        }};
    }

    /// The same with the second operand in CL.
    macro_rules! shifted {
        ($op:literal, $a:expr, $n:expr, $in:expr) => {{
            let (a, n, flags): (u64, u64, u64) = ($a, $n, $in);
            let mut out = [(0u64, 0u64); 4];
            shifted!(@one out, 0, concat!($op, " {a:l}, cl"), a, n, flags);
            shifted!(@one out, 1, concat!($op, " {a:x}, cl"), a, n, flags);
            shifted!(@one out, 2, concat!($op, " {a:e}, cl"), a, n, flags);
            shifted!(@one out, 3, concat!($op, " {a:r}, cl"), a, n, flags);
            out
        }};
        (@one $out:ident, $i:literal, $text:expr, $a:ident, $n:ident, $in:ident) => {{
            let (mut r, f): (u64, u64);
            r = $a;
            // SAFETY: touches its operands, the flags and 16 bytes of stack.
            unsafe {
                asm!(
                    "push {f}",
                    "popfq",
                    $text,
                    "pushfq",
                    "pop {f}",
                    a = inout(reg_abcd) r,
                    f = inout(reg) 0x202 | $in => f,
                    in("rcx") $n,
                );
            }
            $out[$i] = (r, f & ARITH);
        }};
    }

    const WIDTHS: [Width; 4] = [Width::W8, Width::W16, Width::W32, Width::W64];

    #[track_caller]
    fn check(cc: CcState, expect: u64, mask: u64, what: &str) {
        let got = compute(&cc);
        assert_eq!(got & mask, expect & mask, "{what}: {cc:x?}");
    }

    fn state(kind: CcKind, w: Width, dst: u64, src: u64, src2: u64) -> CcState {
        CcState { op: op(kind, w), dst, src, src2, ..CcState::default() }
    }

    #[test]
    fn arithmetic() {
        pairs(|a, b| {
            for (i, w) in WIDTHS.into_iter().enumerate() {
                for cf in 0..2 {
                    let (r, f) = host!("adc", a, b, cf)[i];
                    check(state(CcKind::Adc, w, r, b, a), f, ARITH, "adc");
                    let (r, f) = host!("sbb", a, b, cf)[i];
                    check(state(CcKind::Sbb, w, r, b, a), f, ARITH, "sbb");
                }
                let (r, f) = host!("add", a, b, 0)[i];
                check(state(CcKind::Add, w, r, b, 0), f, ARITH, "add");
                let (r, f) = host!("sub", a, b, 0)[i];
                check(state(CcKind::Sub, w, r, b, 0), f, ARITH, "sub");
                check(state(CcKind::Cmp, w, a, b, 0), f, ARITH, "cmp");
                let (r, f) = host!("and", a, b, 0)[i];
                check(state(CcKind::Logic, w, r, 0, 0), f, ARITH & !AF, "and");
                check(state(CcKind::Test, w, a, b, 0), f, ARITH & !AF, "test");
            }
        });
    }

    #[test]
    fn shifts() {
        for a in VALUES {
            for n in 1..64 {
                for (i, w) in WIDTHS.into_iter().enumerate() {
                    let count = n & if w == Width::W64 { 63 } else { 31 };
                    if count == 0 {
                        continue;
                    }
                    // What the architecture defines (SDM vol. 2, SAL/SAR/SHL/SHR): never AF, OF
                    // for a count of 1, CF of left and logical shifts below the width.
                    let of = if count == 1 { 0 } else { OF };
                    let cf = if count < w.bits().into() { 0 } else { CF };
                    let mask = ARITH & !(AF | of | cf);
                    let (r, f) = shifted!("shl", a, n, 0)[i];
                    check(state(CcKind::Shl, w, r, a, count), f, mask, "shl");
                    let (r, f) = shifted!("shr", a, n, 0)[i];
                    check(state(CcKind::Shr, w, r, a, count), f, mask, "shr");
                    let (r, f) = shifted!("sar", a, n, 0)[i];
                    check(state(CcKind::Sar, w, r, a, count), f, ARITH & !(AF | of), "sar");
                }
            }
        }
    }

    #[test]
    fn rotates_keep_the_rest() {
        for a in VALUES {
            for n in 1..64 {
                for base in [0, ARITH] {
                    for (i, w) in WIDTHS.into_iter().enumerate() {
                        let count = n & if w == Width::W64 { 63 } else { 31 };
                        if count == 0 {
                            continue;
                        }
                        // OF is defined for a count of 1 (SDM vol. 2, RCL/RCR/ROL/ROR).
                        let mask = if count == 1 { ARITH } else { ARITH & !OF };
                        let cc = |word, r| CcState {
                            op: op(CcKind::Eflags, w) | word,
                            src: base,
                            over: r,
                            ..CcState::default()
                        };
                        let (r, f) = shifted!("rol", a, n, base)[i];
                        check(cc(rol(w), r), f, mask, "rol");
                        let (r, f) = shifted!("ror", a, n, base)[i];
                        check(cc(ror(w), r), f, mask, "ror");
                    }
                }
            }
        }
    }

    #[test]
    fn inc_and_dec_keep_carry() {
        // INC and DEC are ADD and SUB of 1 but for CF.
        pairs(|a, cf| {
            let cf = cf & 1;
            for (i, w) in WIDTHS.into_iter().enumerate() {
                let cc = |word, r| CcState {
                    op: op(CcKind::Eflags, w) | word,
                    src: cf,
                    inc: r,
                    ..CcState::default()
                };
                let (r, f) = host!("add", a, 1, 0)[i];
                check(cc(inc(w), r), f & !CF | cf, ARITH, "inc");
                let (r, f) = host!("sub", a, 1, 0)[i];
                check(cc(dec(w), r), f & !CF | cf, ARITH, "dec");
            }
        });
    }

    #[test]
    fn multiplications() {
        for a in VALUES {
            for b in VALUES {
                for (i, w) in WIDTHS.into_iter().enumerate().skip(1) {
                    let f = match i {
                        1 => host_imul(a as i16 as i64, b as i16 as i64, 16),
                        2 => host_imul(a as i32 as i64, b as i32 as i64, 32),
                        _ => host_imul(a as i64, b as i64, 64),
                    };
                    let low = a.wrapping_mul(b);
                    check(state(CcKind::Imul2, w, low, a, b), f, CF | OF, "imul");
                    let high = (i128::from(sext(a, w)) * i128::from(sext(b, w))) >> w.bits();
                    check(state(CcKind::Imul, w, low, high as u64, 0), f, CF | OF, "imul1");
                    let (a, b) = (a & w.mask(), b & w.mask());
                    let high = ((u128::from(a) * u128::from(b)) >> w.bits()) as u64;
                    let f = if high != 0 { CF | OF } else { 0 };
                    check(state(CcKind::Mul, w, low, high, 0), f, CF | OF, "mul");
                }
            }
        }
    }

    /// CF and OF of a signed product: it does not fit `bits`.
    fn host_imul(a: i64, b: i64, bits: u32) -> u64 {
        let p = i128::from(a) * i128::from(b);
        let up = 128 - bits;
        if (p << up) >> up == p { 0 } else { CF | OF }
    }

    #[test]
    fn layers_replace_each_other() {
        let mut cc = state(CcKind::Eflags, Width::W8, 0, ARITH, 0);
        // An INC to 1 clears all but CF.
        cc.op |= inc(Width::W32);
        cc.inc = 1;
        assert_eq!(compute(&cc), CF);
        // Then CF alone is overridden.
        cc.op |= OVER_CF;
        cc.over = 0;
        assert_eq!(compute(&cc), 0);
        cc.op |= OVER_OF;
        cc.over = OF;
        assert_eq!(compute(&cc), OF);
        // CF and OF apart.
        cc.op = cc.op & !OP_OVER_OF | OVER_OF_ALONE;
        assert_eq!(compute(&cc), 0);
        (cc.over, cc.over_of) = (1, 1);
        assert_eq!(compute(&cc), CF | OF);
    }

    #[test]
    fn every_word_is_harmless() {
        // The words come from generated code, but a snapshot may hold anything.
        for op in (0..1 << 20).step_by(7) {
            let (dst, src2) = (u64::MAX, u64::MAX);
            let cc = CcState { op, dst, src: 3, src2, inc: 1, over: 5, over_of: 7 };
            assert_eq!(compute(&cc) & !ARITH, 0);
        }
    }
}
