//! Exit statuses of `tandem run`.
//!
//! A guest chooses odd statuses through isa-debug-exit: writing `v` exits with `(v << 1) | 1`. All
//! statuses of tandem's own are even, so that the two cannot be confused.

use std::process::ExitCode;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest powered off, or reset under `--no-reboot`, or the user quit.
    Done,
    /// The guest wrote to isa-debug-exit; this is the status.
    Debug(u8),
    /// Bad usage: the command line or the machine it describes.
    Usage,
    /// A vCPU of the guest stopped by a triple fault.
    TripleFault,
    /// The guest has panicked, and that was to be told by the status.
    GuestFailed,
    /// The accelerator could not be set up or could not go on.
    Accelerator,
    /// The host refused something else that the machine needs.
    Host,
    /// A bug in tandem.
    Bug,
    /// What the process in the background ended with.
    Of(u8),
}

impl Exit {
    /// The process's exit status.
    pub fn status(self) -> u8 {
        match self {
            Exit::Done => 0,
            Exit::Debug(s) | Exit::Of(s) => s,
            Exit::Usage => 2,
            Exit::TripleFault | Exit::GuestFailed => 4,
            Exit::Accelerator => 6,
            Exit::Host => 8,
            Exit::Bug => 10,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(e: Exit) -> ExitCode {
        ExitCode::from(e.status())
    }
}

/// The table of exit statuses, for the help text.
pub const HELP: &str = "Exit status:
   0      the guest powered off (or reset under --no-reboot), or the user quit with Ctrl-A x
   odd    the guest wrote v to isa-debug-exit: (v << 1) | 1
   2      bad usage; every fault is listed
   4      the guest triple-faulted, or panicked under --action panic=exit-failure
   6      the accelerator could not be set up or could not go on
   8      the host refused a file, a thread or memory
  10      a bug in tandem
SIGINT, SIGTERM and SIGHUP stop the machine in an orderly way and then end tandem by that signal.

Keys while the terminal is the guest's serial port:
  Ctrl-A x quit, Ctrl-A b send a break, Ctrl-A Ctrl-A send Ctrl-A, Ctrl-A h help";
