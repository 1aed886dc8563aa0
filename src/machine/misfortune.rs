//! A guest that panics, or does not feed its watchdog: what comes of it is the configuration's say.

use super::run_state::RunState;
use super::{Exit, Failure, Machine};
use crate::commands::events::{self, GuestPanicAction, WatchdogExpirationAction};
use crate::commands::run_state::ShutdownCause;
use crate::config::action::{Actions, PanicAction, WatchdogAction};
use tandem_devices::power::Panic;

impl Machine {
    /// What comes of misfortunes.
    pub fn actions(&mut self) -> &mut Actions {
        &mut self.config.actions
    }

    /// Says whether a guest's reset ends the machine.
    pub fn set_no_reboot(&mut self, on: bool) {
        self.config.no_reboot = on;
    }

    /// Says whether a machine that has shut down is kept.
    pub fn set_no_shutdown(&mut self, on: bool) {
        self.config.no_shutdown = on;
    }

    /// The guest tells of its end. Returns how the machine ends, if it does.
    pub(super) fn panicked(&mut self, what: Panic) -> Option<Exit> {
        match what {
            Panic::Shutdown => {
                self.hub.emit(events::GuestPvshutdown {});
                return self.shut_down(ShutdownCause::GuestShutdown, Exit::Done);
            }
            Panic::CrashLoaded => {
                self.hub.emit(events::GuestCrashloaded { action: GuestPanicAction::Run });
                return None;
            }
            Panic::Panicked => {}
        }
        let exit = match self.config.actions.panic {
            PanicAction::None => None,
            PanicAction::Shutdown if !self.config.no_shutdown => Some(Exit::Done),
            PanicAction::ExitFailure => Some(Exit::GuestFailed),
            PanicAction::Pause | PanicAction::Shutdown => {
                self.hub.emit(events::GuestPanicked { action: GuestPanicAction::Pause });
                self.stop(RunState::GuestPanicked);
                return None;
            }
        };
        let action =
            if exit.is_some() { GuestPanicAction::Poweroff } else { GuestPanicAction::Run };
        self.hub.emit(events::GuestPanicked { action });
        if exit.is_some() {
            self.stop(RunState::GuestPanicked);
            self.tell_shutdown(ShutdownCause::GuestPanic);
        }
        exit
    }

    /// The watchdog was not fed. Returns how the machine ends, if it does.
    pub(super) fn watchdog_expired(&mut self) -> Result<Option<Exit>, Failure> {
        use WatchdogExpirationAction as Told;
        let action = self.config.actions.watchdog;
        let told = match action {
            WatchdogAction::Reset => Told::Reset,
            WatchdogAction::Shutdown => Told::Shutdown,
            WatchdogAction::Poweroff => Told::Poweroff,
            WatchdogAction::Pause => Told::Pause,
            WatchdogAction::Debug => Told::Debug,
            WatchdogAction::None => Told::None,
        };
        // Stopping is told first, as QEMU does.
        if action == WatchdogAction::Pause {
            self.stop(RunState::Watchdog);
        }
        self.hub.emit(events::Watchdog { action: told });
        match action {
            WatchdogAction::Reset if self.config.no_reboot => {
                return Ok(self.shut_down(ShutdownCause::GuestReset, Exit::Done));
            }
            WatchdogAction::Reset => self.reset(ShutdownCause::GuestReset)?,
            WatchdogAction::Shutdown => {
                if let Err(e) = self.press_power_button() {
                    log::warn!("the power button cannot be pressed: {e}");
                }
            }
            WatchdogAction::Poweroff => {
                return Ok(self.shut_down(ShutdownCause::GuestShutdown, Exit::Done));
            }
            WatchdogAction::Debug => crate::log::note(&"the guest did not feed its watchdog"),
            WatchdogAction::Pause | WatchdogAction::None => {}
        }
        Ok(None)
    }
}
