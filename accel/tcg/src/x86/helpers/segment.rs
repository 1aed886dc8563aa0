//! Segment checks of memory accesses outside 64-bit code.

use super::raise;
use super::vector::active_span;
use crate::x86::Env;
use crate::x86::exception::{Exception, vector};
use tandem_accel::x86::{ATTR_DB, ATTR_P, ATTR_S, ATTR_UNUSABLE, seg};
use tandem_jit::ir::{PTR_READ, PTR_WRITE};

/// [`check`] for generated code: `what` is the segment's number above bit 8 and the access bits.
pub extern "C" fn seg_check(env: *mut Env, what: u64, offset: u64, size: u64) -> u64 {
    // SAFETY: generated code passes its own Env, which nothing else uses while the helper runs.
    let env = unsafe { &mut *env };
    let n = ((what >> 8) as usize).min(seg::GS);
    check(env, n, what as u8, offset, size).unwrap_or_else(|e| raise(env, e))
}

/// [`check`] of the active elements of the masked operand at `offset` that is noted in the processor;
/// elements that are masked off do not fault (SDM vol. 2A §2.4).
pub extern "C" fn masked_seg_check(env: *mut Env, what: u64, offset: u64) -> u64 {
    // SAFETY: as above.
    let env = unsafe { &mut *env };
    let n = ((what >> 8) as usize).min(seg::GS);
    let Some((first, len)) = active_span(&env.cpu) else {
        return env.cpu.seg_base[n].wrapping_add(offset) & u64::from(u32::MAX);
    };
    let from = offset.wrapping_add(first);
    let linear = check(env, n, what as u8, from, len).unwrap_or_else(|e| raise(env, e));
    linear.wrapping_sub(first) & u64::from(u32::MAX)
}

/// ARPL with its destination in memory, at `offset` in segment `what & 0xff`, by the MMU index above:
/// the new ZF. Memory is written only if it changes.
pub extern "C" fn arpl(env: *mut Env, what: u64, offset: u64, src: u64) -> u64 {
    // SAFETY: as above.
    let env = unsafe { &mut *env };
    let n = (what as usize & 0xff).min(seg::GS);
    let mmu = (what >> 8) as u8;
    let run = |env: &mut Env| {
        let old = env.read_u16(check(env, n, PTR_READ, offset, 2)?, mmu)?;
        let rpl = src as u16 & 3;
        if old & 3 >= rpl {
            return Ok(0);
        }
        let to = check(env, n, PTR_READ | PTR_WRITE, offset, 2)?;
        env.write_u16(to, old & !3 | rpl, mmu)?;
        Ok(1)
    };
    run(env).unwrap_or_else(|e| raise(env, e))
}

/// Checks an access of `size` bytes at `offset` in segment `n` against limit and type (SDM vol. 3
/// §5.3, §5.5); `access` is [`PTR_READ`] | [`PTR_WRITE`]. Returns the linear address.
///
/// # Errors
/// #SS(0) for the stack segment and #GP(0) for the others.
pub fn check(env: &Env, n: usize, access: u8, offset: u64, size: u64) -> Result<u64, Exception> {
    let s = &env.cpu.seg[n];
    let last = offset.wrapping_add(size).wrapping_sub(1);
    let limit = u64::from(s.limit);
    let code = s.attr & 8 != 0;
    let expand_down = !code && s.attr & 4 != 0;
    let inside = if expand_down {
        let top = if s.attr & ATTR_DB != 0 { u32::MAX.into() } else { 0xffff };
        offset > limit && last <= top
    } else {
        last <= limit
    };
    // Real mode and virtual-8086 mode have limits but no types.
    let typed = env.cpu.cr0 & 1 != 0 && env.cpu.eflags & 1 << 17 == 0;
    let present = s.attr & (ATTR_P | ATTR_S | ATTR_UNUSABLE) == ATTR_P | ATTR_S;
    let writable = !code && s.attr & 2 != 0;
    let readable = !code || s.attr & 2 != 0;
    let allowed = !typed
        || present && (access & PTR_WRITE == 0 || writable) && (access & PTR_READ == 0 || readable);
    if inside && allowed {
        return Ok(env.cpu.seg_base[n].wrapping_add(offset) & u64::from(u32::MAX));
    }
    let v = if n == seg::SS { vector::SS } else { vector::GP };
    Err(Exception::with_error(v, 0))
}

#[cfg(test)]
mod tests {
    use super::super::vector::Masked;
    use super::*;
    use crate::x86::testing::{BIG, Bench, DATA, sel};
    use tandem_accel::x86::Segment;

    #[test]
    fn masked_elements_may_lie_beyond_the_limit() {
        let mut b = Bench::new();
        b.protected(0);
        let env = b.env();
        // Of a vector of eight doublewords at 1000h, four are inside.
        let s = Segment { selector: sel::FREE, base: 0x5000, limit: 0x100f, attr: DATA | BIG };
        env.cpu.set_seg(seg::FS, s);
        env.cpu.masked_what = Masked { log2: 5, elem_log2: 2, ..Masked::default() }.pack();
        let what = (seg::FS as u64) << 8 | u64::from(PTR_READ);
        for (bits, fault) in [(0, false), (0xf, false), (8, false), (0x10, true), (0x81, true)] {
            env.cpu.masked_bits = bits;
            env.core.fault = 0;
            let linear = masked_seg_check(env, what, 0x1000);
            assert_eq!(env.core.fault != 0, fault, "{bits:#x}");
            if fault {
                assert_eq!(env.cpu.exception, Exception::gp(0));
            } else {
                assert_eq!(linear, 0x6000, "{bits:#x}");
            }
        }
    }
}
