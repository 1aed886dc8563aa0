//! What the pure operations compute: one definition for the interpreter and for constant folding.
//!
//! [`eval`] covers exactly the operations that depend on nothing but their inputs ([`is_pure`]).
//! Inputs are 64-bit containers of which the low `w` bits count; results have zeros above `w`
//! (which the IR leaves unspecified for W8 and W16). Flags travel as images (see [`crate::ir`]).
//! Where x86 leaves a flag undefined, a fixed value is computed: 0 for AF, and for the others what
//! the formula of the defined case gives.

use super::op::{Cond, Op, Width};

/// Carry flag in a flags image.
pub const CF: u64 = 1;
/// Parity flag in a flags image.
pub const PF: u64 = 1 << 2;
/// Auxiliary carry flag in a flags image.
pub const AF: u64 = 1 << 4;
/// Zero flag in a flags image.
pub const ZF: u64 = 1 << 6;
/// Sign flag in a flags image.
pub const SF: u64 = 1 << 7;
/// Overflow flag in a flags image.
pub const OF: u64 = 1 << 11;
/// All flags of an image.
pub const FLAGS: u64 = CF | PF | AF | ZF | SF | OF;

/// Operands of a pure operation. Absent inputs are 0.
#[derive(Clone, Copy, Debug, Default)]
pub struct Args {
    /// The instruction's `aux`.
    pub aux: u8,
    /// The instruction's `cond`.
    pub cond: u8,
    /// The instruction's `imm`.
    pub imm: u64,
    /// Inputs a, b, c, d; a flags input is an image.
    pub ins: [u64; 4],
}

/// Results of a pure operation; those it does not define are 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Results {
    /// First result.
    pub dst: u64,
    /// Second result.
    pub dst2: u64,
    /// Image of the flags result.
    pub fl: u64,
}

/// Whether [`eval`] knows `op`: no effects, and no dependence on globals or `Env`.
pub const fn is_pure(op: Op) -> bool {
    !matches!(
        op,
        Op::InsnStart
            | Op::Get
            | Op::Put
            | Op::LdEnv
            | Op::EnvPtr
            | Op::StEnv
            | Op::DivU2
            | Op::DivS2
            | Op::Ld
            | Op::St
            | Op::Ptr
            | Op::PtrEnd
            | Op::LdP
            | Op::StP
            | Op::AtomicRmw
            | Op::AtomicCas
            | Op::Fence
            | Op::Call
            | Op::Native
            | Op::NativeMem
            | Op::GetMxcsr
            | Op::SetMxcsr
            | Op::BrCc
            | Op::Exit
    )
}

/// The low `w` bits of `v`, sign-extended.
pub const fn sext(w: Width, v: u64) -> u64 {
    let s = 64 - w.bits();
    (((v << s) as i64) >> s) as u64
}

const fn msb(w: Width, v: u64) -> u64 {
    (v >> (w.bits() - 1)) & 1
}

const fn flag(on: bool, bit: u64) -> u64 {
    if on { bit } else { 0 }
}

/// SF, ZF and PF of a result.
const fn szp(w: Width, r: u64) -> u64 {
    let r = r & w.mask();
    flag(r == 0, ZF) | flag(msb(w, r) != 0, SF) | flag((r as u8).count_ones() & 1 == 0, PF)
}

/// Flags of `r = a + b (+ carry)`.
pub const fn add_flags(w: Width, a: u64, b: u64, r: u64) -> u64 {
    let carry = (a & b) | ((a | b) & !r);
    let over = (a ^ r) & (b ^ r);
    szp(w, r) | msb(w, carry) | (a ^ b ^ r) & AF | flag(msb(w, over) != 0, OF)
}

/// Flags of `r = a - b (- borrow)`.
pub const fn sub_flags(w: Width, a: u64, b: u64, r: u64) -> u64 {
    let borrow = (!a & b) | ((!a | b) & r);
    let over = (a ^ b) & (a ^ r);
    szp(w, r) | msb(w, borrow) | (a ^ b ^ r) & AF | flag(msb(w, over) != 0, OF)
}

/// The count of a shift or rotation as the operations mask it.
pub const fn shift_count(w: Width, count: u64) -> u32 {
    (count & if matches!(w, Width::W64) { 63 } else { 31 }) as u32
}

/// Evaluates a pure operation; [`Results::default`] for one that is not ([`is_pure`]).
pub fn eval(op: Op, w: Width, args: &Args) -> Results {
    let m = w.mask();
    let [a, b, c, d] = args.ins;
    let (am, bm) = (a & m, b & m);
    let dst = |v: u64| Results { dst: v, ..Results::default() };
    let both = |r: u64, fl: u64| Results { dst: r & m, dst2: 0, fl };
    match op {
        Op::Const => dst(args.imm),
        Op::Zext => dst(am),
        Op::Sext => dst(sext(w, a)),
        Op::Deposit => {
            let at = u32::from(args.aux & 63);
            dst(a & !(m << at) | bm << at)
        }
        Op::Extract => dst(a >> (args.aux & 63) & m),
        Op::Add | Op::Adc => {
            let carry = if op == Op::Adc { c & CF } else { 0 };
            let r = a.wrapping_add(b).wrapping_add(carry);
            both(r, add_flags(w, a, b, r))
        }
        Op::Sub | Op::Sbb => {
            let borrow = if op == Op::Sbb { c & CF } else { 0 };
            let r = a.wrapping_sub(b).wrapping_sub(borrow);
            both(r, sub_flags(w, a, b, r))
        }
        Op::And => both(a & b, szp(w, a & b)),
        Op::Or => both(a | b, szp(w, a | b)),
        Op::Xor => both(a ^ b, szp(w, a ^ b)),
        Op::Andn => both(a & !b, 0),
        Op::Neg => {
            let r = a.wrapping_neg();
            both(r, sub_flags(w, 0, a, r))
        }
        Op::Not => both(!a, 0),
        Op::Inc => {
            let r = a.wrapping_add(1);
            both(r, add_flags(w, a, 1, r) & !CF | c & CF)
        }
        Op::Dec => {
            let r = a.wrapping_sub(1);
            both(r, sub_flags(w, a, 1, r) & !CF | c & CF)
        }
        Op::Shl | Op::Shr | Op::Sar => shift(op, w, am, shift_count(w, b), d & FLAGS),
        Op::Rol | Op::Ror => rotate(op, w, am, shift_count(w, b), d & FLAGS),
        Op::Rcl | Op::Rcr => rotate_carry(op, w, am, shift_count(w, b), c & FLAGS),
        Op::Shld | Op::Shrd => double_shift(op, w, am, bm, shift_count(w, c), d & FLAGS),
        Op::Mul => {
            let r = a.wrapping_mul(b) & m;
            let wide = i128::from(sext(w, a) as i64) * i128::from(sext(w, b) as i64);
            let over = i128::from(sext(w, r) as i64) != wide;
            both(r, szp(w, r) | flag(over, CF | OF))
        }
        Op::MulU2 => {
            let p = u128::from(am) * u128::from(bm);
            let (lo, hi) = (p as u64 & m, (p >> w.bits()) as u64 & m);
            Results { dst: lo, dst2: hi, fl: szp(w, lo) | flag(hi != 0, CF | OF) }
        }
        Op::MulS2 => {
            let p = i128::from(sext(w, a) as i64) * i128::from(sext(w, b) as i64);
            let (lo, hi) = (p as u64 & m, (p >> w.bits()) as u64 & m);
            let over = i128::from(sext(w, lo) as i64) != p;
            Results { dst: lo, dst2: hi, fl: szp(w, lo) | flag(over, CF | OF) }
        }
        Op::Clz => dst(u64::from(am.leading_zeros() - (64 - w.bits()))),
        Op::Ctz => dst(u64::from(am.trailing_zeros().min(w.bits()))),
        Op::Popcnt => dst(u64::from(am.count_ones())),
        Op::Bswap => dst(am.swap_bytes() >> (64 - w.bits())),
        Op::Pext => dst(pext(am, bm)),
        Op::Pdep => dst(pdep(am, bm) & m),
        Op::Lea => dst(a.wrapping_add(b << (args.aux & 3)).wrapping_add(args.imm) & m),
        Op::SetCc => dst(Cond::from_code(args.cond).holds(a).into()),
        Op::SelCc => dst(if Cond::from_code(args.cond).holds(a) { bm } else { c & m }),
        Op::FlagsImg => dst(a & FLAGS),
        Op::ImgFlags => Results { fl: a & FLAGS, ..Results::default() },
        Op::Bt => {
            let bit = a >> (b & u64::from(w.bits() - 1)) & 1;
            Results { fl: c & FLAGS & !CF | bit, ..Results::default() }
        }
        _ => Results::default(),
    }
}

/// SHL, SHR, SAR of `a` (clean above `w`) by `n` (0–63).
fn shift(op: Op, w: Width, a: u64, n: u32, old: u64) -> Results {
    if n == 0 {
        return Results { dst: a, dst2: 0, fl: old };
    }
    let bits = w.bits();
    let (r, cf, of) = match op {
        Op::Shl => {
            // 128 bits hold every bit that leaves: n is at most 63.
            let wide = u128::from(a) << n;
            let r = wide as u64 & w.mask();
            let cf = (wide >> bits) as u64 & 1;
            (r, cf, msb(w, r) ^ cf)
        }
        Op::Shr => (a >> n, a >> (n - 1) & 1, if n == 1 { msb(w, a) } else { 0 }),
        _ => {
            let s = sext(w, a) as i64;
            ((s >> n) as u64 & w.mask(), (s >> (n - 1)) as u64 & 1, 0)
        }
    };
    Results { dst: r, dst2: 0, fl: szp(w, r) | cf | flag(of != 0, OF) }
}

/// Rotates the low `bits` bits of `v`, which is clean above them, left by `n < bits`.
fn rotl_bits(v: u128, bits: u32, n: u32) -> u128 {
    if n == 0 { v } else { (v << n | v >> (bits - n)) & ((1 << bits) - 1) }
}

/// ROL, ROR.
fn rotate(op: Op, w: Width, a: u64, count: u32, old: u64) -> Results {
    if count == 0 {
        return Results { dst: a, dst2: 0, fl: old };
    }
    let bits = w.bits();
    let n = count % bits;
    let left = if op == Op::Rol { n } else { (bits - n) % bits };
    let r = rotl_bits(a.into(), bits, left) as u64;
    let (cf, of) = if op == Op::Rol {
        (r & 1, msb(w, r) ^ r & 1)
    } else {
        (msb(w, r), (msb(w, r) ^ r >> (bits - 2)) & 1)
    };
    Results { dst: r, dst2: 0, fl: old & !(CF | OF) | cf | flag(of != 0, OF) }
}

/// RCL, RCR: a rotation of `w + 1` bits, the carry on top.
fn rotate_carry(op: Op, w: Width, a: u64, count: u32, old: u64) -> Results {
    if count == 0 {
        return Results { dst: a, dst2: 0, fl: old };
    }
    let bits = w.bits() + 1;
    let n = count % bits;
    let left = if op == Op::Rcl { n } else { (bits - n) % bits };
    let v = rotl_bits(u128::from(old & CF) << w.bits() | u128::from(a), bits, left);
    let (r, cf) = (v as u64 & w.mask(), (v >> w.bits()) as u64 & 1);
    let of = if op == Op::Rcl { msb(w, r) ^ cf } else { (msb(w, r) ^ r >> (w.bits() - 2)) & 1 };
    Results { dst: r, dst2: 0, fl: old & !(CF | OF) | cf | flag(of != 0, OF) }
}

/// SHLD, SHRD of `a` filled from `b`.
fn double_shift(op: Op, w: Width, a: u64, b: u64, n: u32, old: u64) -> Results {
    if n == 0 {
        return Results { dst: a, dst2: 0, fl: old };
    }
    let bits = w.bits();
    // W16 with a count over 16 is undefined on x86; taking the count modulo the width keeps the
    // arithmetic below total.
    let n = if n > bits { n % bits } else { n };
    let (r, cf) = if op == Op::Shld {
        let v = (u128::from(a) << bits | u128::from(b)) << n;
        ((v >> bits) as u64 & w.mask(), (u128::from(a) << n >> bits) as u64 & 1)
    } else {
        let v = u128::from(b) << bits | u128::from(a);
        ((v >> n) as u64 & w.mask(), if n == 0 { old & CF } else { a >> (n - 1) & 1 })
    };
    let of = msb(w, r ^ a);
    Results { dst: r, dst2: 0, fl: szp(w, r) | cf | flag(of != 0, OF) }
}

fn pext(v: u64, mut mask: u64) -> u64 {
    let (mut r, mut at) = (0, 0);
    while mask != 0 {
        r |= (v >> mask.trailing_zeros() & 1) << at;
        at += 1;
        mask &= mask - 1;
    }
    r
}

fn pdep(v: u64, mut mask: u64) -> u64 {
    let (mut r, mut at) = (0, 0);
    while mask != 0 {
        r |= (v >> at & 1) << mask.trailing_zeros();
        at += 1;
        mask &= mask - 1;
    }
    r
}

/// Quotient and remainder of `(hi:lo) / divisor` at width `w`; `None` if the divisor is 0 or the
/// quotient does not fit.
pub fn divide(signed: bool, w: Width, hi: u64, lo: u64, divisor: u64) -> Option<(u64, u64)> {
    let m = w.mask();
    let dividend = u128::from(hi & m) << w.bits() | u128::from(lo & m);
    let (q, r) = if signed {
        let s = 128 - 2 * w.bits();
        let dividend = ((dividend << s) as i128) >> s;
        let divisor = i128::from(sext(w, divisor) as i64);
        // `checked_div` refuses 0 and the one overflow, the least i128 by -1.
        let q = dividend.checked_div(divisor)?;
        if i128::from(sext(w, q as u64) as i64) != q {
            return None;
        }
        (q as u64, dividend.wrapping_rem(divisor) as u64)
    } else {
        let q = dividend.checked_div(u128::from(divisor & m))?;
        if q > u128::from(m) {
            return None;
        }
        (q as u64, (dividend % u128::from(divisor & m)) as u64)
    };
    Some((q & m, r & m))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(op: Op, w: Width, ins: [u64; 4]) -> Results {
        eval(op, w, &Args { ins, ..Args::default() })
    }

    #[test]
    fn arithmetic_flags() {
        let r = run(Op::Add, Width::W8, [0x7f, 1, 0, 0]);
        assert_eq!((r.dst, r.fl), (0x80, SF | OF | AF));
        let r = run(Op::Add, Width::W64, [u64::MAX, 1, 0, 0]);
        assert_eq!((r.dst, r.fl), (0, ZF | CF | AF | PF));
        let r = run(Op::Sbb, Width::W16, [0, 0xffff, CF, 0]);
        assert_eq!((r.dst, r.fl), (0, ZF | CF | AF | PF));
        let r = run(Op::Neg, Width::W32, [0x8000_0000, 0, 0, 0]);
        assert_eq!((r.dst, r.fl), (0x8000_0000, SF | CF | OF | PF));
        let r = run(Op::Dec, Width::W8, [0, 0, CF, 0]);
        assert_eq!((r.dst, r.fl), (0xff, SF | AF | PF | CF));
    }

    #[test]
    fn shifts_and_rotations() {
        assert_eq!(run(Op::Shl, Width::W8, [0xff, 20, 0, 0]).dst, 0);
        let r = run(Op::Shl, Width::W32, [0x8000_0001, 1, 0, 0]);
        assert_eq!((r.dst, r.fl), (2, CF | OF));
        assert_eq!(run(Op::Shl, Width::W64, [1, 64, 0, ZF]), Results { dst: 1, dst2: 0, fl: ZF });
        let r = run(Op::Sar, Width::W16, [0x8000, 31, 0, 0]);
        assert_eq!((r.dst, r.fl), (0xffff, SF | CF | PF));
        let r = run(Op::Rcl, Width::W8, [0x80, 9, CF, 0]);
        assert_eq!((r.dst, r.fl & CF), (0x80, CF));
        assert_eq!(run(Op::Rcr, Width::W64, [2, 1, CF, 0]).dst, 1 << 63 | 1);
        assert_eq!(run(Op::Ror, Width::W8, [0x81, 4, 0, 0]).dst, 0x18);
        let r = run(Op::Shld, Width::W64, [1 << 63, u64::MAX, 4, 0]);
        assert_eq!((r.dst, r.fl & CF), (0xf, 0));
    }

    #[test]
    fn division_edges() {
        assert_eq!(divide(false, Width::W32, 0, 7, 2), Some((3, 1)));
        assert_eq!(divide(false, Width::W64, 1, 0, 1), None);
        assert_eq!(divide(true, Width::W64, 1 << 63, 0, u64::MAX), None);
        assert_eq!(divide(true, Width::W8, 0xff, 0xf9, 2), Some((0xfd, 0xff)));
        assert_eq!(divide(true, Width::W32, 0xffff_ffff, 0x8000_0000, 0xffff_ffff), None);
        assert_eq!(divide(true, Width::W16, 0, 0, 0), None);
    }

    #[test]
    fn bits() {
        assert_eq!(run(Op::Pext, Width::W32, [0xabcd, 0xf0f0, 0, 0]).dst, 0xac);
        assert_eq!(run(Op::Pdep, Width::W64, [0xac, 0xf0f0, 0, 0]).dst, 0xa0c0);
        assert_eq!(run(Op::Clz, Width::W16, [1, 0, 0, 0]).dst, 15);
        assert_eq!(run(Op::Ctz, Width::W16, [0, 0, 0, 0]).dst, 16);
        assert_eq!(run(Op::Bswap, Width::W16, [0x1234, 0, 0, 0]).dst, 0x3412);
    }
}
