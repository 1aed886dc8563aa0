//! Recording sinks and an empty machine, for tests of this crate.

use super::decode::Decoder;
use super::{Bus, pirq::IrqInputs};
use std::sync::{Arc, Mutex};
use tandem_accel::bus::IoBus;
use tandem_accel::irq::{IrqSink, MsiMessage, MsiSink};

/// Records line levels and messages.
#[derive(Default)]
pub struct Recorder {
    levels: Mutex<Vec<(u32, bool)>>,
    msis: Mutex<Vec<MsiMessage>>,
}

impl Recorder {
    pub fn new() -> Arc<Recorder> {
        Arc::default()
    }
    pub fn levels(&self) -> Vec<(u32, bool)> {
        std::mem::take(&mut self.levels.lock().unwrap())
    }
    pub fn messages(&self) -> Vec<MsiMessage> {
        self.msis.lock().unwrap().clone()
    }
}

impl IrqSink for Recorder {
    fn set_level(&self, gsi: u32, high: bool) {
        self.levels.lock().unwrap().push((gsi, high));
    }
}

impl MsiSink for Recorder {
    fn send(&self, msg: MsiMessage) {
        self.msis.lock().unwrap().push(msg);
    }
}

/// A root bus on an empty machine.
pub struct Rig {
    pub io: Arc<IoBus>,
    pub sink: Arc<Recorder>,
    pub router: Arc<super::pirq::IrqRouter>,
    pub bus: Arc<Bus>,
}

pub fn rig() -> Rig {
    let io = Arc::new(IoBus::default());
    let sink = Recorder::new();
    let router = super::pirq::IrqRouter::new(&IrqInputs::new(sink.clone()));
    let bus = Bus::root(Decoder::new(io.clone()), sink.clone(), router.clone());
    Rig { io, sink, router, bus }
}
