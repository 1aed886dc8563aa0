//! Interrupt routing of the ICH9: INTx pins to PIRQA–H, PIRQs to GSI 16–23 and to ISA IRQs, and
//! the ACPI interrupt (ICH9 datasheet §5.9.6, §10.1, §13.1).
//!
//! Slots 0–24 and 30 are wired; slots 25–29 and 31 go where the chipset's device interrupt route
//! registers say. A PIRQ always drives its GSI; it also drives an ISA IRQ when its routing register
//! says so, which is what a system without IOAPIC uses.

use super::Pin;
use super::bus::IntxRoute;
pub use crate::gsi::IrqInputs;
use std::sync::{Arc, Mutex};
use tandem_accel::irq::{IrqInput, IrqLine, IrqSink};

/// GSI of PIRQA; the others follow.
const PIRQ_GSI: u32 = 16;
/// Source number of the ACPI interrupt; those below are slot × 4 + pin.
const SCI: u32 = 128;

/// First slot with a device interrupt route register.
pub const FIRST_ROUTED_SLOT: u8 = 25;
/// Reset value of a device interrupt route register: INTA–D to PIRQA–D.
pub const DEFAULT_DEVICE_ROUTE: u16 = 0x3210;

struct Pirq {
    /// Pins that lead here.
    pins: u128,
    gsi: IrqLine,
    /// ISA IRQ and the wire to it.
    isa: Option<(u8, IrqLine)>,
}

struct State {
    /// Pins that are high.
    high: u128,
    pirqs: [Pirq; 8],
    sci_high: bool,
    sci: IrqLine,
}

struct Wires {
    inputs: IrqInputs,
    state: Mutex<State>,
}

/// The chipset's interrupt router.
pub struct IrqRouter {
    wires: Arc<Wires>,
    sources: Vec<Arc<IrqInput>>,
}

fn wired_pirq(slot: u8, pin: u8) -> u8 {
    match slot {
        0..FIRST_ROUTED_SLOT => (slot + pin) % 4 + 4,
        30 => pin + 4,
        _ => pin,
    }
}

impl IrqRouter {
    /// A router in reset state (ISA routing off, ACPI interrupt on IRQ 9) on the machine's inputs.
    pub fn new(inputs: &IrqInputs) -> Arc<IrqRouter> {
        let pirqs = std::array::from_fn(|n| Pirq {
            pins: (0..128u8)
                .filter(|s| usize::from(wired_pirq(s / 4, s % 4)) == n)
                .fold(0, |m, s| m | 1 << s),
            gsi: inputs.line(PIRQ_GSI + n as u32),
            isa: None,
        });
        let state = State { high: 0, pirqs, sci_high: false, sci: inputs.line(9) };
        let wires = Arc::new(Wires { inputs: inputs.clone(), state: Mutex::new(state) });
        let sources = (0..=SCI).map(|s| IrqInput::new(wires.clone(), s)).collect();
        Arc::new(IrqRouter { wires, sources })
    }

    /// A new wire to the ACPI interrupt.
    pub fn sci(&self) -> IrqLine {
        self.sources[SCI as usize].line()
    }

    /// Routes the ACPI interrupt to `gsi`.
    pub fn set_sci_gsi(&self, gsi: u32) {
        let mut s = self.wires.state.lock().unwrap();
        s.sci.set(false);
        s.sci = self.wires.inputs.line(gsi);
        s.sci.set(s.sci_high);
    }

    /// Writes the routing register of PIRQ `n` (0–7): bit 7 off, else the ISA IRQ.
    pub fn set_isa_route(&self, n: usize, value: u8) {
        const POSSIBLE: u16 = 0b1101_1110_1111_1000;
        let irq = value & 0xf;
        let on = value & 0x80 == 0 && POSSIBLE & 1 << irq != 0;
        let mut s = self.wires.state.lock().unwrap();
        let high = s.high;
        let Some(p) = s.pirqs.get_mut(n) else { return };
        if p.isa.as_ref().map(|(i, _)| *i) == on.then_some(irq) {
            return;
        }
        if let Some((_, line)) = p.isa.take() {
            line.set(false);
        }
        if on {
            let line = self.wires.inputs.line(irq.into());
            line.set(high & p.pins != 0);
            p.isa = Some((irq, line));
        }
    }

    /// Writes the device interrupt route register of `slot` (25–29, 31): a PIRQ in bits 2:0 of each
    /// nibble, INTA lowest. Other slots are wired and ignore it.
    pub fn set_device_route(&self, slot: u8, value: u16) {
        if !matches!(slot, FIRST_ROUTED_SLOT..=29 | 31) {
            return;
        }
        let mut s = self.wires.state.lock().unwrap();
        for pin in 0..4 {
            let bit = 1u128 << (slot * 4 + pin);
            let to = usize::from(value >> (4 * pin) & 7);
            for (n, p) in s.pirqs.iter_mut().enumerate() {
                p.pins = if n == to { p.pins | bit } else { p.pins & !bit };
            }
        }
        let high = s.high;
        s.pirqs.iter().for_each(|p| p.drive(high));
    }
}

impl Pirq {
    fn drive(&self, high: u128) {
        let level = high & self.pins != 0;
        self.gsi.set(level);
        if let Some((_, line)) = &self.isa {
            line.set(level);
        }
    }
}

impl IrqSink for Wires {
    fn set_level(&self, source: u32, level: bool) {
        let mut s = self.state.lock().unwrap();
        if source == SCI {
            s.sci_high = level;
            s.sci.set(level);
        } else if source < SCI {
            let bit = 1u128 << source;
            s.high = if level { s.high | bit } else { s.high & !bit };
            let high = s.high;
            s.pirqs.iter().filter(|p| p.pins & bit != 0).for_each(|p| p.drive(high));
        }
    }
}

impl IntxRoute for IrqRouter {
    fn line(&self, slot: u8, pin: Pin) -> IrqLine {
        self.sources[usize::from(slot % 32) * 4 + pin as usize].line()
    }
    fn isa_irq(&self, slot: u8, pin: Pin) -> Option<u8> {
        let s = self.wires.state.lock().unwrap();
        let bit = 1u128 << (u32::from(slot % 32) * 4 + pin as u32);
        let p = s.pirqs.iter().find(|p| p.pins & bit != 0)?;
        p.isa.as_ref().map(|(irq, _)| *irq)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::testing::Recorder;

    fn router() -> (Arc<Recorder>, Arc<IrqRouter>) {
        let sink = Recorder::new();
        let r = IrqRouter::new(&IrqInputs::new(sink.clone()));
        (sink, r)
    }

    #[test]
    fn pins_that_share_a_pirq_are_ored() {
        let (sink, r) = router();
        let (a, b) = (r.line(1, Pin::A), r.line(5, Pin::A));
        a.assert();
        b.assert();
        a.deassert();
        b.deassert();
        assert_eq!(sink.levels(), [(21, true), (21, false)]);
        r.line(31, Pin::B).assert();
        assert_eq!(sink.levels(), [(17, true)]);
    }

    #[test]
    fn isa_route_follows_its_register() {
        let (sink, r) = router();
        r.line(0, Pin::A).assert();
        r.set_isa_route(4, 11);
        assert_eq!(r.isa_irq(0, Pin::A), Some(11));
        r.set_isa_route(4, 10);
        r.set_isa_route(4, 0x80);
        r.set_isa_route(4, 2);
        r.set_isa_route(99, 5);
        let seen = sink.levels();
        assert_eq!(seen, [(20, true), (11, true), (11, false), (10, true), (10, false)]);
    }

    #[test]
    fn device_routes_and_sci_move_a_high_level_along() {
        let (sink, r) = router();
        r.line(31, Pin::A).assert();
        r.set_device_route(31, 0x3217);
        r.set_device_route(3, 0x7777);
        assert_eq!(sink.levels(), [(16, true), (16, false), (23, true)]);
        let sci = r.sci();
        sci.assert();
        r.set_sci_gsi(20);
        assert_eq!(sink.levels(), [(9, true), (9, false), (20, true)]);
    }
}
