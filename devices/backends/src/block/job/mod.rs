//! Jobs: long work on images while a guest uses them.
//!
//! ```text
//!   main loop ── Control: pause, speed, cancel, complete ──►  thread: backup | mirror | commit | stream
//!             ◄─ Notice: paused, ready, error, ended ───────      │ reads and writes images
//!                                                                 │
//!   guest's requests ──► Drive ──► Witness (backup, mirror, stream) ◄┘  what changes meanwhile
//! ```
//!
//! Each kind has a constructor that installs what must see the guest's changes, a `run` for a thread
//! of its own, and what the main loop does in the end, alone in the drive's gate.
//!
//! What always holds:
//!
//! * A job never holds a claim on a range while it waits for the guest, so neither stops the other
//!   for longer than a piece takes to copy.
//! * A job that fails or is cancelled leaves the guest's disk as it is.
//! * Errors are judged by the policy that the job was given ([`OnError`]).

pub mod backup;
mod claims;
pub mod commit;
mod control;
mod copy;
mod dirty;
pub mod mirror;
pub mod stream;
#[cfg(test)]
mod tests;

pub use control::{Action, Control, Notice, OnError, Progress, Side};
pub use copy::depth_above;

use super::error::Error;

/// How the work of a job ended that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It is done.
    Done,
    /// Somebody cancelled it.
    Cancelled,
}

/// Why work stops before its end.
#[derive(Debug)]
pub enum Halt {
    /// Somebody cancelled it.
    Cancelled,
    /// It cannot go on.
    Failed(Error),
    /// What was tried last is to be tried again after the next checkpoint.
    Again,
}

impl From<Error> for Halt {
    fn from(e: Error) -> Halt {
        Halt::Failed(e)
    }
}

/// How work fared, with cancelling as an end like others.
pub fn ending(result: Result<(), Halt>) -> Result<Ending, Error> {
    match result {
        Ok(()) => Ok(Ending::Done),
        Err(Halt::Cancelled | Halt::Again) => Ok(Ending::Cancelled),
        Err(Halt::Failed(e)) => Err(e),
    }
}
