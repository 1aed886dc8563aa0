//! What comes of a guest's misfortunes, under the names of QEMU's `-action`.

use super::Fault;
use serde::{Deserialize, Serialize};
use tandem_accel::suggest::one_of;

/// What comes of a panic that the guest tells of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PanicAction {
    /// The machine is stopped, and kept.
    Pause,
    /// The machine ends.
    #[default]
    Shutdown,
    /// The machine ends, with an exit status that tells of it.
    ExitFailure,
    /// Nothing; clients are told.
    None,
}

impl PanicAction {
    /// All, by name.
    pub const NAMES: [(&str, PanicAction); 4] = [
        ("pause", PanicAction::Pause),
        ("shutdown", PanicAction::Shutdown),
        ("exit-failure", PanicAction::ExitFailure),
        ("none", PanicAction::None),
    ];
}

/// What comes of a watchdog that was not fed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WatchdogAction {
    /// The machine is reset.
    #[default]
    Reset,
    /// The power button is pressed.
    Shutdown,
    /// The machine ends.
    Poweroff,
    /// The machine is stopped, and kept.
    Pause,
    /// A message; nothing else.
    Debug,
    /// Nothing; clients are told.
    None,
}

impl WatchdogAction {
    /// All, by name.
    pub const NAMES: [(&str, WatchdogAction); 6] = [
        ("reset", WatchdogAction::Reset),
        ("shutdown", WatchdogAction::Shutdown),
        ("poweroff", WatchdogAction::Poweroff),
        ("pause", WatchdogAction::Pause),
        ("debug", WatchdogAction::Debug),
        ("none", WatchdogAction::None),
    ];
}

/// What comes of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Actions {
    /// Of a panic.
    pub panic: PanicAction,
    /// Of a hungry watchdog.
    pub watchdog: WatchdogAction,
}

impl Actions {
    /// Takes `panic=WHAT,watchdog=WHAT`.
    pub fn parse(&mut self, text: &str, faults: &mut Vec<Fault>) {
        for word in text.split(',') {
            let bad = |names: &[&str], v: &str| {
                Fault::new(format!("--action {word} is not supported"), one_of(v, names))
            };
            match word.split_once('=') {
                Some(("panic", v)) => match PanicAction::NAMES.iter().find(|(n, _)| *n == v) {
                    Some((_, a)) => self.panic = *a,
                    None => faults.push(bad(&PanicAction::NAMES.map(|(n, _)| n), v)),
                },
                Some(("watchdog", v)) => {
                    match WatchdogAction::NAMES.iter().find(|(n, _)| *n == v) {
                        Some((_, a)) => self.watchdog = *a,
                        None => faults.push(bad(&WatchdogAction::NAMES.map(|(n, _)| n), v)),
                    }
                }
                _ => faults.push(bad(&["panic=…", "watchdog=…"], word)),
            }
        }
    }

    /// Whether they are the usual ones.
    pub fn usual(&self) -> bool {
        *self == Actions::default()
    }
}
