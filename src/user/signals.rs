//! Signals: what the program wants done about each, and how the host's reach its threads.
//!
//! ```text
//!   host signal ─► on_signal: kept in the thread's Inbox, bell rung, all others blocked
//!                     │
//!   block boundary, or instead of a system call ─► the thread takes it, builds the program's frame
//!                                                 ([`super::frame`]), unblocks what the program wants
//! ```
//! What always holds:
//!
//! * At most one signal waits in an inbox: the others stay in the kernel, in its order.
//! * The host blocks what the program blocks, but for SIGSEGV, SIGBUS and SIGFPE, which generated code
//!   needs; of these, those that somebody sends wait with the thread ([`super::thread`]).

use super::host;
use std::cell::{Cell, UnsafeCell};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use tandem_tcg::user::{Bell, Process};

/// Number of signals.
pub const SIGNALS: usize = 64;
/// What generated code and helpers need: never blocked, always handled.
pub const KEPT: u64 = bit(libc::SIGSEGV) | bit(libc::SIGBUS) | bit(libc::SIGFPE);
/// What cannot be blocked or handled.
pub const SURE: u64 = bit(libc::SIGKILL) | bit(libc::SIGSTOP);

/// The bit of a signal in a set.
pub const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// `struct sigaction` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Action {
    /// Address, or `SIG_DFL`, `SIG_IGN`.
    pub handler: u64,
    /// `SA_…`.
    pub flags: u64,
    /// Where the handler returns to.
    pub restorer: u64,
    /// Blocked while it runs.
    pub mask: u64,
}

/// `SA_RESTORER`: [`Action::restorer`] is given.
const SA_RESTORER: u64 = 0x0400_0000;
/// `SIG_DFL`.
pub const DEFAULT: u64 = 0;
/// `SIG_IGN`.
pub const IGNORE: u64 = 1;

/// `siginfo_t`.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug)]
pub struct SigInfo(pub [u8; 128]);

impl SigInfo {
    /// A fault of the program.
    pub fn fault(signal: i32, code: i32, addr: u64) -> SigInfo {
        let mut s = SigInfo([0; 128]);
        s.0[..4].copy_from_slice(&signal.to_le_bytes());
        s.0[8..12].copy_from_slice(&code.to_le_bytes());
        s.0[16..24].copy_from_slice(&addr.to_le_bytes());
        s
    }
    /// Its signal.
    pub fn signal(&self) -> i32 {
        i32::from_le_bytes([self.0[0], self.0[1], self.0[2], self.0[3]])
    }
}

/// Where the host's signals reach a thread.
pub struct Inbox {
    /// One waits.
    pub waiting: AtomicBool,
    info: UnsafeCell<SigInfo>,
    bell: Bell,
    process: *const Process,
}

thread_local! {
    /// The inbox of the thread that runs here.
    static INBOX: Cell<*const Inbox> = const { Cell::new(std::ptr::null()) };
}

impl Inbox {
    /// For a thread with this bell.
    pub fn new(bell: Bell, process: &Process) -> Box<Inbox> {
        let info = UnsafeCell::new(SigInfo([0; 128]));
        Box::new(Inbox { waiting: AtomicBool::new(false), info, bell, process })
    }
    /// Makes it this host thread's; returns the one before. It must stay until another one is.
    pub fn enter(this: *const Inbox) -> *const Inbox {
        INBOX.with(|i| i.replace(this))
    }
    /// The signal that waits. All signals stay blocked until [`block`] is called.
    pub fn take(&self) -> Option<SigInfo> {
        if !self.waiting.load(Ordering::Acquire) {
            return None;
        }
        // SAFETY: written by the handler on this thread before `waiting`, and not again before it is
        // clear: the handler blocks all signals but those that it does not keep.
        let info = unsafe { *self.info.get() };
        self.waiting.store(false, Ordering::Release);
        Some(info)
    }
}

extern "C" fn on_signal(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let inbox = INBOX.with(Cell::get);
    let uc = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel passes valid pointers to an SA_SIGINFO handler; an inbox outlives its stay.
    unsafe {
        if KEPT & bit(signal) != 0 && (*info).si_code > 0 {
            // A helper, or our own code: a page may only be protected because code came from it.
            let addr = (*info).si_addr() as u64;
            if inbox.is_null() || !(*(*inbox).process).open(addr) {
                // Once more, and then the default action.
                libc::signal(signal, libc::SIG_DFL);
            }
            return;
        }
        if inbox.is_null() || (*inbox).waiting.load(Ordering::Acquire) {
            return;
        }
        *(*inbox).info.get() = SigInfo(*info.cast::<[u8; 128]>());
        (*inbox).waiting.store(true, Ordering::Release);
        (*inbox).bell.ring();
        let mask: u64 = !KEPT;
        std::ptr::copy_nonoverlapping(&mask, (&raw mut (*uc).uc_sigmask).cast::<u64>(), 1);
        let pc = &mut (*uc).uc_mcontext.gregs[libc::REG_RIP as usize];
        if let Some(instead) = host::instead_of(*pc as u64) {
            *pc = instead as i64;
        }
    }
}

/// What the program wants done about each signal.
pub struct Actions(Mutex<[Action; SIGNALS]>);

impl Actions {
    /// What the process has inherited; the handlers that we need are installed.
    pub fn inherited() -> Actions {
        // The runtime of this program ignores it; the program's own parent did not.
        // SAFETY: the default action of a signal may always be set.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
        let mut all = [Action::default(); SIGNALS];
        for (i, a) in all.iter_mut().enumerate() {
            let signal = i as i32 + 1;
            let now = host_action(signal, None);
            if now.handler == IGNORE {
                a.handler = IGNORE;
            }
            if KEPT & bit(signal) != 0 {
                host_action(signal, Some(handled()));
            }
        }
        Actions(Mutex::new(all))
    }

    /// A copy, for a process that does not share them.
    pub fn copied(&self) -> Actions {
        Actions(Mutex::new(*self.lock()))
    }

    /// Does `f` while nobody changes them.
    pub fn still<R>(&self, f: impl FnOnce() -> R) -> R {
        let _unchanged = self.lock();
        f()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, [Action; SIGNALS]> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// What is done about `signal` (1–64).
    pub fn get(&self, signal: i32) -> Action {
        self.lock()[(signal as usize).wrapping_sub(1) % SIGNALS]
    }

    /// Changes it, for the host too.
    pub fn set(&self, signal: i32, action: Action) {
        let mut all = self.lock();
        all[(signal as usize).wrapping_sub(1) % SIGNALS] = action;
        if KEPT & bit(signal) != 0 {
            return;
        }
        let host = match action.handler {
            DEFAULT | IGNORE => {
                // SA_NOCLDSTOP and SA_NOCLDWAIT concern the kernel.
                Action { handler: action.handler, flags: action.flags & 3, ..Action::default() }
            }
            _ => {
                let h = handled();
                Action { flags: h.flags | action.flags & 3, ..h }
            }
        };
        host_action(signal, Some(host));
    }
}

/// How a signal is handled here: without SA_RESTART, because whether a call is to begin again is
/// decided for the program ([`super::syscall`]).
fn handled() -> Action {
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_signal;
    Action {
        handler: handler as usize as u64,
        flags: libc::SA_SIGINFO as u64 | SA_RESTORER,
        restorer: host::restorer() as u64,
        mask: !KEPT,
    }
}

/// Sets what the host does about `signal`; returns what it did.
fn host_action(signal: i32, new: Option<Action>) -> Action {
    let mut old = Action::default();
    let new = new.as_ref().map_or(0, |a| std::ptr::from_ref(a) as u64);
    // SAFETY: both point to a kernel `struct sigaction`; the handler is async-signal-safe. The C
    // library refuses to change the two signals that it uses, which the program's own needs.
    unsafe {
        host::syscall(libc::SYS_rt_sigaction, [signal as u64, new, &raw mut old as u64, 8, 0, 0])
    };
    old
}

/// Has the host block what the program blocks; returns what was blocked.
pub fn block(mask: u64) -> u64 {
    let (mask, mut old) = (mask & !KEPT, 0u64);
    // SAFETY: both are signal sets of 8 bytes.
    unsafe {
        host::syscall(
            libc::SYS_rt_sigprocmask,
            [libc::SIG_SETMASK as u64, &raw const mask as u64, &raw mut old as u64, 8, 0, 0],
        )
    };
    old
}

/// Ends the process by `signal`, as the program would end.
pub fn die(signal: i32) -> ! {
    host_action(signal, Some(Action::default()));
    // SAFETY: the thread is to end.
    unsafe {
        libc::kill(libc::getpid(), signal);
        block(!bit(signal));
        // It was blocked until here, or does not end a process.
        libc::_exit(128 + signal)
    }
}

/// Whether `signal` without a handler ends the process.
pub fn ends(signal: i32) -> bool {
    !matches!(
        signal,
        libc::SIGCHLD
            | libc::SIGCONT
            | libc::SIGURG
            | libc::SIGWINCH
            | libc::SIGSTOP
            | libc::SIGTSTP
            | libc::SIGTTIN
            | libc::SIGTTOU
    )
}

/// A signal's name.
pub fn name(signal: i32) -> &'static str {
    match signal {
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGILL => "SIGILL",
        libc::SIGTRAP => "SIGTRAP",
        _ => "a signal",
    }
}
