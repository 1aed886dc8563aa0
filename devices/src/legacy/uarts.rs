//! Serial ports that a command line adds: `isa-serial`, at the ports of COM1 to COM4 or others, and
//! `pci-serial`, a 16550 on PCI (class 07:00, PCI Code and ID Assignment 1.11 §1.8).

use super::serial::{COM, PORTS, Serial};
use crate::pci::function::BarKind;
use crate::pci::{Bar, Function, FunctionSpec, Identity, Intx, PciDevice, Pin};
use crate::registry::{
    BusKind, Device, DeviceContext, DeviceFault, DeviceType, Properties, Property, PropertyKind,
};
use std::sync::{Arc, Weak};
use tandem_accel::irq::{IrqInput, IrqLine, IrqSink};
use tandem_backends::chardev::{CharBackend, CharFront};

/// Class: a serial controller that is a 16550.
const CLASS_16550: u32 = 0x07_0002;

/// Input goes into the port.
struct Front(Weak<Serial>);

impl CharFront for Front {
    fn receive(&self, data: &[u8]) -> usize {
        // A port that has gone takes everything.
        self.0.upgrade().map_or(data.len(), |s| s.receive(data))
    }
}

/// A port on `irq` that is joined to the character device of `p`.
fn port(ctx: &DeviceContext, p: &Properties, irq: IrqLine) -> Result<Arc<Serial>, DeviceFault> {
    let Some(id) = p.text("chardev") else {
        let what = "it has no character device";
        return Err(DeviceFault::new(what, "give it one with chardev=ID"));
    };
    let chardev: Arc<dyn CharBackend> = ctx.backends.chardev(id)?;
    let serial = Serial::new(irq, chardev.clone());
    if !chardev.attach(Arc::new(Front(Arc::downgrade(&serial)))) {
        let what = format!("character device '{id}' is in use");
        return Err(DeviceFault::new(what, "give each device one of its own"));
    }
    serial.on_room(move || chardev.room());
    Ok(serial)
}

const CHARDEV: Property = Property {
    name: "chardev",
    kind: PropertyKind::Text,
    default: None,
    description: "id of the character device (--chardev …,id=…)",
};

const fn property(name: &'static str, max: u64, description: &'static str) -> Property {
    Property { name, kind: PropertyKind::Uint { min: 0, max }, default: None, description }
}

/// A port at ISA resources, which ACPI tells of.
pub struct IsaSerial {
    /// The first of its eight ports.
    pub base: u16,
    /// Its interrupt.
    pub irq: u8,
}

/// A port in being.
struct OnIsa(Arc<Serial>);

impl Device for OnIsa {
    fn reset(&self) {
        self.0.reset();
    }
}

inventory::submit! {
    DeviceType {
        name: "isa-serial",
        bus: BusKind::Isa,
        description: "serial port (16550)",
        properties: &[
            CHARDEV,
            property("index", 3, "0 to 3 for COM1 to COM4; the first free one if absent"),
            property("iobase", 0xfff8, "first port, if not that of its index"),
            property("irq", 15, "interrupt, if not that of its index"),
        ],
        create: create_isa,
    }
}

fn create_isa(ctx: &DeviceContext, p: &Properties) -> Result<Arc<dyn Device>, DeviceFault> {
    let taken: Vec<u64> = ctx.io.pio.ranges().iter().map(|(at, ..)| *at).collect();
    let free = || COM.iter().position(|(base, _)| !taken.contains(&u64::from(*base)));
    let index = p.uint("index").map(|i| i as usize).or_else(free);
    let com = index.and_then(|i| COM.get(i)).copied();
    let base = p.uint("iobase").map(|b| b as u16).or(com.map(|c| c.0));
    let irq = p.uint("irq").map(|i| i as u32).or(com.map(|c| c.1));
    let (Some(base), Some(irq)) = (base, irq) else {
        let what = "COM1 to COM4 are there already";
        return Err(DeviceFault::new(what, "choose ports and interrupt with iobase and irq"));
    };
    let serial = port(ctx, p, ctx.irqs.line(irq))?;
    ctx.io
        .pio
        .insert("serial port", base.into(), PORTS, serial.clone())
        .map_err(|e| DeviceFault::new(e.to_string(), "choose another index or iobase"))?;
    let told = IsaSerial { base, irq: irq as u8 };
    ctx.directory.add(p.text("id").unwrap_or_default(), Arc::new(told));
    Ok(Arc::new(OnIsa(serial)))
}

/// A wire to a function's interrupt pin.
struct ToPin(Arc<Intx>);

impl IrqSink for ToPin {
    fn set_level(&self, _: u32, high: bool) {
        self.0.set(high);
    }
}

/// A port on PCI.
struct OnPci {
    function: Function,
    serial: Arc<Serial>,
}

impl PciDevice for OnPci {
    fn function(&self) -> &Function {
        &self.function
    }
}

impl Device for OnPci {
    fn reset(&self) {
        self.serial.reset();
    }
}

inventory::submit! {
    DeviceType {
        name: "pci-serial",
        bus: BusKind::Pci,
        description: "serial port (16550) on PCI",
        properties: &[CHARDEV],
        create: |ctx, p| {
            let slot = ctx.pci()?.slot(p.pci_address("addr"))?;
            let id = Identity {
                vendor: 0x1b36,
                device: 0x0002,
                revision: 1,
                class: CLASS_16550,
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
            };
            let mut spec = FunctionSpec::new(p.text("id").unwrap_or("pci-serial"), id);
            let intx = slot.intx(Pin::A);
            spec.intx(intx.clone());
            let serial = port(ctx, p, IrqInput::new(Arc::new(ToPin(intx)), 0).line())?;
            spec.bar(0, Bar { kind: BarKind::Io, len: PORTS, device: serial.clone() })?;
            let device = Arc::new(OnPci { function: spec.build(slot.decoder()), serial });
            slot.attach(device.clone());
            Ok(device)
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::testing::rig;
    use crate::registry::create;
    use crate::testing::{Random, context};
    use std::sync::Mutex;
    use tandem_backends::chardev::CharSink;

    #[derive(Default)]
    struct Line {
        written: Mutex<Vec<u8>>,
        front: Mutex<Option<Arc<dyn CharFront>>>,
    }

    impl CharSink for Line {
        fn write(&self, data: &[u8]) {
            self.written.lock().unwrap().extend(data);
        }
    }
    impl CharBackend for Line {
        fn attach(&self, front: Arc<dyn CharFront>) -> bool {
            let mut f = self.front.lock().unwrap();
            let free = f.is_none();
            f.get_or_insert(front);
            free
        }
        fn room(&self) {}
        fn is_open(&self) -> bool {
            true
        }
    }

    fn props(all: &[(&str, &str)]) -> Vec<(String, String)> {
        all.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    #[test]
    fn ports_are_found_and_carry_bytes_both_ways() {
        let r = rig();
        let mut ctx = context(&r);
        let lines: Vec<Arc<Line>> = (0..3).map(|_| Arc::default()).collect();
        for (i, l) in lines.iter().enumerate() {
            ctx.backends.chardevs.insert(format!("c{i}"), l.clone());
        }
        create(&ctx, "isa-serial", &props(&[("chardev", "c0"), ("index", "1")])).unwrap();
        create(&ctx, "isa-serial", &props(&[("chardev", "c1")])).unwrap();
        let all = ctx.directory.all::<IsaSerial>();
        assert_eq!(all.iter().map(|s| s.base).collect::<Vec<_>>(), [0x2f8, 0x3f8]);
        create(&ctx, "pci-serial", &props(&[("chardev", "c2")])).unwrap();
        let (_, card) = r.bus.devices().into_iter().next().unwrap();
        card.config_write(0x10, &0xc000u32.to_le_bytes());
        card.config_write(4, &[1, 0]);
        r.sink.levels();
        for (i, base) in [0x2f8u16, 0x3f8, 0xc000].into_iter().enumerate() {
            r.io.pio_write(base, &[b'a' + i as u8]);
            assert_eq!(*lines[i].written.lock().unwrap(), [b'a' + i as u8]);
            // OUT2 and the receiver's interrupt.
            r.io.pio_write(base + 4, &[8]);
            r.io.pio_write(base + 1, &[1]);
            let front = lines[i].front.lock().unwrap().clone().unwrap();
            assert_eq!(front.receive(b"x"), 1);
            assert!(r.sink.levels().iter().any(|(_, high)| *high), "{base:#x}");
            let mut d = [0];
            r.io.pio_read(base, &mut d);
            assert_eq!(d, *b"x");
        }
        let fail = |d: &str, p: &[(&str, &str)]| create(&ctx, d, &props(p)).err().unwrap();
        assert!(fail("isa-serial", &[])[0].to_string().contains("chardev=ID"));
        assert!(fail("pci-serial", &[("chardev", "c2")])[0].to_string().contains("in use"));
    }

    #[test]
    fn a_hostile_guest_ends_nothing() {
        let r = rig();
        let mut ctx = context(&r);
        ctx.backends.chardevs.insert("c".into(), Arc::new(Line::default()));
        create(&ctx, "pci-serial", &props(&[("chardev", "c")])).unwrap();
        let (_, card) = r.bus.devices().into_iter().next().unwrap();
        let mut random = Random::default();
        for _ in 0..100_000 {
            let (a, v) = (random.next(), random.word().to_le_bytes());
            let size = 1usize << (a % 3);
            match a >> 62 {
                0 => card.config_write((a >> 8) as u16 & 0xfc, &v[..size]),
                1 => r.io.pio_read((a >> 8) as u16, &mut [0; 4][..size]),
                _ => r.io.pio_write(0xc000 + (a >> 8 & 7) as u16, &v[..size]),
            }
        }
    }
}
