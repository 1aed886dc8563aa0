//! Signals: an orderly stop when asked to end, and a terminal that is given back whatever happens.
//!
//! * SIGINT, SIGTERM, SIGHUP: the first one asks the main loop to stop the machine (through an
//!   eventfd); a second one does not wait any longer. Either way the process finally ends by that
//!   signal, as its parent expects.
//! * Signals of a crash: the terminal is restored, then whoever handled the signal before has his
//!   turn (Rust's own handler reports a stack overflow), then the default action.
//! * SIGTSTP from outside: the terminal is the shell's while tandem is stopped, and raw again when
//!   it continues.
//!
//! Accelerators install their own handlers for the signals they live on later and pass on what is
//! not theirs.

use crate::terminal;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};
use vmm_sys_util::eventfd::EventFd;

/// Signals that ask for an end.
const ASK: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];
/// Signals of a crash.
const CRASH: [libc::c_int; 7] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGABRT,
    libc::SIGSYS,
    libc::SIGQUIT,
];

/// The signal that asked for an end; 0 if none has.
static ASKED: AtomicI32 = AtomicI32::new(0);
/// The eventfd to tell, once there is a main loop.
static LISTENER: AtomicI32 = AtomicI32::new(-1);
/// Who handled the signals of a crash before.
static BEFORE: OnceLock<[libc::sigaction; CRASH.len()]> = OnceLock::new();

type Handler = extern "C" fn(libc::c_int);

fn action(handler: Handler, flags: libc::c_int) -> libc::sigaction {
    // SAFETY: sigaction is plain data for which all zeroes is valid (default action, empty mask).
    let mut a: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    a.sa_sigaction = handler as *const () as usize;
    a.sa_flags = flags | libc::SA_ONSTACK;
    a
}

/// Installs the handlers. Call once, first thing in main.
pub fn install() -> io::Result<()> {
    let mut before = Vec::with_capacity(CRASH.len());
    for signal in CRASH {
        before.push(install_one(signal, &action(crashed, 0))?);
    }
    let before: [libc::sigaction; CRASH.len()] =
        before.try_into().map_err(|_| io::Error::other("signals installed twice"))?;
    let _ = BEFORE.set(before);
    for signal in ASK {
        // A signal that the parent chose to ignore (nohup) stays ignored.
        let old = install_one(signal, &action(asked, libc::SA_RESTART))?;
        if old.sa_sigaction == libc::SIG_IGN {
            install_one(signal, &old)?;
        }
    }
    install_one(libc::SIGTSTP, &action(suspended, libc::SA_RESTART))?;
    Ok(())
}

fn install_one(signal: libc::c_int, new: &libc::sigaction) -> io::Result<libc::sigaction> {
    let mut old = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: both structures live through the call; the handlers in `new` are extern "C" functions
    // that restrict themselves to async-signal-safe calls.
    match unsafe { libc::sigaction(signal, new, old.as_mut_ptr()) } {
        // SAFETY: zeroed before, and filled by sigaction.
        0 => Ok(unsafe { old.assume_init() }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Tells `listener` when a signal asks for an end. It must stay open until the process ends.
pub fn listen(listener: &'static EventFd) {
    LISTENER.store(listener.as_raw_fd(), Ordering::Release);
}

/// The signal that asked for an end, if one has.
pub fn asked_to_end() -> Option<libc::c_int> {
    Some(ASKED.load(Ordering::Acquire)).filter(|s| *s != 0)
}

/// Ends the process by `signal`, so that its parent sees why.
pub fn die_by(signal: libc::c_int) -> ! {
    terminal::restore();
    default_action(signal);
    // Only reached if the signal is blocked: the status that a shell would show.
    // SAFETY: _exit takes no memory.
    unsafe { libc::_exit(128 + signal) }
}

/// Restores the default action and raises the signal. Async-signal-safe.
fn default_action(signal: libc::c_int) {
    // SAFETY: all calls are async-signal-safe; the set is initialised before use.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal);
        libc::raise(signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), std::ptr::null_mut());
    }
}

extern "C" fn asked(signal: libc::c_int) {
    let listener = LISTENER.load(Ordering::Acquire);
    let first = ASKED.swap(signal, Ordering::AcqRel) == 0;
    if listener < 0 || !first {
        terminal::restore();
        default_action(signal);
        return;
    }
    let one = 1u64.to_ne_bytes();
    // SAFETY: eight bytes of a live array; write is async-signal-safe and errno is saved around it.
    unsafe {
        let errno = *libc::__errno_location();
        libc::write(listener, one.as_ptr().cast(), one.len());
        *libc::__errno_location() = errno;
    }
}

extern "C" fn crashed(signal: libc::c_int) {
    terminal::restore();
    let before = BEFORE.get().zip(CRASH.iter().position(|s| *s == signal));
    match before.map(|(all, i)| &all[i]) {
        // Returning repeats a faulting instruction, and this time the earlier handler gets it.
        Some(old) if old.sa_sigaction != libc::SIG_DFL && old.sa_sigaction != libc::SIG_IGN => {
            // SAFETY: the structure is one that sigaction itself returned.
            unsafe { libc::sigaction(signal, old, std::ptr::null_mut()) };
        }
        _ => default_action(signal),
    }
}

extern "C" fn suspended(_: libc::c_int) {
    let raw = terminal::is_raw();
    terminal::restore();
    // SAFETY: raise is async-signal-safe; the process stops here until it is continued.
    unsafe { libc::raise(libc::SIGSTOP) };
    if raw {
        terminal::set(true);
    }
}
