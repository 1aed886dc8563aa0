//! The ways software reaches configuration space: mechanism #1 (ports 0xcf8 and 0xcfc, PCI 3.0
//! §3.2.2.3.2) and memory-mapped (ECAM, PCIe 5.0 §7.2.2).

use super::bus::{Bus, Devfn};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use tandem_accel::bus::{BusDevice, IoBus, Overlap};

/// CONFIG_ADDRESS port.
pub const CONFIG_ADDRESS: u16 = 0xcf8;
/// CONFIG_DATA port.
pub const CONFIG_DATA: u16 = 0xcfc;
/// Bytes of ECAM per bus.
pub const ECAM_PER_BUS: u64 = 1 << 20;

const ENABLE: u32 = 1 << 31;

/// The address latch. The reset control register lies inside its port range, at 0xcf9, and answers
/// byte accesses there.
struct AddressPort {
    latch: Arc<AtomicU32>,
    reset: Option<Arc<dyn BusDevice>>,
}

impl BusDevice for AddressPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&self.latch.load(Ordering::Relaxed).to_le_bytes()),
            (1, 1) if self.reset.is_some() => {
                self.reset.iter().for_each(|r| r.read(0, data));
            }
            _ => data.fill(0xff),
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[a, b, c, d]) => {
                self.latch.store(u32::from_le_bytes([a, b, c, d]), Ordering::Relaxed);
            }
            (1, [_]) => self.reset.iter().for_each(|r| r.write(0, data)),
            _ => {}
        }
    }
}

struct DataPort {
    latch: Arc<AtomicU32>,
    root: Arc<Bus>,
}

impl DataPort {
    fn target(&self, offset: u64) -> Option<(u8, Devfn, u16)> {
        let a = self.latch.load(Ordering::Relaxed);
        let reg = (a & 0xfc) as u16 + (offset & 3) as u16;
        (a & ENABLE != 0).then_some(((a >> 16) as u8, Devfn::from_byte((a >> 8) as u8), reg))
    }
}

impl BusDevice for DataPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.target(offset) {
            Some((bus, at, reg)) => self.root.config_read(bus, at, reg, data),
            None => data.fill(0xff),
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((bus, at, reg)) = self.target(offset) {
            self.root.config_write(bus, at, reg, data);
        }
    }
}

/// Puts mechanism #1 for `root` on the ports. `reset` is the reset control register (one byte),
/// which answers at 0xcf9.
pub fn map_ports(
    io: &IoBus,
    root: &Arc<Bus>,
    reset: Option<Arc<dyn BusDevice>>,
) -> Result<(), Overlap> {
    let latch = Arc::new(AtomicU32::new(0));
    let address = AddressPort { latch: latch.clone(), reset };
    io.pio.insert("PCI config address", CONFIG_ADDRESS.into(), 4, Arc::new(address))?;
    let data = DataPort { latch, root: root.clone() };
    io.pio.insert("PCI config data", CONFIG_DATA.into(), 4, Arc::new(data))
}

/// Memory-mapped configuration space of the buses of `root`, 1 MiB each, from bus 0.
pub struct Ecam {
    root: Arc<Bus>,
}

impl Ecam {
    /// For the functions on `root` and behind it.
    pub fn new(root: Arc<Bus>) -> Arc<Ecam> {
        Arc::new(Ecam { root })
    }
    /// The root bus.
    pub fn root(&self) -> &Arc<Bus> {
        &self.root
    }
    fn target(offset: u64) -> (u8, Devfn, u16) {
        ((offset >> 20) as u8, Devfn::from_byte((offset >> 12) as u8), (offset & 0xfff) as u16)
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (i, part) in data.chunks_mut(4).enumerate() {
            let (bus, at, reg) = Self::target(offset.wrapping_add(4 * i as u64));
            self.root.config_read(bus, at, reg, part);
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        for (i, part) in data.chunks(4).enumerate() {
            let (bus, at, reg) = Self::target(offset.wrapping_add(4 * i as u64));
            self.root.config_write(bus, at, reg, part);
        }
    }
}
