//! What a device asks of the machine about power: off, reset, sleep, an exit for tests.
//!
//! A request only records the wish and returns; the machine acts on it from its own thread, so a
//! device may call with its lock held and the guest may run a few more instructions.

use std::fmt;

/// A guest's request about the whole machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PowerRequest {
    /// ACPI S5, or what else turns the machine off.
    Off,
    /// Reset of the whole machine.
    Reset(ResetCause),
    /// isa-debug-exit: end the virtual machine monitor with this exit status (of which a process
    /// keeps the low 8 bits).
    DebugExit(u32),
    /// A sleep state that the machine does not offer; it stays up.
    Refused(SleepState),
    /// The guest's system tells of its end.
    Panicked(Panic),
    /// A watchdog was not fed in time.
    Watchdog,
}

/// What a guest tells through pvpanic.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Panic {
    /// It has panicked.
    Panicked,
    /// It has panicked, and a system that it had loaded for that case takes over.
    CrashLoaded,
    /// It has shut down.
    Shutdown,
}

/// What pulled the reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ResetCause {
    /// The reset control register, port CF9h.
    ResetControl,
    /// The keyboard controller's pulse command (FEh).
    KeyboardController,
    /// Port 92h, bit 0.
    Port92,
}

/// Sleep states other than S5 (ACPI 6.4 §16.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SleepState {
    /// Suspend to RAM.
    S3,
    /// Hibernate.
    S4,
    /// A SLP_TYP value that means nothing here.
    Unknown(u8),
}

impl fmt::Display for SleepState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SleepState::S3 => f.write_str("S3"),
            SleepState::S4 => f.write_str("S4"),
            SleepState::Unknown(t) => write!(f, "sleep type {t}"),
        }
    }
}

/// What a guest did that whoever manages the machine is told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum News {
    /// A tray was opened or closed.
    TrayMoved {
        /// The drive in it, by the name that it was given; empty if none.
        drive: String,
        /// The device's id; empty if it has none.
        id: String,
        /// It is open now.
        open: bool,
    },
}

/// The machine's ear for power requests. Never blocks; callable from any thread.
pub trait PowerSink: Send + Sync {
    /// Takes one request.
    fn request(&self, request: PowerRequest);
    /// Takes news, on which nothing depends; who manages no machine need not listen.
    fn tell(&self, news: News) {
        log::debug!("{news:?}");
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use std::sync::Mutex;

    /// Records what was asked.
    #[derive(Default)]
    pub(crate) struct Recorder(pub(crate) Mutex<Vec<PowerRequest>>);

    impl PowerSink for Recorder {
        fn request(&self, request: PowerRequest) {
            self.0.lock().unwrap().push(request);
        }
    }
}
