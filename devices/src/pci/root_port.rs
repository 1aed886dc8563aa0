//! A PCI Express root port: a bridge on the root bus with room for one device behind it
//! (PCIe 5.0 §7.5.1.3, §7.5.3), which may come and go while the machine runs ([`HotplugSlot`]).

use super::bus::{Bus, PciDevice};
use super::capability::{Express, ExpressType, PowerManagement};
use super::function::{Function, FunctionSpec, Identity};
use super::hotplug::{Answer, HotplugSlot, Unwilling};
use super::{Devfn, Msi, PciError, Pin};
use crate::registry::{BusKind, Device, DeviceFault, DeviceType, Property, PropertyKind};
use std::sync::Arc;

/// QEMU's generic root port, which guests know.
const VENDOR_REDHAT: u16 = 0x1b36;
const DEVICE_ROOT_PORT: u16 = 0x000c;
const CLASS_PCI_BRIDGE: u32 = 0x06_0400;

/// A root port.
pub struct RootPort {
    function: Function,
    behind: Arc<Bus>,
    /// Absent if what is behind it stays there.
    slot: Option<HotplugSlot>,
}

impl RootPort {
    /// Puts a root port on the root bus, at `at` or in the first free slot. With a number for its
    /// own slot (13 bits), devices behind it may come and go.
    pub fn attach(
        root: &Arc<Bus>,
        at: Option<Devfn>,
        name: &str,
        hotplug: Option<u16>,
    ) -> Result<Arc<Self>, PciError> {
        if !root.is_root() {
            return Err(PciError("a root port sits on the root bus; use bus=pcie.0".into()));
        }
        let place = root.slot(at)?;
        let id = Identity {
            vendor: VENDOR_REDHAT,
            device: DEVICE_ROOT_PORT,
            class: CLASS_PCI_BRIDGE,
            ..Identity::default()
        };
        let mut spec = FunctionSpec::bridge(name, id);
        let intx = place.intx(Pin::A);
        spec.intx(intx.clone());
        spec.capability(&PowerManagement)?;
        let express = spec.capability(&Express { kind: ExpressType::RootPort })?;
        let behind = root.behind_port(place.devfn());
        let slot = match hotplug {
            Some(number) => {
                let msi = Msi::new(place.msi(), 0);
                spec.msi(msi.clone())?;
                Some(HotplugSlot::new(&mut spec, express, number, &behind, msi, intx))
            }
            None => None,
        };
        let function = spec.build(place.decoder());
        let port = Arc::new(RootPort { function, behind, slot });
        port.reset_slot();
        place.attach(port.clone());
        Ok(port)
    }

    /// The bus behind it.
    pub fn behind(&self) -> &Arc<Bus> {
        &self.behind
    }

    /// Whether devices behind it may come and go.
    pub fn hotplug(&self) -> bool {
        self.slot.is_some()
    }

    /// Tells the guest that a device was put on the bus behind the port.
    pub fn inserted(&self) {
        if let Some(s) = &self.slot {
            s.insert(&self.function);
        }
    }

    /// Asks the guest to let go of the device behind the port. See [`HotplugSlot::request_removal`].
    /// On a port without hot-plug nothing happens.
    pub fn request_removal(&self, answer: Answer) -> Result<(), Unwilling> {
        match &self.slot {
            Some(s) => s.request_removal(&self.function, answer),
            None => Ok(()),
        }
    }

    fn reset_slot(&self) {
        if let Some(s) = &self.slot {
            s.reset(&self.function);
        }
    }
}

impl PciDevice for RootPort {
    fn function(&self) -> &Function {
        &self.function
    }
    fn config_write(&self, at: u16, data: &[u8]) {
        match &self.slot {
            Some(s) => s.write(&self.function, at, data),
            None => self.function.write(at, data),
        }
    }
    fn reset(&self) {
        self.function.reset();
        self.reset_slot();
    }
    fn secondary(&self) -> Option<&Arc<Bus>> {
        Some(&self.behind)
    }
}

/// The bus resets its devices.
impl Device for RootPort {
    fn reset(&self) {}
}

const BYTE: PropertyKind = PropertyKind::Uint { min: 0, max: 255 };

inventory::submit! {
    DeviceType {
        name: "pcie-root-port",
        bus: BusKind::Pci,
        description: "PCI Express root port; its id names the bus behind it",
        properties: &[
            Property { name: "port", kind: BYTE, default: Some("0"), description: "port number" },
            Property {
                name: "chassis",
                kind: BYTE,
                default: Some("0"),
                description: "number of the chassis, for people",
            },
            Property {
                name: "slot",
                kind: PropertyKind::Uint { min: 0, max: 0x1fff },
                default: Some("0"),
                description: "number of the slot in the chassis, for people",
            },
            Property {
                name: "hotplug",
                kind: PropertyKind::Bool,
                default: Some("on"),
                description: "devices may come and go",
            },
        ],
        create: |ctx, props| {
            let id = props.text("id").unwrap_or("pcie-root-port");
            let number = props.uint("slot").unwrap_or(0) as u16;
            let hotplug = props.bool("hotplug").then_some(number);
            let port = RootPort::attach(ctx.pci()?, props.pci_address("addr"), id, hotplug)?;
            if let Some(id) = props.text("id") {
                if !ctx.buses.add(id, port.behind()) {
                    return Err(DeviceFault::new(
                        format!("there is a bus '{id}' already"),
                        "give the port another id",
                    ));
                }
                ctx.directory.add(id, port.clone());
            }
            Ok(port)
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::hotplug::Outcome;
    use super::*;
    use crate::registry;
    use crate::virtio::testing::Rig;
    use std::sync::Mutex;
    use tandem_accel::irq::MsiMessage;

    fn props(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    fn read(rig: &Rig, bus: u8, at: &str, reg: u16) -> u32 {
        let mut b = [0; 4];
        rig.pci.bus.config_read(bus, at.parse().unwrap(), reg, &mut b);
        u32::from_le_bytes(b)
    }

    #[test]
    fn devices_sit_behind_ports() {
        let rig = Rig::new();
        let ctx = rig.context();
        let make = |name, list: &[(&str, &str)]| registry::create(&ctx, name, &props(list));
        make("pcie-root-port", &[("id", "pci.1"), ("addr", "0x2.0x1"), ("hotplug", "off")])
            .unwrap();
        make("virtio-rng-pci", &[("bus", "pci.1"), ("addr", "0x0")]).unwrap();
        let read = |bus: u8, at: &str, reg: u16| read(&rig, bus, at, reg);
        assert_eq!(read(0, "2.1", 0), 0x000c_1b36);
        assert_eq!(read(0, "2.1", 0x0c) >> 16 & 0x7f, 1, "a type 1 header");
        assert_eq!(read(1, "0", 0), u32::MAX, "not reachable before there are bus numbers");
        rig.pci.bus.config_write(0, "2.1".parse().unwrap(), 0x18, &[0, 1, 1]);
        assert_eq!(read(1, "0", 0), 0x1044_1af4);
        let faults = |name, list: &[(&str, &str)]| make(name, list).err().unwrap()[0].to_string();
        assert!(faults("virtio-rng-pci", &[("bus", "pci.2")]).contains("did you mean 'pci.1'?"));
        assert!(faults("virtio-rng-pci", &[("bus", "pci.1")]).contains("no PCI slot is free"));
        let at = [("bus", "pci.1"), ("addr", "1")];
        assert!(faults("virtio-rng-pci", &at).contains("behind a PCI Express port"));
        assert!(faults("pcie-root-port", &[("id", "pci.1")]).contains("already"));
        assert!(faults("pcie-root-port", &[("bus", "pci.1")]).contains("root bus"));
    }

    /// A port as a system sees it, found by its capabilities.
    struct Slot {
        rig: Rig,
        ctx: registry::DeviceContext,
        port: Arc<RootPort>,
        express: u16,
        told: Arc<Mutex<Vec<Outcome>>>,
    }

    const BUTTON: u16 = 1;
    const PRESENCE: u16 = 1 << 3;
    const PRESENT: u16 = 1 << 6;
    const LINK: u16 = 1 << 8;
    /// Button, presence and link events, and interrupts for them.
    const ENABLES: u16 = 1 | 1 << 3 | 1 << 5 | 1 << 12;
    const ON: u16 = 1 << 8;
    const BLINK: u16 = 2 << 8;
    const OFF: u16 = 3 << 8 | 1 << 10;

    impl Slot {
        fn new() -> Slot {
            let rig = Rig::new();
            let ctx = rig.context();
            let given = props(&[("id", "pci.1"), ("addr", "2"), ("slot", "7")]);
            registry::create(&ctx, "pcie-root-port", &given).unwrap();
            let port: Arc<RootPort> = ctx.directory.find(Some("pci.1")).unwrap();
            let mut slot = Slot { rig, ctx, port, express: 0, told: Arc::default() };
            slot.write(0x18, &[0, 1, 1]);
            let (mut at, mut msi) = (slot.read(0x34) as u16 & 0xff, 0);
            while at != 0 {
                match slot.read(at) & 0xff {
                    0x10 => slot.express = at,
                    0x05 => msi = at,
                    _ => {}
                }
                at = (slot.read(at) >> 8) as u16 & 0xff;
            }
            slot.write(4, &4u16.to_le_bytes());
            slot.write(msi + 4, &0xfee0_0000u32.to_le_bytes());
            slot.write(msi + 12, &0x41u16.to_le_bytes());
            slot.write(msi + 2, &1u16.to_le_bytes());
            slot
        }
        fn read(&self, reg: u16) -> u32 {
            read(&self.rig, 0, "2", reg)
        }
        fn write(&self, reg: u16, data: &[u8]) {
            self.rig.pci.bus.config_write(0, "2".parse().unwrap(), reg, data);
        }
        fn status(&self) -> u16 {
            (self.read(self.express + 0x18) >> 16) as u16
        }
        fn link(&self) -> bool {
            self.read(self.express + 0x10) >> 29 & 1 != 0
        }
        fn clear(&self, events: u16) {
            self.write(self.express + 0x1a, &events.to_le_bytes());
        }
        fn control(&self, c: u16) {
            self.write(self.express + 0x18, &c.to_le_bytes());
        }
        fn device(&self) -> u32 {
            read(&self.rig, 1, "0", 0)
        }
        fn messages(&self) -> Vec<MsiMessage> {
            self.rig.sink.messages()
        }
        fn plug(&self) -> Arc<dyn Device> {
            let given = props(&[("bus", "pci.1")]);
            let d = registry::create(&self.ctx, "virtio-rng-pci", &given).unwrap();
            self.port.inserted();
            d
        }
        fn request(&self) -> Result<(), Unwilling> {
            let told = self.told.clone();
            self.port.request_removal(Box::new(move |o| told.lock().unwrap().push(o)))
        }
        fn told(&self) -> Vec<Outcome> {
            std::mem::take(&mut self.told.lock().unwrap())
        }
    }

    #[test]
    fn a_device_comes_is_powered_and_goes() {
        let s = Slot::new();
        assert_eq!(s.read(s.express + 0x14), 0x0004_005b | 7 << 19);
        assert_eq!(s.read(s.express) >> 16 & 0x1f0, 0x140, "root port with a slot");
        assert_eq!((s.status(), s.link()), (0, false));
        s.control(ENABLES | OFF);
        let card = s.plug();
        assert_eq!(s.status(), PRESENT | PRESENCE | BUTTON);
        assert_eq!(s.messages().len(), 1);
        assert_eq!(s.messages()[0].data, 0x41);
        assert_eq!((s.device(), s.link()), (u32::MAX, false), "it has no power");
        s.clear(PRESENCE | BUTTON);
        s.control(ENABLES | BLINK);
        assert_eq!(s.status(), PRESENT | LINK);
        assert!(s.link() && s.device() == 0x1044_1af4);
        assert_eq!(s.messages().len(), 2, "one for each time that events begin");
        s.clear(LINK);
        assert_eq!(s.request(), Err(Unwilling::Busy));
        s.control(ENABLES | ON);
        assert_eq!(s.told(), []);
        s.request().unwrap();
        assert_eq!(s.request(), Err(Unwilling::Pending));
        assert_eq!((s.status(), s.messages().len()), (PRESENT | BUTTON, 3));
        s.clear(BUTTON);
        s.control(ENABLES | BLINK);
        assert_eq!(s.told(), []);
        let left = Arc::strong_count(&card);
        s.control(ENABLES | OFF);
        assert_eq!(s.told(), [Outcome::Removed]);
        assert_eq!((s.status(), s.device(), s.link()), (PRESENCE | LINK, u32::MAX, false));
        assert_eq!(Arc::strong_count(&card), left - 1, "the bus has let go of it");
        // The slot takes another.
        s.clear(PRESENCE | LINK);
        s.plug();
        s.control(ENABLES | ON);
        assert_eq!(s.device(), 0x1044_1af4);
    }

    #[test]
    fn a_guest_may_refuse_or_turn_off_for_itself() {
        let s = Slot::new();
        s.control(ENABLES | OFF);
        s.plug();
        s.control(ENABLES | ON);
        s.request().unwrap();
        s.control(ENABLES | BLINK);
        s.control(ENABLES | ON);
        assert_eq!(s.told(), [Outcome::Refused]);
        // Without a request the device stays, without power.
        s.control(ENABLES | OFF);
        assert_eq!((s.device(), s.status() & PRESENT), (u32::MAX, PRESENT));
        s.control(ENABLES | ON);
        assert_eq!(s.device(), 0x1044_1af4);
        s.control(ENABLES | OFF);
        s.request().unwrap();
        assert_eq!(s.told(), [Outcome::Removed]);
    }

    #[test]
    fn a_reset_powers_what_is_there_and_removes_what_was_asked_for() {
        let s = Slot::new();
        s.plug();
        s.rig.pci.bus.reset();
        assert_eq!((s.status(), s.link()), (PRESENT, true));
        assert_eq!(s.read(s.express + 0x18) as u16, ON);
        s.request().unwrap();
        assert_eq!(s.messages().len(), 0, "nobody asked for interrupts");
        s.rig.pci.bus.reset();
        assert_eq!((s.told(), s.status(), s.link()), (vec![Outcome::Removed], 0, false));
    }

    #[test]
    fn every_write_is_harmless() {
        let s = Slot::new();
        s.plug();
        for at in (0..0x100).chain([0xffc, 0xfff]) {
            for data in [&[0xff; 4][..], &[0; 4], &[0xff; 2], &[0x5a], &[]] {
                s.write(at, data);
            }
        }
        s.request().ok();
        for c in 0..=u16::MAX >> 3 {
            s.control(c << 3);
        }
        s.rig.pci.bus.reset();
        assert_eq!(s.device(), u32::MAX);
    }
}
