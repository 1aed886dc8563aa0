//! A PCI Express root port: a bridge on the root bus with room for one device behind it
//! (PCIe 5.0 §7.5.1.3, §7.5.3). There is no hot-plug: its slot registers say so.

use super::bus::{Bus, PciDevice};
use super::capability::{Express, ExpressType, PowerManagement};
use super::function::{Function, FunctionSpec, Identity};
use super::{Devfn, PciError, Pin};
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
}

impl RootPort {
    /// Puts a root port on the root bus, at `at` or in the first free slot.
    pub fn attach(root: &Arc<Bus>, at: Option<Devfn>, name: &str) -> Result<Arc<Self>, PciError> {
        if !root.is_root() {
            return Err(PciError("a root port sits on the root bus; use bus=pcie.0".into()));
        }
        let slot = root.slot(at)?;
        let id = Identity {
            vendor: VENDOR_REDHAT,
            device: DEVICE_ROOT_PORT,
            class: CLASS_PCI_BRIDGE,
            ..Identity::default()
        };
        let mut spec = FunctionSpec::bridge(name, id);
        spec.intx(slot.intx(Pin::A));
        spec.capability(&PowerManagement)?;
        spec.capability(&Express { kind: ExpressType::RootPort })?;
        let behind = root.behind_bridge(slot.devfn());
        let function = spec.build(slot.decoder());
        let port = Arc::new(RootPort { function, behind });
        slot.attach(port.clone());
        Ok(port)
    }

    /// The bus behind it.
    pub fn behind(&self) -> &Arc<Bus> {
        &self.behind
    }
}

impl PciDevice for RootPort {
    fn function(&self) -> &Function {
        &self.function
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
                kind: PropertyKind::Choice(&["off"]),
                default: Some("off"),
                description: "devices may come and go",
            },
        ],
        create: |ctx, props| {
            let id = props.text("id").unwrap_or("pcie-root-port");
            let port = RootPort::attach(ctx.pci()?, props.pci_address("addr"), id)?;
            if let Some(id) = props.text("id")
                && !ctx.buses.add(id, port.behind())
            {
                return Err(DeviceFault::new(
                    format!("there is a bus '{id}' already"),
                    "give the port another id",
                ));
            }
            Ok(port)
        },
    }
}

#[cfg(test)]
mod tests {
    use crate::registry;
    use crate::virtio::testing::Rig;

    fn props(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    #[test]
    fn devices_sit_behind_ports() {
        let rig = Rig::new();
        let ctx = rig.context();
        let make = |name, list: &[(&str, &str)]| registry::create(&ctx, name, &props(list));
        make("pcie-root-port", &[("id", "pci.1"), ("addr", "0x2.0x1"), ("bus", "pcie.0")]).unwrap();
        make("virtio-rng-pci", &[("bus", "pci.1"), ("addr", "0x0")]).unwrap();
        let read = |bus: u8, at: &str, reg: u16| {
            let mut b = [0; 4];
            rig.pci.bus.config_read(bus, at.parse().unwrap(), reg, &mut b);
            u32::from_le_bytes(b)
        };
        assert_eq!(read(0, "2.1", 0), 0x000c_1b36);
        assert_eq!(read(0, "2.1", 0x0c) >> 16 & 0x7f, 1, "a type 1 header");
        assert_eq!(read(1, "0", 0), u32::MAX, "not reachable before there are bus numbers");
        rig.pci.bus.config_write(0, "2.1".parse().unwrap(), 0x18, &[0, 1, 1]);
        assert_eq!(read(1, "0", 0), 0x1044_1af4);
        let faults = |name, list: &[(&str, &str)]| make(name, list).err().unwrap()[0].to_string();
        assert!(faults("virtio-rng-pci", &[("bus", "pci.2")]).contains("did you mean 'pci.1'?"));
        assert!(faults("pcie-root-port", &[("id", "pci.1")]).contains("already"));
        assert!(faults("pcie-root-port", &[("bus", "pci.1")]).contains("root bus"));
    }
}
