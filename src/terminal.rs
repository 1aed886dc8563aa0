//! The user's terminal while it is the guest's serial port: raw mode, restored on every way out, and
//! the escape key.
//!
//! There is one controlling terminal per process, so its saved modes are process-wide. [`restore`]
//! is async-signal-safe: the handlers in [`crate::signals`], the panic hook and [`RawMode`]'s drop
//! all end in it, and calling it twice is harmless.

use std::io;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

const STDIN: libc::c_int = 0;

/// The two modes of the terminal. Leaked once, so that a signal handler may look at any time.
struct Modes {
    cooked: libc::termios,
    raw: libc::termios,
}

static MODES: AtomicPtr<Modes> = AtomicPtr::new(std::ptr::null_mut());
static IS_RAW: AtomicBool = AtomicBool::new(false);

/// Whether standard input is a terminal.
pub fn is_terminal() -> bool {
    // SAFETY: no memory is passed.
    unsafe { libc::isatty(STDIN) == 1 }
}

/// Raw mode, until dropped.
pub struct RawMode(());

impl RawMode {
    /// Puts the terminal into raw mode: every key goes to the guest, nothing is echoed. Output
    /// processing stays on, so that messages of ours still start at the left margin.
    pub fn enter() -> io::Result<RawMode> {
        let mut modes = MaybeUninit::<libc::termios>::uninit();
        // SAFETY: tcgetattr fills the structure it is given, or fails.
        if unsafe { libc::tcgetattr(STDIN, modes.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: tcgetattr succeeded, so all of it is initialised.
        let cooked = unsafe { modes.assume_init() };
        let mut raw = cooked;
        // SAFETY: cfmakeraw only writes the structure it is given.
        unsafe { libc::cfmakeraw(&mut raw) };
        raw.c_oflag = cooked.c_oflag;
        let modes = Box::into_raw(Box::new(Modes { cooked, raw }));
        MODES.store(modes, Ordering::Release);
        set(true);
        Ok(RawMode(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal back as it was. Async-signal-safe.
pub fn restore() {
    if IS_RAW.load(Ordering::Acquire) {
        set(false);
    }
}

/// Whether the terminal is in raw mode now.
pub fn is_raw() -> bool {
    IS_RAW.load(Ordering::Acquire)
}

/// Switches the modes. Async-signal-safe.
pub fn set(raw: bool) {
    let modes = MODES.load(Ordering::Acquire);
    if modes.is_null() {
        return;
    }
    // SAFETY: a non-null pointer in MODES comes from Box::into_raw in `enter` and is never freed.
    let modes = unsafe { &*modes };
    let mode = if raw { &modes.raw } else { &modes.cooked };
    // SAFETY: sigset_t and termios are plain data that live through the calls, all of which are
    // async-signal-safe. SIGTTOU is blocked because a background process that changes modes would
    // be stopped in the middle of its way out.
    unsafe {
        let mut ttou = MaybeUninit::<libc::sigset_t>::uninit();
        let mut before = MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigemptyset(ttou.as_mut_ptr());
        libc::sigaddset(ttou.as_mut_ptr(), libc::SIGTTOU);
        libc::pthread_sigmask(libc::SIG_BLOCK, ttou.as_ptr(), before.as_mut_ptr());
        libc::tcsetattr(STDIN, libc::TCSANOW, mode);
        libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut());
    }
    IS_RAW.store(raw, Ordering::Release);
}

/// What a key means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Key {
    /// The guest gets this byte.
    Guest(u8),
    /// Quit.
    Quit,
    /// Show the keys.
    Help,
    /// Send a break.
    Break,
}

/// The escape key, Ctrl-A.
const ESCAPE: u8 = 0x01;

/// What Ctrl-A h shows.
pub const HELP: &str = "\nCtrl-A x  quit\nCtrl-A b  send a break\nCtrl-A h  this help\n\
                        Ctrl-A Ctrl-A  send Ctrl-A\n";

/// Recognises keys that follow the escape key.
#[derive(Default)]
pub struct EscapeKeys {
    escaped: bool,
}

impl EscapeKeys {
    /// The meaning of the next byte; `None` if it awaits another, or means nothing after the escape
    /// key.
    pub fn key(&mut self, byte: u8) -> Option<Key> {
        if !std::mem::take(&mut self.escaped) {
            self.escaped = byte == ESCAPE;
            return (byte != ESCAPE).then_some(Key::Guest(byte));
        }
        match byte {
            b'x' | b'X' => Some(Key::Quit),
            b'h' | b'H' | b'?' => Some(Key::Help),
            b'b' | b'B' => Some(Key::Break),
            ESCAPE => Some(Key::Guest(ESCAPE)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_after_the_escape_key() {
        let mut e = EscapeKeys::default();
        let keys: Vec<Key> =
            b"a\x01h\x01\x01x\x01bz\x01qx\x01x".iter().filter_map(|b| e.key(*b)).collect();
        use Key::*;
        assert_eq!(
            keys,
            [Guest(b'a'), Help, Guest(1), Guest(b'x'), Break, Guest(b'z'), Guest(b'x'), Quit]
        );
    }
}
