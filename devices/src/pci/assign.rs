//! What firmware does to PCI before an operating system starts, for machines that start without
//! firmware: places the BARs, turns decoding on, and fills in the interrupt line registers.

use super::bus::Bus;
use super::config::{command, reg};
use super::function::BarKind;
use super::{PciError, Pin};
use std::ops::Range;

/// Address ranges to place BARs in.
#[derive(Clone, Debug)]
pub struct Ranges {
    /// Ports.
    pub io: Range<u64>,
    /// Memory below 4 GiB.
    pub mem32: Range<u64>,
    /// Memory above 4 GiB, for 64-bit BARs that do not fit below.
    pub mem64: Range<u64>,
}

fn take(range: &mut Range<u64>, len: u64) -> Option<u64> {
    let start = range.start.checked_next_multiple_of(len)?;
    let end = start.checked_add(len).filter(|e| *e <= range.end)?;
    range.start = end;
    Some(start)
}

/// Places the BARs of the functions on `root`, largest first. Functions behind bridges are left to
/// the operating system.
pub fn assign(root: &Bus, mut ranges: Ranges) -> Result<(), PciError> {
    let devices = root.devices();
    let mut bars: Vec<_> = devices
        .iter()
        .flat_map(|(at, d)| {
            d.function().bars().into_iter().map(|(reg, kind, len)| (*at, d.clone(), reg, kind, len))
        })
        .collect();
    bars.sort_by_key(|(at, _, reg, _, len)| (std::cmp::Reverse(*len), *at, *reg));
    for (at, d, reg, kind, len) in bars {
        let start = match kind {
            BarKind::Io => take(&mut ranges.io, len),
            BarKind::Mem32 => take(&mut ranges.mem32, len),
            BarKind::Mem64 => take(&mut ranges.mem32, len).or_else(|| take(&mut ranges.mem64, len)),
        };
        let Some(start) = start else {
            return Err(PciError(format!(
                "no room for a {len:#x}-byte BAR of {} at {at}; use fewer or smaller devices",
                d.function().name()
            )));
        };
        d.config_write(reg, &(start as u32).to_le_bytes());
        if kind == BarKind::Mem64 {
            d.config_write(reg + 4, &((start >> 32) as u32).to_le_bytes());
        }
    }
    for (at, d) in devices {
        let f = d.function();
        let decode = f.bars().iter().fold(0, |c, (_, kind, _)| match kind {
            BarKind::Io => c | command::IO,
            BarKind::Mem32 | BarKind::Mem64 => c | command::MEMORY,
        });
        let old = f.u32(reg::COMMAND) as u16;
        d.config_write(reg::COMMAND, &(old | decode).to_le_bytes());
        let pin = f.u8(reg::INTERRUPT_PIN);
        if (1..=4).contains(&pin) {
            let irq = root.isa_irq(at.slot(), Pin::from_index(pin - 1)).unwrap_or(0xff);
            d.config_write(reg::INTERRUPT_LINE, &[irq]);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::PciDevice;
    use crate::pci::testing::rig;
    use crate::pci::{Bar, Function, FunctionSpec, Identity};
    use std::sync::Arc;
    use tandem_accel::bus::BusDevice;

    struct Ram;
    impl BusDevice for Ram {
        fn read(&self, _: u64, _: &mut [u8]) {}
        fn write(&self, _: u64, _: &[u8]) {}
    }
    struct Plain(Function);
    impl PciDevice for Plain {
        fn function(&self) -> &Function {
            &self.0
        }
    }

    #[test]
    fn bars_are_placed_aligned_and_lines_named() {
        let r = rig();
        r.router.set_isa_route(5, 10);
        let slot = r.bus.slot(None).unwrap();
        let mut s = FunctionSpec::new("x", Identity::default());
        for (i, kind, len) in [
            (0, BarKind::Mem32, 0x1000),
            (1, BarKind::Io, 0x40),
            (2, BarKind::Mem64, 0x10_0000),
            (4, BarKind::Mem64, 0x100_0000),
        ] {
            s.bar(i, Bar { kind, len, device: Arc::new(Ram) }).unwrap();
        }
        s.intx(slot.intx(Pin::A));
        let d = Arc::new(Plain(s.build(slot.decoder())));
        slot.attach(d.clone());
        let ranges = Ranges {
            io: 0xc001..0xd000,
            mem32: 0xc000_0000..0xc020_0000,
            mem64: 0x8_0000_0001..0x10_0000_0000,
        };
        assign(&r.bus, ranges.clone()).unwrap();
        let at = |i| d.0.bar_address(i);
        assert_eq!(at(4), Some(0x8_0100_0000));
        assert_eq!((at(2), at(0)), (Some(0xc000_0000), Some(0xc010_0000)));
        assert_eq!(at(1), Some(0xc040));
        assert_eq!(d.0.u8(reg::INTERRUPT_LINE), 10);
        let tight = Ranges { mem64: 0..0, ..ranges };
        assert!(assign(&r.bus, tight).unwrap_err().to_string().contains("01.0"));
    }
}
