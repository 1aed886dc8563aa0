//! Interrupt routing: which input of PIC and IOAPIC a GSI reaches, and how levels and messages get
//! there.

use crate::error::failed;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_msi,
};
use kvm_ioctls::VmFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tandem_accel::irq::{IrqSink, MsiMessage, MsiSink};
use tandem_accel::{Error, Result};

/// Inputs of the IOAPIC; GSIs are below this.
const GSIS: u32 = 24;

/// (GSI, chip, pin). GSIs 0–15 are the ISA interrupts: each reaches its PIC pin, and the IOAPIC pin
/// of the same number, but for the timer, which a PC wires to IOAPIC pin 2 (ACPI 6.4 §5.2.12.5),
/// where the cascade (GSI 2) would be.
fn routes() -> impl Iterator<Item = (u32, u32, u32)> {
    (0..GSIS).flat_map(|gsi| {
        let pic = match gsi {
            0..8 => Some((gsi, KVM_IRQCHIP_PIC_MASTER, gsi)),
            8..16 => Some((gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8)),
            _ => None,
        };
        let ioapic = match gsi {
            0 => Some((gsi, KVM_IRQCHIP_IOAPIC, 2)),
            2 => None,
            _ => Some((gsi, KVM_IRQCHIP_IOAPIC, gsi)),
        };
        pic.into_iter().chain(ioapic)
    })
}

/// Installs the routing table.
pub(crate) fn set_routing(vm: &VmFd) -> Result<()> {
    let entries: Vec<_> = routes()
        .map(|(gsi, irqchip, pin)| {
            let mut e =
                kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
            e.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
            e
        })
        .collect();
    let table = KvmIrqRouting::from_entries(&entries)
        .map_err(|e| Error::new(format!("cannot build the interrupt routing table: {e:?}")))?;
    vm.set_gsi_routing(&table).map_err(|e| failed("route interrupts", "KVM_SET_GSI_ROUTING", e))
}

/// Delivers levels and messages to the in-kernel chips.
pub(crate) struct Delivery {
    vm: Arc<VmFd>,
    /// Whether a failure has been logged; one is enough to know.
    complained: AtomicBool,
}

impl Delivery {
    pub fn new(vm: Arc<VmFd>) -> Delivery {
        Delivery { vm, complained: AtomicBool::new(false) }
    }

    fn complain(&self, e: Error) {
        if !self.complained.swap(true, Ordering::Relaxed) {
            log::error!("{e}");
        }
    }
}

impl IrqSink for Delivery {
    fn set_level(&self, gsi: u32, high: bool) {
        if gsi >= GSIS {
            return;
        }
        if let Err(e) = self.vm.set_irq_line(gsi, high) {
            self.complain(failed(&format!("set interrupt line {gsi}"), "KVM_IRQ_LINE", e));
        }
    }
}

impl MsiSink for Delivery {
    fn send(&self, msg: MsiMessage) {
        let msi = kvm_msi {
            address_lo: msg.addr as u32,
            address_hi: (msg.addr >> 32) as u32,
            data: msg.data,
            ..Default::default()
        };
        // A message that no local APIC takes is the guest's affair; the kernel answers EINVAL for
        // one that is malformed, which hardware would drop too.
        match self.vm.signal_msi(msi) {
            Err(e) if e.errno() != libc::EINVAL => {
                self.complain(failed("deliver an interrupt message", "KVM_SIGNAL_MSI", e));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timer_goes_to_pin_2_and_pins_are_unique() {
        let v: Vec<_> = routes().collect();
        assert!(v.contains(&(0, KVM_IRQCHIP_IOAPIC, 2)));
        assert!(v.contains(&(0, KVM_IRQCHIP_PIC_MASTER, 0)));
        assert!(v.contains(&(12, KVM_IRQCHIP_PIC_SLAVE, 4)));
        assert!(v.contains(&(23, KVM_IRQCHIP_IOAPIC, 23)));
        for (i, a) in v.iter().enumerate() {
            assert!(v[i + 1..].iter().all(|b| (a.1, a.2) != (b.1, b.2)), "{a:?}");
        }
    }
}
