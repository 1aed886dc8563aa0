//! The registry of device types: each registers itself where it is written, with name, bus,
//! description, typed properties and constructor. `-device NAME,prop=value`, its help, hot plugging
//! and introspection all read it; no file names every device.
//!
//! ```
//! # use tandem_devices::registry::*;
//! tandem_devices::inventory::submit! {
//!     DeviceType {
//!         name: "example",
//!         bus: BusKind::System,
//!         description: "does nothing",
//!         properties: &[Property {
//!             name: "size",
//!             kind: PropertyKind::Uint { min: 1, max: 16 },
//!             default: Some("4"),
//!             description: "how much of it",
//!         }],
//!         create: |_ctx, _props| { struct Example; impl Device for Example {
//!             fn reset(&self) {}
//!         } Ok(std::sync::Arc::new(Example)) },
//!     }
//! }
//! assert!(find("example").is_ok());
//! ```

use crate::firmware::bootorder::BootOrder;
use crate::gsi::IrqInputs;
use crate::pci::{Bus, Devfn};
use crate::power::PowerSink;
use crate::virtio::mmio::Slots;
use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use tandem_accel::bus::IoBus;
use tandem_accel::clock::Clock;
use tandem_accel::irq::MsiSink;
use tandem_accel::memory::GuestMap;
use tandem_accel::suggest::{closest_or, one_of};
use tandem_backends::block::drive::Drive;
use tandem_backends::chardev::CharBackend;
use tandem_backends::net::{MacAddr, Network};

/// One thing that is wrong with a device on a command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFault {
    /// What is wrong: a clause without a final period.
    pub what: String,
    /// What to do about it: likewise.
    pub remedy: String,
}

impl DeviceFault {
    /// `what` is wrong; do `remedy`.
    pub fn new(what: impl Into<String>, remedy: impl Into<String>) -> DeviceFault {
        DeviceFault { what: what.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for DeviceFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.what, self.remedy)
    }
}

impl std::error::Error for DeviceFault {}

impl From<crate::pci::PciError> for DeviceFault {
    fn from(e: crate::pci::PciError) -> DeviceFault {
        match e.0.split_once("; ") {
            Some((what, remedy)) => DeviceFault::new(what, remedy),
            None => DeviceFault::new(e.0, "change the device's properties"),
        }
    }
}

/// Where a device type plugs in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum BusKind {
    /// Directly on the machine.
    System,
    /// Legacy ports and lines.
    Isa,
    /// PCI.
    Pci,
    /// A port of a SATA adapter.
    Ide,
    /// A virtio-serial-pci device.
    VirtioSerial,
    /// A machine's places for virtio devices without PCI.
    VirtioMmio,
}

impl fmt::Display for BusKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BusKind::System => "System",
            BusKind::Isa => "ISA",
            BusKind::Pci => "PCI",
            BusKind::Ide => "IDE",
            BusKind::VirtioSerial => "virtio-serial",
            BusKind::VirtioMmio => "virtio",
        })
    }
}

/// Type of a property.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PropertyKind {
    /// `on` or `off`.
    Bool,
    /// A number, decimal or 0x hexadecimal.
    Uint {
        /// Least value.
        min: u64,
        /// Greatest value.
        max: u64,
    },
    /// Bytes: a number with an optional suffix K, M, G or T.
    Size,
    /// Text.
    Text,
    /// A PCI address, SLOT or SLOT.FUNCTION in hexadecimal.
    PciAddress,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// An Ethernet address of a single station.
    Mac,
}

impl fmt::Display for PropertyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PropertyKind::Bool => f.write_str("on|off"),
            PropertyKind::Uint { min: 0, max: u64::MAX } => f.write_str("number"),
            PropertyKind::Uint { min, max } => write!(f, "number {min:#x}-{max:#x}"),
            PropertyKind::Size => f.write_str("size"),
            PropertyKind::Text => f.write_str("text"),
            PropertyKind::PciAddress => f.write_str("slot[.function]"),
            PropertyKind::Choice(words) => f.write_str(&words.join("|")),
            PropertyKind::Mac => f.write_str("xx:xx:xx:xx:xx:xx"),
        }
    }
}

/// A property of a device type.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Property {
    /// Name.
    pub name: &'static str,
    /// Type.
    pub kind: PropertyKind,
    /// Value when it is not given, in the form a user would write; `None`: it is absent then.
    pub default: Option<&'static str>,
    /// What it means.
    pub description: &'static str,
}

/// Property of every device.
const COMMON: &[Property] = &[Property {
    name: "id",
    kind: PropertyKind::Text,
    default: None,
    description: "name of this device",
}];

/// Further properties of every PCI device.
const COMMON_PCI: &[Property] = &[
    Property {
        name: "addr",
        kind: PropertyKind::PciAddress,
        default: None,
        description: "slot and function on its bus; the first free slot if absent",
    },
    Property {
        name: "bus",
        kind: PropertyKind::Text,
        default: None,
        description: "the bus: pcie.0, or the id of a root port; pcie.0 if absent",
    },
    Property {
        name: "multifunction",
        kind: PropertyKind::Bool,
        default: Some("off"),
        description: "says that the slot has more functions; it follows from there being some",
    },
];

/// PCI buses by name, so that devices can be put behind ports.
#[derive(Default)]
pub struct Buses(Mutex<BTreeMap<String, Arc<Bus>>>);

impl Buses {
    /// The name of the root bus.
    pub const ROOT: &'static str = "pcie.0";

    /// Adds the bus `name`; does nothing and returns false if the name is taken.
    pub fn add(&self, name: &str, bus: &Arc<Bus>) -> bool {
        let mut all = self.0.lock().unwrap();
        let free = name != Buses::ROOT && !all.contains_key(name);
        if free {
            all.insert(name.into(), bus.clone());
        }
        free
    }

    /// The bus `name`, behind a port.
    fn find(&self, name: &str) -> Result<Arc<Bus>, DeviceFault> {
        let all = self.0.lock().unwrap();
        all.get(name).cloned().ok_or_else(|| {
            let names: Vec<&str> =
                [Buses::ROOT].into_iter().chain(all.keys().map(String::as_str)).collect();
            DeviceFault::new(format!("there is no bus '{name}'"), one_of(name, &names))
        })
    }
}

/// Value of a property.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Value {
    /// Of [`PropertyKind::Bool`].
    Bool(bool),
    /// Of [`PropertyKind::Uint`] and [`PropertyKind::Size`].
    Uint(u64),
    /// Of [`PropertyKind::Text`] and [`PropertyKind::Choice`].
    Text(String),
    /// Of [`PropertyKind::PciAddress`].
    PciAddress(Devfn),
    /// Of [`PropertyKind::Mac`].
    Mac(MacAddr),
}

impl PropertyKind {
    /// The value that `s` writes; else what would be right.
    fn parse(self, s: &str) -> Result<Value, String> {
        match self {
            PropertyKind::Bool => match s {
                "on" | "yes" | "true" => Ok(Value::Bool(true)),
                "off" | "no" | "false" => Ok(Value::Bool(false)),
                _ => Err("write on or off".into()),
            },
            PropertyKind::Uint { min, max } => number(s)
                .filter(|n| (min..=max).contains(n))
                .map(Value::Uint)
                .ok_or_else(|| format!("write a number from {min:#x} to {max:#x}")),
            PropertyKind::Size => size(s)
                .map(Value::Uint)
                .ok_or_else(|| "write a number of bytes, or one with K, M, G or T".into()),
            PropertyKind::Text => Ok(Value::Text(s.into())),
            PropertyKind::PciAddress => s.parse().map(Value::PciAddress).map_err(|_| {
                "write SLOT or SLOT.FUNCTION in hexadecimal, 0 to 1f and 0 to 7".into()
            }),
            PropertyKind::Choice(words) => match words.iter().find(|w| **w == s) {
                Some(w) => Ok(Value::Text((*w).into())),
                None => Err(one_of(s, words)),
            },
            PropertyKind::Mac => match s.parse::<MacAddr>() {
                Ok(m) if m.is_multicast() => {
                    Err("that is a group's address; make the first byte even".into())
                }
                Ok(m) => Ok(Value::Mac(m)),
                Err(e) => Err(e.to_string()),
            },
        }
    }
}

fn number(s: &str) -> Option<u64> {
    match s.strip_prefix("0x").or_else(|| s.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => s.parse().ok(),
    }
}

fn size(s: &str) -> Option<u64> {
    let shift = match s.bytes().last()?.to_ascii_uppercase() {
        b'K' => 10,
        b'M' => 20,
        b'G' => 30,
        b'T' => 40,
        _ => return number(s),
    };
    number(s.get(..s.len() - 1)?)?.checked_mul(1 << shift)
}

/// Checked values of a device's properties, defaults included.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Properties(BTreeMap<&'static str, Value>);

impl Properties {
    /// A value; `None` if it was not given and has no default.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }
    /// A boolean; off if absent.
    pub fn bool(&self, name: &str) -> bool {
        matches!(self.get(name), Some(Value::Bool(true)))
    }
    /// A number or size, if present.
    pub fn uint(&self, name: &str) -> Option<u64> {
        match self.get(name) {
            Some(Value::Uint(n)) => Some(*n),
            _ => None,
        }
    }
    /// A text or choice, if present.
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.get(name) {
            Some(Value::Text(t)) => Some(t),
            _ => None,
        }
    }
    /// An Ethernet address, if present.
    pub fn mac(&self, name: &str) -> Option<MacAddr> {
        match self.get(name) {
            Some(Value::Mac(m)) => Some(*m),
            _ => None,
        }
    }
    /// A PCI address, if present.
    pub fn pci_address(&self, name: &str) -> Option<Devfn> {
        match self.get(name) {
            Some(Value::PciAddress(a)) => Some(*a),
            _ => None,
        }
    }
}

/// Host-side ends that devices name by id.
#[derive(Clone, Default)]
pub struct Backends {
    /// Character devices.
    pub chardevs: BTreeMap<String, Arc<dyn CharBackend>>,
    /// Drives.
    pub drives: BTreeMap<String, Arc<Drive>>,
    /// Names of drives for discs in which there is none.
    pub empty: BTreeSet<String>,
    /// Networks.
    pub networks: BTreeMap<String, Arc<Network>>,
}

impl Backends {
    /// The character device `id`.
    pub fn chardev(&self, id: &str) -> Result<Arc<dyn CharBackend>, DeviceFault> {
        self.chardevs.get(id).cloned().ok_or_else(|| {
            let names: Vec<&str> = self.chardevs.keys().map(String::as_str).collect();
            let remedy = if names.is_empty() { "make it first".into() } else { one_of(id, &names) };
            DeviceFault::new(format!("there is no character device '{id}'"), remedy)
        })
    }

    /// The network `id`.
    pub fn network(&self, id: &str) -> Result<Arc<Network>, DeviceFault> {
        self.networks.get(id).cloned().ok_or_else(|| {
            let names: Vec<&str> = self.networks.keys().map(String::as_str).collect();
            let remedy = match names[..] {
                [] => format!("make it first with --netdev user,id={id}"),
                _ => one_of(id, &names),
            };
            DeviceFault::new(format!("there is no network '{id}'"), remedy)
        })
    }

    /// The drive `id`.
    pub fn drive(&self, id: &str) -> Result<Arc<Drive>, DeviceFault> {
        self.drives.get(id).cloned().ok_or_else(|| {
            let names: Vec<&str> = self.drives.keys().map(String::as_str).collect();
            let remedy = match names[..] {
                [] => "make it first with --drive".to_string(),
                _ => one_of(id, &names),
            };
            DeviceFault::new(format!("there is no drive '{id}'"), remedy)
        })
    }
}

/// Devices that others look for: a bus that ports plug into, a balloon that an operator squeezes.
#[derive(Clone, Default)]
pub struct Directory(Arc<Mutex<Vec<(String, Entry)>>>);

type Entry = Arc<dyn Any + Send + Sync>;

impl Directory {
    /// Adds a device; `id` is empty if it has none.
    pub fn add<T: Send + Sync + 'static>(&self, id: &str, device: Arc<T>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((id.into(), device));
    }

    /// Takes the devices called `id` out, of whatever type.
    pub fn remove(&self, id: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|(name, _)| name != id);
    }

    /// All devices of this type, in the order of their making.
    pub fn all<T: Send + Sync + 'static>(&self) -> Vec<Arc<T>> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().filter_map(|(_, d)| d.clone().downcast().ok()).collect()
    }

    /// The first device of this type, or the one called `id`.
    pub fn find<T: Send + Sync + 'static>(&self, id: Option<&str>) -> Option<Arc<T>> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut named = all.iter().filter(|(name, _)| id.is_none_or(|id| id == name));
        named.find_map(|(_, d)| d.clone().downcast().ok())
    }
}

/// What a constructor may need of the machine.
#[derive(Clone)]
pub struct DeviceContext {
    /// Both I/O spaces.
    pub io: Arc<IoBus>,
    /// Interrupt inputs.
    pub irqs: IrqInputs,
    /// Where messages go.
    pub msi: Arc<dyn MsiSink>,
    /// Guest time.
    pub clock: Arc<Clock>,
    /// Guest memory.
    pub memory: Arc<GuestMap>,
    /// Where power requests go.
    pub power: Arc<dyn PowerSink>,
    /// The root bus, on machines with PCI; for a constructor the bus that the device belongs on.
    pub pci: Option<Arc<Bus>>,
    /// Further PCI buses.
    pub buses: Arc<Buses>,
    /// Places for virtio devices without PCI, on machines that have them.
    pub virtio_mmio: Option<Arc<Slots>>,
    /// What devices say about the order of booting.
    pub boot_order: Arc<BootOrder>,
    /// Host-side ends.
    pub backends: Backends,
    /// Devices that others look for.
    pub directory: Directory,
}

impl DeviceContext {
    /// The bus that a PCI device belongs on.
    pub fn pci(&self) -> Result<&Arc<Bus>, DeviceFault> {
        self.pci
            .as_ref()
            .ok_or_else(|| DeviceFault::new("this machine has no PCI", "use --machine q35"))
    }
}

/// A device in being.
pub trait Device: Send + Sync {
    /// Back to the state after power-on. May be called twice in a row.
    fn reset(&self);
}

/// Makes a device from checked properties and puts it on its buses.
pub type Create = fn(&DeviceContext, &Properties) -> Result<Arc<dyn Device>, DeviceFault>;

/// A type of device.
pub struct DeviceType {
    /// Name, unique.
    pub name: &'static str,
    /// Where it plugs in.
    pub bus: BusKind,
    /// What it is, in a few words.
    pub description: &'static str,
    /// Its properties besides those that every device on its bus has.
    pub properties: &'static [Property],
    /// Constructor.
    pub create: Create,
}

inventory::collect!(DeviceType);

impl fmt::Debug for DeviceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceType({})", self.name)
    }
}

impl DeviceType {
    /// The name without what says the bus; the name itself if nothing does.
    fn short_name(&self) -> &'static str {
        let short = match self.bus {
            BusKind::Pci => self.name.strip_suffix("-pci"),
            BusKind::Isa => self.name.strip_prefix("isa-"),
            // "virtio-blk" alone is the PCI device.
            BusKind::System | BusKind::Ide | BusKind::VirtioSerial | BusKind::VirtioMmio => None,
        };
        short.unwrap_or(self.name)
    }

    /// All properties, its own first.
    pub fn properties(&self) -> impl Iterator<Item = &'static Property> {
        let pci = if self.bus == BusKind::Pci { COMMON_PCI } else { &[] };
        self.properties.iter().chain(pci).chain(COMMON)
    }

    /// Checks `given` (name, text) against the properties and fills in defaults. Every fault is
    /// reported.
    pub fn parse(&self, given: &[(String, String)]) -> Result<Properties, Vec<DeviceFault>> {
        let (mut values, mut faults) = (BTreeMap::new(), Vec::new());
        for (name, text) in given {
            let Some(p) = self.properties().find(|p| p.name == name) else {
                let names: Vec<_> = self.properties().map(|p| p.name).collect();
                faults.push(DeviceFault::new(
                    format!("device '{}' has no property '{name}'", self.name),
                    closest_or(name, &names, || {
                        format!("list its properties with --device {},help", self.name)
                    }),
                ));
                continue;
            };
            match p.kind.parse(text) {
                Ok(_) if values.contains_key(p.name) => faults.push(DeviceFault::new(
                    format!("property '{name}' of device '{}' is given twice", self.name),
                    "give it once",
                )),
                Ok(v) => {
                    values.insert(p.name, v);
                }
                Err(remedy) => faults.push(DeviceFault::new(
                    format!("property '{name}' of device '{}' cannot be '{text}'", self.name),
                    remedy,
                )),
            }
        }
        for p in self.properties() {
            if let (false, Some(d)) = (values.contains_key(p.name), p.default) {
                // A default that does not parse is a mistake of the type's author, which a test
                // over all types finds.
                values.extend(p.kind.parse(d).ok().map(|v| (p.name, v)));
            }
        }
        if faults.is_empty() { Ok(Properties(values)) } else { Err(faults) }
    }

    /// What `-device NAME,help` prints.
    pub fn help(&self) -> String {
        let mut s = format!("{}: {} ({} bus)\n", self.name, self.description, self.bus);
        for p in self.properties() {
            let default = p.default.map(|d| format!(", default {d}")).unwrap_or_default();
            s += &format!("  {}=<{}{default}>  {}\n", p.name, p.kind, p.description);
        }
        s
    }
}

/// How QEMU names virtio devices that have no legacy interface.
pub const NON_TRANSITIONAL: &str = "-non-transitional";

/// All types, by bus and name.
pub fn types() -> Vec<&'static DeviceType> {
    let mut all: Vec<_> = inventory::iter::<DeviceType>.into_iter().collect();
    all.sort_by_key(|t| (t.bus, t.name));
    all
}

/// The type called `name`; also without `-pci` at the end or `isa-` at the start.
pub fn find(name: &str) -> Result<&'static DeviceType, DeviceFault> {
    let all = types();
    // A virtio device without legacy interface is what ours are.
    let name =
        name.strip_suffix(NON_TRANSITIONAL).filter(|n| n.starts_with("virtio-")).unwrap_or(name);
    let exact = all.iter().copied().find(|t| t.name == name);
    exact.or_else(|| all.iter().copied().find(|t| t.short_name() == name)).ok_or_else(|| {
        let names: Vec<_> = all.iter().flat_map(|t| [t.name, t.short_name()]).collect();
        DeviceFault::new(
            format!("there is no device '{name}'"),
            closest_or(name, &names, || "list the devices with --device help".into()),
        )
    })
}

/// What `-device help` prints.
pub fn help() -> String {
    let mut s = String::new();
    let mut bus = None;
    for t in types() {
        if bus.replace(t.bus) != Some(t.bus) {
            s += &format!("{} devices:\n", t.bus);
        }
        s += &format!("  {:<20} {}\n", t.name, t.description);
    }
    s
}

/// Checks a device without making it.
pub fn check(
    name: &str,
    given: &[(String, String)],
) -> Result<(&'static DeviceType, Properties), Vec<DeviceFault>> {
    let t = find(name).map_err(|f| vec![f])?;
    Ok((t, t.parse(given)?))
}

/// Makes a device.
pub fn create(
    ctx: &DeviceContext,
    name: &str,
    given: &[(String, String)],
) -> Result<Arc<dyn Device>, Vec<DeviceFault>> {
    let (t, props) = check(name, given)?;
    let place = match props.text("bus").filter(|b| t.bus == BusKind::Pci && *b != Buses::ROOT) {
        Some(bus) => ctx.buses.find(bus).map(|bus| DeviceContext { pci: Some(bus), ..ctx.clone() }),
        None => Ok(ctx.clone()),
    };
    place
        .and_then(|ctx| (t.create)(&ctx, &props))
        .map_err(|f| vec![DeviceFault { what: format!("device '{name}': {}", f.what), ..f }])
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;
    impl Device for Nothing {
        fn reset(&self) {}
    }

    inventory::submit! {
        DeviceType {
            name: "registry-test",
            bus: BusKind::Pci,
            description: "for this test",
            properties: &[
                Property {
                    name: "iobase",
                    kind: PropertyKind::Uint { min: 0, max: 0xffff },
                    default: Some("0x501"),
                    description: "port",
                },
                Property {
                    name: "mode",
                    kind: PropertyKind::Choice(&["fast", "slow"]),
                    default: None,
                    description: "how",
                },
                Property {
                    name: "cache",
                    kind: PropertyKind::Size,
                    default: None,
                    description: "how much",
                },
                Property {
                    name: "quiet",
                    kind: PropertyKind::Bool,
                    default: Some("off"),
                    description: "whether",
                },
            ],
            create: |_, _| Ok(Arc::new(Nothing)),
        }
    }

    fn given(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    #[test]
    fn values_are_typed_and_defaults_filled_in() {
        let g = given(&[("mode", "slow"), ("cache", "64K"), ("addr", "1f.2"), ("quiet", "on")]);
        let (_, p) = check("registry-test", &g).unwrap();
        assert_eq!(p.uint("iobase"), Some(0x501));
        assert_eq!((p.text("mode"), p.uint("cache")), (Some("slow"), Some(65536)));
        assert_eq!(p.pci_address("addr"), Devfn::new(31, 2));
        assert!(p.bool("quiet") && p.get("id").is_none());
    }

    #[test]
    fn all_faults_are_told_with_a_remedy() {
        let g = given(&[
            ("iobas", "1"),
            ("iobase", "0x10000"),
            ("mode", "fas"),
            ("addr", "99"),
            ("cache", "12Q"),
            ("quiet", "on"),
            ("quiet", "off"),
        ]);
        let said: Vec<String> =
            check("registry-test", &g).unwrap_err().iter().map(|f| f.to_string()).collect();
        assert_eq!(said.len(), 6, "{said:?}");
        assert!(said[0].contains("did you mean 'iobase'?"));
        assert!(said[2].contains("did you mean 'fast'?"));
        assert_eq!(find("virtio-rng").unwrap().name, "virtio-rng-pci");
        assert!(find("virtio-rmg").unwrap_err().remedy.contains("'virtio-rng'"));
        let f = check("registry-tets", &[]).unwrap_err();
        assert!(f[0].to_string().contains("did you mean 'registry-test'?"));
    }

    #[test]
    fn every_type_is_well_formed() {
        let all = types();
        for pair in all.windows(2) {
            assert_ne!(pair[0].name, pair[1].name);
        }
        for t in all {
            for p in t.properties() {
                assert!(p.default.is_none_or(|d| p.kind.parse(d).is_ok()), "{} {}", t.name, p.name);
                assert_eq!(t.properties().filter(|q| q.name == p.name).count(), 1);
            }
            assert!(t.help().contains(t.description));
            assert!(help().contains(t.name));
        }
    }
}
