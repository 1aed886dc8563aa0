//! The slow paths that generated code calls (see [`tandem_jit::target::Runtime`]).

use crate::exec;
use crate::softmmu::{PAGE_MASK, PAGE_SIZE, slow};
use crate::x86::Env;
use crate::x86::exception::Exception;
use crate::x86::helpers::raise;
use crate::x86::paging::Access;
use tandem_jit::ir::{PTR_ALIGNED, PTR_READ, PTR_WRITE};
use tandem_jit::target::{AccessInfo, Runtime};

/// The entry points as the compiler wants them.
pub fn table() -> Runtime {
    Runtime {
        load: load as *const () as usize,
        store: store as *const () as usize,
        ptr: ptr as *const () as usize,
        ptr_end: ptr_end as *const () as usize,
        lookup: lookup as *const () as usize,
    }
}

/// Turns a failed access into a pending fault.
fn settle(env: &mut Env, r: Result<u64, Exception>) -> u64 {
    r.unwrap_or_else(|e| raise(env, e))
}

/// What all entry points may assume of `env`.
///
/// # Safety
/// `env` is the running vCPU's `Env`; generated code has no other reference to it while it calls.
unsafe fn env_of<'a>(env: *mut Env) -> &'a mut Env {
    // SAFETY: the caller's promise.
    unsafe { &mut *env }
}

extern "C" fn load(env: *mut Env, addr: u64, info: u32) -> u64 {
    let info = AccessInfo(info);
    // SAFETY: called by generated code of this vCPU.
    let env = unsafe { env_of(env) };
    let r = env.read(addr, info.size() as usize, info.mmu_idx());
    settle(env, r)
}

extern "C" fn store(env: *mut Env, addr: u64, info: u32, value: u64) {
    let info = AccessInfo(info);
    // SAFETY: called by generated code of this vCPU.
    let env = unsafe { env_of(env) };
    if let Err(e) = env.write(addr, value, info.size() as usize, info.mmu_idx()) {
        raise(env, e);
    }
}

extern "C" fn ptr(env: *mut Env, addr: u64, info: u32) -> u64 {
    // SAFETY: called by generated code of this vCPU.
    let env = unsafe { env_of(env) };
    let r = pointer(env, addr, AccessInfo(info));
    settle(env, r)
}

/// A host pointer to the bytes themselves, or to the bounce buffer.
fn pointer(env: &mut Env, addr: u64, info: AccessInfo) -> Result<u64, Exception> {
    let (size, mmu, access) = (info.size() as usize, info.mmu_idx(), info.access());
    let (reads, writes) = (access & PTR_READ != 0, access & PTR_WRITE != 0);
    if access & PTR_ALIGNED != 0 && addr & (size as u64 - 1) != 0 {
        return Err(Exception::gp(0));
    }
    if PAGE_SIZE - (addr & PAGE_MASK) >= size as u64 {
        let mut bar = 0;
        let mut e = None;
        if writes {
            e = Some(env.entry(addr, Access::Write, mmu)?);
            bar |= slow::BAR_WRITE;
        }
        if reads {
            e = Some(env.entry(addr, Access::Read, mmu)?);
            bar |= slow::BAR_READ;
        }
        if let Some(e) = e.filter(|e| e.phys & bar == 0) {
            return Ok(addr.wrapping_add(e.addend));
        }
    }
    if writes {
        env.probe_write(addr, size as u64, mmu)?;
    }
    if reads {
        let mut data = [0; 64];
        env.read_bytes(addr, &mut data[..size], mmu)?;
        env.core.bounce_buf.data = data;
    }
    env.core.bounce_buf.addr = addr;
    env.core.bounce_buf.info = info.0;
    env.core.bounce = writes.into();
    Ok(env.core.bounce_buf.data.as_ptr() as u64)
}

extern "C" fn ptr_end(env: *mut Env) {
    // SAFETY: called by generated code of this vCPU.
    let env = unsafe { env_of(env) };
    env.core.bounce = 0;
    let info = AccessInfo(env.core.bounce_buf.info);
    let data = env.core.bounce_buf.data;
    let size = info.size() as usize;
    if let Err(e) = env.write_bytes(env.core.bounce_buf.addr, &data[..size], info.mmu_idx()) {
        raise(env, e);
    }
}

extern "C" fn lookup(env: *mut Env, pc: u64) -> u64 {
    // SAFETY: called by generated code of this vCPU.
    let env = unsafe { env_of(env) };
    exec::lookup_from_code(env, pc)
}
