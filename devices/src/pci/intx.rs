//! The INTx pin of a function.

use std::sync::Mutex;
use tandem_accel::irq::IrqLine;

/// Interrupt pin of a function.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pin {
    /// INTA.
    A = 0,
    /// INTB.
    B = 1,
    /// INTC.
    C = 2,
    /// INTD.
    D = 3,
}

impl Pin {
    /// The pin `n % 4`.
    pub fn from_index(n: u8) -> Pin {
        [Pin::A, Pin::B, Pin::C, Pin::D][usize::from(n % 4)]
    }
    /// The parent bus's pin that this pin of the device in `slot` behind a bridge reaches
    /// (PCI-to-PCI Bridge 1.2 §9.1).
    pub fn swizzle(self, slot: u8) -> Pin {
        Pin::from_index(self as u8 + slot % 4)
    }
}

struct State {
    asserted: bool,
    disabled: bool,
}

/// An INTx pin: what the device wants, gated by the command register.
pub struct Intx {
    line: IrqLine,
    pin: Pin,
    state: Mutex<State>,
}

impl Intx {
    /// Pin `pin` at the end of `line`, low.
    pub fn new(line: IrqLine, pin: Pin) -> Intx {
        Intx { line, pin, state: Mutex::new(State { asserted: false, disabled: false }) }
    }
    /// Which pin.
    pub fn pin(&self) -> Pin {
        self.pin
    }
    /// The device wants the pin asserted or not.
    pub fn set(&self, asserted: bool) {
        let mut s = self.state.lock().unwrap();
        s.asserted = asserted;
        self.line.set(s.asserted && !s.disabled);
    }
    /// The command register's Interrupt Disable.
    pub fn set_disabled(&self, disabled: bool) {
        let mut s = self.state.lock().unwrap();
        s.disabled = disabled;
        self.line.set(s.asserted && !s.disabled);
    }
    /// Whether the device wants an interrupt (the status register's Interrupt Status).
    pub fn pending(&self) -> bool {
        self.state.lock().unwrap().asserted
    }
}
