//! The q35 memory controller hub at 00:00.0 (8086:29c0): PCIEXBAR, which places ECAM, and the
//! registers that shadow the BIOS area (PAM) and SMRAM (Intel 3 Series datasheet §5.1).

use super::bus::{Bus, Devfn, PciDevice};
use super::decode::{ClaimId, SpaceKind, Window};
use super::host::{ECAM_PER_BUS, Ecam};
use super::{Function, FunctionSpec, Identity, PciError};
use std::sync::{Arc, Mutex};

/// Where firmware of this machine puts ECAM.
pub const ECAM_BASE: u64 = 0xb000_0000;
/// Length of ECAM for all 256 buses.
pub const ECAM_LEN: u64 = 256 * ECAM_PER_BUS;

const PCIEXBAR: u16 = 0x60;
const PAM0: u16 = 0x90;
const SMRAM: u16 = 0x9d;
const ESMRAMC: u16 = 0x9e;

/// Told when software changes the shadowing of the BIOS area or of SMRAM.
pub trait Shadowing: Send + Sync {
    /// `pam` are the registers PAM0–PAM6, `smram` and `esmramc` those of that name.
    fn changed(&self, pam: [u8; 7], smram: u8, esmramc: u8);
}

/// The memory controller hub.
pub struct Mch {
    function: Function,
    ecam: Arc<Ecam>,
    /// Where ECAM is mapped: base, length, claim.
    mapped: Mutex<Option<(u64, u64, ClaimId)>>,
    shadowing: Option<Arc<dyn Shadowing>>,
}

impl Mch {
    /// Attaches the hub to `root`. With `ecam_base`, ECAM is on from reset, as after firmware; else
    /// firmware turns it on.
    pub fn attach(
        root: &Arc<Bus>,
        ecam_base: Option<u64>,
        shadowing: Option<Arc<dyn Shadowing>>,
    ) -> Result<Arc<Mch>, PciError> {
        let slot = root.slot(Devfn::new(0, 0))?;
        let mut spec = FunctionSpec::new(
            "MCH",
            Identity {
                vendor: 0x8086,
                device: 0x29c0,
                revision: 0,
                class: 0x06_0000,
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
            },
        );
        let c = spec.config();
        let pciexbar = ecam_base.map_or(ECAM_BASE, |b| b | 1);
        c.preset(PCIEXBAR, &pciexbar.to_le_bytes());
        c.allow(PCIEXBAR, &0xf_fc00_0007u64.to_le_bytes());
        c.allow(PAM0, &[0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33]);
        c.preset(SMRAM, &[0x02, 0x38]);
        c.allow(SMRAM, &[0x78, 0x87]);
        let mch = Arc::new(Mch {
            function: spec.build(slot.decoder()),
            ecam: Ecam::new(root.clone()),
            mapped: Mutex::new(None),
            shadowing,
        });
        mch.place_ecam(root);
        slot.attach(mch.clone());
        Ok(mch)
    }

    /// Base and length of ECAM as PCIEXBAR says; `None` while it is off or senseless.
    pub fn ecam(&self) -> Option<(u64, u64)> {
        let v = self.function.u64(PCIEXBAR);
        let buses = match v >> 1 & 3 {
            0 => 256,
            1 => 128,
            2 => 64,
            _ => return None,
        };
        let len = buses * ECAM_PER_BUS;
        let base = v & 0xf_f000_0000 | v & 0x0c00_0000 & !(len - 1);
        (v & 1 != 0 && base != 0).then_some((base, len))
    }

    fn place_ecam(&self, root: &Bus) {
        let wanted = self.ecam();
        let mut mapped = self.mapped.lock().unwrap();
        if wanted == mapped.map(|(base, len, _)| (base, len)) {
            return;
        }
        if let Some((_, _, id)) = mapped.take() {
            root.decoder().release(id);
        }
        *mapped = wanted.map(|(start, len)| {
            let name = "PCI ECAM".to_string();
            let device = self.ecam.clone();
            let space = SpaceKind::Memory;
            let w = Window { space, start, len, name, device, direct: None };
            (start, len, root.decoder().claim(w))
        });
    }

    fn tell_shadowing(&self) {
        if let Some(s) = &self.shadowing {
            let pam = std::array::from_fn(|i| self.function.u8(PAM0 + i as u16));
            s.changed(pam, self.function.u8(SMRAM), self.function.u8(ESMRAMC));
        }
    }
}

impl PciDevice for Mch {
    fn function(&self) -> &Function {
        &self.function
    }
    fn config_write(&self, at: u16, data: &[u8]) {
        self.function.write(at, data);
        let end = at.saturating_add(data.len() as u16);
        if at < PCIEXBAR + 8 && end > PCIEXBAR {
            self.place_ecam(self.ecam.root());
        }
        if at <= ESMRAMC && end > PAM0 {
            self.tell_shadowing();
        }
    }
    fn reset(&self) {
        self.function.reset();
        self.place_ecam(self.ecam.root());
        self.tell_shadowing();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::host::map_ports;
    use crate::pci::testing::rig;
    use tandem_accel::bus::BusDevice;

    struct ResetRegister(Mutex<Vec<u8>>);
    impl BusDevice for ResetRegister {
        fn read(&self, _: u64, data: &mut [u8]) {
            data.fill(0x5a);
        }
        fn write(&self, _: u64, data: &[u8]) {
            self.0.lock().unwrap().extend(data);
        }
    }

    struct Seen(Mutex<Vec<[u8; 7]>>);
    impl Shadowing for Seen {
        fn changed(&self, pam: [u8; 7], _: u8, _: u8) {
            self.0.lock().unwrap().push(pam);
        }
    }

    #[test]
    fn ports_reach_configuration_space_and_spare_the_reset_register() {
        let r = rig();
        let seen = Arc::new(Seen(Mutex::default()));
        Mch::attach(&r.bus, None, Some(seen.clone())).unwrap();
        let reset = Arc::new(ResetRegister(Mutex::default()));
        map_ports(&r.io, &r.bus, Some(reset.clone())).unwrap();
        let mut d = [0; 4];
        r.io.pio_read(0xcfc, &mut d);
        assert_eq!(d, [0xff; 4]);
        r.io.pio_write(0xcf8, &0x8000_0000u32.to_le_bytes());
        r.io.pio_read(0xcfc, &mut d);
        assert_eq!(u32::from_le_bytes(d), 0x29c0_8086);
        r.io.pio_read(0xcfe, &mut d[..2]);
        assert_eq!(d[..2], [0xc0, 0x29]);
        r.io.pio_write(0xcf9, &[6]);
        r.io.pio_read(0xcf9, &mut d[..1]);
        assert_eq!((reset.0.lock().unwrap()[0], d[0]), (6, 0x5a));
        r.io.pio_read(0xcf8, &mut d);
        assert_eq!(u32::from_le_bytes(d), 0x8000_0000);
        r.io.pio_write(0xcf8, &0x8000_0090u32.to_le_bytes());
        r.io.pio_write(0xcfd, &[0x33]);
        assert_eq!(seen.0.lock().unwrap()[0], [0, 0x33, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn ecam_goes_where_pciexbar_says() {
        let r = rig();
        let mch = Mch::attach(&r.bus, Some(ECAM_BASE), None).unwrap();
        assert_eq!(mch.ecam(), Some((ECAM_BASE, ECAM_LEN)));
        let mut d = [0; 8];
        r.io.mmio_read(ECAM_BASE, &mut d);
        assert_eq!(d[..4], 0x29c0_8086u32.to_le_bytes());
        r.io.mmio_read(ECAM_BASE + (1 << 15), &mut d);
        assert_eq!(d, [0xff; 8]);
        // 64 buses at another place, programmed through the window itself.
        r.io.mmio_write(ECAM_BASE + 0x60, &0xe400_0005u32.to_le_bytes());
        assert_eq!(mch.ecam(), Some((0xe400_0000, 64 << 20)));
        assert_eq!(r.io.mmio.ranges().len(), 1);
        r.io.mmio_write(0xe400_0060, &[0]);
        assert!(r.io.mmio.ranges().is_empty());
        mch.reset();
        assert_eq!(r.io.mmio.ranges()[0].0, ECAM_BASE);
    }
}
