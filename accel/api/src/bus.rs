//! The I/O address spaces: port I/O and memory-mapped I/O, as vCPU threads and devices see them.
//!
//! A lookup copies the target out and releases the map's lock before the device is called, so that
//! a device may change the map from inside an access (a PCI BAR write does).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, RwLock};

/// A device on a bus. The bus never splits an access: `data.len()` is 1, 2, 4 or 8 (or more for
/// MMIO through wide instructions, in pieces of at most 8); `offset` is relative to the range, and
/// the whole access lies within the range.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// The range overlaps one that is already mapped.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{name} at {start:#x}+{len:#x} overlaps {other}")]
pub struct Overlap {
    /// What was to be mapped.
    pub name: String,
    /// First address.
    pub start: u64,
    /// Length.
    pub len: u64,
    /// What is there already.
    pub other: String,
}

#[derive(Clone)]
struct Mapping {
    len: u64,
    name: String,
    dev: Arc<dyn BusDevice>,
}

/// One address space of devices.
#[derive(Default)]
pub struct Space {
    map: RwLock<BTreeMap<u64, Mapping>>,
}

impl Space {
    /// Maps `dev` at `[start, start + len)`; `len` > 0.
    pub fn insert(
        &self,
        name: &str,
        start: u64,
        len: u64,
        dev: Arc<dyn BusDevice>,
    ) -> Result<(), Overlap> {
        let mut map = self.map.write().unwrap();
        let end = start.saturating_add(len);
        if let Some((_, m)) =
            map.range(..end).next_back().filter(|(s, m)| s.saturating_add(m.len) > start)
        {
            return Err(Overlap { name: name.into(), start, len, other: m.name.clone() });
        }
        map.insert(start, Mapping { len, name: name.into(), dev });
        Ok(())
    }

    /// Removes the range that starts at `start`.
    pub fn remove(&self, start: u64) {
        self.map.write().unwrap().remove(&start);
    }

    /// Removes all ranges. Devices that hold the bus (a PCI bridge maps what is behind it) and are
    /// held by it would otherwise keep each other for ever.
    pub fn clear(&self) {
        let all = std::mem::take(&mut *self.map.write().unwrap());
        drop(all);
    }

    fn find(&self, addr: u64, len: usize) -> Option<(u64, Arc<dyn BusDevice>)> {
        let map = self.map.read().unwrap();
        let (start, m) = map.range(..=addr).next_back()?;
        let off = addr - start;
        (off < m.len && len as u64 <= m.len - off).then(|| (off, m.dev.clone()))
    }

    /// Reads; an address nobody answers gives all ones. Returns whether somebody answered.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        match self.find(addr, data.len()) {
            Some((off, dev)) => {
                dev.read(off, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes; an address nobody answers drops it. Returns whether somebody answered.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        match self.find(addr, data.len()) {
            Some((off, dev)) => {
                dev.write(off, data);
                true
            }
            None => false,
        }
    }

    /// The ranges in address order: start, length, name.
    pub fn ranges(&self) -> Vec<(u64, u64, String)> {
        let map = self.map.read().unwrap();
        map.iter().map(|(s, m)| (*s, m.len, m.name.clone())).collect()
    }
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.ranges()).finish()
    }
}

/// Both I/O spaces of a machine.
///
/// Port accesses that no single device covers whole are split into bytes, as a PC's bus does for
/// adjacent byte-wide ports.
#[derive(Default, Debug)]
pub struct IoBus {
    /// Port I/O, 64 Ki ports.
    pub pio: Space,
    /// Memory-mapped I/O, by guest physical address.
    pub mmio: Space,
}

impl IoBus {
    /// `IN` of 1, 2 or 4 bytes.
    pub fn pio_read(&self, port: u16, data: &mut [u8]) {
        if self.pio.read(port.into(), data) || data.len() == 1 {
            return;
        }
        for (i, b) in data.iter_mut().enumerate() {
            self.pio.read(u64::from(port) + i as u64, std::slice::from_mut(b));
        }
    }
    /// `OUT` of 1, 2 or 4 bytes.
    pub fn pio_write(&self, port: u16, data: &[u8]) {
        if self.pio.write(port.into(), data) || data.len() == 1 {
            return;
        }
        for (i, b) in data.iter().enumerate() {
            self.pio.write(u64::from(port) + i as u64, std::slice::from_ref(b));
        }
    }
    /// A load from guest physical memory that is not RAM.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.mmio.read(gpa, data);
    }
    /// A store to guest physical memory that is not RAM.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.mmio.write(gpa, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[derive(Default)]
    struct Reg(AtomicU64);
    impl BusDevice for Reg {
        fn read(&self, offset: u64, data: &mut [u8]) {
            let v = self.0.load(Ordering::Relaxed) >> (8 * offset);
            for (i, b) in data.iter_mut().enumerate() {
                *b = (v >> (8 * i)) as u8;
            }
        }
        fn write(&self, _: u64, data: &[u8]) {
            self.0.store(data[0].into(), Ordering::Relaxed);
        }
    }

    #[test]
    fn overlap_is_refused_by_name() {
        let s = Space::default();
        s.insert("a", 0x10, 0x10, Arc::new(Reg::default())).unwrap();
        assert!(s.insert("b", 0x20, 1, Arc::new(Reg::default())).is_ok());
        let e = s.insert("c", 0xf, 2, Arc::new(Reg::default())).unwrap_err();
        assert_eq!(e.other, "a");
        assert!(s.insert("d", 0xf, 1, Arc::new(Reg::default())).is_ok());
    }

    #[test]
    fn nobody_answers_all_ones_and_wide_port_reads_split() {
        let bus = IoBus::default();
        let r = Arc::new(Reg::default());
        r.0.store(0x12, Ordering::Relaxed);
        bus.pio.insert("r", 0x70, 1, r).unwrap();
        let mut d = [0; 2];
        bus.pio_read(0x70, &mut d);
        assert_eq!(d, [0x12, 0xff]);
        let mut d = [0; 4];
        bus.mmio_read(0xdead_0000, &mut d);
        assert_eq!(d, [0xff; 4]);
    }
}
