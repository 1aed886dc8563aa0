//! The run state and its arrows.
//!
//! ```text
//!                start                      stop
//!   Prelaunch ─────────► Running ◄───────────────────► Paused
//!       ▲                 │   │         start
//!       │ reset           │   └─ the guest turns off (no_shutdown), accelerator error
//!       │                 ▼      (no_shutdown)
//!       └──────── Shutdown, InternalError             (not started again without a reset)
//!   Running ──► GuestPanicked, Watchdog                (as Paused, with the reason)
//! ```
//!
//! Only the main loop's thread moves along an arrow. While the state is not `Running`, every vCPU
//! is paused and guest time stands still. An arrow is told to all monitors before whoever asked for
//! it is answered.

use super::inbox::Event;
use super::{Exit, Failure, Machine};
use crate::commands::events;
use crate::commands::run_state::ShutdownCause;
use crate::qapi;
use tandem_accel::vcpu::{StopReason, VcpuHandle};

/// What a machine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// Built, or reset while it did not run; not started.
    Prelaunch,
    /// The guest runs.
    Running,
    /// Stopped by a user.
    Paused,
    /// The guest has shut down.
    Shutdown,
    /// The accelerator cannot go on.
    InternalError,
    /// The guest has panicked.
    GuestPanicked,
    /// The guest did not feed its watchdog.
    Watchdog,
}

impl RunState {
    /// Whether it can only go on after a reset.
    pub fn needs_reset(self) -> bool {
        matches!(self, RunState::Shutdown | RunState::InternalError)
    }
}

impl Machine {
    /// The present state.
    pub fn run_state(&self) -> RunState {
        self.state
    }

    /// Lets the guest run, or run on.
    pub fn start(&mut self) {
        if self.state == RunState::Running || self.state.needs_reset() {
            return;
        }
        self.state = RunState::Running;
        self.hub.emit(events::Resume {});
        self.accel.clock().resume();
        self.vcpus.iter().for_each(VcpuHandle::resume);
    }

    /// Stops the guest, if it runs; the state is `why` afterwards.
    pub fn stop(&mut self, why: RunState) {
        if self.state == RunState::Running {
            self.pause_vcpus();
            self.accel.clock().pause();
            self.state = why;
            self.hub.emit(events::Stop {});
        } else if !self.state.needs_reset() && why.needs_reset() {
            self.state = why;
        }
    }

    pub(super) fn pause_vcpus(&self) {
        self.vcpus.iter().for_each(VcpuHandle::pause);
        self.vcpus.iter().for_each(VcpuHandle::wait_not_running);
    }

    /// Tells everybody that the machine shuts down.
    pub fn tell_shutdown(&self, reason: ShutdownCause) {
        self.hub.emit(events::Shutdown { guest: reason.is_guest(), reason });
    }

    /// The guest is at its end: the machine ends with `exit`, or is kept as it is.
    pub fn shut_down(&mut self, reason: ShutdownCause, exit: Exit) -> Option<Exit> {
        self.tell_shutdown(reason);
        if !self.config.no_shutdown {
            return Some(exit);
        }
        self.stop(RunState::Shutdown);
        None
    }

    /// RESET of the whole machine, in place. It goes on if it ran.
    pub fn reset(&mut self, reason: ShutdownCause) -> Result<(), Failure> {
        self.pause_vcpus();
        // What was asked before the vCPUs stopped concerns a machine that is no more.
        self.batch.extend(self.inbox.take());
        self.batch.retain(|event| {
            !matches!(event, Event::Power(_) | Event::Stopped(_, StopReason::TripleFault))
        });
        if let Some(guest) = &self.guest {
            guest.board.reset();
            self.accel.reset().map_err(Failure::Accelerator)?;
            let first = guest.load(&self.memory)?;
            for (i, vcpu) in self.vcpus.iter().enumerate() {
                let state = guest.processors.initial_state(i, &first);
                vcpu.set_state(state).map_err(Failure::Accelerator)?;
            }
        }
        self.hub.emit(events::Reset { guest: reason.is_guest(), reason });
        match self.state {
            RunState::Running => self.vcpus.iter().for_each(VcpuHandle::resume),
            _ => self.state = RunState::Prelaunch,
        }
        Ok(())
    }

    /// Presses the power button.
    pub fn press_power_button(&mut self) -> qapi::Result<()> {
        self.hub.emit(events::Powerdown {});
        if let Some(guest) = &self.guest {
            guest.board.press_power_button();
        }
        Ok(())
    }
}
