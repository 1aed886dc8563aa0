//! The ICH9 LPC bridge at 00:1f.0 (8086:2918): interrupt routing, placement of the ACPI registers,
//! and the chipset configuration space (ICH9 datasheet §10, §13).

use super::bus::{Bus, Devfn, PciDevice};
use super::decode::{ClaimId, Decoder, SpaceKind, Window};
use super::pirq::{DEFAULT_DEVICE_ROUTE, IrqRouter};
use super::{Function, FunctionSpec, Identity, PciError};
use std::sync::{Arc, Mutex};
use tandem_accel::bus::BusDevice;

const PMBASE: u16 = 0x40;
const ACPI_CNTL: u16 = 0x44;
const PIRQA_ROUT: u16 = 0x60;
const PIRQE_ROUT: u16 = 0x68;
const RCBA: u16 = 0xf0;

/// Length of the ACPI register block.
pub const PM_LEN: u64 = 128;
/// Length of the chipset configuration space.
const RCRB_LEN: usize = 0x4000;
/// Slots of the device interrupt route registers and their offsets.
const DEVICE_ROUTES: [(u8, usize); 6] =
    [(31, 0x3140), (29, 0x3144), (28, 0x3146), (27, 0x3148), (26, 0x314c), (25, 0x3150)];

/// What firmware would have programmed, for machines that start without one. Restored by reset.
#[derive(Clone, Debug)]
pub struct Programmed {
    /// Base of the ACPI registers, a multiple of 128.
    pub pm_base: u16,
    /// ISA IRQs of PIRQA–H.
    pub pirq: [u8; 8],
}

impl Default for Programmed {
    fn default() -> Self {
        Programmed { pm_base: 0x600, pirq: [10, 10, 11, 11, 10, 10, 11, 11] }
    }
}

/// Chipset configuration space: storage, of which the device interrupt routes have effect.
struct Rcrb {
    router: Arc<IrqRouter>,
    bytes: Mutex<Vec<u8>>,
}

impl Rcrb {
    fn new(router: Arc<IrqRouter>) -> Arc<Rcrb> {
        let r = Arc::new(Rcrb { router, bytes: Mutex::new(vec![0; RCRB_LEN]) });
        r.reset();
        r
    }
    fn reset(&self) {
        let mut b = self.bytes.lock().unwrap();
        b.fill(0);
        for (_, at) in DEVICE_ROUTES {
            b[at..at + 2].copy_from_slice(&DEFAULT_DEVICE_ROUTE.to_le_bytes());
        }
        self.apply(&b);
    }
    fn apply(&self, b: &[u8]) {
        for (slot, at) in DEVICE_ROUTES {
            self.router.set_device_route(slot, u16::from_le_bytes([b[at], b[at + 1]]));
        }
    }
}

impl BusDevice for Rcrb {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let b = self.bytes.lock().unwrap();
        for (at, d) in (offset as usize..).zip(data) {
            *d = b.get(at).copied().unwrap_or(0xff);
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        let mut b = self.bytes.lock().unwrap();
        for (at, d) in (offset as usize..).zip(data) {
            if let Some(x) = b.get_mut(at) {
                *x = *d;
            }
        }
        self.apply(&b);
    }
}

/// A window that a base register of the bridge places.
type Placed = Option<(u64, ClaimId)>;

#[derive(Default)]
struct Windows {
    pm: Placed,
    rcrb: Placed,
}

/// The LPC bridge.
pub struct Ich9Lpc {
    function: Function,
    decoder: Arc<Decoder>,
    router: Arc<IrqRouter>,
    pm: Option<Arc<dyn BusDevice>>,
    rcrb: Arc<Rcrb>,
    windows: Mutex<Windows>,
}

impl Ich9Lpc {
    /// Attaches the bridge to `root`. `pm` answers in the 128 ports that PMBASE places: PM1 event
    /// at 0, PM1 control at 4, timer at 8, GPE0 at 20h. `programmed`: start as after firmware.
    pub fn attach(
        root: &Arc<Bus>,
        router: Arc<IrqRouter>,
        pm: Option<Arc<dyn BusDevice>>,
        programmed: Option<Programmed>,
    ) -> Result<Arc<Ich9Lpc>, PciError> {
        let slot = root.slot(Devfn::new(0x1f, 0))?;
        let mut spec = FunctionSpec::new(
            "ICH9 LPC",
            Identity {
                vendor: 0x8086,
                device: 0x2918,
                revision: 2,
                class: 0x06_0100,
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
            },
        );
        let c = spec.config();
        // The bridge decodes I/O, memory and is a master, always.
        c.preset(super::config::reg::COMMAND, &[0x07, 0]);
        c.allow(super::config::reg::COMMAND, &[0x40, 0x01]);
        c.preset(super::config::reg::HEADER_TYPE, &[0x80]);
        c.preset(PMBASE, &[0x01, 0, 0, 0]);
        c.allow(PMBASE, &[0x80, 0xff, 0, 0]);
        c.allow(ACPI_CNTL, &[0x87]);
        for at in [PIRQA_ROUT, PIRQE_ROUT] {
            c.preset(at, &[0x80; 4]);
            c.allow(at, &[0x8f; 4]);
        }
        // SERIRQ control; LPC I/O decode ranges and enables; generic power management.
        c.preset(0x64, &[0x10]);
        c.allow(0x64, &[0xff]);
        c.allow(0x80, &[0x77, 0x13, 0xff, 0x3f]);
        c.allow(0x84, &[0xff; 16]);
        c.allow(0xa0, &[0xff; 8]);
        c.allow(0xdc, &[0x03]);
        c.allow(RCBA, &0xffff_c001u32.to_le_bytes());
        if let Some(p) = &programmed {
            c.preset(PMBASE, &(p.pm_base & 0xff80 | 1).to_le_bytes());
            c.preset(ACPI_CNTL, &[0x80]);
            for (i, irq) in p.pirq.iter().enumerate() {
                c.preset(pirq_reg(i), &[irq & 0xf]);
            }
        }
        let lpc = Arc::new(Ich9Lpc {
            function: spec.build(slot.decoder()),
            decoder: slot.decoder(),
            rcrb: Rcrb::new(router.clone()),
            router,
            pm,
            windows: Mutex::default(),
        });
        lpc.apply();
        slot.attach(lpc.clone());
        Ok(lpc)
    }

    fn place(&self, placed: &mut Placed, wanted: Option<u64>, make: impl Fn(u64) -> Window) {
        if wanted == placed.map(|(at, _)| at) {
            return;
        }
        if let Some((_, id)) = placed.take() {
            self.decoder.release(id);
        }
        *placed = wanted.map(|at| (at, self.decoder.claim(make(at))));
    }

    /// Makes routes and windows follow the registers.
    fn apply(&self) {
        let f = &self.function;
        for n in 0..8 {
            self.router.set_isa_route(n, f.u8(pirq_reg(n)));
        }
        let acpi = f.u8(ACPI_CNTL);
        self.router.set_sci_gsi(match acpi & 7 {
            1 => 10,
            2 => 11,
            4 => 20,
            5 => 21,
            _ => 9,
        });
        let mut w = self.windows.lock().unwrap();
        if let Some(pm) = &self.pm {
            let base = u64::from(f.u32(PMBASE) & 0xff80);
            let on = acpi & 0x80 != 0 && base != 0;
            self.place(&mut w.pm, on.then_some(base), |start| Window {
                space: SpaceKind::Io,
                start,
                len: PM_LEN,
                name: "ACPI PM".into(),
                device: pm.clone(),
                direct: None,
            });
        }
        let rcba = f.u32(RCBA);
        let base = u64::from(rcba & 0xffff_c000);
        self.place(&mut w.rcrb, (rcba & 1 != 0 && base != 0).then_some(base), |start| Window {
            space: SpaceKind::Memory,
            start,
            len: RCRB_LEN as u64,
            name: "ICH9 RCRB".into(),
            device: self.rcrb.clone(),
            direct: None,
        });
    }
}

/// Routing register of PIRQ `n` (0–7).
fn pirq_reg(n: usize) -> u16 {
    if n < 4 { PIRQA_ROUT + n as u16 } else { PIRQE_ROUT + (n as u16 & 3) }
}

impl PciDevice for Ich9Lpc {
    fn function(&self) -> &Function {
        &self.function
    }
    fn config_write(&self, at: u16, data: &[u8]) {
        self.function.write(at, data);
        self.apply();
    }
    fn reset(&self) {
        self.function.reset();
        self.rcrb.reset();
        self.apply();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Pin;
    use crate::pci::bus::IntxRoute;
    use crate::pci::testing::{Rig, rig};

    struct Pm;
    impl BusDevice for Pm {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, _: u64, _: &[u8]) {}
    }

    fn lpc(r: &Rig, p: Option<Programmed>) -> Arc<Ich9Lpc> {
        Ich9Lpc::attach(&r.bus, r.router.clone(), Some(Arc::new(Pm)), p).unwrap()
    }

    #[test]
    fn firmware_places_the_acpi_registers() {
        let r = rig();
        let l = lpc(&r, None);
        assert!(r.io.pio.ranges().is_empty());
        l.config_write(PMBASE, &0x681u32.to_le_bytes());
        l.config_write(ACPI_CNTL, &[0x80]);
        let mut d = [0];
        r.io.pio_read(0x688, &mut d);
        assert_eq!(d, [8]);
        l.config_write(PMBASE, &0x600u32.to_le_bytes());
        assert_eq!(r.io.pio.ranges()[0].0, 0x600);
        assert_eq!(l.function.u32(PMBASE), 0x601);
        l.reset();
        assert!(r.io.pio.ranges().is_empty());
    }

    #[test]
    fn starting_as_after_firmware_survives_reset() {
        let r = rig();
        let l = lpc(&r, Some(Programmed::default()));
        for _ in 0..2 {
            assert_eq!(r.io.pio.ranges()[0].0, 0x600);
            assert_eq!(r.router.isa_irq(31, Pin::A), Some(10));
            l.config_write(PIRQA_ROUT, &[0x80]);
            assert_eq!(r.router.isa_irq(31, Pin::A), None);
            l.reset();
        }
    }

    #[test]
    fn chipset_space_reroutes_devices() {
        let r = rig();
        let l = lpc(&r, None);
        l.config_write(RCBA, &0xfed1_c001u32.to_le_bytes());
        let mut d = [0; 2];
        r.io.mmio_read(0xfed1_c000 + 0x3140, &mut d);
        assert_eq!(d, [0x10, 0x32]);
        r.router.line(31, Pin::A).assert();
        r.io.mmio_write(0xfed1_c000 + 0x3140, &[0x15]);
        assert_eq!(r.sink.levels(), [(16, true), (16, false), (21, true)]);
    }
}
