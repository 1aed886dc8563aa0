//! Helpers that raise faults which the front end has found.

use super::raise;
use crate::x86::Env;
use crate::x86::exception::{Exception, vector};
use tandem_jit::ir::PTR_WRITE;

/// Raises exception `vector`. Bit 32 of `error` says that its low 32 bits are an error code.
pub extern "C" fn raise_exception(env: *mut Env, vector: u64, error: u64) -> u64 {
    // SAFETY: generated code passes its own Env, which nothing else uses while the helper runs.
    let env = unsafe { &mut *env };
    let code = (error >> 32 != 0).then_some(error as u32);
    raise(env, Exception { error: code, ..Exception::plain(vector as u8) })
}

/// Raises #AC(0) unless `addr` is a multiple of the alignment in `what` (bits 32–47, a power of two);
/// the access's size (bits 0–15), kind (16–23) and MMU index (24–31) are there too.
pub extern "C" fn align_check(env: *mut Env, addr: u64, what: u64) -> u64 {
    let align = what >> 32 & 0xffff;
    if addr & align.wrapping_sub(1) == 0 {
        return 0;
    }
    // SAFETY: as above.
    let env = unsafe { &mut *env };
    let write = what >> 16 & u64::from(PTR_WRITE) != 0;
    let e = misaligned(env, addr, what & 0xffff, write, (what >> 24) as u8);
    raise(env, e)
}

/// What a misaligned access raises where alignment is checked: the page fault that it has anyway, else
/// #AC(0) (SDM vol. 3 table 6-2).
pub fn misaligned(env: &mut Env, addr: u64, size: u64, write: bool, mmu_idx: u8) -> Exception {
    let mut bytes = [0; 512];
    let size = size.min(512);
    let access = if write {
        env.probe_write(addr, size, mmu_idx)
    } else {
        env.read_bytes(addr, &mut bytes[..size as usize], mmu_idx)
    };
    access.err().unwrap_or(Exception::with_error(vector::AC, 0))
}

/// Raises #GP(0) unless `addr` is a multiple of `size`, a power of two.
pub extern "C" fn check_aligned(env: *mut Env, addr: u64, size: u64) -> u64 {
    if addr & size.wrapping_sub(1) == 0 {
        return 0;
    }
    // SAFETY: as above.
    let env = unsafe { &mut *env };
    raise(env, Exception::gp(0))
}
