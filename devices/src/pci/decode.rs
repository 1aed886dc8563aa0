//! Who answers at which address: windows that functions claim and release as software programs
//! their BARs.
//!
//! While an operating system moves BARs about, two windows may collide for a moment. The older
//! claim keeps the address; the younger waits and gets it when the older goes away.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use tandem_accel::bus::{BusDevice, IoBus, Space};
use tandem_accel::memory::{GuestMap, Region, RegionKind};

/// Which address space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SpaceKind {
    /// Ports.
    Io,
    /// Guest physical addresses.
    Memory,
}

/// Host memory behind a window: the guest's accesses go there without a stop. It answers on the
/// bus as well, for what reaches it there.
#[derive(Clone)]
pub struct Direct {
    /// Where it is put.
    pub map: Arc<GuestMap>,
    /// The memory, in no map but by a claim.
    pub region: Region,
}

impl BusDevice for Direct {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if !self.region.read(offset, data) {
            data.fill(0xff);
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        if self.region.kind != RegionKind::Rom {
            self.region.load(offset, data);
        }
    }
}

/// A range of addresses and who answers there.
#[derive(Clone)]
pub struct Window {
    /// Address space.
    pub space: SpaceKind,
    /// First address.
    pub start: u64,
    /// Length in bytes, > 0.
    pub len: u64,
    /// Name in listings.
    pub name: String,
    /// Who answers.
    pub device: Arc<dyn BusDevice>,
    /// The memory that answers in its stead; `start` and `len` are multiples of 4 KiB then.
    pub direct: Option<Arc<Direct>>,
}

/// Names a claimed window.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ClaimId(u64);

struct Claim {
    window: Window,
    mapped: bool,
}

#[derive(Default)]
struct Claims {
    next: u64,
    all: BTreeMap<ClaimId, Claim>,
}

/// The claims on both address spaces of a machine.
pub struct Decoder {
    io: Arc<IoBus>,
    claims: Mutex<Claims>,
}

impl Decoder {
    /// No claims yet on `io`.
    pub fn new(io: Arc<IoBus>) -> Arc<Decoder> {
        Arc::new(Decoder { io, claims: Mutex::default() })
    }

    fn space(&self, kind: SpaceKind) -> &Space {
        match kind {
            SpaceKind::Io => &self.io.pio,
            SpaceKind::Memory => &self.io.mmio,
        }
    }

    fn try_map(&self, w: &Window) -> bool {
        match self.space(w.space).insert(&w.name, w.start, w.len, w.device.clone()) {
            Ok(()) => match w.direct.as_ref().map(|d| d.map.insert(&d.region.moved(w.start))) {
                Some(Err(e)) => {
                    log::debug!("PCI window waits: {e}");
                    self.space(w.space).remove(w.start);
                    false
                }
                None | Some(Ok(())) => true,
            },
            Err(e) => {
                log::debug!("PCI window waits: {e}");
                false
            }
        }
    }

    /// Claims `window`; it is mapped now, or as soon as nobody else is there.
    pub fn claim(&self, window: Window) -> ClaimId {
        let mut claims = self.claims.lock().unwrap();
        let id = ClaimId(claims.next);
        claims.next += 1;
        let mapped = self.try_map(&window);
        claims.all.insert(id, Claim { window, mapped });
        id
    }

    /// Gives a window up. Unknown ids are ignored.
    pub fn release(&self, id: ClaimId) {
        let mut claims = self.claims.lock().unwrap();
        let Some(gone) = claims.all.remove(&id) else { return };
        if !gone.mapped {
            return;
        }
        if let Some(d) = &gone.window.direct {
            d.map.remove(gone.window.start);
        }
        self.space(gone.window.space).remove(gone.window.start);
        for c in claims.all.values_mut().filter(|c| !c.mapped) {
            c.mapped = self.try_map(&c.window);
        }
    }
}
