//! The BIOS area from C0000h to FFFFFh: thirteen segments, each of which reads and writes either RAM
//! or what lies on the bus, as the PAM registers of the memory controller say (Intel 3 Series
//! datasheet §5.1.22). On the bus is the end of the firmware's ROM from E0000h on, and nothing below.
//!
//! ```text
//!   reads from   writes to      mapped as
//!   bus          bus            ROM (e_0000 and up), nothing (below)
//!   RAM          bus            the RAM, write-protected
//!   bus          RAM            a device that does just that
//!   RAM          RAM            the RAM
//! ```
//!
//! There is no system management mode, so that SMRAM's registers switch nothing.

use crate::pci::mch::Shadowing;
use std::sync::{Arc, Mutex};
use tandem_accel::Result;
use tandem_accel::bus::{BusDevice, IoBus};
use tandem_accel::memory::{GuestMap, Region, RegionKind};

/// First address of the area.
pub const START: u64 = 0xc_0000;
/// Its end.
pub const END: u64 = 0x10_0000;
/// First address where the firmware's ROM shows.
pub const ROM: u64 = 0xe_0000;

const READ: u8 = 1;
const WRITE: u8 = 2;

/// Segments: first address, length, PAM register, shift of its two bits.
fn segments() -> impl Iterator<Item = (u64, u64, usize, u8)> {
    let small = (0..12).map(|i| {
        let shift = if i % 2 == 0 { 0 } else { 4 };
        (START + 0x4000 * i as u64, 0x4000, 1 + i / 2, shift)
    });
    small.chain([(0xf_0000, 0x1_0000, 0, 4)])
}

/// One segment with what may show there.
struct Segment {
    ram: Region,
    rom: Option<Region>,
    /// Its access bits; `None` before the first look at the registers.
    now: Option<u8>,
}

/// The area.
pub struct Shadow {
    memory: Arc<GuestMap>,
    bus: Arc<IoBus>,
    segments: Mutex<Vec<Segment>>,
}

impl Shadow {
    /// The area of a machine whose firmware ROM ends with the bytes of `rom`, all segments on the
    /// bus as after RESET.
    pub fn new(memory: Arc<GuestMap>, bus: Arc<IoBus>, rom: &[u8]) -> Result<Arc<Shadow>> {
        let mut list = Vec::new();
        for (at, len, _, _) in segments() {
            let ram = Region::new("shadow RAM", RegionKind::Ram, at, len)?;
            // The ROM's last byte is at the end of the area.
            let from_end = (END - at) as usize;
            let rom = match rom.len().checked_sub(from_end) {
                Some(start) if at >= ROM => {
                    let r = Region::new("firmware ROM", RegionKind::Rom, at, len)?;
                    r.load(0, &rom[start..start + len as usize]);
                    Some(r)
                }
                _ => None,
            };
            list.push(Segment { ram, rom, now: None });
        }
        let shadow = Arc::new(Shadow { memory, bus, segments: Mutex::new(list) });
        shadow.changed([0; 7], 0, 0);
        Ok(shadow)
    }

    fn switch(&self, s: &mut Segment, access: u8) {
        let at = s.ram.gpa;
        if s.now == Some(access) {
            return;
        }
        self.memory.remove(at);
        if s.now == Some(WRITE) {
            self.bus.mmio.remove(at);
        }
        s.now = Some(access);
        let shown = match access & (READ | WRITE) {
            0 => s.rom.clone(),
            READ => Some(s.ram.with_kind(RegionKind::Rom)),
            WRITE => {
                let split = Arc::new(Split { ram: s.ram.clone(), rom: s.rom.clone() });
                if let Err(e) = self.bus.mmio.insert("shadow RAM, writes", at, s.ram.len(), split) {
                    log::warn!("the BIOS area cannot be switched: {e}");
                }
                None
            }
            _ => Some(s.ram.clone()),
        };
        if let Some(r) = shown
            && let Err(e) = self.memory.insert(&r)
        {
            log::error!("the BIOS area cannot be switched: {e}");
        }
    }
}

impl Shadowing for Shadow {
    fn changed(&self, pam: [u8; 7], _smram: u8, _esmramc: u8) {
        let mut list = self.segments.lock().unwrap_or_else(|e| e.into_inner());
        for (s, (_, _, register, shift)) in list.iter_mut().zip(segments()) {
            self.switch(s, pam[register] >> shift & (READ | WRITE));
        }
    }
}

/// A segment that reads the bus and writes RAM.
struct Split {
    ram: Region,
    rom: Option<Region>,
}

impl BusDevice for Split {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if !self.rom.as_ref().is_some_and(|r| r.read(offset, data)) {
            data.fill(0xff);
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.ram.load(offset, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rig() -> (Arc<GuestMap>, Arc<IoBus>, Arc<Shadow>) {
        let (map, bus) = (GuestMap::new(), Arc::new(IoBus::default()));
        let rom: Vec<u8> = (0..0x4_0000u32).map(|i| (i >> 14) as u8).collect();
        let s = Shadow::new(map.clone(), bus.clone(), &rom).unwrap();
        (map, bus, s)
    }
    fn at(map: &GuestMap, gpa: u64) -> Option<(RegionKind, u8)> {
        let r = map.find(gpa)?;
        let mut b = [0];
        r.read(gpa - r.gpa, &mut b);
        Some((r.kind, b[0]))
    }

    #[test]
    fn rom_shows_until_software_shadows_it() {
        let (map, bus, s) = rig();
        use RegionKind::{Ram, Rom};
        assert_eq!(at(&map, 0xc_0000), None);
        assert_eq!(at(&map, 0xe_0000), Some((Rom, 8)));
        assert_eq!(at(&map, 0xf_fff0), Some((Rom, 15)));
        // As SeaBIOS does: everything to RAM, copy, then protect.
        s.changed([0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33], 0, 0);
        assert_eq!(at(&map, 0xc_0000), Some((Ram, 0)));
        assert_eq!(at(&map, 0xf_fff0), Some((Ram, 0)));
        assert!(map.find(0xf_0000).unwrap().load(0, &[0x77]));
        s.changed([0x10, 0x31, 0x33, 0x33, 0x33, 0x33, 0x33], 0, 0);
        assert_eq!(at(&map, 0xf_0000), Some((Rom, 0x77)));
        assert_eq!((at(&map, 0xc_0000), at(&map, 0xc_4000)), (Some((Rom, 0)), Some((Ram, 0))));
        assert!(bus.mmio.ranges().is_empty());
        // RESET brings the ROM back.
        s.changed([0; 7], 0, 0);
        assert_eq!(at(&map, 0xf_0000), Some((Rom, 12)));
        assert_eq!(at(&map, 0xd_0000), None);
    }

    #[test]
    fn writes_may_go_to_ram_that_is_not_read() {
        let (map, bus, s) = rig();
        s.changed([0x20, 0, 0, 0, 0, 0, 0], 0, 0);
        assert_eq!(at(&map, 0xf_0000), None);
        let mut b = [0];
        bus.mmio_write(0xf_0000, &[0x55]);
        bus.mmio_read(0xf_0000, &mut b);
        assert_eq!(b, [12]);
        s.changed([0x30, 0, 0, 0, 0, 0, 0], 0, 0);
        assert_eq!(at(&map, 0xf_0000), Some((RegionKind::Ram, 0x55)));
        assert!(bus.mmio.ranges().is_empty());
    }

    #[test]
    fn a_short_rom_shows_at_the_end_only() {
        let (map, bus) = (GuestMap::new(), Arc::new(IoBus::default()));
        Shadow::new(map.clone(), bus, &[9; 0x1_0000]).unwrap();
        assert_eq!(at(&map, 0xe_c000), None);
        assert_eq!(at(&map, 0xf_0000), Some((RegionKind::Rom, 9)));
    }
}
