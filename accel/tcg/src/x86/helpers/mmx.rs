//! What the MMX instructions compute, in portable code.
//!
//! An operation takes two 64-bit registers and gives one. [`OPS`] is the table that the front end
//! indexes; shifts by an immediate are shifts by that count.

use super::raise;
use crate::x86::Env;
use crate::x86::exception::{Exception, vector};
use iced_x86::Mnemonic;

type Op = fn(u64, u64) -> u64;

fn bytes(f: impl Fn(u8, u8) -> u8, a: u64, b: u64) -> u64 {
    let (a, b) = (a.to_le_bytes(), b.to_le_bytes());
    u64::from_le_bytes(std::array::from_fn(|i| f(a[i], b[i])))
}

fn words(f: impl Fn(u16, u16) -> u16, a: u64, b: u64) -> u64 {
    (0..4).fold(0, |r, i| {
        r | u64::from(f((a >> (16 * i)) as u16, (b >> (16 * i)) as u16)) << (16 * i)
    })
}

fn dwords(f: impl Fn(u32, u32) -> u32, a: u64, b: u64) -> u64 {
    u64::from(f(a as u32, b as u32)) | u64::from(f((a >> 32) as u32, (b >> 32) as u32)) << 32
}

fn word(v: u64, i: u32) -> u16 {
    (v >> (16 * i)) as u16
}

fn sword(v: u64, i: u32) -> i32 {
    (word(v, i) as i16).into()
}

fn from_words(w: [u16; 4]) -> u64 {
    w.iter().rev().fold(0, |r, &w| r << 16 | u64::from(w))
}

fn from_dwords(d: [u32; 2]) -> u64 {
    u64::from(d[0]) | u64::from(d[1]) << 32
}

fn ones8(c: bool) -> u8 {
    if c { !0 } else { 0 }
}
fn ones16(c: bool) -> u16 {
    if c { !0 } else { 0 }
}
fn ones32(c: bool) -> u32 {
    if c { !0 } else { 0 }
}

fn sat16(v: i32) -> u16 {
    v.clamp(i16::MIN.into(), i16::MAX.into()) as u16
}

/// Interleaves elements of `bits` bits from the low halves of `a` and `b`.
fn unpack(a: u64, b: u64, bits: u32) -> u64 {
    let mask = (1u64 << bits) - 1;
    (0..32 / bits).fold(0, |r, i| {
        let (x, y) = (a >> (bits * i) & mask, b >> (bits * i) & mask);
        r | (x | y << bits) << (2 * bits * i)
    })
}

/// The words of `a`, then those of `b`, each made a byte.
fn pack_words(f: impl Fn(i32) -> u8, a: u64, b: u64) -> u64 {
    let w = |i: usize| if i < 4 { sword(a, i as u32) } else { sword(b, i as u32 - 4) };
    u64::from_le_bytes(std::array::from_fn(|i| f(w(i))))
}

/// The shift that `f` makes of elements `bits` wide, or `over` for a count that leaves nothing.
fn shift(a: u64, n: u64, bits: u32, f: fn(u64, u32, u32) -> u64) -> u64 {
    let mask = u64::MAX >> (64 - bits);
    (0..64 / bits).fold(0, |r, i| {
        let e = a >> (bits * i) & mask;
        r | (f(e, n.min(255) as u32, bits) & mask) << (bits * i)
    })
}

fn left(e: u64, n: u32, bits: u32) -> u64 {
    if n >= bits { 0 } else { e << n }
}
fn right(e: u64, n: u32, bits: u32) -> u64 {
    if n >= bits { 0 } else { e >> n }
}
fn arith(e: u64, n: u32, bits: u32) -> u64 {
    let s = 64 - bits;
    (((e << s) as i64 >> s) >> n.min(bits - 1)) as u64
}

/// Horizontal operation on neighbouring words: two from `a`, two from `b`.
fn hwords(f: impl Fn(i32, i32) -> u16, a: u64, b: u64) -> u64 {
    let p = |v, i| f(sword(v, i), sword(v, i + 1));
    from_words([p(a, 0), p(a, 2), p(b, 0), p(b, 2)])
}

fn hdwords(f: fn(u32, u32) -> u32, a: u64, b: u64) -> u64 {
    let p = |v: u64| f(v as u32, (v >> 32) as u32);
    from_dwords([p(a), p(b)])
}

fn avg8(x: u8, y: u8) -> u8 {
    (u16::from(x) + u16::from(y)).div_ceil(2) as u8
}
fn avg16(x: u16, y: u16) -> u16 {
    (u32::from(x) + u32::from(y)).div_ceil(2) as u16
}

/// `x` with the sign of `y`, or 0.
macro_rules! sign {
    ($t:ty, $x:expr, $y:expr) => {
        match ($y as $t).signum() {
            0 => 0,
            1 => $x,
            _ => $x.wrapping_neg(),
        }
    };
}

macro_rules! ops {
    ($( $name:ident $f:expr; )*) => {
        /// The operations, with the instruction of each.
        pub static OPS: &[(Mnemonic, Op)] = &[ $( (Mnemonic::$name, $f), )* ];
    };
}

ops! {
    Packsswb |a, b| pack_words(|w| w.clamp(-128, 127) as u8, a, b);
    Packuswb |a, b| pack_words(|w| w.clamp(0, 255) as u8, a, b);
    Packssdw |a, b| {
        let s = |v: u64| sat16(v as i32);
        from_words([s(a), s(a >> 32), s(b), s(b >> 32)])
    };
    Paddb |a, b| bytes(u8::wrapping_add, a, b);
    Paddw |a, b| words(u16::wrapping_add, a, b);
    Paddd |a, b| dwords(u32::wrapping_add, a, b);
    Paddq |a, b| a.wrapping_add(b);
    Paddsb |a, b| bytes(|x, y| (x as i8).saturating_add(y as i8) as u8, a, b);
    Paddsw |a, b| words(|x, y| (x as i16).saturating_add(y as i16) as u16, a, b);
    Paddusb |a, b| bytes(u8::saturating_add, a, b);
    Paddusw |a, b| words(u16::saturating_add, a, b);
    Psubb |a, b| bytes(u8::wrapping_sub, a, b);
    Psubw |a, b| words(u16::wrapping_sub, a, b);
    Psubd |a, b| dwords(u32::wrapping_sub, a, b);
    Psubq |a, b| a.wrapping_sub(b);
    Psubsb |a, b| bytes(|x, y| (x as i8).saturating_sub(y as i8) as u8, a, b);
    Psubsw |a, b| words(|x, y| (x as i16).saturating_sub(y as i16) as u16, a, b);
    Psubusb |a, b| bytes(u8::saturating_sub, a, b);
    Psubusw |a, b| words(u16::saturating_sub, a, b);
    Pand |a, b| a & b;
    Pandn |a, b| !a & b;
    Por |a, b| a | b;
    Pxor |a, b| a ^ b;
    Pavgb |a, b| bytes(avg8, a, b);
    Pavgw |a, b| words(avg16, a, b);
    Pcmpeqb |a, b| bytes(|x, y| ones8(x == y), a, b);
    Pcmpeqw |a, b| words(|x, y| ones16(x == y), a, b);
    Pcmpeqd |a, b| dwords(|x, y| ones32(x == y), a, b);
    Pcmpgtb |a, b| bytes(|x, y| ones8(x as i8 > y as i8), a, b);
    Pcmpgtw |a, b| words(|x, y| ones16(x as i16 > y as i16), a, b);
    Pcmpgtd |a, b| dwords(|x, y| ones32(x as i32 > y as i32), a, b);
    Pmaxsw |a, b| words(|x, y| (x as i16).max(y as i16) as u16, a, b);
    Pminsw |a, b| words(|x, y| (x as i16).min(y as i16) as u16, a, b);
    Pmaxub |a, b| bytes(u8::max, a, b);
    Pminub |a, b| bytes(u8::min, a, b);
    Pmullw |a, b| words(u16::wrapping_mul, a, b);
    Pmulhw |a, b| words(|x, y| ((i32::from(x as i16) * i32::from(y as i16)) >> 16) as u16, a, b);
    Pmulhuw |a, b| words(|x, y| ((u32::from(x) * u32::from(y)) >> 16) as u16, a, b);
    Pmuludq |a, b| (a & 0xffff_ffff) * (b & 0xffff_ffff);
    Pmaddwd |a, b| {
        let p = |i| (sword(a, i) * sword(b, i)).wrapping_add(sword(a, i + 1) * sword(b, i + 1));
        from_dwords([p(0) as u32, p(2) as u32])
    };
    Psadbw |a, b| {
        let d = |i: u32| u64::from(((a >> (8 * i)) as u8).abs_diff((b >> (8 * i)) as u8));
        (0..8).map(d).sum()
    };
    Punpcklbw |a, b| unpack(a, b, 8);
    Punpcklwd |a, b| unpack(a, b, 16);
    Punpckldq |a, b| unpack(a, b, 32);
    Punpckhbw |a, b| unpack(a >> 32, b >> 32, 8);
    Punpckhwd |a, b| unpack(a >> 32, b >> 32, 16);
    Punpckhdq |a, b| unpack(a >> 32, b >> 32, 32);
    Psllw |a, n| shift(a, n, 16, left);
    Pslld |a, n| shift(a, n, 32, left);
    Psllq |a, n| shift(a, n, 64, left);
    Psrlw |a, n| shift(a, n, 16, right);
    Psrld |a, n| shift(a, n, 32, right);
    Psrlq |a, n| shift(a, n, 64, right);
    Psraw |a, n| shift(a, n, 16, arith);
    Psrad |a, n| shift(a, n, 32, arith);
    Pabsb |_, b| bytes(|_, y| (y as i8).unsigned_abs(), 0, b);
    Pabsw |_, b| words(|_, y| (y as i16).unsigned_abs(), 0, b);
    Pabsd |_, b| dwords(|_, y| (y as i32).unsigned_abs(), 0, b);
    Phaddw |a, b| hwords(|x, y| (x + y) as u16, a, b);
    Phaddsw |a, b| hwords(|x, y| sat16(x + y), a, b);
    Phsubw |a, b| hwords(|x, y| (x - y) as u16, a, b);
    Phsubsw |a, b| hwords(|x, y| sat16(x - y), a, b);
    Phaddd |a, b| hdwords(u32::wrapping_add, a, b);
    Phsubd |a, b| hdwords(u32::wrapping_sub, a, b);
    Pmaddubsw |a, b| {
        let p = |i: u32| {
            let x = i32::from((a >> (8 * i)) as u8);
            x * i32::from((b >> (8 * i)) as i8)
        };
        from_words(std::array::from_fn(|i| sat16(p(2 * i as u32) + p(2 * i as u32 + 1))))
    };
    Pmulhrsw |a, b| words(|x, y| {
        ((((i32::from(x as i16) * i32::from(y as i16)) >> 14) + 1) >> 1) as u16
    }, a, b);
    Pshufb |a, b| bytes(|_, y| if y & 0x80 != 0 { 0 } else { (a >> (8 * (y & 7))) as u8 }, 0, b);
    Psignb |a, b| bytes(|x, y| sign!(i8, x, y), a, b);
    Psignw |a, b| words(|x, y| sign!(i16, x, y), a, b);
    Psignd |a, b| dwords(|x, y| sign!(i32, x, y), a, b);
}

/// Index in [`OPS`] of the operation of `mnemonic`.
pub fn op_index(mnemonic: Mnemonic) -> Option<usize> {
    OPS.iter().position(|(m, _)| *m == mnemonic)
}

/// Operation number `op` of [`OPS`].
pub extern "C" fn mmx_op(_env: *mut Env, op: u64, a: u64, b: u64) -> u64 {
    OPS.get(op as usize).map_or(0, |(_, f)| f(a, b))
}

/// PALIGNR: `a` above `b`, shifted right by `n` bytes.
pub extern "C" fn mmx_palignr(_env: *mut Env, a: u64, b: u64, n: u64) -> u64 {
    if n >= 16 { 0 } else { ((u128::from(a) << 64 | u128::from(b)) >> (8 * n)) as u64 }
}

/// PSHUFW with the immediate `imm`.
pub extern "C" fn mmx_pshufw(_env: *mut Env, a: u64, imm: u64) -> u64 {
    from_words(std::array::from_fn(|i| word(a, (imm >> (2 * i) & 3) as u32)))
}

/// PMOVMSKB: the bytes' top bits.
pub extern "C" fn mmx_pmovmskb(_env: *mut Env, a: u64) -> u64 {
    (0..8).fold(0, |r, i| r | (a >> (8 * i + 7) & 1) << i)
}

/// MASKMOVQ: stores the bytes of `data` whose byte in `mask` has its top bit set.
pub extern "C" fn mmx_maskmovq(
    env: *mut Env,
    addr: u64,
    data: u64,
    mask: u64,
    mmu_idx: u64,
) -> u64 {
    // SAFETY: generated code passes its own Env, which nothing else uses while the helper runs.
    let env = unsafe { &mut *env };
    let bits = mmx_pmovmskb(env, mask);
    for really in [false, true] {
        for i in (0..8).filter(|i| bits >> i & 1 != 0) {
            let to = addr.wrapping_add(i);
            let r = if really {
                env.write_u8(to, (data >> (8 * i)) as u8, mmu_idx as u8)
            } else {
                env.probe_write(to, 1, mmu_idx as u8)
            };
            if let Err(e) = r {
                return raise(env, e);
            }
        }
    }
    0
}

/// Conversions between MMX registers and floating point.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Convert {
    Pi2Ps,
    Pi2Pd,
    Ps2Pi,
    Tps2Pi,
    Pd2Pi,
    Tpd2Pi,
}

/// The status flags of MXCSR.
const STATUS: u32 = 0x3f;
/// Those found before the operation is done: invalid, denormal, division by zero.
const EARLY: u32 = 0x07;

/// Conversion `op & 0xff` ([`Convert`]). To floating point: of `lo` into vector register `op >> 8`;
/// from floating point: of `lo` and `hi`, returning the two integers. Raises #XM for an exception
/// that MXCSR does not mask.
pub extern "C" fn mmx_convert(env: *mut Env, op: u64, lo: u64, hi: u64) -> u64 {
    // SAFETY: as in `mmx_maskmovq`.
    let env = unsafe { &mut *env };
    let mxcsr = env.core.mxcsr;
    // Single precision has both inputs in `lo`; what else the register holds must not be looked at.
    let hi = if op as u8 >= Convert::Pd2Pi as u8 { hi } else { 0 };
    let Some((out, after)) = convert(op as u8, u128::from(hi) << 64 | u128::from(lo), mxcsr) else {
        return raise(env, Exception::UD);
    };
    let raised = after & STATUS;
    let trapped = raised & !(mxcsr >> 7) & STATUS;
    // An unmasked exception found early hides those that the result would have raised.
    env.core.mxcsr |= if trapped & EARLY != 0 { raised & EARLY } else { raised };
    if trapped != 0 {
        let osxmmexcpt = env.cpu.cr4 & crate::x86::bits::cr4::OSXMMEXCPT != 0;
        let e = if osxmmexcpt { Exception::plain(vector::XM) } else { Exception::UD };
        return raise(env, e);
    }
    let reg = &mut env.core.vec[(op >> 8 & 31) as usize];
    match op as u8 {
        0 => reg[..8].copy_from_slice(&(out as u64).to_le_bytes()),
        1 => reg[..16].copy_from_slice(&out.to_le_bytes()),
        _ => {}
    }
    out as u64
}

/// Executes the SSE2 instruction that converts in vector registers, under the guest's rounding mode
/// with exceptions masked; result and MXCSR.
#[cfg(target_arch = "x86_64")]
fn convert(op: u8, input: u128, mxcsr: u32) -> Option<(u128, u32)> {
    use std::arch::{asm, x86_64::__m128i};
    // SAFETY: both are 16 bytes of plain data.
    let mut x: __m128i = unsafe { std::mem::transmute(input) };
    let inside = mxcsr & !STATUS | 0x1f80;
    let (mut host, mut after) = (0u32, 0u32);
    macro_rules! run {
        ($insn:literal) => {
            // SAFETY: the instruction works on the named register; MXCSR is restored at the end.
            unsafe {
                asm!(
                    "stmxcsr [{host}]",
                    "ldmxcsr [{inside}]",
                    concat!($insn, " {x}, {x}"),
                    "stmxcsr [{after}]",
                    "ldmxcsr [{host}]",
                    host = in(reg) &mut host,
                    inside = in(reg) &inside,
                    after = in(reg) &mut after,
                    x = inout(xmm_reg) x,
                    options(nostack, preserves_flags)
                )
            }
        };
    }
    match op {
        0 => run!("cvtdq2ps"),
        1 => run!("cvtdq2pd"),
        2 => run!("cvtps2dq"),
        3 => run!("cvttps2dq"),
        4 => run!("cvtpd2dq"),
        5 => run!("cvttpd2dq"),
        _ => return None,
    }
    // SAFETY: both are 16 bytes of plain data.
    Some((unsafe { std::mem::transmute::<__m128i, u128>(x) }, after))
}

/// Other hosts offer no SSE to a guest, so that the instruction does not exist.
#[cfg(not(target_arch = "x86_64"))]
fn convert(_op: u8, _input: u128, _mxcsr: u32) -> Option<(u128, u32)> {
    None
}

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests {
    use super::*;
    use std::arch::asm;

    macro_rules! host {
        ($m:expr, $a:expr, $b:expr; $( $name:ident $text:literal )*) => {
            match $m {
                // SAFETY: MMX registers are declared as clobbered, and EMMS gives the x87 back.
                $( Mnemonic::$name => unsafe {
                    let r: u64;
                    asm!("movq mm0, {a}", "movq mm1, {b}", concat!($text, " mm0, mm1"),
                        "movq {r}, mm0", "emms", a = in(reg) $a, b = in(reg) $b, r = out(reg) r,
                        out("mm0") _, out("mm1") _);
                    r
                }, )*
                m => panic!("{m:?} has no host test"),
            }
        };
    }

    fn on_host(m: Mnemonic, a: u64, b: u64) -> u64 {
        host!(m, a, b;
            Packsswb "packsswb" Packuswb "packuswb" Packssdw "packssdw" Paddb "paddb"
            Paddw "paddw" Paddd "paddd" Paddq "paddq" Paddsb "paddsb" Paddsw "paddsw"
            Paddusb "paddusb" Paddusw "paddusw" Psubb "psubb" Psubw "psubw" Psubd "psubd"
            Psubq "psubq" Psubsb "psubsb" Psubsw "psubsw" Psubusb "psubusb" Psubusw "psubusw"
            Pand "pand" Pandn "pandn" Por "por" Pxor "pxor" Pavgb "pavgb" Pavgw "pavgw"
            Pcmpeqb "pcmpeqb" Pcmpeqw "pcmpeqw" Pcmpeqd "pcmpeqd" Pcmpgtb "pcmpgtb"
            Pcmpgtw "pcmpgtw" Pcmpgtd "pcmpgtd" Pmaxsw "pmaxsw" Pminsw "pminsw"
            Pmaxub "pmaxub" Pminub "pminub" Pmullw "pmullw" Pmulhw "pmulhw"
            Pmulhuw "pmulhuw" Pmuludq "pmuludq" Pmaddwd "pmaddwd" Psadbw "psadbw"
            Punpcklbw "punpcklbw" Punpcklwd "punpcklwd" Punpckldq "punpckldq"
            Punpckhbw "punpckhbw" Punpckhwd "punpckhwd" Punpckhdq "punpckhdq"
            Psllw "psllw" Pslld "pslld" Psllq "psllq" Psrlw "psrlw" Psrld "psrld"
            Psrlq "psrlq" Psraw "psraw" Psrad "psrad" Pabsb "pabsb" Pabsw "pabsw"
            Pabsd "pabsd" Phaddw "phaddw" Phaddsw "phaddsw" Phsubw "phsubw"
            Phsubsw "phsubsw" Phaddd "phaddd" Phsubd "phsubd" Pmaddubsw "pmaddubsw"
            Pmulhrsw "pmulhrsw" Pshufb "pshufb" Psignb "psignb" Psignw "psignw"
            Psignd "psignd")
    }

    #[test]
    fn every_operation_agrees_with_the_host() {
        if !is_x86_feature_detected!("ssse3") {
            return;
        }
        let mut x = 0x0123_4567_89ab_cdefu64;
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x
        };
        let mut value = || match next() >> 60 {
            0..=3 => next() & 0x3f,
            4..=6 => next() & 0x80ff_7f00_8001_ffff,
            7 => 0x8000_8000_8000_8000,
            8 => 0x8080_8080_8080_8080,
            _ => next(),
        };
        for _ in 0..2000 {
            let (a, b) = (value(), value());
            for (i, (m, _)) in OPS.iter().enumerate() {
                let r = mmx_op(std::ptr::null_mut(), i as u64, a, b);
                assert_eq!(r, on_host(*m, a, b), "{m:?} {a:#x} {b:#x}");
            }
        }
    }
}
