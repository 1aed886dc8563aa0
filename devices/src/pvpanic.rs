//! pvpanic: a register by which a guest's system tells that it has come to its end (QEMU's
//! specification "pvpanic"): as a port that ACPI names, or on PCI.

use crate::pci::function::BarKind;
use crate::pci::{Bar, Function, FunctionSpec, Identity, PciDevice};
use crate::power::{Panic, PowerRequest, PowerSink};
use crate::registry::{
    BusKind, Device, DeviceContext, DeviceFault, DeviceType, Properties, Property, PropertyKind,
};
use std::sync::Arc;
use tandem_accel::bus::BusDevice;

/// The port, where nobody says another.
pub const PORT: u16 = 0x505;

/// Events, a bit each.
const PANICKED: u8 = 1;
const CRASH_LOADED: u8 = 2;
const SHUTDOWN: u8 = 4;

/// The register: it reads as the events that are understood; writing one tells of it.
struct Register {
    events: u8,
    power: Arc<dyn PowerSink>,
}

impl BusDevice for Register {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == 0 && !data.is_empty() {
            data[0] = self.events;
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        let Some(v) = data.first().filter(|_| offset == 0) else { return };
        // The gravest counts.
        let told = match v & self.events {
            e if e & PANICKED != 0 => Panic::Panicked,
            e if e & CRASH_LOADED != 0 => Panic::CrashLoaded,
            e if e & SHUTDOWN != 0 => Panic::Shutdown,
            _ => return,
        };
        self.power.request(PowerRequest::Panicked(told));
    }
}

impl Device for Register {
    fn reset(&self) {}
}

const EVENTS: Property = Property {
    name: "events",
    kind: PropertyKind::Uint { min: 0, max: 7 },
    default: Some("7"),
    description: "events that are understood: 1 panic, 2 crash kernel loaded, 4 shutdown",
};

fn register(ctx: &DeviceContext, p: &Properties) -> Arc<Register> {
    Arc::new(Register { events: p.uint("events").unwrap_or(7) as u8, power: ctx.power.clone() })
}

inventory::submit! {
    DeviceType {
        name: "pvpanic",
        bus: BusKind::Isa,
        description: "port by which the guest tells of a panic",
        properties: &[
            EVENTS,
            Property {
                name: "ioport",
                kind: PropertyKind::Uint { min: 0, max: 0xffff },
                default: Some("0x505"),
                description: "the port",
            },
        ],
        create: |ctx, p| {
            let register = register(ctx, p);
            let port = p.uint("ioport").unwrap_or(PORT.into());
            ctx.io.pio.insert("pvpanic", port, 1, register.clone()).map_err(|e| {
                DeviceFault::new(e.to_string(), "choose another ioport")
            })?;
            Ok(register)
        },
    }
}

/// The register on PCI.
struct OnPci(Function);

impl PciDevice for OnPci {
    fn function(&self) -> &Function {
        &self.0
    }
}

impl Device for OnPci {
    fn reset(&self) {}
}

inventory::submit! {
    DeviceType {
        name: "pvpanic-pci",
        bus: BusKind::Pci,
        description: "PCI function by which the guest tells of a panic",
        properties: &[EVENTS],
        create: |ctx, p| {
            let slot = ctx.pci()?.slot(p.pci_address("addr"))?;
            let id = Identity {
                vendor: 0x1b36,
                device: 0x0011,
                revision: 1,
                class: 0x08_8000,
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
            };
            let mut spec = FunctionSpec::new(p.text("id").unwrap_or("pvpanic-pci"), id);
            spec.bar(0, Bar { kind: BarKind::Mem32, len: 16, device: register(ctx, p) })?;
            let device = Arc::new(OnPci(spec.build(slot.decoder())));
            slot.attach(device.clone());
            Ok(device)
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::testing::Recorder;

    #[test]
    fn events_that_are_understood_are_told() {
        let power = Arc::new(Recorder::default());
        let r = Register { events: PANICKED | CRASH_LOADED, power: power.clone() };
        let mut d = [0xff; 4];
        r.read(0, &mut d);
        assert_eq!(d, [3, 0, 0, 0]);
        for v in [0, SHUTDOWN, 0xf8, CRASH_LOADED, 0xff] {
            r.write(0, &[v, 1]);
        }
        r.write(0, &[]);
        r.write(1, &[1]);
        let told = [Panic::CrashLoaded, Panic::Panicked].map(PowerRequest::Panicked);
        assert_eq!(*power.0.lock().unwrap(), told);
    }
}
