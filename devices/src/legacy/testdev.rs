//! `pc-testdev`: QEMU's device for bare-metal test kernels.
//!
//! | where | what |
//! | --- | --- |
//! | ports 2000h–2017h | writing 1 or 0 raises or lowers GSI 0–23 |
//! | ports E0h–E3h | a latch, read back in any width |
//! | ports E4h–E7h | page flush: an address; accepted, and nothing need happen here |
//! | FF000000h, 64 KiB | RAM behind MMIO, so that every access is emulated |

use crate::gsi::{GSI_COUNT, IrqInputs};
use crate::registry::{BusKind, Device, DeviceFault, DeviceType};
use crate::state::{RestoreError, Stateful};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard};
use tandem_accel::bus::{BusDevice, IoBus, Overlap};
use tandem_accel::irq::IrqLine;

/// First interrupt line port.
pub const IRQ_PORT: u16 = 0x2000;
/// First port of the latch.
pub const LATCH_PORT: u16 = 0xe0;
/// First port of the page flush.
pub const FLUSH_PORT: u16 = 0xe4;
/// Guest physical address of the RAM.
pub const RAM_BASE: u64 = 0xff00_0000;
/// Its size in bytes.
pub const RAM_SIZE: u64 = 0x1_0000;

/// State of a test device.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TestDevState {
    /// The latch.
    pub latch: [u8; 4],
    /// Levels of the lines, bit n for GSI n.
    pub lines: u32,
    /// The RAM.
    pub ram: Vec<u8>,
}

/// A test device.
pub struct TestDev {
    lines: Vec<IrqLine>,
    state: Mutex<TestDevState>,
}

impl Device for TestDev {
    fn reset(&self) {
        TestDev::reset(self);
    }
}

inventory::submit! {
    DeviceType {
        name: "pc-testdev",
        bus: BusKind::Isa,
        description: "interrupt lines, latch and RAM behind MMIO for bare-metal test kernels",
        properties: &[],
        create: |cx, _| {
            let dev = TestDev::new(&cx.irqs);
            dev.map(&cx.io).map_err(|e| {
                DeviceFault::new(e.to_string(), "give --device pc-testdev only once")
            })?;
            Ok(dev)
        },
    }
}

/// One of its regions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Part {
    Irq,
    Latch,
    Flush,
    Ram,
}

struct Region(Arc<TestDev>, Part);

impl TestDev {
    /// A test device with wires to all of `inputs`.
    pub fn new(inputs: &IrqInputs) -> Arc<TestDev> {
        Arc::new(TestDev {
            lines: (0..GSI_COUNT).map(|g| inputs.line(g)).collect(),
            state: Mutex::new(Self::initial()),
        })
    }

    fn initial() -> TestDevState {
        TestDevState { latch: [0; 4], lines: 0, ram: vec![0; RAM_SIZE as usize] }
    }

    /// Maps its regions.
    pub fn map(self: &Arc<Self>, io: &IoBus) -> Result<(), Overlap> {
        let part = |p| Arc::new(Region(self.clone(), p));
        // Three ports more, so that a wide write to the last line is not split over its neighbours.
        let lines = u64::from(GSI_COUNT) + 3;
        io.pio.insert("pc-testdev irq", IRQ_PORT.into(), lines, part(Part::Irq))?;
        io.pio.insert("pc-testdev latch", LATCH_PORT.into(), 4, part(Part::Latch))?;
        io.pio.insert("pc-testdev flush", FLUSH_PORT.into(), 4, part(Part::Flush))?;
        io.mmio.insert("pc-testdev ram", RAM_BASE, RAM_SIZE, part(Part::Ram))
    }

    /// RESET.
    pub fn reset(&self) {
        let mut s = self.lock();
        *s = Self::initial();
        self.lines.iter().for_each(IrqLine::deassert);
    }

    fn lock(&self) -> MutexGuard<'_, TestDevState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

fn part_of(bytes: &mut [u8], offset: u64, len: usize) -> Option<&mut [u8]> {
    let at = usize::try_from(offset).ok()?;
    bytes.get_mut(at..at.checked_add(len)?)
}

impl BusDevice for Region {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut s = self.0.lock();
        let from = match self.1 {
            Part::Latch => part_of(&mut s.latch, offset, data.len()),
            Part::Ram => part_of(&mut s.ram, offset, data.len()),
            Part::Irq | Part::Flush => None,
        };
        match from {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut s = self.0.lock();
        let to = match self.1 {
            Part::Irq => {
                let high = data.iter().any(|b| *b != 0);
                if let Some(l) = usize::try_from(offset).ok().and_then(|n| self.0.lines.get(n)) {
                    let bit = 1 << offset;
                    s.lines = s.lines & !bit | if high { bit } else { 0 };
                    l.set(high);
                }
                return;
            }
            Part::Flush => return,
            Part::Latch => part_of(&mut s.latch, offset, data.len()),
            Part::Ram => part_of(&mut s.ram, offset, data.len()),
        };
        if let Some(bytes) = to {
            bytes.copy_from_slice(data);
        }
    }
}

impl Stateful for TestDev {
    type State = TestDevState;
    const KIND: &'static str = "pc-testdev";
    const VERSION: u32 = 1;

    fn state(&self) -> TestDevState {
        self.lock().clone()
    }

    fn restore(&self, new: &TestDevState) -> Result<(), RestoreError> {
        if new.ram.len() as u64 != RAM_SIZE {
            let why = format!("{} bytes of RAM, not {RAM_SIZE}", new.ram.len());
            return Err(RestoreError { kind: Self::KIND, why });
        }
        let mut s = self.lock();
        *s = new.clone();
        for (n, l) in self.lines.iter().enumerate() {
            l.import_level(s.lines >> n & 1 != 0);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Levels;

    #[test]
    fn all_regions_as_test_kernels_use_them() {
        let irq = Arc::new(Levels::default());
        let dev = TestDev::new(&IrqInputs::new(irq.clone()));
        let io = IoBus::default();
        dev.map(&io).unwrap();
        io.pio_write(0x2019 - 2, &[1]);
        assert!(irq.level(23));
        io.pio_write(0x2016, &1u32.to_le_bytes());
        assert!(irq.level(22) && irq.level(23), "a wide write is one write to one line");
        io.pio_write(0x2017, &0u32.to_le_bytes());
        assert!(!irq.level(23));
        io.pio_write(0xe0, &0x1234_5678u32.to_le_bytes());
        io.pio_write(0xe1, &[0xab]);
        let mut d = [0; 2];
        io.pio_read(0xe0, &mut d);
        assert_eq!(d, [0x78, 0xab]);
        io.pio_write(0xe4, &0x1000u32.to_le_bytes());
        io.mmio_write(0xff00_fff8, &[1, 2, 3, 4, 5, 6, 7, 8]);
        let mut d = [0; 4];
        io.mmio_read(0xff00_fffb, &mut d);
        assert_eq!(d, [4, 5, 6, 7]);
        let s = dev.state();
        dev.reset();
        dev.restore(&s).unwrap();
        assert_eq!(dev.state(), s);
    }
}
