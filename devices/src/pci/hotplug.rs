//! The slot of a port into which a device can be put, and from which it can be taken, while the
//! machine runs (PCIe 5.0 §6.7, §7.5.3.9 to §7.5.3.11): presence, an attention button, two
//! indicators, and a power controller.
//!
//! ```text
//!   insert ─► present, button ─────────► system turns power on  ─► link up ─► it scans the bus
//!   request_removal ─► button ─► system lets go, turns power off ─► device gone ─► Outcome::Removed
//!                              └► or turns the blinking indicator back on  ─────► Outcome::Refused
//! ```
//!
//! What always holds:
//!
//! * The bus behind the port answers exactly while a device is present and has power (link up). A
//!   device without power is in reset.
//! * A device leaves only when it was asked for and has no power, thus when the system has let go
//!   of it, or at a reset of the machine.
//! * Commands take effect at once, so there is no Command Completed event (NCCS).
//! * Lock order: slot → function → decoder, and slot → device, whose reset may wait for the host.

use super::bus::Bus;
use super::config::CONFIG_SIZE;
use super::{Function, FunctionSpec, Intx, Msi};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Registers, from the PCI Express capability.
const FLAGS: u16 = 0x02;
const LINK_CAPABILITIES: u16 = 0x0c;
const LINK_STATUS: u16 = 0x12;
const SLOT_CAPABILITIES: u16 = 0x14;
const SLOT_CONTROL: u16 = 0x18;
const SLOT_STATUS: u16 = 0x1a;

/// In the capability's flags: there is a slot.
const SLOT_IMPLEMENTED: u16 = 1 << 8;
/// In the link's capabilities and status: it tells whether it is up.
const LINK_REPORTS: u32 = 1 << 20;
const LINK_UP: u16 = 1 << 13;

/// Slot capabilities: attention button, power controller, both indicators, hot-plug, no Command
/// Completed events.
const CAPABILITIES: u32 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 18;
const NUMBER_SHIFT: u32 = 19;

/// Slot control. Events have the same bits in control and status but for the link's.
mod control {
    pub const EVENTS: u16 = 0x1f;
    pub const INTERRUPT: u16 = 1 << 5;
    pub const POWER_INDICATOR: u16 = 3 << 8;
    pub const INDICATOR_ON: u16 = 1 << 8;
    pub const INDICATOR_BLINK: u16 = 2 << 8;
    pub const INDICATOR_OFF: u16 = 3 << 8;
    pub const POWER_OFF: u16 = 1 << 10;
    pub const LINK_EVENT: u16 = 1 << 12;
    /// What software may write: enables, indicators, power.
    pub const WRITABLE: u16 =
        EVENTS | INTERRUPT | 3 << 6 | POWER_INDICATOR | POWER_OFF | LINK_EVENT;
}

/// Slot status.
mod status {
    pub const BUTTON: u16 = 1 << 0;
    pub const PRESENCE_CHANGED: u16 = 1 << 3;
    pub const PRESENT: u16 = 1 << 6;
    pub const LINK_CHANGED: u16 = 1 << 8;
    /// Events, cleared by writing ones.
    pub const EVENTS: u16 = 0x1f | LINK_CHANGED;
}

/// What became of a request to remove a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It is gone.
    Removed,
    /// The guest keeps it.
    Refused,
}

/// Why no removal can be asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unwilling {
    /// The guest is busy with the slot: the power indicator blinks.
    #[error("the guest is busy with the slot (its power indicator blinks); try again")]
    Busy,
    /// A removal has been asked for already.
    #[error("the device is already in the process of unplug")]
    Pending,
}

/// How long a guest may take to react to the button before it may be pressed again. Systems wait
/// 5 s after the button, in which a second press would mean the opposite.
const PATIENCE: Duration = Duration::from_secs(6);

/// Told once, on any thread, without a lock of the slot's user.
pub type Answer = Box<dyn FnOnce(Outcome) + Send>;

#[derive(Default)]
struct State {
    /// Who is to be told of the removal that was asked for.
    removal: Option<(Answer, Instant)>,
    /// Some enabled event is there.
    signalled: bool,
}

/// The slot of a port. Its registers are in the port's [`Function`], which every call names.
pub struct HotplugSlot {
    behind: Arc<Bus>,
    /// Offset of the PCI Express capability.
    cap: u16,
    msi: Arc<Msi>,
    intx: Arc<Intx>,
    state: Mutex<State>,
}

impl HotplugSlot {
    /// Adds the slot's registers to a port with the PCI Express capability at `cap`. `behind` is the
    /// bus that the port leads to, `number` the slot's name for people (13 bits).
    pub fn new(
        spec: &mut FunctionSpec,
        cap: u16,
        number: u16,
        behind: &Arc<Bus>,
        msi: Arc<Msi>,
        intx: Arc<Intx>,
    ) -> HotplugSlot {
        let c = spec.config();
        let flags = c.u16(cap + FLAGS) | SLOT_IMPLEMENTED;
        c.preset(cap + FLAGS, &flags.to_le_bytes());
        let link = c.u32(cap + LINK_CAPABILITIES) | LINK_REPORTS;
        c.preset(cap + LINK_CAPABILITIES, &link.to_le_bytes());
        let slot = CAPABILITIES | u32::from(number) << NUMBER_SHIFT;
        c.preset(cap + SLOT_CAPABILITIES, &slot.to_le_bytes());
        c.allow(cap + SLOT_CONTROL, &control::WRITABLE.to_le_bytes());
        c.allow_clear(cap + SLOT_STATUS, &status::EVENTS.to_le_bytes());
        HotplugSlot { behind: behind.clone(), cap, msi, intx, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn control(&self, f: &Function) -> u16 {
        f.u32(self.cap + SLOT_CONTROL) as u16
    }

    fn status(&self, f: &Function) -> u16 {
        (f.u32(self.cap + SLOT_CONTROL) >> 16) as u16
    }

    fn raise(&self, f: &Function, events: u16) {
        f.poke(self.cap + SLOT_STATUS, &(self.status(f) | events).to_le_bytes());
    }

    fn set_present(&self, f: &Function, present: bool) {
        let old = self.status(f) & !status::PRESENT;
        let new = old | if present { status::PRESENT } else { 0 };
        f.poke(self.cap + SLOT_STATUS, &new.to_le_bytes());
    }

    fn set_link(&self, f: &Function, up: bool) {
        self.behind.set_link(up);
        let old = f.u32(self.cap + LINK_STATUS) as u16 & !LINK_UP;
        let new = old | if up { LINK_UP } else { 0 };
        f.poke(self.cap + LINK_STATUS, &new.to_le_bytes());
    }

    /// Interrupts, or stops it, as events and their enables say (§6.7.3.4).
    fn signal(&self, f: &Function, s: &mut State) {
        let (c, st) = (self.control(f), self.status(f));
        let events = st & c & control::EVENTS != 0
            || st & status::LINK_CHANGED != 0 && c & control::LINK_EVENT != 0;
        let now = events && c & control::INTERRUPT != 0;
        let msi = self.msi.enabled();
        self.intx.set(now && !msi);
        if msi && now && !s.signalled {
            self.msi.notify(0);
        }
        s.signalled = now;
    }

    /// The state after power-on of the machine: what is in the slot has power. A removal that was
    /// asked for is done.
    pub fn reset(&self, f: &Function) {
        let mut s = self.lock();
        let answer = s.removal.take();
        if answer.is_some() {
            self.behind.detach_all();
        }
        let present = !self.behind.devices().is_empty();
        let c = if present {
            control::INDICATOR_ON
        } else {
            control::INDICATOR_OFF | control::POWER_OFF
        };
        f.poke(self.cap + SLOT_CONTROL, &c.to_le_bytes());
        f.poke(self.cap + SLOT_STATUS, &[0; 2]);
        self.set_present(f, present);
        self.set_link(f, present);
        s.signalled = false;
        drop(s);
        if let Some((answer, _)) = answer {
            answer(Outcome::Removed);
        }
    }

    /// Software writes the port's configuration space.
    pub fn write(&self, f: &Function, at: u16, data: &[u8]) {
        if usize::from(at) + data.len() > CONFIG_SIZE {
            return;
        }
        let mut s = self.lock();
        let old = self.control(f);
        f.write(at, data);
        let told = self.obey(f, &mut s, old, self.control(f));
        self.signal(f, &mut s);
        drop(s);
        if let Some((answer, outcome)) = told {
            answer(outcome);
        }
    }

    /// Does what a change of slot control demands; returns who is to be told of what.
    fn obey(&self, f: &Function, s: &mut State, old: u16, new: u16) -> Option<(Answer, Outcome)> {
        if (old ^ new) & control::POWER_OFF != 0 {
            if new & control::POWER_OFF == 0 {
                if self.status(f) & status::PRESENT != 0 {
                    self.set_link(f, true);
                    self.raise(f, status::LINK_CHANGED);
                }
                return None;
            }
            if self.status(f) & status::PRESENT != 0 {
                self.set_link(f, false);
                self.raise(f, status::LINK_CHANGED);
            }
            self.behind.reset();
            return self.eject(f, s).map(|a| (a, Outcome::Removed));
        }
        let (was, is) = (old & control::POWER_INDICATOR, new & control::POWER_INDICATOR);
        if was == control::INDICATOR_BLINK
            && is == control::INDICATOR_ON
            && new & control::POWER_OFF == 0
        {
            return s.removal.take().map(|(a, _)| (a, Outcome::Refused));
        }
        None
    }

    /// Takes the device out, if that was asked for; returns who is to be told.
    fn eject(&self, f: &Function, s: &mut State) -> Option<Answer> {
        let (answer, _) = s.removal.take()?;
        self.behind.detach_all();
        self.set_present(f, false);
        self.raise(f, status::PRESENCE_CHANGED);
        Some(answer)
    }

    /// A device was put on the bus behind the port.
    pub fn insert(&self, f: &Function) {
        let mut s = self.lock();
        self.set_present(f, true);
        // Systems that wait for the button do not ask for changes of presence.
        self.raise(f, status::PRESENCE_CHANGED | status::BUTTON);
        if self.control(f) & control::POWER_OFF == 0 {
            // Somebody turned the empty slot on.
            self.set_link(f, true);
            self.raise(f, status::LINK_CHANGED);
        }
        self.signal(f, &mut s);
    }

    /// Asks the guest to let go of what is in the slot; `answer` is told what became of it, perhaps
    /// before this returns, perhaps never.
    pub fn request_removal(&self, f: &Function, answer: Answer) -> Result<(), Unwilling> {
        let mut s = self.lock();
        let c = self.control(f);
        // A guest that was not listening yet may be asked again.
        if s.removal.as_ref().is_some_and(|(_, since)| since.elapsed() < PATIENCE) {
            return Err(Unwilling::Pending);
        }
        if c & control::POWER_INDICATOR == control::INDICATOR_BLINK {
            return Err(Unwilling::Busy);
        }
        s.removal = Some((answer, Instant::now()));
        let gone = match c & control::POWER_OFF {
            0 => {
                self.raise(f, status::BUTTON);
                None
            }
            _ => self.eject(f, &mut s),
        };
        self.signal(f, &mut s);
        drop(s);
        if let Some(answer) = gone {
            answer(Outcome::Removed);
        }
        Ok(())
    }
}
