//! The configuration core of a function: header, BARs, command register, interrupt capabilities.
//!
//! A device makes a [`FunctionSpec`], adds what it has, and keeps the [`Function`] built from it.
//! Always: the windows claimed on the decoder are those that command register and BARs say.

use super::PciError;
use super::capability::Capability;
use super::config::{ConfigSpace, command, reg, status};
use super::decode::{ClaimId, Decoder, Direct, SpaceKind, Window};
use super::{Intx, Msi, Msix, msi};
use std::sync::{Arc, Mutex};
use tandem_accel::bus::BusDevice;

/// Who a function is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class code, 24 bits: base class, subclass, programming interface.
    pub class: u32,
    /// Subsystem vendor (type 0 headers).
    pub subsystem_vendor: u16,
    /// Subsystem (type 0 headers).
    pub subsystem: u16,
}

/// What a BAR decodes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BarKind {
    /// Ports.
    Io,
    /// Memory below 4 GiB.
    Mem32,
    /// Memory anywhere, prefetchable; takes two registers.
    Mem64,
}

/// A base address register and who answers behind it.
#[derive(Clone)]
pub struct Bar {
    /// What it decodes.
    pub kind: BarKind,
    /// Length in bytes: a power of two, at least 4 (I/O, at most 256) or 16 (memory).
    pub len: u64,
    /// Who answers.
    pub device: Arc<dyn BusDevice>,
}

impl Bar {
    fn valid(&self) -> bool {
        self.len.is_power_of_two()
            && match self.kind {
                BarKind::Io => (4..=256).contains(&self.len),
                BarKind::Mem32 => (16..=1 << 31).contains(&self.len),
                BarKind::Mem64 => (16..=1 << 40).contains(&self.len),
            }
    }
    fn space(&self) -> SpaceKind {
        match self.kind {
            BarKind::Io => SpaceKind::Io,
            BarKind::Mem32 | BarKind::Mem64 => SpaceKind::Memory,
        }
    }
    /// The address in the register at `at`, if it is usable.
    fn address(&self, cfg: &ConfigSpace, at: u16) -> Option<u64> {
        let (addr, limit) = match self.kind {
            BarKind::Io => (u64::from(cfg.u32(at) & !3), 0xffff),
            BarKind::Mem32 => (u64::from(cfg.u32(at) & !0xf), 0xffff_fffe),
            BarKind::Mem64 => (cfg.u64(at) & !0xf, (1 << 52) - 1),
        };
        // All ones is how software asks for the size, 0 is how it turns a BAR off.
        let last = addr.checked_add(self.len - 1)?;
        (addr != 0 && last <= limit).then_some(addr)
    }
}

struct BarSlot {
    index: u8,
    reg: u16,
    bar: Bar,
    direct: Option<Arc<Direct>>,
}

/// Bit of the expansion ROM's register that turns it on (PCI Local Bus 3.0 §6.2.5.2).
const ROM_ENABLE: u32 = 1;
/// The expansion ROM among the BARs, whose indices are below.
const ROM_INDEX: u8 = 6;

/// A function under construction.
pub struct FunctionSpec {
    name: String,
    config: ConfigSpace,
    bars: Vec<BarSlot>,
    bridge: bool,
    msi: Option<(u16, Arc<Msi>)>,
    msix: Option<(u16, Arc<Msix>)>,
    intx: Option<Arc<Intx>>,
}

impl FunctionSpec {
    fn with_header(name: &str, id: Identity, bridge: bool) -> FunctionSpec {
        let mut c = ConfigSpace::default();
        c.preset(reg::VENDOR, &id.vendor.to_le_bytes());
        c.preset(reg::DEVICE, &id.device.to_le_bytes());
        c.preset(reg::REVISION, &(id.class << 8 | u32::from(id.revision)).to_le_bytes());
        c.preset(reg::HEADER_TYPE, &[u8::from(bridge)]);
        c.allow(reg::COMMAND, &command::WRITABLE.to_le_bytes());
        c.allow_clear(reg::STATUS, &status::ERRORS.to_le_bytes());
        c.allow(reg::INTERRUPT_LINE, &[0xff]);
        // Cache line size: no effect, but software sets and expects to read it.
        c.allow(0x0c, &[0xff]);
        FunctionSpec {
            name: name.into(),
            config: c,
            bars: Vec::new(),
            bridge,
            msi: None,
            msix: None,
            intx: None,
        }
    }

    /// A function with a type 0 header; `name` names its windows in listings.
    pub fn new(name: &str, id: Identity) -> FunctionSpec {
        let mut f = Self::with_header(name, id, false);
        f.config.preset(reg::SUBSYSTEM_VENDOR, &id.subsystem_vendor.to_le_bytes());
        f.config.preset(reg::SUBSYSTEM, &id.subsystem.to_le_bytes());
        f
    }

    /// A PCI-to-PCI bridge: a type 1 header (PCI-to-PCI Bridge 1.2 §3.2) whose windows software may
    /// set. Windows behind it decode by their own BARs alone.
    pub fn bridge(name: &str, id: Identity) -> FunctionSpec {
        let mut f = Self::with_header(name, id, true);
        let c = &mut f.config;
        // Bus numbers and secondary latency timer; I/O, memory and 64-bit prefetchable windows.
        c.allow(0x18, &[0xff; 4]);
        c.preset(0x1c, &[0x01, 0x01]);
        c.allow(0x1c, &[0xf0, 0xf0]);
        c.allow_clear(0x1e, &status::ERRORS.to_le_bytes());
        c.allow(0x20, &[0xf0, 0xff, 0xf0, 0xff]);
        c.preset(0x24, &[0x01, 0, 0x01, 0]);
        c.allow(0x24, &[0xf0, 0xff, 0xf0, 0xff]);
        c.allow(0x28, &[0xff; 8]);
        c.allow(0x30, &[0xff; 4]);
        c.allow(reg::BRIDGE_CONTROL, &[0x5f, 0]);
        f
    }

    /// Registers beyond the header, for the device to fill and to open for writing.
    pub fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    /// Adds BAR `index` (0–5; 0–1 on a bridge; a 64-bit one takes `index + 1` too).
    pub fn bar(&mut self, index: u8, bar: Bar) -> Result<(), PciError> {
        let fail = |why: &str| Err(PciError(format!("{}: BAR {index} {why}", self.name)));
        let width = if bar.kind == BarKind::Mem64 { 2 } else { 1 };
        if index + width > if self.bridge { 2 } else { 6 } {
            return fail("does not exist");
        }
        if !bar.valid() {
            return fail("has an impossible length");
        }
        let taken = |s: &BarSlot| {
            let w = if s.bar.kind == BarKind::Mem64 { 2 } else { 1 };
            s.index < index + width && index < s.index + w
        };
        if self.bars.iter().any(taken) {
            return fail("is taken");
        }
        let at = reg::BAR0 + 4 * u16::from(index);
        let mask = !(bar.len - 1);
        match bar.kind {
            BarKind::Io => {
                self.config.preset(at, &1u32.to_le_bytes());
                self.config.allow(at, &(mask as u32 & !3).to_le_bytes());
            }
            BarKind::Mem32 => self.config.allow(at, &(mask as u32 & !0xf).to_le_bytes()),
            BarKind::Mem64 => {
                self.config.preset(at, &0xcu32.to_le_bytes());
                self.config.allow(at, &(mask & !0xf).to_le_bytes());
            }
        }
        self.bars.push(BarSlot { index, reg: at, bar, direct: None });
        Ok(())
    }

    /// Adds BAR `index` with memory behind it, which the guest reaches without a stop.
    pub fn memory_bar(
        &mut self,
        index: u8,
        kind: BarKind,
        direct: Arc<Direct>,
    ) -> Result<(), PciError> {
        self.bar(index, Bar { kind, len: direct.region.len(), device: direct.clone() })?;
        if let Some(slot) = self.bars.last_mut() {
            slot.direct = Some(direct);
        }
        Ok(())
    }

    /// Adds an expansion ROM. It shows when both its register and the command register say so.
    pub fn rom(&mut self, rom: Arc<Direct>) -> Result<(), PciError> {
        let bar = Bar { kind: BarKind::Mem32, len: rom.region.len(), device: rom.clone() };
        if !bar.valid() || bar.len > 16 << 20 || self.bridge {
            return Err(PciError(format!("{}: its ROM has an impossible length", self.name)));
        }
        let mask = !(bar.len as u32 - 1) | ROM_ENABLE;
        self.config.allow(reg::ROM, &mask.to_le_bytes());
        self.bars.push(BarSlot { index: ROM_INDEX, reg: reg::ROM, bar, direct: Some(rom) });
        Ok(())
    }

    /// Appends a capability; returns its offset.
    pub fn capability(&mut self, cap: &dyn Capability) -> Result<u16, PciError> {
        self.config.add_capability(cap).map_err(|e| PciError(format!("{}: {e}", self.name)))
    }

    /// Adds the MSI capability.
    pub fn msi(&mut self, msi: Arc<Msi>) -> Result<(), PciError> {
        let at = self.capability(&*msi)?;
        self.msi = Some((at, msi));
        Ok(())
    }

    /// Adds the MSI-X capability and its BAR (32-bit memory).
    pub fn msix(&mut self, msix: Arc<Msix>) -> Result<(), PciError> {
        let bar = Bar { kind: BarKind::Mem32, len: msix.bar_len(), device: msix.clone() };
        self.bar(msix.bar(), bar)?;
        let at = self.capability(&*msix)?;
        self.msix = Some((at, msix));
        Ok(())
    }

    /// Adds an interrupt pin.
    pub fn intx(&mut self, intx: Arc<Intx>) {
        self.config.preset(reg::INTERRUPT_PIN, &[intx.pin() as u8 + 1]);
        self.intx = Some(intx);
    }

    /// The function, which decodes on `decoder`. Presets of command register and BARs take effect.
    pub fn build(self, decoder: Arc<Decoder>) -> Function {
        let claims = self.bars.iter().map(|_| None).collect();
        let f = Function {
            name: self.name,
            decoder,
            bars: self.bars,
            bridge: self.bridge,
            msi: self.msi,
            msix: self.msix,
            intx: self.intx,
            state: Mutex::new(State { config: self.config, claims }),
        };
        f.apply(&mut f.state.lock().unwrap());
        f
    }
}

struct State {
    config: ConfigSpace,
    /// What each BAR has claimed, and where.
    claims: Vec<Option<(u64, ClaimId)>>,
}

/// A function in being.
pub struct Function {
    name: String,
    decoder: Arc<Decoder>,
    bars: Vec<BarSlot>,
    bridge: bool,
    msi: Option<(u16, Arc<Msi>)>,
    msix: Option<(u16, Arc<Msix>)>,
    intx: Option<Arc<Intx>>,
    state: Mutex<State>,
}

impl Function {
    /// Name in listings.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Reads configuration space as software does.
    pub fn read(&self, at: u16, data: &mut [u8]) {
        let mut s = self.state.lock().unwrap();
        if let Some(intx) = &self.intx {
            let old = s.config.u16(reg::STATUS) & !status::INTERRUPT;
            let new = old | if intx.pending() { status::INTERRUPT } else { 0 };
            s.config.poke(reg::STATUS, &new.to_le_bytes());
        }
        if let Some((cap, m)) = &self.msi {
            s.config.poke(cap + msi::PENDING, &m.pending().to_le_bytes());
        }
        s.config.read(at, data);
    }

    /// Writes configuration space as software does.
    pub fn write(&self, at: u16, data: &[u8]) {
        let mut s = self.state.lock().unwrap();
        if s.config.write(at, data) {
            self.apply(&mut s);
        }
    }

    /// A byte of configuration space.
    pub fn u8(&self, at: u16) -> u8 {
        self.state.lock().unwrap().config.u8(at)
    }
    /// A double word of configuration space.
    pub fn u32(&self, at: u16) -> u32 {
        self.state.lock().unwrap().config.u32(at)
    }
    /// A quad word of configuration space.
    pub fn u64(&self, at: u16) -> u64 {
        self.state.lock().unwrap().config.u64(at)
    }
    /// Sets read-only bytes that the device itself changes.
    pub fn poke(&self, at: u16, value: &[u8]) {
        self.state.lock().unwrap().config.poke(at, value);
    }

    /// The buses behind a bridge, first to last, as software numbered them.
    pub fn secondary_range(&self) -> Option<(u8, u8)> {
        if !self.bridge {
            return None;
        }
        let s = self.state.lock().unwrap();
        let (first, last) = (s.config.u8(reg::SECONDARY_BUS), s.config.u8(reg::SECONDARY_BUS + 1));
        (first != 0 && first <= last).then_some((first, last))
    }

    /// The BARs: register, kind, length.
    pub fn bars(&self) -> Vec<(u16, BarKind, u64)> {
        let bars = self.bars.iter().filter(|b| b.index != ROM_INDEX);
        bars.map(|b| (b.reg, b.bar.kind, b.bar.len)).collect()
    }

    /// Where BAR `index` answers now; `None` while it is off.
    pub fn bar_address(&self, index: u8) -> Option<u64> {
        let i = self.bars.iter().position(|b| b.index == index)?;
        self.state.lock().unwrap().claims[i].map(|(addr, _)| addr)
    }

    /// Back to the state after power-on: BARs off, interrupts off.
    pub fn reset(&self) {
        let mut s = self.state.lock().unwrap();
        s.config.reset();
        if let Some((_, m)) = &self.msix {
            m.reset();
        }
        if let Some(intx) = &self.intx {
            intx.set(false);
        }
        self.apply(&mut s);
    }

    /// Makes claims and interrupt gates follow the registers.
    fn apply(&self, s: &mut State) {
        let cmd = s.config.u16(reg::COMMAND);
        for (slot, claim) in self.bars.iter().zip(&mut s.claims) {
            let enable = match slot.bar.kind {
                BarKind::Io => command::IO,
                BarKind::Mem32 | BarKind::Mem64 => command::MEMORY,
            };
            let on = slot.index != ROM_INDEX || s.config.u32(reg::ROM) & ROM_ENABLE != 0;
            let wanted = match cmd & enable != 0 && on {
                true => slot.bar.address(&s.config, slot.reg),
                false => None,
            };
            if wanted == claim.map(|(addr, _)| addr) {
                continue;
            }
            if let Some((_, id)) = claim.take() {
                self.decoder.release(id);
            }
            *claim = wanted.map(|start| {
                let window = Window {
                    space: slot.bar.space(),
                    start,
                    len: slot.bar.len,
                    name: match slot.index {
                        ROM_INDEX => format!("{} ROM", self.name),
                        n => format!("{} BAR {n}", self.name),
                    },
                    device: slot.bar.device.clone(),
                    direct: slot.direct.clone(),
                };
                (start, self.decoder.claim(window))
            });
        }
        let master = cmd & command::BUS_MASTER != 0;
        if let Some((cap, m)) = &self.msi {
            m.set_bus_master(master);
            m.update(&s.config, *cap);
        }
        if let Some((cap, m)) = &self.msix {
            m.set_bus_master(master);
            m.set_control(s.config.u16(cap + 2));
        }
        if let Some(intx) = &self.intx {
            intx.set_disabled(cmd & command::INTX_DISABLE != 0);
        }
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        let s = self.state.get_mut().unwrap_or_else(|e| e.into_inner());
        for (_, id) in s.claims.iter_mut().filter_map(Option::take) {
            self.decoder.release(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Pin;
    use crate::pci::bus::IntxRoute;
    use crate::pci::testing::{Rig, rig};
    use tandem_accel::irq::MsiMessage;

    struct Echo(u8);
    impl BusDevice for Echo {
        fn read(&self, _: u64, data: &mut [u8]) {
            data.fill(self.0);
        }
        fn write(&self, _: u64, _: &[u8]) {}
    }

    fn bar(kind: BarKind, len: u64, v: u8) -> Bar {
        Bar { kind, len, device: Arc::new(Echo(v)) }
    }

    fn function(r: &Rig, v: u8) -> Function {
        let mut s = FunctionSpec::new("echo", Identity { vendor: 0x1234, ..Identity::default() });
        s.bar(0, bar(BarKind::Mem32, 0x1000, v)).unwrap();
        s.bar(1, bar(BarKind::Io, 0x20, v)).unwrap();
        s.bar(2, bar(BarKind::Mem64, 0x4000, v)).unwrap();
        assert!(s.bar(3, bar(BarKind::Mem32, 0x1000, v)).is_err());
        assert!(s.bar(5, bar(BarKind::Mem64, 0x1000, v)).is_err());
        assert!(s.bar(4, bar(BarKind::Mem32, 0x1001, v)).is_err());
        s.build(r.bus.decoder().clone())
    }

    fn mmio(r: &Rig, addr: u64) -> u8 {
        let mut d = [0];
        r.io.mmio_read(addr, &mut d);
        d[0]
    }

    #[test]
    fn bars_report_size_and_follow_the_command_register() {
        let r = rig();
        let f = function(&r, 7);
        for (at, v) in [(0x10, 0xffff_f000), (0x14, 0xffff_ffe1), (0x18, 0xffff_c00c)] {
            f.write(at, &[0xff; 4]);
            assert_eq!(f.u32(at), v);
        }
        f.write(0x1c, &[0xff; 4]);
        assert_eq!(f.u32(0x1c), 0xffff_ffff);
        f.write(0x10, &0xc000_0000u32.to_le_bytes());
        f.write(0x14, &0xc000u32.to_le_bytes());
        f.write(0x18, &0x10_0000_0000u64.to_le_bytes());
        assert!(r.io.mmio.ranges().is_empty() && r.io.pio.ranges().is_empty());
        f.write(4, &2u16.to_le_bytes());
        assert_eq!((mmio(&r, 0xc000_0fff), mmio(&r, 0x10_0000_3fff)), (7, 7));
        assert_eq!(f.bar_address(2), Some(0x10_0000_0000));
        assert!(r.io.pio.ranges().is_empty());
        f.write(4, &1u16.to_le_bytes());
        assert!(r.io.mmio.ranges().is_empty());
        assert_eq!(r.io.pio.ranges()[0].0, 0xc000);
        f.reset();
        assert!(r.io.pio.ranges().is_empty());
        drop(f);
    }

    #[test]
    fn colliding_bars_wait_for_each_other() {
        let r = rig();
        let (a, b) = (function(&r, 1), function(&r, 2));
        for f in [&a, &b] {
            f.write(0x10, &0xc000_0000u32.to_le_bytes());
            f.write(4, &2u16.to_le_bytes());
        }
        assert_eq!(mmio(&r, 0xc000_0000), 1);
        a.write(0x10, &0xd000_0000u32.to_le_bytes());
        assert_eq!((mmio(&r, 0xc000_0000), mmio(&r, 0xd000_0000)), (2, 1));
        drop(b);
        assert_eq!(mmio(&r, 0xc000_0000), 0xff);
    }

    #[test]
    fn memory_and_rom_are_mapped_where_software_puts_them() {
        use tandem_accel::memory::{GuestMap, Region, RegionKind};
        let r = rig();
        let map = GuestMap::new();
        map.add("ram", RegionKind::Ram, 0, 0x10_0000).unwrap();
        let region = |name, kind| {
            let region = Region::new(name, kind, 0, 0x2000).unwrap();
            Arc::new(Direct { map: map.clone(), region })
        };
        let (vram, rom) = (region("vram", RegionKind::Device), region("rom", RegionKind::Rom));
        assert!(rom.region.load(4, &[0x55]));
        let mut s = FunctionSpec::new("card", Identity::default());
        s.memory_bar(0, BarKind::Mem32, vram.clone()).unwrap();
        s.rom(rom).unwrap();
        let f = s.build(r.bus.decoder().clone());
        f.write(0x30, &[0xff; 4]);
        assert_eq!(f.u32(0x30), 0xffff_e001);
        f.write(0x10, &0xc000_0000u32.to_le_bytes());
        f.write(0x30, &0xc001_0000u32.to_le_bytes());
        f.write(4, &2u16.to_le_bytes());
        assert!(map.find(0xc001_0000).is_none());
        f.write(0x30, &0xc001_0001u32.to_le_bytes());
        let rom = map.find(0xc001_0004).unwrap();
        let mut b = [0];
        assert!(rom.kind == RegionKind::Rom && rom.read(4, &mut b) && b == [0x55]);
        assert_eq!(map.find(0xc000_1fff).unwrap().kind, RegionKind::Device);
        // On top of RAM it waits.
        f.write(0x10, &0x8_0000u32.to_le_bytes());
        assert_eq!(map.find(0x8_0000).unwrap().kind, RegionKind::Ram);
        f.write(0x10, &0xd000_0000u32.to_le_bytes());
        assert!(map.find(0xd000_0000).is_some() && map.find(0xc000_0000).is_none());
        r.io.mmio_write(0xd000_0001, &[9]);
        assert!(vram.region.read(1, &mut b) && b == [9]);
        f.reset();
        assert_eq!(map.regions().len(), 1);
    }

    #[test]
    fn interrupt_gates_follow_the_registers() {
        let r = rig();
        let intx = Arc::new(Intx::new(r.router.line(3, Pin::A), Pin::A));
        let msi = Msi::new(r.sink.clone(), 1);
        let mut s = FunctionSpec::new("irq", Identity::default());
        s.intx(intx.clone());
        s.msi(msi.clone()).unwrap();
        let f = s.build(r.bus.decoder().clone());
        intx.set(true);
        assert_eq!(r.sink.levels(), [(23, true)]);
        let mut st = [0; 2];
        f.read(6, &mut st);
        assert_eq!(st[0] & 8, 8);
        f.write(4, &(command::INTX_DISABLE | command::BUS_MASTER).to_le_bytes());
        assert_eq!(r.sink.levels(), [(23, false)]);
        // Two messages granted; vector 1 masked, then unmasked.
        f.write(0x44, &0xfee0_0000u32.to_le_bytes());
        f.write(0x4c, &0x30u16.to_le_bytes());
        f.write(0x50, &2u32.to_le_bytes());
        f.write(0x42, &0x11u16.to_le_bytes());
        msi.notify(0);
        msi.notify(1);
        let m = |data| MsiMessage { addr: 0xfee0_0000, data };
        assert_eq!(r.sink.messages(), [m(0x30)]);
        let mut p = [0; 4];
        f.read(0x54, &mut p);
        assert_eq!(p, [2, 0, 0, 0]);
        f.write(0x50, &[0; 4]);
        assert_eq!(r.sink.messages(), [m(0x30), m(0x31)]);
    }

    #[test]
    fn bridge_says_which_buses_are_behind_it() {
        let r = rig();
        let f = FunctionSpec::bridge("port", Identity::default()).build(r.bus.decoder().clone());
        assert_eq!(f.secondary_range(), None);
        f.write(0x18, &[0, 1, 4, 0]);
        assert_eq!(f.secondary_range(), Some((1, 4)));
        assert_eq!(f.u8(reg::HEADER_TYPE), 1);
    }
}
