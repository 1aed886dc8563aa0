//! Events: what clients are told without asking.

use super::dump::DumpQueryResult;
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
    /// A dump of guest memory has ended.
    DumpCompleted = "DUMP_COMPLETED" {
        /// How it has ended.
        result: DumpQueryResult,
        /// Why it failed.
        error: Option<String>,
    }
    /// A device has left the machine.
    DeviceDeleted = "DEVICE_DELETED" {
        /// Its name.
        device: Option<String>,
        /// Its path in the tree of objects.
        path: String,
    }
    /// The guest keeps a device that it was asked to let go of.
    DeviceUnplugGuestError = "DEVICE_UNPLUG_GUEST_ERROR" {
        /// Its name.
        device: Option<String>,
        /// Its path in the tree of objects.
        path: String,
    }
}
