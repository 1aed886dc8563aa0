//! SIGFPE in generated code becomes a leave with [`crate::target::LEAVE_TRAP`].
//!
//! One process-wide handler, installed with the first back end, in front of whatever handler there
//! was. What always holds: the handler looks at a fixed table of atomics only, so it is
//! async-signal-safe; a fault outside every arena goes to the previous handler unchanged.

use super::frame::FRAME;
use crate::ir::TRAP_DIVIDE;
use crate::snapshot::TRAP_BIAS;
use std::io;
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Trap number of a SIMD floating-point exception.
const TRAP_SIMD: u32 = 1;

/// One arena that the handler knows. A slot is free while `len` is 0.
struct Slot {
    taken: AtomicU32,
    start: AtomicU64,
    len: AtomicU64,
    thunk: AtomicU64,
    host_pc: AtomicU32,
    fault: AtomicU32,
}

const SLOTS: usize = 64;
#[allow(clippy::declare_interior_mutable_const)]
const FREE: Slot = Slot {
    taken: AtomicU32::new(0),
    start: AtomicU64::new(0),
    len: AtomicU64::new(0),
    thunk: AtomicU64::new(0),
    host_pc: AtomicU32::new(0),
    fault: AtomicU32::new(0),
};
static TABLE: [Slot; SLOTS] = [FREE; SLOTS];

/// The handler that was there before ours.
struct Previous(libc::sigaction);
// SAFETY: plain data (a function address and flags), written once.
unsafe impl Sync for Previous {}
// SAFETY: as above.
unsafe impl Send for Previous {}
static PREVIOUS: OnceLock<Result<Previous, i32>> = OnceLock::new();

/// Keeps an arena known to the handler.
#[derive(Debug)]
pub(super) struct Registration(usize);

/// An arena as the handler must know it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Watched {
    /// Executable range.
    pub start: u64,
    pub len: u64,
    /// Address of the trap thunk.
    pub thunk: u64,
    /// Offsets in `Env`.
    pub host_pc: u32,
    pub fault: u32,
}

impl Registration {
    /// Makes the handler watch an arena.
    ///
    /// # Errors
    /// The handler cannot be installed, or too many back ends exist at once.
    pub(super) fn new(w: Watched) -> io::Result<Registration> {
        install()?;
        for (i, slot) in TABLE.iter().enumerate() {
            let free = slot.taken.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed);
            if free.is_err() {
                continue;
            }
            slot.start.store(w.start, Ordering::Relaxed);
            slot.thunk.store(w.thunk, Ordering::Relaxed);
            slot.host_pc.store(w.host_pc, Ordering::Relaxed);
            slot.fault.store(w.fault, Ordering::Relaxed);
            slot.len.store(w.len, Ordering::Release);
            return Ok(Registration(i));
        }
        Err(io::Error::other("too many translators in one process"))
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        TABLE[self.0].len.store(0, Ordering::Release);
        TABLE[self.0].taken.store(0, Ordering::Release);
    }
}

fn install() -> io::Result<()> {
    let done = PREVIOUS.get_or_init(|| {
        let mut old = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: all-zero bytes are a valid sigaction; the handler has the SA_SIGINFO signature
        // and is async-signal-safe; both pointers are to live structures.
        unsafe {
            let mut new: libc::sigaction = MaybeUninit::zeroed().assume_init();
            let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_fpe;
            new.sa_sigaction = handler as usize;
            new.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
            libc::sigemptyset(&mut new.sa_mask);
            if libc::sigaction(libc::SIGFPE, &new, old.as_mut_ptr()) != 0 {
                return Err(*libc::__errno_location());
            }
            Ok(Previous(old.assume_init()))
        }
    });
    match done {
        Ok(_) => Ok(()),
        Err(e) => Err(io::Error::from_raw_os_error(*e)),
    }
}

extern "C" fn on_fpe(sig: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let uc = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel passes a valid ucontext to an SA_SIGINFO handler.
    let regs = unsafe { &mut (*uc).uc_mcontext.gregs };
    let pc = regs[libc::REG_RIP as usize] as u64;
    for slot in &TABLE {
        let len = slot.len.load(Ordering::Acquire);
        if pc.wrapping_sub(slot.start.load(Ordering::Relaxed)) >= len {
            continue;
        }
        let env = regs[libc::REG_RSP as usize] as u64 + FRAME as u64;
        // SAFETY: info is valid in an SA_SIGINFO handler.
        let code = unsafe { (*info).si_code };
        let trap = if code == FPE_INTDIV || code == FPE_INTOVF { TRAP_DIVIDE } else { TRAP_SIMD };
        let host_pc = env + slot.host_pc.load(Ordering::Relaxed) as u64;
        let fault = env + slot.fault.load(Ordering::Relaxed) as u64;
        // SAFETY: only guest code divides or computes in an arena (thunks do neither), and while
        // guest code runs RSP is Env - FRAME; the offsets are fields of Env.
        unsafe {
            (host_pc as *mut u64).write(pc + u64::from(TRAP_BIAS));
            (fault as *mut u32).write(trap);
        }
        regs[libc::REG_RIP as usize] = slot.thunk.load(Ordering::Relaxed) as i64;
        return;
    }
    chain(sig, info, context);
}

/// `si_code` values of SIGFPE (POSIX; Linux uapi/asm-generic/siginfo.h).
const FPE_INTDIV: i32 = 1;
const FPE_INTOVF: i32 = 2;

/// Hands the signal to the previous handler, or lets it kill the process.
fn chain(sig: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let old = match PREVIOUS.get() {
        Some(Ok(p)) => p.0.sa_sigaction,
        _ => libc::SIG_DFL,
    };
    if old == libc::SIG_DFL || old == libc::SIG_IGN {
        // The faulting instruction runs again and meets the default action.
        // SAFETY: resetting a signal to its default is always allowed.
        unsafe { libc::signal(sig, libc::SIG_DFL) };
        return;
    }
    // SAFETY: the address was a handler in force; a one-argument handler ignores the rest.
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
        unsafe { std::mem::transmute(old) };
    handler(sig, info, context);
}
