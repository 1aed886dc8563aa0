//! From global system interrupts to the chips' inputs, and the chips together.

use super::apic_bus::{ApicBus, ApicConfig};
use super::ioapic::IoApic;
use super::lapic::Lapic;
use super::pic::DualPic;
use std::sync::Arc;
use tandem_accel::clock::Clock;
use tandem_accel::irq::{IrqSink, MsiMessage, MsiSink};

/// Number of GSIs.
pub const GSIS: u32 = 24;

/// Routes GSIs: 0–15 are the ISA interrupts and reach PIC and I/O APIC, 16–23 the I/O APIC alone.
/// GSI 0 (the PIT) is wired to I/O APIC pin 2, which MADT must say (interrupt source override); pin
/// 0 carries the PIC's output.
pub struct IrqRouter {
    pic: Arc<DualPic>,
    ioapic: Arc<IoApic>,
    bus: Arc<ApicBus>,
}

impl IrqSink for IrqRouter {
    fn set_level(&self, gsi: u32, high: bool) {
        if gsi < 16 {
            self.pic.set_level(gsi, high);
        }
        match gsi {
            0 => self.ioapic.set_level(2, high),
            1..GSIS => self.ioapic.set_level(gsi, high),
            _ => {}
        }
    }
}

impl MsiSink for IrqRouter {
    fn send(&self, msg: MsiMessage) {
        self.bus.send(msg);
    }
}

/// All interrupt chips of a machine.
#[derive(Clone)]
pub struct IrqChips {
    /// The 8259As.
    pub pic: Arc<DualPic>,
    /// The I/O APIC.
    pub ioapic: Arc<IoApic>,
    /// The local APICs.
    pub bus: Arc<ApicBus>,
    /// Where interrupt lines and messages go.
    pub router: Arc<IrqRouter>,
}

impl IrqChips {
    /// Chips for processors with these APIC IDs; the first is the bootstrap processor.
    pub fn new(apic_ids: &[u32], config: ApicConfig, clock: &Arc<Clock>) -> IrqChips {
        let pic = DualPic::new();
        let bus = ApicBus::new(apic_ids, config, clock, pic.clone());
        let ioapic = IoApic::new(bus.clone());
        let router =
            Arc::new(IrqRouter { pic: pic.clone(), ioapic: ioapic.clone(), bus: bus.clone() });
        IrqChips { pic, ioapic, bus, router }
    }

    /// The local APIC of vCPU `index`.
    pub fn lapic(&self, index: usize) -> Option<Arc<Lapic>> {
        self.bus.lapics().get(index).cloned()
    }

    /// Resets PIC and I/O APIC; each local APIC is reset with its processor.
    pub fn reset(&self) {
        self.pic.reset();
        self.ioapic.reset();
    }
}
