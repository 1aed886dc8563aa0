//! The adapter's interrupt: a bit for each port, and one line or message for all (Serial ATA AHCI
//! 1.3.1 §10.7).

use crate::pci::{Intx, Msi};
use std::sync::{Arc, Mutex};

#[derive(Default)]
struct State {
    /// The IS register: ports that wanted an interrupt.
    ports: u32,
    /// GHC.IE.
    enabled: bool,
}

/// The interrupt. Lock order: a port's lock → this → interrupt chip.
pub struct Irq {
    state: Mutex<State>,
    intx: Arc<Intx>,
    msi: Arc<Msi>,
}

impl Irq {
    /// Quiet.
    pub fn new(intx: Arc<Intx>, msi: Arc<Msi>) -> Irq {
        Irq { state: Mutex::default(), intx, msi }
    }

    /// The IS register.
    pub fn ports(&self) -> u32 {
        self.state.lock().unwrap().ports
    }

    /// Port `n` (0–31) wants an interrupt.
    pub fn raise(&self, n: u8) {
        let mut s = self.state.lock().unwrap();
        let new = s.ports & 1 << n == 0;
        s.ports |= 1 << n;
        self.follow(&s, new);
    }

    /// Software clears bits; the caller then lets ports that still want one raise it again.
    pub fn clear(&self, bits: u32) {
        let mut s = self.state.lock().unwrap();
        s.ports &= !bits;
        // Who is told by messages would else never hear of the others.
        self.follow(&s, bits != 0);
    }

    /// GHC.IE.
    pub fn enable(&self, on: bool) {
        let mut s = self.state.lock().unwrap();
        let new = on && !s.enabled;
        s.enabled = on;
        self.follow(&s, new);
    }

    /// Back to the state after power-on.
    pub fn reset(&self) {
        let mut s = self.state.lock().unwrap();
        *s = State::default();
        self.follow(&s, false);
    }

    fn follow(&self, s: &State, message: bool) {
        let wanted = s.enabled && s.ports != 0;
        if !self.msi.enabled() {
            self.intx.set(wanted);
        } else {
            self.intx.set(false);
            if wanted && message {
                self.msi.notify(0);
            }
        }
    }
}
