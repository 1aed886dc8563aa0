//! Run state: stop, go on, reset, power button, quit.

use super::events::WatchdogExpirationAction;
use crate::config::action;
use crate::machine::inbox::Event;
use crate::machine::{Machine, run_state::RunState};
use crate::qapi::define::Nothing;
use crate::qapi::{Error, Result};

crate::choice! {
    /// Why a machine shuts down or is reset.
    pub enum ShutdownCause {
        /// An error of the host.
        HostError = "host-error",
        /// `quit`.
        HostQmpQuit = "host-qmp-quit",
        /// `system_reset`.
        HostQmpSystemReset = "host-qmp-system-reset",
        /// A signal.
        HostSignal = "host-signal",
        /// The user.
        HostUi = "host-ui",
        /// The guest turned the machine off.
        GuestShutdown = "guest-shutdown",
        /// The guest reset the machine, and resets are shut-downs here.
        GuestReset = "guest-reset",
        /// A processor of the guest triple-faulted.
        GuestPanic = "guest-panic",
    }
}

impl ShutdownCause {
    /// Whether the guest asked for it.
    pub fn is_guest(self) -> bool {
        use ShutdownCause::*;
        matches!(self, GuestShutdown | GuestReset | GuestPanic)
    }
}

crate::choice! {
    /// What a machine does.
    pub enum Status {
        /// The guest has panicked.
        GuestPanicked = "guest-panicked",
        /// It cannot go on; only a reset helps.
        InternalError = "internal-error",
        /// It was stopped by a user.
        Paused = "paused",
        /// It was built and has not been started.
        Prelaunch = "prelaunch",
        /// The guest runs.
        Running = "running",
        /// The guest has shut down; only a reset helps.
        Shutdown = "shutdown",
        /// The guest did not feed its watchdog.
        Watchdog = "watchdog",
    }
}

impl From<RunState> for Status {
    fn from(s: RunState) -> Status {
        match s {
            RunState::Prelaunch => Status::Prelaunch,
            RunState::Running => Status::Running,
            RunState::Paused => Status::Paused,
            RunState::Shutdown => Status::Shutdown,
            RunState::InternalError => Status::InternalError,
            RunState::GuestPanicked => Status::GuestPanicked,
            RunState::Watchdog => Status::Watchdog,
        }
    }
}

crate::object! {
    /// What a machine does.
    pub struct StatusInfo {
        /// Whether the guest runs.
        running: bool,
        /// What it does.
        status: Status,
    }
}

/// What the machine does now.
pub fn status(vm: &Machine) -> StatusInfo {
    let state = vm.run_state();
    StatusInfo { running: state == RunState::Running, status: state.into() }
}

crate::choice! {
    /// What comes of a guest's reset.
    pub enum RebootAction {
        /// It is done.
        Reset = "reset",
        /// The machine ends.
        Shutdown = "shutdown",
    }
    /// What comes of a guest that shuts down.
    pub enum ShutdownAction {
        /// The machine ends.
        Poweroff = "poweroff",
        /// The machine is stopped, and kept.
        Pause = "pause",
    }
    /// What comes of a guest's panic.
    pub enum PanicAction {
        /// The machine is stopped, and kept.
        Pause = "pause",
        /// The machine ends.
        Shutdown = "shutdown",
        /// The machine ends, with an exit status that tells of it.
        ExitFailure = "exit-failure",
        /// Nothing.
        None = "none",
    }
}

fn set_action(
    vm: &mut Machine,
    reboot: Option<RebootAction>,
    shutdown: Option<ShutdownAction>,
    panic: Option<PanicAction>,
    watchdog: Option<WatchdogExpirationAction>,
) {
    if let Some(r) = reboot {
        vm.set_no_reboot(r == RebootAction::Shutdown);
    }
    if let Some(s) = shutdown {
        vm.set_no_shutdown(s == ShutdownAction::Pause);
    }
    let actions = vm.actions();
    if let Some(p) = panic {
        actions.panic = match p {
            PanicAction::Pause => action::PanicAction::Pause,
            PanicAction::Shutdown => action::PanicAction::Shutdown,
            PanicAction::ExitFailure => action::PanicAction::ExitFailure,
            PanicAction::None => action::PanicAction::None,
        };
    }
    if let Some(w) = watchdog {
        use WatchdogExpirationAction as Told;
        use action::WatchdogAction as Does;
        actions.watchdog = match w {
            Told::Reset => Does::Reset,
            Told::Shutdown => Does::Shutdown,
            Told::Poweroff => Does::Poweroff,
            Told::Pause => Does::Pause,
            Told::Debug => Does::Debug,
            Told::None => Does::None,
        };
    }
}

fn cont(vm: &mut Machine) -> Result<()> {
    if vm.run_state().needs_reset() {
        return Err(Error::new("Resetting the Virtual Machine is required"));
    }
    vm.start();
    Ok(())
}

fn powerdown(vm: &mut Machine) -> Result<()> {
    vm.press_power_button()
}

crate::commands! {
    /// Tells what the machine does.
    fn "query-status"(cx) -> StatusInfo { Ok(status(cx.vm)) }

    /// Stops the guest's processors and time. Does nothing if they are stopped.
    fn "stop"(cx) -> Nothing {
        cx.vm.stop(RunState::Paused);
        Ok(Nothing {})
    }

    /// Lets the guest go on, or start. Does nothing if it runs.
    fn "cont"(cx) -> Nothing { cont(cx.vm).map(|()| Nothing {}) }

    /// Resets the machine.
    fn "system_reset"(cx) -> Nothing {
        Ok(cx.vm.reset(ShutdownCause::HostQmpSystemReset).map(|()| Nothing {})?)
    }

    /// Presses the power button. What comes of it is the guest's decision.
    fn "system_powerdown"(cx) -> Nothing { powerdown(cx.vm).map(|()| Nothing {}) }

    /// Says what comes of a watchdog that is not fed.
    fn "watchdog-set-action"(cx, {
        /// What.
        action: WatchdogExpirationAction,
    }) -> Nothing {
        set_action(cx.vm, None, None, None, Some(action));
        Ok(Nothing {})
    }

    /// Says what comes of what a guest does.
    fn "set-action"(cx, {
        /// Of a reset.
        reboot: Option<RebootAction>,
        /// Of a shut-down.
        shutdown: Option<ShutdownAction>,
        /// Of a panic.
        panic: Option<PanicAction>,
        /// Of a watchdog that is not fed.
        watchdog: Option<WatchdogExpirationAction>,
    }) -> Nothing {
        set_action(cx.vm, reboot, shutdown, panic, watchdog);
        Ok(Nothing {})
    }

    /// Ends the virtual machine monitor without asking the guest.
    fn "quit"(cx) -> Nothing {
        cx.vm.inbox().post(Event::Quit(ShutdownCause::HostQmpQuit));
        Ok(Nothing {})
    }
}
