//! The reset control register (port CF9h; ICH9 data sheet §13.7.5) and system control port A (port
//! 92h: address line 20 and fast reset).
//!
//! Address line 20 is always open: what is written is read back and has no other effect.

use crate::power::{PowerRequest, PowerSink, ResetCause};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use tandem_accel::bus::BusDevice;

/// The reset control register's port. It lies inside PCI's CONFIG_ADDRESS, whose device passes byte
/// accesses on.
pub const RESET_PORT: u16 = 0xcf9;
/// System control port A.
pub const PORT_A: u16 = 0x92;

const RST_CPU: u8 = 1 << 2;
const RST_WRITABLE: u8 = 1 << 1 | 1 << 3;
const FAST_RESET: u8 = 1;
const A20: u8 = 2;

/// The reset control register.
pub struct ResetControl {
    value: AtomicU8,
    power: Arc<dyn PowerSink>,
}

impl ResetControl {
    /// A register that asks `power`.
    pub fn new(power: Arc<dyn PowerSink>) -> Arc<ResetControl> {
        Arc::new(ResetControl { value: AtomicU8::new(0), power })
    }
    /// RESET.
    pub fn reset(&self) {
        self.value.store(0, Ordering::Relaxed);
    }
}

impl BusDevice for ResetControl {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(b) = data.first_mut() {
            *b = self.value.load(Ordering::Relaxed);
        }
    }
    fn write(&self, _: u64, data: &[u8]) {
        let Some(&v) = data.first() else { return };
        self.value.store(v & RST_WRITABLE, Ordering::Relaxed);
        if v & RST_CPU != 0 {
            self.power.request(PowerRequest::Reset(ResetCause::ResetControl));
        }
    }
}

/// System control port A.
pub struct PortA {
    value: AtomicU8,
    power: Arc<dyn PowerSink>,
}

impl PortA {
    /// A port that asks `power`.
    pub fn new(power: Arc<dyn PowerSink>) -> Arc<PortA> {
        Arc::new(PortA { value: AtomicU8::new(A20), power })
    }
    /// RESET.
    pub fn reset(&self) {
        self.value.store(A20, Ordering::Relaxed);
    }
}

impl BusDevice for PortA {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(b) = data.first_mut() {
            *b = self.value.load(Ordering::Relaxed);
        }
    }
    fn write(&self, _: u64, data: &[u8]) {
        let Some(&v) = data.first() else { return };
        let before = self.value.swap(v & (A20 | FAST_RESET), Ordering::Relaxed);
        if v & !before & FAST_RESET != 0 {
            self.power.request(PowerRequest::Reset(ResetCause::Port92));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::testing::Recorder;

    #[test]
    fn resets_are_asked_for() {
        let power = Arc::new(Recorder::default());
        let (r, a) = (ResetControl::new(power.clone()), PortA::new(power.clone()));
        let get = |d: &dyn BusDevice| {
            let mut b = [0];
            d.read(0, &mut b);
            b[0]
        };
        r.write(0, &[2]);
        assert_eq!(get(&*r), 2);
        assert!(power.0.lock().unwrap().is_empty());
        r.write(0, &[6]);
        assert_eq!(get(&*a), 2);
        a.write(0, &[0]);
        assert_eq!(get(&*a), 0);
        a.write(0, &[3]);
        a.write(0, &[3]);
        let want = [ResetCause::ResetControl, ResetCause::Port92].map(PowerRequest::Reset);
        assert_eq!(*power.0.lock().unwrap(), want);
    }
}
