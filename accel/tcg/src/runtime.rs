//! The slow paths that generated code calls (see [`tandem_jit::target::Runtime`]).

use crate::env::{BOUNCED, CODE_OPEN, MASKED};
use crate::exec;
use crate::softmmu::{PAGE_MASK, PAGE_SIZE, slow};
use crate::tb::{self, LOCK_RETRY};
use crate::x86::Env;
use crate::x86::exception::Exception;
use crate::x86::helpers::{raise, vector};
use crate::x86::paging::Access;
use tandem_jit::code::ExitRef;
use tandem_jit::ir::{PTR_ALIGNED, PTR_LOCKED, PTR_MASKED, PTR_READ, PTR_WRITE};
use tandem_jit::target::{AccessInfo, Runtime};

/// The entry points as the compiler wants them.
pub fn table() -> Runtime {
    Runtime {
        load: load as *const () as usize,
        store: store as *const () as usize,
        ptr: ptr as *const () as usize,
        ptr_end: ptr_end as *const () as usize,
        lookup: lookup as *const () as usize,
        x87_image: x87_image as *const () as usize,
        refused: lookup as *const () as usize,
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
    let value = value & info.width().mask();
    if let Err(e) = env.write(addr, value, info.size() as usize, info.mmu_idx()) {
        raise(env, e);
    }
}

extern "C" fn ptr(env: *mut Env, addr: u64, info: u32) -> u64 {
    // SAFETY: called by generated code of this vCPU.
    let env = unsafe { env_of(env) };
    let info = AccessInfo(info);
    let r = match info.access() & PTR_MASKED != 0 {
        true => vector::masked_pointer(env, addr),
        false => pointer(env, addr, info),
    };
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
        if let Some(p) = in_page(env, addr, info)? {
            return Ok(p);
        }
    } else if access & PTR_LOCKED != 0 && env.core.alone == 0 {
        // Of one instruction on two pages the host can make nothing atomic.
        env.probe_write(addr, size as u64, mmu)?;
        return Err(Exception::plain(LOCK_RETRY));
    }
    if writes {
        env.clear_code(addr, size as u64, mmu)?;
    }
    if reads {
        let mut data = [0; 64];
        env.read_bytes(addr, &mut data[..size], mmu)?;
        env.core.bounce_buf.data = data;
    }
    env.core.bounce_buf.addr = addr;
    env.core.bounce_buf.info = info.0;
    env.core.bounce = if writes { BOUNCED } else { 0 };
    Ok(env.core.bounce_buf.data.as_ptr() as u64)
}

/// A host pointer to the bytes themselves, inside one page, if they are memory.
fn in_page(env: &mut Env, addr: u64, info: AccessInfo) -> Result<Option<u64>, Exception> {
    let (size, mmu, access) = (info.size(), info.mmu_idx(), info.access());
    let (reads, writes) = (access & PTR_READ != 0, access & PTR_WRITE != 0);
    let mut bar = 0;
    let mut entry = None;
    if writes {
        entry = Some(env.entry(addr, Access::Write, mmu)?);
        bar |= slow::IO_WRITE;
    }
    if reads {
        entry = Some(env.entry(addr, Access::Read, mmu)?);
        bar |= slow::IO_READ;
    }
    let Some(e) = entry.filter(|e| e.phys & bar == 0) else { return Ok(None) };
    if writes && e.phys & slow::CODE != 0 {
        let gpa = e.phys & !PAGE_MASK | addr & PAGE_MASK;
        tb::clear_code(env, gpa, size as usize)?;
        env.core.bounce_buf.addr = gpa;
        env.core.bounce_buf.info = info.0;
        env.core.bounce = CODE_OPEN;
    }
    if e.phys & slow::WATCH != 0 {
        env.cpu.note_access(addr, size.into(), writes);
    }
    Ok(Some(addr.wrapping_add(e.addend)))
}

extern "C" fn ptr_end(env: *mut Env) {
    // SAFETY: called by generated code of this vCPU.
    let env = unsafe { env_of(env) };
    let was = std::mem::take(&mut env.core.bounce);
    let info = AccessInfo(env.core.bounce_buf.info);
    let (addr, size) = (env.core.bounce_buf.addr, info.size() as usize);
    if was == CODE_OPEN {
        return tb::code_written(env, addr, size);
    }
    if was == MASKED {
        if let Err(e) = env.between_blocks(vector::masked_end) {
            raise(env, e);
        }
        return;
    }
    let data = env.core.bounce_buf.data;
    // The instruction has done its work: what the write finds translated from there by now does not
    // restart it.
    let done = env.between_blocks(|env| env.write_bytes(addr, &data[..size], info.mmu_idx()));
    if let Err(e) = done {
        raise(env, e);
    }
}

extern "C" fn x87_image(env: *mut Env) {
    // SAFETY: called by generated code of this vCPU.
    let env = unsafe { env_of(env) };
    env.make_x87_image();
}

extern "C" fn lookup(env: *mut Env, pc: u64, exit: u64) -> u64 {
    // SAFETY: called by generated code of this vCPU.
    let env = unsafe { env_of(env) };
    exec::lookup_from_code(env, pc, ExitRef(exit))
}
