//! Helpers that raise faults which the front end has found.

use super::raise;
use crate::x86::Env;
use crate::x86::exception::{Exception, vector};

/// Raises exception `vector`. Bit 32 of `error` says that its low 32 bits are an error code.
pub extern "C" fn raise_exception(env: *mut Env, vector: u64, error: u64) -> u64 {
    // SAFETY: generated code passes its own Env, which nothing else uses while the helper runs.
    let env = unsafe { &mut *env };
    let code = (error >> 32 != 0).then_some(error as u32);
    raise(env, Exception { error: code, ..Exception::plain(vector as u8) })
}

/// Raises #AC(0) unless `addr` is a multiple of `size`, a power of two.
pub extern "C" fn align_check(env: *mut Env, addr: u64, size: u64) -> u64 {
    if addr & size.wrapping_sub(1) == 0 {
        return 0;
    }
    // SAFETY: as above.
    let env = unsafe { &mut *env };
    raise(env, Exception::with_error(vector::AC, 0))
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
