//! Integer instructions that need more than the IR has.

use super::raise;
use crate::x86::Env;
use crate::x86::bits::rflags::ZF;
use crate::x86::exception::{Exception, vector};
use crate::x86::flags;
use tandem_accel::x86::gpr;

/// BOUND: raises #BR unless `lower` <= `index` <= `upper`, all sign-extended.
pub extern "C" fn bound(env: *mut Env, index: u64, lower: u64, upper: u64) -> u64 {
    let (index, lower, upper) = (index as i64, lower as i64, upper as i64);
    if lower <= index && index <= upper {
        return 0;
    }
    // SAFETY: generated code passes its own Env, which nothing else uses while the helper runs.
    let env = unsafe { &mut *env };
    raise(env, Exception::plain(vector::BR))
}

/// CMPXCHG16B at host pointer `p`, which is aligned unless the access has been bounced: compares
/// with RDX:RAX, stores RCX:RBX or loads RDX:RAX, and sets ZF.
pub extern "C" fn cmpxchg16b(env: *mut Env, p: u64) -> u64 {
    // SAFETY: generated code passes its own Env, which nothing else uses while the helper runs.
    let env = unsafe { &mut *env };
    let g = &mut env.cpu.gpr;
    let expect = u128::from(g[gpr::RDX]) << 64 | u128::from(g[gpr::RAX]);
    let new = u128::from(g[gpr::RCX]) << 64 | u128::from(g[gpr::RBX]);
    // SAFETY: `p` comes from a `Ptr` of 16 bytes for reading and writing; guest addresses are
    // aligned (checked before), RAM is mapped page by page, and the bounce buffer is aligned.
    let old = unsafe { compare_exchange(p as *mut u128, expect, new) };
    let equal = old == expect;
    if !equal {
        g[gpr::RAX] = old as u64;
        g[gpr::RDX] = (old >> 64) as u64;
    }
    let image = flags::compute(&env.cpu.cc) & !ZF | if equal { ZF } else { 0 };
    env.set_arith_flags(image);
    0
}

/// # Safety
/// `p` is 16-byte aligned and accessible.
#[cfg(target_arch = "x86_64")]
unsafe fn compare_exchange(p: *mut u128, expect: u128, new: u128) -> u128 {
    let (lo, hi): (u64, u64);
    // SAFETY: the caller's promise; every x86-64 processor that runs a current system has
    // CMPXCHG16B. RBX belongs to the compiler, so it is exchanged and restored.
    unsafe {
        std::arch::asm!(
            "xchg {new_lo}, rbx",
            "lock cmpxchg16b [{p}]",
            "mov rbx, {new_lo}",
            p = in(reg) p,
            new_lo = inout(reg) new as u64 => _,
            in("rcx") (new >> 64) as u64,
            inout("rax") expect as u64 => lo,
            inout("rdx") (expect >> 64) as u64 => hi,
            options(nostack),
        );
    }
    u128::from(hi) << 64 | u128::from(lo)
}

/// Without a 128-bit atomic, one lock serialises all of them; plain stores of other vCPUs may come
/// between.
///
/// # Safety
/// `p` is 16-byte aligned and accessible.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn compare_exchange(p: *mut u128, expect: u128, new: u128) -> u128 {
    static LOCK: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _guard = LOCK.lock().unwrap_or_else(|e| e.into_inner());
    // SAFETY: the caller's promise.
    unsafe {
        let old = p.read_volatile();
        if old == expect {
            p.write_volatile(new);
        }
        old
    }
}

/// 64 random bits (RDRAND, RDSEED).
pub extern "C" fn random(env: *mut Env) -> u64 {
    // SAFETY: generated code passes its own Env, which nothing else uses while the helper runs.
    unsafe { &*env }.vcpu().random()
}

/// Sets RIP, where a block leaves to a computed address.
pub extern "C" fn set_rip(env: *mut Env, rip: u64) -> u64 {
    // SAFETY: generated code passes its own Env, which nothing else uses while the helper runs.
    unsafe { (*env).cpu.rip = rip };
    0
}
