//! Events: what clients are told without asking.

use super::dump::DumpQueryResult;
use super::run_state::ShutdownCause;

crate::choice! {
    /// What comes of a guest's panic.
    pub enum GuestPanicAction {
        /// The machine is stopped.
        Pause = "pause",
        /// The machine ends.
        Poweroff = "poweroff",
        /// Nothing.
        Run = "run",
    }
    /// What comes of a watchdog that is not fed.
    pub enum WatchdogExpirationAction {
        /// The machine is reset.
        Reset = "reset",
        /// The power button is pressed.
        Shutdown = "shutdown",
        /// The machine ends.
        Poweroff = "poweroff",
        /// The machine is stopped.
        Pause = "pause",
        /// A message.
        Debug = "debug",
        /// Nothing.
        None = "none",
    }
}

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
    /// The guest has panicked.
    GuestPanicked = "GUEST_PANICKED" {
        /// What comes of it.
        action: GuestPanicAction,
    }
    /// The guest has panicked, and its crash kernel takes over.
    GuestCrashloaded = "GUEST_CRASHLOADED" {
        /// What comes of it.
        action: GuestPanicAction,
    }
    /// The guest tells through pvpanic that it has shut down.
    GuestPvshutdown = "GUEST_PVSHUTDOWN" {}
    /// The guest did not feed its watchdog.
    Watchdog = "WATCHDOG" {
        /// What comes of it.
        action: WatchdogExpirationAction,
    }
    /// A dump of guest memory has ended.
    DumpCompleted = "DUMP_COMPLETED" {
        /// How it has ended.
        result: DumpQueryResult,
        /// Why it failed.
        error: Option<String>,
    }
    /// A tray was opened or closed, by the guest or from outside.
    DeviceTrayMoved = "DEVICE_TRAY_MOVED" {
        /// Name of the drive; empty if the device was made for none.
        device: String,
        /// Id of the device.
        id: String,
        /// It is open now.
        tray_open: bool,
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
