//! Decimal adjustment (SDM vol. 2, DAA and its kin), on values: AX and the flags' image in, AX and
//! above bit 16 the new image out.

use crate::x86::Env;
use crate::x86::bits::rflags::{AF, CF, OF, PF, SF, ZF};

/// ZF, SF and PF of AL.
fn zsp(al: u8) -> u64 {
    let flag = |set: bool, bit: u64| if set { bit } else { 0 };
    flag(al == 0, ZF) | flag(al >> 7 != 0, SF) | flag(al.count_ones() & 1 == 0, PF)
}

fn pack(ax: u64, image: u64) -> u64 {
    ax & 0xffff | image << 16
}

/// DAA, or DAS if `subtract`.
fn decimal(ax: u64, image: u64, subtract: bool) -> u64 {
    let old = ax as u8;
    let low = old & 15 > 9 || image & AF != 0;
    let high = old > 0x99 || image & CF != 0;
    let fix = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
    let al = if subtract { old.wrapping_sub(fix) } else { old.wrapping_add(fix) };
    // In DAS the subtraction of 6 alone may borrow.
    let borrow = subtract && low && old < 6;
    let af = if low { AF } else { 0 };
    let cf = if high || borrow { CF } else { 0 };
    pack(ax & 0xff00 | u64::from(al), af | cf | zsp(al) | image & OF)
}

/// AAA and AAS.
fn ascii(ax: u64, image: u64, adjust: fn(u16) -> u16) -> u64 {
    let mut ax = ax as u16;
    let mut out = 0;
    if ax & 15 > 9 || image & AF != 0 {
        ax = adjust(ax);
        out = AF | CF;
    }
    ax &= 0xff0f;
    pack(ax.into(), out | zsp(ax as u8))
}

/// DAA.
pub extern "C" fn daa(_: *mut Env, ax: u64, image: u64) -> u64 {
    decimal(ax, image, false)
}

/// DAS.
pub extern "C" fn das(_: *mut Env, ax: u64, image: u64) -> u64 {
    decimal(ax, image, true)
}

/// AAA: AX + 0x106 carries from AL into AH.
pub extern "C" fn aaa(_: *mut Env, ax: u64, image: u64) -> u64 {
    ascii(ax, image, |v| v.wrapping_add(0x106))
}

/// AAS.
pub extern "C" fn aas(_: *mut Env, ax: u64, image: u64) -> u64 {
    ascii(ax, image, |v| v.wrapping_sub(6).wrapping_sub(0x100))
}
