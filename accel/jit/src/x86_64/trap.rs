//! SIGFPE in generated code becomes a leave with [`crate::target::LEAVE_TRAP`], and so do SIGSEGV and
//! SIGBUS of code whose guest memory is the process's own.
//!
//! One process-wide handler for each signal, installed with the first back end that needs it, in front
//! of whatever handler there was. What always holds: the handler looks at a fixed table of atomics only, so it is
//! async-signal-safe; a fault outside every arena goes to the previous handler unchanged.

use super::frame::FRAME;
use crate::ir::TRAP_DIVIDE;
use crate::snapshot::TRAP_BIAS;
use crate::target::{
    TRAP_ACCESS, TRAP_BUS, TRAP_MAPPED, TRAP_NO_ADDRESS, TRAP_PRESENT, TRAP_WRITE,
};
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
    fault_addr: AtomicU32,
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
    fault_addr: AtomicU32::new(0),
};
static TABLE: [Slot; SLOTS] = [FREE; SLOTS];

/// The handler that was there before ours.
struct Previous(libc::sigaction);
// SAFETY: plain data (a function address and flags), written once.
unsafe impl Sync for Previous {}
// SAFETY: as above.
unsafe impl Send for Previous {}
/// By signal, in the order of [`SIGNALS`].
static PREVIOUS: [OnceLock<Result<Previous, i32>>; 3] = [const { OnceLock::new() }; 3];
const SIGNALS: [i32; 3] = [libc::SIGFPE, libc::SIGSEGV, libc::SIGBUS];

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
    pub fault_addr: u32,
    /// Accesses of guest memory may be refused by the host.
    pub accesses: bool,
}

impl Registration {
    /// Makes the handlers watch an arena.
    ///
    /// # Errors
    /// The handler cannot be installed, or too many back ends exist at once.
    pub(super) fn new(w: Watched) -> io::Result<Registration> {
        let signals = if w.accesses { &SIGNALS[..] } else { &SIGNALS[..1] };
        for (&signal, previous) in signals.iter().zip(&PREVIOUS) {
            install(signal, previous)?;
        }
        for (i, slot) in TABLE.iter().enumerate() {
            let free = slot.taken.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed);
            if free.is_err() {
                continue;
            }
            slot.start.store(w.start, Ordering::Relaxed);
            slot.thunk.store(w.thunk, Ordering::Relaxed);
            slot.host_pc.store(w.host_pc, Ordering::Relaxed);
            slot.fault.store(w.fault, Ordering::Relaxed);
            slot.fault_addr.store(w.fault_addr, Ordering::Relaxed);
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

fn install(signal: i32, previous: &OnceLock<Result<Previous, i32>>) -> io::Result<()> {
    let done = previous.get_or_init(|| {
        let mut old = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: all-zero bytes are a valid sigaction; the handler has the SA_SIGINFO signature
        // and is async-signal-safe; both pointers are to live structures.
        unsafe {
            let mut new: libc::sigaction = MaybeUninit::zeroed().assume_init();
            let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_trap;
            new.sa_sigaction = handler as usize;
            new.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
            libc::sigemptyset(&mut new.sa_mask);
            if libc::sigaction(signal, &new, old.as_mut_ptr()) != 0 {
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

extern "C" fn on_trap(sig: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
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
        let (code, addr) = unsafe { ((*info).si_code, (*info).si_addr() as u64) };
        // A signal that somebody has sent means no trap.
        if code <= 0 {
            break;
        }
        let trap = match sig {
            libc::SIGFPE if code == FPE_INTDIV || code == FPE_INTOVF => TRAP_DIVIDE,
            libc::SIGFPE => TRAP_SIMD,
            _ => {
                let error = regs[libc::REG_ERR as usize] as u64;
                let at = env + slot.fault_addr.load(Ordering::Relaxed) as u64;
                // SAFETY: as below.
                unsafe { (at as *mut u64).write(addr) };
                let bit = |on: bool, bit: u32| if on { bit } else { 0 };
                TRAP_ACCESS
                    | bit(error & PF_WRITE != 0, TRAP_WRITE)
                    | bit(sig == libc::SIGSEGV && code == SEGV_ACCERR, TRAP_MAPPED)
                    | bit(sig == libc::SIGBUS, TRAP_BUS)
                    | bit(code == SI_KERNEL, TRAP_NO_ADDRESS)
                    | bit(error & PF_PRESENT != 0, TRAP_PRESENT)
            }
        };
        let host_pc = env + slot.host_pc.load(Ordering::Relaxed) as u64;
        let fault = env + slot.fault.load(Ordering::Relaxed) as u64;
        // SAFETY: only guest code divides, computes or touches guest memory in an arena (thunks do
        // none of it), and while guest code runs RSP is Env - FRAME; the offsets are fields of Env.
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
/// `si_code` of SIGSEGV: the mapping does not allow it.
const SEGV_ACCERR: i32 = 2;
/// `si_code` of #GP.
const SI_KERNEL: i32 = 0x80;
/// Bits of a page fault's error code: there was a page; a write (SDM vol. 3 §4.7).
const PF_PRESENT: u64 = 1;
const PF_WRITE: u64 = 2;

/// Hands the signal to the previous handler, or lets it kill the process.
fn chain(sig: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let known = SIGNALS.iter().position(|&s| s == sig).and_then(|i| PREVIOUS[i].get());
    let old = match known {
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
