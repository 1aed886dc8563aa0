//! The I/O APIC: 24 pins, version 20h (82093AA data sheet; ICH9 data sheet §13.5, which adds the
//! EOI register).
//!
//! Level-triggered entries keep a remote IRR from delivery to EOI and are delivered again if the
//! pin is still high then. Edges on a masked pin are lost, as the data sheet says.

use super::apic_bus::{ApicBus, Delivery, DeliveryMode};
use crate::state::{RestoreError, Stateful};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard};
use tandem_accel::bus::BusDevice;

/// Guest physical address.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Bytes of address space.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// Number of pins.
pub const IOAPIC_PINS: u32 = 24;

const PINS: usize = IOAPIC_PINS as usize;
const VERSION: u32 = 0x20;

/// Bits of a redirection table entry.
mod entry {
    pub const LOGICAL: u64 = 1 << 11;
    pub const DELIVERY_STATUS: u64 = 1 << 12;
    pub const REMOTE_IRR: u64 = 1 << 14;
    pub const LEVEL: u64 = 1 << 15;
    pub const MASKED: u64 = 1 << 16;
    pub const READ_ONLY: u64 = DELIVERY_STATUS | REMOTE_IRR;
    /// Vector, modes, polarity, trigger, mask; destination.
    pub const VALID: u64 = 0xff00_0000_0001_ffff;
}

/// State of an I/O APIC; the fields of KVM's `kvm_ioapic_state`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct IoApicState {
    /// Index register.
    pub select: u8,
    /// APIC ID (4 bits).
    pub id: u8,
    /// Levels of the pins.
    pub irr: u32,
    /// Redirection table.
    pub entries: [u64; PINS],
}

impl Default for IoApicState {
    fn default() -> IoApicState {
        IoApicState { select: 0, id: 0, irr: 0, entries: [entry::MASKED; PINS] }
    }
}

/// An I/O APIC.
pub struct IoApic {
    state: Mutex<IoApicState>,
    bus: Arc<ApicBus>,
}

impl IoApic {
    /// An I/O APIC that delivers over `bus`.
    pub fn new(bus: Arc<ApicBus>) -> Arc<IoApic> {
        let io = Arc::new(IoApic { state: Mutex::default(), bus: bus.clone() });
        bus.join(Arc::downgrade(&io));
        io
    }

    /// Pin `pin` has this level; an unknown pin is ignored.
    pub fn set_level(&self, pin: u32, high: bool) {
        if pin >= IOAPIC_PINS {
            return;
        }
        let mut s = self.lock();
        let was = s.irr & 1 << pin != 0;
        if high {
            s.irr |= 1 << pin;
        } else {
            s.irr &= !(1 << pin);
        }
        if high && (!was || s.entries[pin as usize] & entry::LEVEL != 0) {
            self.service(&mut s, pin as usize);
        }
    }

    /// Delivers pin `pin`, which is high or has risen, if its entry allows.
    fn service(&self, s: &mut IoApicState, pin: usize) {
        let e = s.entries[pin];
        let level = e & entry::LEVEL != 0;
        if e & entry::MASKED != 0 || (level && e & entry::REMOTE_IRR != 0) {
            return;
        }
        let Some(mode) = DeliveryMode::from_bits((e >> 8) as u32) else { return };
        // Modes other than these two are edge-triggered whatever the entry says.
        let level = level && matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
        let taken = self.bus.deliver(Delivery {
            dest: (e >> 56) as u32,
            logical: e & entry::LOGICAL != 0,
            wide: false,
            mode,
            vector: e as u8,
            level,
        });
        if level && taken {
            s.entries[pin] |= entry::REMOTE_IRR;
        }
    }

    /// EOI of `vector`, by a local APIC's broadcast or the EOI register.
    pub(super) fn end_of_interrupt(&self, vector: u8) {
        let mut s = self.lock();
        for pin in 0..PINS {
            let e = s.entries[pin];
            if e as u8 == vector && e & entry::LEVEL != 0 && e & entry::REMOTE_IRR != 0 {
                s.entries[pin] &= !entry::REMOTE_IRR;
                if s.irr & 1 << pin != 0 {
                    self.service(&mut s, pin);
                }
            }
        }
    }

    /// RESET; pin levels stay.
    pub fn reset(&self) {
        let mut s = self.lock();
        *s = IoApicState { irr: s.irr, ..IoApicState::default() };
    }

    fn lock(&self) -> MutexGuard<'_, IoApicState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn read_window(s: &IoApicState) -> u32 {
        match s.select {
            0 => u32::from(s.id) << 24,
            1 => VERSION | (IOAPIC_PINS - 1) << 16,
            2 => u32::from(s.id) << 24,
            n @ 0x10..=0x3f => {
                let e = s.entries[usize::from(n - 0x10) / 2];
                if n & 1 == 0 { e as u32 } else { (e >> 32) as u32 }
            }
            _ => 0,
        }
    }

    fn write_window(&self, s: &mut IoApicState, v: u32) {
        match s.select {
            0 => s.id = (v >> 24) as u8 & 0xf,
            n @ 0x10..=0x3f => {
                let pin = usize::from(n - 0x10) / 2;
                let old = s.entries[pin];
                let new = if n & 1 == 0 {
                    old & !0xffff_ffff | u64::from(v)
                } else {
                    old & 0xffff_ffff | u64::from(v) << 32
                };
                let mut new = new & entry::VALID & !entry::READ_ONLY | old & entry::READ_ONLY;
                // Turning an entry to edge forgets its remote IRR: kernels clear a stuck one so.
                if new & entry::LEVEL == 0 {
                    new &= !entry::REMOTE_IRR;
                }
                s.entries[pin] = new;
                if new & entry::LEVEL != 0 && s.irr & 1 << pin != 0 {
                    self.service(s, pin);
                }
            }
            _ => {}
        }
    }
}

impl BusDevice for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let s = self.lock();
        let v = match offset & !0xf {
            0x00 => s.select.into(),
            0x10 => Self::read_window(&s),
            _ => 0,
        };
        drop(s);
        let bytes = (u64::from(v) >> (8 * (offset & 3))).to_le_bytes();
        for (i, b) in data.iter_mut().enumerate() {
            *b = bytes.get(i).copied().unwrap_or(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut v = [0; 4];
        let n = data.len().min(4);
        v[..n].copy_from_slice(&data[..n]);
        let v = u32::from_le_bytes(v);
        match offset {
            0x00 => self.lock().select = v as u8,
            0x10 => {
                let mut s = self.lock();
                self.write_window(&mut s, v);
            }
            0x40 => self.end_of_interrupt(v as u8),
            _ => {}
        }
    }
}

impl Stateful for IoApic {
    type State = IoApicState;
    const KIND: &'static str = "ioapic";
    const VERSION: u32 = 1;

    fn state(&self) -> IoApicState {
        *self.lock()
    }

    fn restore(&self, s: &IoApicState) -> Result<(), RestoreError> {
        let mut mine = self.lock();
        *mine = *s;
        mine.id &= 0xf;
        mine.irr &= (1 << PINS) - 1;
        for e in &mut mine.entries {
            *e &= entry::VALID;
        }
        Ok(())
    }
}
