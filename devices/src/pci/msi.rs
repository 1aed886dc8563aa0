//! MSI (PCI 3.0 §6.8.1): up to 32 messages, 64-bit address, per-vector masking.

use super::capability::Capability;
use super::config::ConfigSpace;
use std::sync::{Arc, Mutex};
use tandem_accel::irq::{MsiMessage, MsiSink};

/// Offset of the mask bits in the capability.
const MASK: u16 = 0x10;
/// Offset of the pending bits in the capability.
pub(super) const PENDING: u16 = 0x14;

#[derive(Default)]
struct State {
    enabled: bool,
    bus_master: bool,
    /// log2 of the number of messages software granted.
    granted: u8,
    addr: u64,
    data: u16,
    mask: u32,
    pending: u32,
}

/// The MSI messages of a function.
pub struct Msi {
    sink: Arc<dyn MsiSink>,
    /// log2 of the number of messages asked for, 0–5.
    log2: u8,
    state: Mutex<State>,
}

impl Msi {
    /// `2^log2` messages (at most 32).
    pub fn new(sink: Arc<dyn MsiSink>, log2: u8) -> Arc<Msi> {
        Arc::new(Msi { sink, log2: log2.min(5), state: Mutex::default() })
    }

    /// Whether software has turned MSI on; INTx is not used then.
    pub fn enabled(&self) -> bool {
        self.state.lock().unwrap().enabled
    }

    /// Sends message `n`, or remembers it while masked. `n` wraps at the number of messages that
    /// software granted. Nothing happens while MSI is off.
    pub fn notify(&self, n: u8) {
        let msg = {
            let mut s = self.state.lock().unwrap();
            let n = n & ((1 << s.granted) - 1);
            if !s.enabled {
                return;
            }
            if s.mask & 1 << n != 0 {
                s.pending |= 1 << n;
                return;
            }
            s.message(n)
        };
        self.deliver(msg);
    }

    fn deliver(&self, msg: Option<MsiMessage>) {
        if let Some(m) = msg {
            self.sink.send(m);
        }
    }

    /// Takes over what software wrote into the capability at `cap`.
    pub(super) fn update(&self, cfg: &ConfigSpace, cap: u16) {
        let mut unmasked = Vec::new();
        {
            let mut s = self.state.lock().unwrap();
            let control = cfg.u16(cap + 2);
            s.enabled = control & 1 != 0;
            s.granted = ((control >> 4 & 7) as u8).min(self.log2);
            s.addr = cfg.u64(cap + 4);
            s.data = cfg.u16(cap + 12);
            s.mask = cfg.u32(cap + MASK);
            if s.enabled {
                let due = s.pending & !s.mask;
                s.pending &= !due;
                unmasked.extend((0..32).filter(|n| due & 1 << n != 0).map(|n| s.message(n)));
            } else {
                s.pending = 0;
            }
        }
        unmasked.into_iter().for_each(|m| self.deliver(m));
    }

    pub(super) fn set_bus_master(&self, on: bool) {
        self.state.lock().unwrap().bus_master = on;
    }

    pub(super) fn pending(&self) -> u32 {
        self.state.lock().unwrap().pending
    }
}

impl State {
    fn message(&self, n: u8) -> Option<MsiMessage> {
        let low = (1u16 << self.granted) - 1;
        let data = self.data & !low | u16::from(n) & low;
        self.bus_master.then_some(MsiMessage { addr: self.addr, data: data.into() })
    }
}

impl Capability for Msi {
    fn id(&self) -> u8 {
        0x05
    }
    fn body(&self) -> Vec<u8> {
        let mut b = vec![0; 0x16];
        // 64-bit addresses, per-vector masking.
        let control = 1u16 << 8 | 1 << 7 | u16::from(self.log2) << 1;
        b[..2].copy_from_slice(&control.to_le_bytes());
        b
    }
    fn writable(&self) -> Vec<u8> {
        let mut w = vec![0; 0x16];
        w[..2].copy_from_slice(&0x71u16.to_le_bytes());
        w[2..6].copy_from_slice(&0xffff_fffcu32.to_le_bytes());
        w[6..12].fill(0xff);
        w[14..18].copy_from_slice(&(u32::MAX >> (32 - (1u32 << self.log2))).to_le_bytes());
        w
    }
}
