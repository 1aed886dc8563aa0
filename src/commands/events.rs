//! Events: what clients are told without asking.

use super::run_state::ShutdownCause;

crate::events! {
    /// The guest shuts down, or is shut down from outside.
    Shutdown = "SHUTDOWN" {
        /// The guest asked for it.
        guest: bool,
        /// Why.
        reason: ShutdownCause,
    }
    /// The power button was pressed.
    Powerdown = "POWERDOWN" {}
    /// The machine was reset.
    Reset = "RESET" {
        /// The guest asked for it.
        guest: bool,
        /// Why.
        reason: ShutdownCause,
    }
    /// The processors were stopped.
    Stop = "STOP" {}
    /// The processors run again.
    Resume = "RESUME" {}
}
