//! The bus between I/O APICs, message-signalled interrupts and local APICs: finds destinations
//! (SDM vol. 3 §11.6.2).

use super::ioapic::IoApic;
use super::lapic::Lapic;
use super::pic::DualPic;
use std::sync::{Arc, OnceLock, Weak};
use tandem_accel::clock::Clock;
use tandem_accel::irq::{MsiMessage, MsiSink};

/// How an interrupt is delivered (SDM vol. 3 §11.6.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeliveryMode {
    /// To all destinations.
    Fixed,
    /// To the destination of lowest priority.
    LowestPriority,
    /// System management interrupt.
    Smi,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up IPI.
    StartUp,
    /// As if from an external 8259A: its vector is fetched from the PIC.
    ExtInt,
}

impl DeliveryMode {
    /// Decodes a 3-bit delivery mode field; 011b is reserved.
    pub fn from_bits(bits: u32) -> Option<DeliveryMode> {
        Some(match bits & 7 {
            0 => DeliveryMode::Fixed,
            1 => DeliveryMode::LowestPriority,
            2 => DeliveryMode::Smi,
            4 => DeliveryMode::Nmi,
            5 => DeliveryMode::Init,
            6 => DeliveryMode::StartUp,
            7 => DeliveryMode::ExtInt,
            _ => return None,
        })
    }
}

/// One interrupt on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Delivery {
    /// Destination: APIC ID, or set of logical destinations.
    pub dest: u32,
    /// `dest` is logical.
    pub logical: bool,
    /// `dest` has 32 bits (from an x2APIC), else 8.
    pub wide: bool,
    /// How.
    pub mode: DeliveryMode,
    /// Vector.
    pub vector: u8,
    /// Level-triggered: the EOI goes back to the I/O APIC.
    pub level: bool,
}

/// What local APICs need to know of their processors.
#[derive(Clone, Copy, Debug)]
pub struct ApicConfig {
    /// TSC frequency in Hz.
    pub tsc_hz: u64,
    /// CPUID shows x2APIC.
    pub x2apic: bool,
    /// CPUID shows the TSC-deadline timer.
    pub tsc_deadline: bool,
    /// Physical address bits (36–52).
    pub phys_bits: u8,
}

/// All local APICs of a machine.
pub struct ApicBus {
    lapics: Vec<Arc<Lapic>>,
    ioapic: OnceLock<Weak<IoApic>>,
}

impl ApicBus {
    /// A bus with one local APIC for each of `apic_ids`; the first is the bootstrap processor's.
    pub fn new(
        apic_ids: &[u32],
        config: ApicConfig,
        clock: &Arc<Clock>,
        pic: Arc<DualPic>,
    ) -> Arc<ApicBus> {
        let bus = Arc::new_cyclic(|me: &Weak<ApicBus>| ApicBus {
            lapics: apic_ids
                .iter()
                .enumerate()
                .map(|(i, &id)| {
                    Lapic::new(id, i == 0, config, clock.clone(), me.clone(), pic.clone())
                })
                .collect(),
            ioapic: OnceLock::new(),
        });
        let me = Arc::downgrade(&bus);
        pic.on_change(move || {
            if let Some(bus) = me.upgrade() {
                bus.pic_changed();
            }
        });
        bus
    }

    /// Joins the I/O APIC, which hears of EOIs from now on.
    pub(super) fn join(&self, ioapic: Weak<IoApic>) {
        let _ = self.ioapic.set(ioapic);
    }

    /// The local APICs, in vCPU order.
    pub fn lapics(&self) -> &[Arc<Lapic>] {
        &self.lapics
    }

    fn pic_changed(&self) {
        for l in &self.lapics {
            l.sample_lint0();
        }
    }

    /// Delivers to all destinations that match; returns whether one took it.
    pub fn deliver(&self, d: Delivery) -> bool {
        if d.mode == DeliveryMode::LowestPriority {
            let best = self
                .lapics
                .iter()
                .filter(|l| l.matches(d))
                .filter_map(|l| l.arbitration_priority().map(|p| (p, l)))
                .min_by_key(|(p, _)| *p);
            return best.is_some_and(|(_, l)| l.accept(d.mode, d.vector, d.level));
        }
        let mut taken = false;
        for l in self.lapics.iter().filter(|l| l.matches(d)) {
            taken |= l.accept(d.mode, d.vector, d.level);
        }
        taken
    }

    /// Delivers to all local APICs except that with APIC ID `except`.
    pub(super) fn broadcast(&self, d: Delivery, except: Option<u32>) {
        for l in self.lapics.iter().filter(|l| Some(l.id()) != except && l.is_enabled()) {
            l.accept(d.mode, d.vector, d.level);
        }
    }

    /// A local APIC finished a level-triggered interrupt.
    pub(super) fn end_of_interrupt(&self, vector: u8) {
        if let Some(io) = self.ioapic.get().and_then(Weak::upgrade) {
            io.end_of_interrupt(vector);
        }
    }
}

/// Decodes a message (SDM vol. 3 §11.11); `None` if it is no interrupt message.
fn decode(msg: MsiMessage) -> Option<Delivery> {
    if msg.addr >> 20 != 0xfee {
        return None;
    }
    Some(Delivery {
        dest: (msg.addr >> 12) as u32 & 0xff,
        // The destination mode counts only with the redirection hint by the letter of the SDM; in
        // fact processors and hypervisors look at the mode alone.
        logical: msg.addr & 4 != 0,
        wide: false,
        mode: DeliveryMode::from_bits(msg.data >> 8)?,
        vector: msg.data as u8,
        level: msg.data & 1 << 15 != 0,
    })
}

impl MsiSink for ApicBus {
    fn send(&self, msg: MsiMessage) {
        match decode(msg) {
            Some(d) => {
                self.deliver(d);
            }
            None => log::debug!("message {msg:x?} is no interrupt"),
        }
    }
}
