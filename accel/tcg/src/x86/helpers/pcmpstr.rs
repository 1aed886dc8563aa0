//! The string comparisons of SSE4.2 (SDM vol. 2 §4.1).

use crate::x86::Env;
use crate::x86::bits::rflags::{CF, OF, SF, ZF};

/// Bit of `what`: lengths are explicit, in RAX and RDX.
pub const EXPLICIT: u64 = 1 << 24;
/// Bit of `what`: the explicit lengths are 64 bits wide.
pub const WIDE: u64 = 1 << 25;
/// Bit of `what`: the result is an index, else a mask for XMM0.
pub const INDEX: u64 = 1 << 26;
/// Bit of `what`: VEX form, which clears the upper part of register 0 when it writes it.
pub const VEX: u64 = 1 << 27;
/// Bit of `what`: the second operand was in memory.
pub const MEMORY: u64 = 1 << 28;

/// One comparison: `what` has the immediate in bits 0–7, the first register in 8–12, the second in
/// 16–20, and the bits above; `lo` and `hi` are the second operand if it was in memory. Returns the
/// flags' image, and in the upper half the index for ECX.
pub extern "C" fn pcmpstr(env: *mut Env, what: u64, lo: u64, hi: u64) -> u64 {
    // SAFETY: generated code passes its own Env, which nothing else uses while the helper runs.
    let env = unsafe { &mut *env };
    let imm = what as u8;
    let register = |n: u64| u128::from_le_bytes(first16(&env.core.vec[(n & 31) as usize]));
    let a = register(what >> 8);
    let b = if what & MEMORY != 0 {
        u128::from(hi) << 64 | u128::from(lo)
    } else {
        register(what >> 16)
    };
    let n = if imm & 1 != 0 { 8 } else { 16 };
    let (la, lb) = if what & EXPLICIT != 0 {
        let len = |gpr: u64| {
            let v = if what & WIDE != 0 { gpr as i64 } else { i64::from(gpr as i32) };
            v.unsigned_abs().min(n) as u32
        };
        (len(env.cpu.gpr[0]), len(env.cpu.gpr[2]))
    } else {
        (implicit_length(a, imm), implicit_length(b, imm))
    };
    let r = compare(imm, a, la, b, lb);
    let n = n as u32;
    let mut flags = 0;
    for (on, flag) in [(r != 0, CF), (lb < n, ZF), (la < n, SF), (r & 1 != 0, OF)] {
        if on {
            flags |= flag;
        }
    }
    if what & INDEX != 0 {
        let index = match (r, imm & 0x40 != 0) {
            (0, _) => n,
            (r, false) => r.trailing_zeros(),
            (r, true) => 31 - r.leading_zeros(),
        };
        return flags | u64::from(index) << 32;
    }
    let mask = if imm & 0x40 != 0 { expand(r, n) } else { u128::from(r) };
    let x0 = &mut env.core.vec[0];
    x0[..16].copy_from_slice(&mask.to_le_bytes());
    if what & VEX != 0 {
        x0[16..].fill(0);
    }
    flags
}

fn first16(reg: &[u8; 64]) -> [u8; 16] {
    let mut a = [0; 16];
    a.copy_from_slice(&reg[..16]);
    a
}

/// Element `i` of `v` as the immediate's format says, extended by its sign.
fn element(v: u128, i: u32, imm: u8) -> i32 {
    match imm & 3 {
        0 => i32::from((v >> (8 * i)) as u8),
        1 => i32::from((v >> (16 * i)) as u16),
        2 => i32::from((v >> (8 * i)) as i8),
        _ => i32::from((v >> (16 * i)) as i16),
    }
}

fn implicit_length(v: u128, imm: u8) -> u32 {
    let n = if imm & 1 != 0 { 8 } else { 16 };
    (0..n).find(|&i| element(v, i, imm) == 0).unwrap_or(n)
}

/// IntRes2: a bit for each element of `b`.
fn compare(imm: u8, a: u128, la: u32, b: u128, lb: u32) -> u32 {
    let n = if imm & 1 != 0 { 8 } else { 16 };
    let at = |i: u32| element(a, i, imm);
    let bt = |j: u32| element(b, j, imm);
    let mut r = 0u32;
    for j in 0..n {
        let bit = match imm >> 2 & 3 {
            // Equal any: b[j] is in the set a.
            0 => j < lb && (0..la).any(|i| at(i) == bt(j)),
            // Ranges: b[j] is within a pair of bounds in a.
            1 => j < lb && (0..la / 2).any(|i| at(2 * i) <= bt(j) && bt(j) <= at(2 * i + 1)),
            // Equal each: both ended counts as equal, one ended as different.
            2 => match (j < la, j < lb) {
                (true, true) => at(j) == bt(j),
                (x, y) => x == y,
            },
            // Equal ordered: a is found at b[j]; what runs past the register's end matches.
            _ => (0..la).all(|i| j + i >= n || (j + i < lb && at(i) == bt(j + i))),
        };
        r |= u32::from(bit) << j;
    }
    let all = (1u32 << n) - 1;
    match imm >> 4 & 3 {
        1 => r ^ all,
        3 => r ^ ((1u32 << lb) - 1),
        _ => r,
    }
}

/// One byte or word of ones for each bit.
fn expand(r: u32, n: u32) -> u128 {
    let bits = 128 / n;
    let ones = (1u128 << bits) - 1;
    (0..n).filter(|i| r >> i & 1 != 0).fold(0, |m, i| m | ones << (bits * i))
}

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests {
    use super::*;
    use std::arch::x86_64::*;

    /// The host's own instruction for a handful of immediates, which the instruction needs as
    /// constants.
    macro_rules! host {
        ($imm:expr, $a:expr, $la:expr, $b:expr, $lb:expr; $($k:literal)*) => {
            match $imm {
                // SAFETY: the caller has checked for SSE4.2.
                $( $k => unsafe {
                    let a = std::mem::transmute::<u128, __m128i>($a);
                    let b = std::mem::transmute::<u128, __m128i>($b);
                    let m: u128 = std::mem::transmute(_mm_cmpestrm::<$k>(a, $la, b, $lb));
                    let mi: u128 = std::mem::transmute(_mm_cmpistrm::<$k>(a, b));
                    (m, mi)
                }, )*
                _ => unreachable!(),
            }
        };
    }

    #[test]
    fn agrees_with_the_host() {
        if !is_x86_feature_detected!("sse4.2") {
            return;
        }
        let mut x = 0x1234_5678_9abc_def1u64;
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x
        };
        for round in 0..200_000 {
            // Few distinct bytes, so that matches and terminators occur.
            let mut vec = || {
                let bytes: [u8; 16] =
                    std::array::from_fn(|_| [0, 1, 2, 0x80, 0xff, 3][(next() >> 33) as usize % 6]);
                u128::from_le_bytes(bytes)
            };
            let (a, b) = (vec(), vec());
            let (la, lb) = (next() as i32 % 20, next() as i32 % 20);
            let imm = (round % 64) as u8;
            let (m, mi) = host!(imm, a, la, b, lb;
                0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30
                31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57
                58 59 60 61 62 63);
            let n = if imm & 1 != 0 { 8 } else { 16 };
            let r = compare(imm, a, la.unsigned_abs().min(n), b, lb.unsigned_abs().min(n));
            assert_eq!(u128::from(r), m, "explicit {imm:#x} {a:032x} {la} {b:032x} {lb}");
            let r = compare(imm, a, implicit_length(a, imm), b, implicit_length(b, imm));
            assert_eq!(u128::from(r), mi, "implicit {imm:#x} {a:032x} {b:032x}");
        }
    }
}
