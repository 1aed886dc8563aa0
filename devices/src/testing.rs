//! Recording sinks for the devices' tests.

use std::collections::BTreeMap;
use std::sync::Mutex;
use tandem_accel::irq::{IrqSink, MsiMessage, MsiSink};

/// Remembers line levels, counts rising edges, and keeps messages.
#[derive(Default)]
pub(crate) struct Levels {
    lines: Mutex<BTreeMap<u32, (bool, u32)>>,
    pub(crate) messages: Mutex<Vec<MsiMessage>>,
}

impl Levels {
    pub(crate) fn level(&self, gsi: u32) -> bool {
        self.lines.lock().unwrap().get(&gsi).is_some_and(|l| l.0)
    }
    /// Rising edges so far.
    pub(crate) fn edges(&self, gsi: u32) -> u32 {
        self.lines.lock().unwrap().get(&gsi).map_or(0, |l| l.1)
    }
}

impl IrqSink for Levels {
    fn set_level(&self, gsi: u32, high: bool) {
        let mut lines = self.lines.lock().unwrap();
        let l = lines.entry(gsi).or_default();
        if high && !l.0 {
            l.1 += 1;
        }
        l.0 = high;
    }
}

impl MsiSink for Levels {
    fn send(&self, msg: MsiMessage) {
        self.messages.lock().unwrap().push(msg);
    }
}

/// Sets a clock to `ns` and runs what is due by then.
pub(crate) fn run_at(clock: &tandem_accel::clock::Clock, ns: u64) {
    clock.set(ns);
    clock.resume();
    clock.run_expired();
    clock.pause();
    clock.set(ns);
}
