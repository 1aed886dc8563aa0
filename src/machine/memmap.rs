//! The guest-physical memory map of `q35`: one table, from which guest memory is allocated, devices
//! are placed, and the map that the guest is told (E820) is made.
//!
//! ```text
//!            0 ─┬─ RAM                                    640 KiB
//!      a_0000 ─┼─ VGA window, if there is a VGA           128 KiB
//!      c_0000 ─┼─ RAM, reserved: option ROMs, firmware   256 KiB   ACPI tables from e_0000
//!     10_0000 ─┼─ RAM                                    up to b000_0000 (or 8000_0000, see below)
//!   b000_0000 ─┼─ PCIe configuration space (ECAM)        256 MiB   buses 0–255
//!   c000_0000 ─┼─ 32-bit PCI window                      1004 MiB
//!   fec0_0000 ─┼─ IOAPIC, fed0_0000 HPET, fee0_0000 LAPIC
//!   feff_c000 ─┼─ reserved for the accelerator           16 KiB
//!   ff00_0000 ─┼─ flash window, firmware                 16 MiB
//! 1_0000_0000 ─┼─ RAM that does not fit below
//! 80_0000_0000 ─┴─ 64-bit PCI window                     256 GiB
//! ```
//!
//! RAM of 2.75 GiB and more is split at 2 GiB, so that the upper part starts on a 1 GiB boundary and
//! huge pages line up; less lies wholly below the ECAM window.

use crate::config::Size;

/// End of conventional memory that the guest may use; the last KiB is the extended BIOS data area.
pub const EBDA: u64 = 0x9_fc00;
/// First address of the VGA window.
pub const VGA: u64 = 0xa_0000;
/// First address of the option ROM and firmware shadow.
pub const SHADOW: u64 = 0xc_0000;
/// First address of the area for ACPI tables.
pub const ACPI: u64 = 0xe_0000;
/// First address of extended memory.
pub const ONE_MIB: u64 = 0x10_0000;
/// PCIe configuration space.
pub const ECAM: u64 = 0xb000_0000;
/// Its size: 1 MiB for each of 256 buses.
pub const ECAM_SIZE: u64 = 0x1000_0000;
/// 32-bit PCI window.
pub const PCI32: u64 = 0xc000_0000;
/// IOAPIC; also the end of the 32-bit PCI window.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Pages that an accelerator may use for its own purposes (KVM on old Intel hosts: identity map and
/// task state).
pub const ACCEL: u64 = 0xfeff_c000;
/// End of the accelerator's pages and start of the flash window.
pub const FLASH: u64 = 0xff00_0000;
/// 4 GiB.
pub const FOUR_GIB: u64 = 1 << 32;
/// 64-bit PCI window.
pub const PCI64: u64 = 0x80_0000_0000;
/// Its size.
pub const PCI64_SIZE: u64 = 0x40_0000_0000;

/// Where RAM below 4 GiB ends if there is more of it than fits below the ECAM window.
const SPLIT: u64 = 0x8000_0000;

/// The least RAM a machine can have.
pub const MIN_RAM: Size = Size::mib(8);
/// The most: it must end below the 64-bit PCI window.
pub const MAX_RAM: Size = Size(PCI64 - FOUR_GIB);

/// What a range of the E820 map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum E820Kind {
    /// Usable RAM.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
}

/// A range of the map that the guest is told (ACPI 6.4 §15).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct E820Entry {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// What it is.
    pub kind: E820Kind,
}

/// The memory map for one size of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryMap {
    /// End of RAM below 4 GiB.
    pub low_end: u64,
    /// Bytes of RAM from 4 GiB on.
    pub high: u64,
}

impl MemoryMap {
    /// The map for this much RAM.
    pub fn new(ram: Size) -> MemoryMap {
        let low_end = if ram.bytes() >= ECAM { SPLIT } else { ram.bytes() };
        MemoryMap { low_end, high: ram.bytes() - low_end }
    }

    /// RAM to allocate: name, first address, bytes. With firmware the area of option ROMs and
    /// firmware is not among it: what shows there is switched.
    pub fn ram(&self, firmware: bool) -> Vec<(&'static str, u64, u64)> {
        let mut regions = vec![("base RAM", 0, VGA), ("low RAM", ONE_MIB, self.low_end - ONE_MIB)];
        if !firmware {
            regions.insert(1, ("shadow RAM", SHADOW, ONE_MIB - SHADOW));
        }
        if self.high > 0 {
            regions.push(("high RAM", FOUR_GIB, self.high));
        }
        regions
    }

    /// The places of runs of RAM of these lengths that follow each other: run, first address, bytes.
    /// A run over the hole below 4 GiB has two places. Lengths beyond the end count for nothing.
    pub fn runs(&self, lengths: &[u64]) -> Vec<(usize, u64, u64)> {
        let parts = [(0, 0, self.low_end), (self.low_end, FOUR_GIB, self.high)];
        let mut places = Vec::new();
        let mut start = 0u64;
        for (i, len) in lengths.iter().enumerate() {
            let end = start.saturating_add(*len);
            for (offset, base, size) in parts {
                let (from, to) = (start.max(offset), end.min(offset + size));
                if from < to {
                    places.push((i, base + (from - offset), to - from));
                }
            }
            start = end;
        }
        places
    }

    /// The map that the guest is told, in address order.
    pub fn e820(&self) -> Vec<E820Entry> {
        use E820Kind::{Ram, Reserved};
        let entry = |start, end, kind| E820Entry { start, len: end - start, kind };
        let mut map = vec![
            entry(0, EBDA, Ram),
            entry(EBDA, VGA, Reserved),
            entry(ACPI, ONE_MIB, Reserved),
            entry(ONE_MIB, self.low_end, Ram),
            entry(ECAM, ECAM + ECAM_SIZE, Reserved),
            entry(ACCEL, FLASH, Reserved),
        ];
        if self.high > 0 {
            map.push(entry(FOUR_GIB, FOUR_GIB + self.high, Ram));
        }
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_ram_is_somewhere_and_nothing_overlaps() {
        for mib in [8, 256, 2815, 2816, 4096, 65536] {
            let m = MemoryMap::new(Size::mib(mib));
            assert_eq!(m.low_end + m.high, mib << 20);
            assert!(m.low_end <= ECAM);
            for list in [
                m.ram(false).iter().map(|r| (r.1, r.2)).collect::<Vec<_>>(),
                m.e820().iter().map(|e| (e.start, e.len)).collect(),
            ] {
                for pair in list.windows(2) {
                    assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{mib} MiB: {pair:x?}");
                }
            }
        }
        assert_eq!(MemoryMap::new(Size::mib(4096)).low_end, SPLIT);
    }
}
