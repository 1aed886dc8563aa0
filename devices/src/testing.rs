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
    clock.run_to(ns);
}

/// xorshift64*: the same numbers on every run.
pub(crate) struct Random(u64);

impl Default for Random {
    fn default() -> Random {
        Random(0x9e37_79b9_7f4a_7c15)
    }
}

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    /// Numbers that find edges more often than chance does.
    pub(crate) fn word(&mut self) -> u64 {
        let random = self.next();
        let edges = [0, 1, 2, 8, 0xf, 0x7f, 0x80, 0xffff, 0x8000, 0x1000, u64::MAX, random];
        edges[(self.next() >> 11) as usize % edges.len()]
    }
}

/// What devices of a machine with nothing but `rig` and 64 KiB of memory are made from.
pub(crate) fn context(rig: &crate::pci::testing::Rig) -> crate::registry::DeviceContext {
    let memory = tandem_accel::memory::GuestMap::new();
    memory.add("ram", tandem_accel::memory::RegionKind::Ram, 0, 0x1_0000).unwrap();
    crate::registry::DeviceContext {
        io: rig.io.clone(),
        irqs: crate::gsi::IrqInputs::new(rig.sink.clone()),
        msi: rig.sink.clone(),
        clock: tandem_accel::clock::Clock::new(),
        memory,
        power: std::sync::Arc::new(crate::power::testing::Recorder::default()),
        pci: Some(rig.bus.clone()),
        buses: Default::default(),
        virtio_mmio: None,
        boot_order: Default::default(),
        backends: Default::default(),
        directory: Default::default(),
    }
}
