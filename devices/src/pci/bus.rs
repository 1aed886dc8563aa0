//! Buses: which function answers a configuration access, and where a slot's INTx goes.

use super::config::{CONFIG_SIZE, reg};
use super::decode::Decoder;
use super::{Function, Intx, PciError, Pin};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use tandem_accel::irq::{IrqLine, MsiSink};

/// Device (slot) 0–31 and function 0–7 on a bus.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Devfn(u8);

impl Devfn {
    /// `slot` 0–31, `function` 0–7; `None` beyond.
    pub const fn new(slot: u8, function: u8) -> Option<Devfn> {
        if slot < 32 && function < 8 { Some(Devfn(slot << 3 | function)) } else { None }
    }
    /// From the byte of a configuration address.
    pub const fn from_byte(b: u8) -> Devfn {
        Devfn(b)
    }
    /// Slot.
    pub const fn slot(self) -> u8 {
        self.0 >> 3
    }
    /// Function.
    pub const fn function(self) -> u8 {
        self.0 & 7
    }
}

impl fmt::Display for Devfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}.{}", self.slot(), self.function())
    }
}

impl fmt::Debug for Devfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Devfn {
    type Err = PciError;
    /// `SLOT` or `SLOT.FUNCTION` in hexadecimal, as on QEMU's command line.
    fn from_str(s: &str) -> Result<Devfn, PciError> {
        let (slot, function) = s.split_once('.').unwrap_or((s, "0"));
        let hex = |t: &str| u8::from_str_radix(t.strip_prefix("0x").unwrap_or(t), 16).ok();
        hex(slot).zip(hex(function)).and_then(|(s, f)| Devfn::new(s, f)).ok_or_else(|| {
            PciError(format!(
                "'{s}' is no PCI address: write SLOT or SLOT.FUNCTION in hexadecimal, \
                 slot 0 to 1f, function 0 to 7"
            ))
        })
    }
}

/// Where the INTx pins of a bus's slots lead.
pub trait IntxRoute: Send + Sync {
    /// A new wire from pin `pin` of `slot` (0–31).
    fn line(&self, slot: u8, pin: Pin) -> IrqLine;
    /// The ISA IRQ that the pin reaches now, for the interrupt line register.
    fn isa_irq(&self, slot: u8, pin: Pin) -> Option<u8>;
}

/// The way up through a bridge in `slot`.
struct Swizzle {
    upstream: Arc<dyn IntxRoute>,
    slot: u8,
}

impl IntxRoute for Swizzle {
    fn line(&self, slot: u8, pin: Pin) -> IrqLine {
        self.upstream.line(self.slot, pin.swizzle(slot))
    }
    fn isa_irq(&self, slot: u8, pin: Pin) -> Option<u8> {
        self.upstream.isa_irq(self.slot, pin.swizzle(slot))
    }
}

/// A device on a bus: one function.
pub trait PciDevice: Send + Sync {
    /// Its configuration core.
    fn function(&self) -> &Function;
    /// Reads configuration space; `at + data.len()` is at most 4096.
    fn config_read(&self, at: u16, data: &mut [u8]) {
        self.function().read(at, data);
    }
    /// Writes configuration space; `at + data.len()` is at most 4096.
    fn config_write(&self, at: u16, data: &[u8]) {
        self.function().write(at, data);
    }
    /// Back to the state after power-on.
    fn reset(&self) {
        self.function().reset();
    }
    /// The bus behind it, if it is a bridge.
    fn secondary(&self) -> Option<&Arc<Bus>> {
        None
    }
}

/// What is at an address of the bus.
enum Place {
    Reserved,
    Device(Arc<dyn PciDevice>),
}

/// A bus: up to 256 functions.
pub struct Bus {
    decoder: Arc<Decoder>,
    msi: Arc<dyn MsiSink>,
    intx: Arc<dyn IntxRoute>,
    root: bool,
    /// Slots: 32, or 1 behind a PCI Express port.
    slots: u8,
    /// Whether configuration accesses reach it.
    link: AtomicBool,
    places: RwLock<BTreeMap<Devfn, Place>>,
}

impl Bus {
    /// A root bus.
    pub fn root(
        decoder: Arc<Decoder>,
        msi: Arc<dyn MsiSink>,
        intx: Arc<dyn IntxRoute>,
    ) -> Arc<Bus> {
        Arc::new(Bus {
            decoder,
            msi,
            intx,
            root: true,
            slots: 32,
            link: AtomicBool::new(true),
            places: RwLock::default(),
        })
    }

    /// Whether it is a root bus.
    pub fn is_root(&self) -> bool {
        self.root
    }

    /// The bus behind the bridge that will sit at `at` of this bus.
    pub fn behind_bridge(&self, at: Devfn) -> Arc<Bus> {
        self.behind(at, 32)
    }

    /// The link behind the PCI Express port that will sit at `at` of this bus: it has one slot.
    pub fn behind_port(&self, at: Devfn) -> Arc<Bus> {
        self.behind(at, 1)
    }

    fn behind(&self, at: Devfn, slots: u8) -> Arc<Bus> {
        let intx = Arc::new(Swizzle { upstream: self.intx.clone(), slot: at.slot() });
        Arc::new(Bus {
            decoder: self.decoder.clone(),
            msi: self.msi.clone(),
            intx,
            root: false,
            slots,
            link: AtomicBool::new(true),
            places: RwLock::default(),
        })
    }

    /// Connects configuration accesses with the devices, or parts them.
    pub fn set_link(&self, up: bool) {
        self.link.store(up, Ordering::Release);
    }

    /// Who answers at which address.
    pub fn decoder(&self) -> &Arc<Decoder> {
        &self.decoder
    }

    /// Reserves an address: `at`, or function 0 of the first free slot, which on a root bus is none
    /// below 1.
    pub fn slot(self: &Arc<Self>, at: Option<Devfn>) -> Result<Slot, PciError> {
        let mut places = self.places.write().unwrap();
        let devfn = match at {
            Some(at) if places.contains_key(&at) => {
                return Err(PciError(format!(
                    "PCI address {at} is taken; choose another or leave addr out"
                )));
            }
            Some(at) if at.slot() >= self.slots => {
                return Err(PciError(format!(
                    "there is no PCI address {at} behind a PCI Express port; leave addr out"
                )));
            }
            Some(at) => at,
            None => (u8::from(self.root)..self.slots)
                .filter_map(|s| Devfn::new(s, 0))
                .find(|d| !places.keys().any(|k| k.slot() == d.slot()))
                .ok_or_else(|| PciError("no PCI slot is free; use fewer devices".into()))?,
        };
        places.insert(devfn, Place::Reserved);
        Ok(Slot { bus: self.clone(), devfn, attached: false })
    }

    /// The devices in address order.
    pub fn devices(&self) -> Vec<(Devfn, Arc<dyn PciDevice>)> {
        let places = self.places.read().unwrap();
        let device = |(at, p): (&Devfn, &Place)| match p {
            Place::Device(d) => Some((*at, d.clone())),
            Place::Reserved => None,
        };
        places.iter().filter_map(device).collect()
    }

    /// Takes the device at `at` away.
    pub fn detach(&self, at: Devfn) -> Option<Arc<dyn PciDevice>> {
        match self.places.write().unwrap().remove(&at)? {
            Place::Device(d) => Some(d),
            Place::Reserved => None,
        }
    }

    /// Takes all devices away.
    pub fn detach_all(&self) {
        let gone = {
            let mut places = self.places.write().unwrap();
            let (gone, kept) = std::mem::take(&mut *places)
                .into_iter()
                .partition::<BTreeMap<_, _>, _>(|(_, p)| matches!(p, Place::Device(_)));
            *places = kept;
            gone
        };
        // Whoever drops the last of one does so without the bus's lock.
        drop(gone);
    }

    fn device(&self, at: Devfn) -> Option<Arc<dyn PciDevice>> {
        match self.places.read().unwrap().get(&at)? {
            Place::Device(d) => Some(d.clone()),
            Place::Reserved => None,
        }
    }

    /// The function at `at` of bus `number`, where this bus is number `own`.
    fn find(&self, own: u8, number: u8, at: Devfn) -> Option<Arc<dyn PciDevice>> {
        if !self.link.load(Ordering::Acquire) {
            return None;
        }
        if number == own {
            return self.device(at);
        }
        self.devices().into_iter().find_map(|(_, d)| {
            let (first, last) = d.function().secondary_range()?;
            // A bus number that does not grow downwards would let a guest make us go in circles.
            if first <= own || !(first..=last).contains(&number) {
                return None;
            }
            d.secondary()?.find(first, number, at)
        })
    }

    /// Whether a slot has a function besides function 0.
    fn multifunction(&self, at: Devfn) -> bool {
        let places = self.places.read().unwrap();
        places
            .range(at..=Devfn(at.0 | 7))
            .any(|(k, p)| k.function() != 0 && matches!(p, Place::Device(_)))
    }

    /// Reads configuration space of a function on this root bus or behind it.
    pub fn config_read(&self, number: u8, at: Devfn, reg: u16, data: &mut [u8]) {
        data.fill(0xff);
        if usize::from(reg) + data.len() > CONFIG_SIZE {
            return;
        }
        let Some(d) = self.find(0, number, at) else { return };
        d.config_read(reg, data);
        let header = usize::from(reg::HEADER_TYPE);
        if let Some(i) = header.checked_sub(usize::from(reg)).filter(|i| *i < data.len())
            && number == 0
            && at.function() == 0
            && self.multifunction(at)
        {
            data[i] |= 0x80;
        }
    }

    /// Writes configuration space of a function on this root bus or behind it.
    pub fn config_write(&self, number: u8, at: Devfn, reg: u16, data: &[u8]) {
        if usize::from(reg) + data.len() > CONFIG_SIZE {
            return;
        }
        if let Some(d) = self.find(0, number, at) {
            d.config_write(reg, data);
        }
    }

    /// Resets every device on this bus and behind it.
    pub fn reset(&self) {
        for (_, d) in self.devices() {
            if let Some(bus) = d.secondary() {
                bus.reset();
            }
            d.reset();
        }
    }

    /// See [`IntxRoute::isa_irq`].
    pub fn isa_irq(&self, slot: u8, pin: Pin) -> Option<u8> {
        self.intx.isa_irq(slot, pin)
    }
}

/// A reserved address on a bus, free again when dropped without a device.
pub struct Slot {
    bus: Arc<Bus>,
    devfn: Devfn,
    attached: bool,
}

impl Slot {
    /// The address.
    pub fn devfn(&self) -> Devfn {
        self.devfn
    }
    /// The bus.
    pub fn bus(&self) -> &Arc<Bus> {
        &self.bus
    }
    /// Pin `pin` of this slot.
    pub fn intx(&self, pin: Pin) -> Arc<Intx> {
        Arc::new(Intx::new(self.bus.intx.line(self.devfn.slot(), pin), pin))
    }
    /// Where messages go.
    pub fn msi(&self) -> Arc<dyn MsiSink> {
        self.bus.msi.clone()
    }
    /// Who answers at which address.
    pub fn decoder(&self) -> Arc<Decoder> {
        self.bus.decoder.clone()
    }
    /// Puts `device` here.
    pub fn attach(mut self, device: Arc<dyn PciDevice>) {
        self.attached = true;
        self.bus.places.write().unwrap().insert(self.devfn, Place::Device(device));
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if !self.attached {
            self.bus.places.write().unwrap().remove(&self.devfn);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::testing::{Rig, rig};
    use crate::pci::{FunctionSpec, Identity};

    struct Plain(Function, Option<Arc<Bus>>);
    impl PciDevice for Plain {
        fn function(&self) -> &Function {
            &self.0
        }
        fn secondary(&self) -> Option<&Arc<Bus>> {
            self.1.as_ref()
        }
    }

    fn put(r: &Rig, bus: &Arc<Bus>, at: &str, device: u16) {
        let slot = bus.slot(Some(at.parse().unwrap())).unwrap();
        let id = Identity { vendor: 0x1234, device, ..Identity::default() };
        slot.attach(Arc::new(Plain(
            FunctionSpec::new("x", id).build(r.bus.decoder().clone()),
            None,
        )));
    }

    fn read32(bus: &Bus, number: u8, at: &str, reg: u16) -> u32 {
        let mut d = [0; 4];
        bus.config_read(number, at.parse().unwrap(), reg, &mut d);
        u32::from_le_bytes(d)
    }

    #[test]
    fn addresses_parse_like_qemu() {
        assert_eq!("1f.2".parse::<Devfn>().unwrap(), Devfn::new(0x1f, 2).unwrap());
        assert_eq!("0x4".parse::<Devfn>().unwrap().to_string(), "04.0");
        for bad in ["", "20", "1.8", "x", "1.2.3"] {
            assert!(bad.parse::<Devfn>().is_err(), "{bad}");
        }
    }

    #[test]
    fn absent_functions_read_ones_and_slots_free_themselves() {
        let r = rig();
        put(&r, &r.bus, "2", 1);
        assert_eq!(read32(&r.bus, 0, "2", 0), 0x1_1234);
        assert_eq!(read32(&r.bus, 0, "3", 0), u32::MAX);
        assert_eq!(read32(&r.bus, 1, "2", 0), u32::MAX);
        assert_eq!(read32(&r.bus, 0, "2", 0xffe), u32::MAX);
        assert!(r.bus.slot(Some("2".parse().unwrap())).is_err());
        let s = r.bus.slot(None).unwrap();
        assert_eq!(s.devfn().to_string(), "01.0");
        drop(s);
        assert_eq!(r.bus.slot(None).unwrap().devfn().to_string(), "01.0");
        assert_eq!(read32(&r.bus, 0, "2", 0xc) >> 16, 0);
        put(&r, &r.bus, "2.3", 9);
        assert_eq!(read32(&r.bus, 0, "2", 0xc) >> 16, 0x80);
    }

    #[test]
    fn bridges_pass_configuration_and_swizzled_interrupts() {
        let r = rig();
        let slot = r.bus.slot(Some("5".parse().unwrap())).unwrap();
        let behind = r.bus.behind_bridge(slot.devfn());
        let f = FunctionSpec::bridge("b", Identity::default()).build(r.bus.decoder().clone());
        slot.attach(Arc::new(Plain(f, Some(behind.clone()))));
        put(&r, &behind, "1", 7);
        assert_eq!(read32(&r.bus, 3, "1", 0), u32::MAX);
        r.bus.config_write(0, "5".parse().unwrap(), 0x18, &[0, 3, 3]);
        assert_eq!(read32(&r.bus, 3, "1", 0), 0x7_1234);
        // INTA of slot 1 behind slot 5: pin B of slot 5, PIRQ (5 + 1) % 4 + 4, GSI 22.
        let s = behind.slot(Some("1.1".parse().unwrap())).unwrap();
        s.intx(Pin::A).set(true);
        assert_eq!(r.sink.levels(), [(22, true)]);
    }
}
