//! The 8254 programmable interval timer and system control port B (Intel 82C54 data sheet; ICH9
//! data sheet §13.3, §13.7.1).
//!
//! Channel 0 drives interrupt 0, channel 1 was the memory refresh, channel 2 the speaker, gated and
//! read back through port 61h. Outputs and counts are computed from guest time when they are looked
//! at; only channel 0's interrupt needs a timer. A new count takes effect at once in all modes.

use super::{MIN_INTERVAL, nanos, ticks};
use crate::state::{RestoreError, Stateful};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use tandem_accel::bus::BusDevice;
use tandem_accel::clock::{Clock, Timer};
use tandem_accel::irq::IrqLine;

/// Input clock in Hz.
pub const PIT_HZ: u64 = 1_193_182;
/// First of the four ports.
pub const PIT_PORT: u16 = 0x40;
/// System control port B.
pub const PORT_B: u16 = 0x61;
/// Half-period (ns) of the refresh toggle in port B.
const REFRESH_NS: u64 = 15_085;

/// Which bytes of a count are read and written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Access {
    /// Low byte only.
    Low,
    /// High byte only.
    High,
    /// Low byte, then high byte.
    Both,
}

/// State of one counter.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PitChannel {
    /// Reload value, 1–10000h.
    pub count: u32,
    /// Mode, 0–5.
    pub mode: u8,
    /// Counts in BCD.
    pub bcd: bool,
    /// Bytes accessed.
    pub access: Access,
    /// Gate input.
    pub gate: bool,
    /// Guest time (ns) at which counting began.
    pub load_time: u64,
    /// Counting has begun.
    pub running: bool,
    /// Ticks already counted when the gate stopped the counter.
    pub stopped_at: Option<u64>,
    /// Low byte of a count whose high byte is still to come.
    pub write_latch: Option<u8>,
    /// The next read gives the high byte.
    pub read_high: bool,
    /// Latched count.
    pub latched_count: Option<u16>,
    /// Latched status.
    pub latched_status: Option<u8>,
}

impl Default for PitChannel {
    fn default() -> PitChannel {
        PitChannel {
            count: 0x10000,
            mode: 3,
            bcd: false,
            access: Access::Both,
            gate: true,
            load_time: 0,
            running: false,
            stopped_at: None,
            write_latch: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
        }
    }
}

impl PitChannel {
    fn elapsed(&self, now: u64) -> u64 {
        match self.stopped_at {
            Some(t) => t,
            None => ticks(now.saturating_sub(self.load_time), PIT_HZ),
        }
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    /// The counting element, in binary.
    fn counter(&self, now: u64) -> u32 {
        let n = u64::from(self.count.max(1));
        if !self.running {
            return self.count;
        }
        let d = self.elapsed(now);
        let range = if self.bcd { 10_000 } else { 0x10000 };
        let v = match self.mode {
            2 => n - d % n,
            3 => n - 2 * d % n,
            // One-shot modes count on through 0.
            _ => (n + range - d % range) % range,
        };
        v as u32
    }

    fn read_value(&self, now: u64) -> u16 {
        let v = self.counter(now);
        if !self.bcd {
            return v as u16;
        }
        (0..4).fold(0, |bcd, i| bcd | (v / 10u32.pow(i) % 10) << (4 * i)) as u16
    }

    /// The OUT pin.
    fn out(&self, now: u64) -> bool {
        if !self.running {
            return self.mode != 0;
        }
        let (d, n) = (self.elapsed(now), u64::from(self.count.max(1)));
        match self.mode {
            0 | 1 => d >= n,
            2 => !self.gate || d % n != n - 1,
            3 => !self.gate || d % n < n.div_ceil(2),
            _ => d != n,
        }
    }

    fn load(&mut self, raw: u16, now: u64) {
        let mut v = u32::from(raw);
        if self.bcd {
            v = (0..4).fold(0, |b, i| b + (v >> (4 * i) & 0xf).min(9) * 10u32.pow(i));
        }
        self.count = match v {
            0 if self.bcd => 10_000,
            0 => 0x10000,
            v => v,
        };
        // Modes 1 and 5 wait for the gate to rise.
        if !matches!(self.mode, 1 | 5) {
            self.start(now);
        }
    }

    fn start(&mut self, now: u64) {
        self.running = true;
        self.load_time = now;
        self.stopped_at = (!self.gate && matches!(self.mode, 0 | 4)).then_some(0);
    }

    fn set_gate(&mut self, gate: bool, now: u64) {
        if self.gate == gate {
            return;
        }
        match self.mode {
            0 | 4 if self.running => {
                if gate {
                    let t = self.stopped_at.take().unwrap_or(0);
                    self.load_time = now.saturating_sub(nanos(t, PIT_HZ));
                } else {
                    self.stopped_at = Some(self.elapsed(now));
                }
            }
            1 | 5 if gate => self.start(now),
            2 | 3 if gate && self.running => self.start(now),
            _ => {}
        }
        self.gate = gate;
    }

    fn control(&mut self, v: u8, now: u64) {
        let access = match v >> 4 & 3 {
            0 => return self.latch_count(now),
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        // Modes 6 and 7 are 2 and 3.
        let mode = v >> 1 & 7;
        *self = PitChannel {
            mode: if mode > 5 { mode - 4 } else { mode },
            bcd: v & 1 != 0,
            access,
            gate: self.gate,
            count: self.count,
            ..PitChannel::default()
        };
    }

    fn latch_count(&mut self, now: u64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.read_value(now));
            self.read_high = false;
        }
    }

    fn latch_status(&mut self, now: u64) {
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::Both => 3,
        };
        let null = u8::from(!self.running);
        self.latched_status.get_or_insert(
            u8::from(self.out(now)) << 7
                | null << 6
                | access << 4
                | self.mode << 1
                | u8::from(self.bcd),
        );
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(s) = self.latched_status.take() {
            return s;
        }
        let v = self.latched_count.unwrap_or_else(|| self.read_value(now));
        let [low, high] = v.to_le_bytes();
        let (byte, last) = match self.access {
            Access::Low => (low, true),
            Access::High => (high, true),
            Access::Both if self.read_high => (high, true),
            Access::Both => (low, false),
        };
        self.read_high = !last;
        if last {
            self.latched_count = None;
        }
        byte
    }

    fn write(&mut self, v: u8, now: u64) {
        match (self.access, self.write_latch.take()) {
            (Access::Low, _) => self.load(v.into(), now),
            (Access::High, _) => self.load(u16::from(v) << 8, now),
            (Access::Both, Some(low)) => self.load(u16::from_le_bytes([low, v]), now),
            (Access::Both, None) => {
                self.write_latch = Some(v);
                // The first byte stops a mode 0 count (data sheet, mode 0).
                if self.mode == 0 {
                    self.running = false;
                }
            }
        }
    }
}

/// State of the PIT and port B.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PitState {
    /// The counters.
    pub channels: [PitChannel; 3],
    /// Writable bits of port B (0–3).
    pub port_b: u8,
    /// Guest time (ns) of channel 0's next interrupt.
    pub next_irq: Option<u64>,
    /// Interrupt 0 belongs to the HPET.
    pub irq_disabled: bool,
    /// Level of interrupt 0.
    pub irq_level: bool,
}

/// The PIT.
pub struct Pit {
    state: Mutex<PitState>,
    clock: Arc<Clock>,
    irq: IrqLine,
    timer: Timer,
}

impl Pit {
    /// A PIT with interrupt 0 on `irq`.
    pub fn new(clock: &Arc<Clock>, irq: IrqLine) -> Arc<Pit> {
        Arc::new_cyclic(|me: &Weak<Pit>| {
            let me = me.clone();
            let timer = clock.timer(move || {
                if let Some(p) = me.upgrade() {
                    p.fired();
                }
            });
            let state = Mutex::new(power_on());
            Pit { state, clock: clock.clone(), irq, timer }
        })
    }

    /// Gives interrupt 0 away (to the HPET's legacy replacement) or takes it back.
    pub fn set_irq_enabled(&self, on: bool) {
        let mut s = self.lock();
        s.irq_disabled = !on;
        if !on {
            self.set_irq(&mut s, false);
        }
    }

    /// RESET.
    pub fn reset(&self) {
        let mut s = self.lock();
        self.set_irq(&mut s, false);
        *s = power_on();
        self.timer.disarm();
    }

    /// System control port B as a device on one port.
    pub fn port_b(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(PortB(self.clone()))
    }

    fn lock(&self) -> MutexGuard<'_, PitState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn set_irq(&self, s: &mut PitState, high: bool) {
        s.irq_level = high && !s.irq_disabled;
        self.irq.set(s.irq_level);
    }

    /// Channel 0 was programmed.
    fn reprogrammed(&self, s: &mut PitState, now: u64) {
        // Only the ends of counts raise interrupts, not what the output does when programmed.
        self.set_irq(s, false);
        let c = &s.channels[0];
        let start = c.running && !matches!(c.mode, 1 | 5);
        s.next_irq = start.then(|| now.saturating_add(nanos(c.count.into(), PIT_HZ)));
        self.rearm(s);
    }

    fn rearm(&self, s: &PitState) {
        match s.next_irq {
            Some(t) => self.timer.arm(t),
            None => self.timer.disarm(),
        }
    }

    fn fired(&self) {
        let now = self.clock.now();
        let mut s = self.lock();
        if s.next_irq.is_none_or(|t| t > now) {
            return;
        }
        let c = s.channels[0];
        s.next_irq = c.is_periodic().then(|| {
            // Multiples of the period since the load, so that rounding does not add up.
            let n = u64::from(c.count.max(1));
            let done = ticks(now.saturating_sub(c.load_time), PIT_HZ) / n;
            let next = c.load_time.saturating_add(nanos((done + 1) * n, PIT_HZ));
            next.max(now + MIN_INTERVAL)
        });
        self.set_irq(&mut s, false);
        self.set_irq(&mut s, true);
        self.rearm(&s);
    }

    fn write_port(&self, port: u64, v: u8) {
        let now = self.clock.now();
        let mut s = self.lock();
        match (port & 3, v >> 6) {
            (3, 3) => {
                for n in (0..3).filter(|n| v & 2 << n != 0) {
                    let c = &mut s.channels[n];
                    if v & 0x20 == 0 {
                        c.latch_count(now);
                    }
                    if v & 0x10 == 0 {
                        c.latch_status(now);
                    }
                }
            }
            (3, n) => {
                s.channels[usize::from(n)].control(v, now);
                if n == 0 && v & 0x30 != 0 {
                    self.reprogrammed(&mut s, now);
                }
            }
            (n, _) => {
                s.channels[n as usize].write(v, now);
                if n == 0 {
                    self.reprogrammed(&mut s, now);
                }
            }
        }
    }
}

fn power_on() -> PitState {
    let mut s = PitState::default();
    s.channels[2].gate = false;
    s
}

impl BusDevice for Pit {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let now = self.clock.now();
        let mut s = self.lock();
        for (i, b) in data.iter_mut().enumerate() {
            let n = (offset + i as u64) & 3;
            *b = if n == 3 { 0 } else { s.channels[n as usize].read(now) };
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        for (i, b) in data.iter().enumerate() {
            self.write_port(offset + i as u64, *b);
        }
    }
}

/// System control port B.
struct PortB(Arc<Pit>);

impl BusDevice for PortB {
    fn read(&self, _: u64, data: &mut [u8]) {
        let now = self.0.clock.now();
        let s = self.0.lock();
        let refresh = ((now / REFRESH_NS) & 1) as u8;
        let v = s.port_b | refresh << 4 | u8::from(s.channels[2].out(now)) << 5;
        data.fill(0);
        if let Some(b) = data.first_mut() {
            *b = v;
        }
    }
    fn write(&self, _: u64, data: &[u8]) {
        let Some(&v) = data.first() else { return };
        let now = self.0.clock.now();
        let mut s = self.0.lock();
        s.port_b = v & 0xf;
        s.channels[2].set_gate(v & 1 != 0, now);
    }
}

impl Stateful for Pit {
    type State = PitState;
    const KIND: &'static str = "i8254";
    const VERSION: u32 = 1;

    fn state(&self) -> PitState {
        *self.lock()
    }

    fn restore(&self, new: &PitState) -> Result<(), RestoreError> {
        let bad = |c: &PitChannel| !(1..=0x10000).contains(&c.count) || c.mode > 5;
        if new.channels.iter().any(bad) {
            let why = "a counter has an impossible count or mode".into();
            return Err(RestoreError { kind: Self::KIND, why });
        }
        let mut s = self.lock();
        *s = *new;
        self.irq.import_level(s.irq_level);
        self.rearm(&s);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Levels, run_at};

    fn rig() -> (Arc<Clock>, Arc<Pit>, Arc<Levels>) {
        let clock = Clock::new();
        let irq = Arc::new(Levels::default());
        let pit = Pit::new(&clock, IrqLine::new(irq.clone(), 0));
        (clock, pit, irq)
    }
    fn get(d: &dyn BusDevice, r: u64) -> u8 {
        let mut b = [0];
        d.read(r, &mut b);
        b[0]
    }

    #[test]
    fn periodic_interrupt_without_drift() {
        let (clock, pit, irq) = rig();
        pit.write(3, &[0x34]);
        let count = (PIT_HZ / 100) as u16;
        pit.write(0, &[count as u8]);
        pit.write(0, &[(count >> 8) as u8]);
        for k in 1..=50 {
            run_at(&clock, k * 10_000_000 + 5_000);
            assert_eq!(irq.edges(0), k as u32);
        }
        pit.write(3, &[0x30]);
        assert_eq!(clock.next_deadline(), None);
        assert!(!irq.level(0));
    }

    #[test]
    fn one_shot_and_read_back() {
        let (clock, pit, irq) = rig();
        pit.write(3, &[0x38]);
        pit.write(0, &[0xe8]);
        pit.write(0, &[0x03]);
        clock.set(nanos(400, PIT_HZ));
        pit.write(3, &[0x00]);
        clock.set(nanos(500, PIT_HZ));
        assert_eq!((get(&*pit, 0), get(&*pit, 0)), (0x58, 0x02), "latched 600");
        assert_eq!((get(&*pit, 0), get(&*pit, 0)), (0xf4, 0x01));
        pit.write(3, &[0xe2]);
        assert_eq!(get(&*pit, 0), 0xb8, "OUT high, loaded, both bytes, mode 4");
        run_at(&clock, nanos(1000, PIT_HZ));
        assert_eq!(irq.edges(0), 1);
        assert_eq!(clock.next_deadline(), None);
    }

    #[test]
    fn channel_two_measures_time_through_port_b() {
        let (clock, pit, _) = rig();
        let b = pit.port_b();
        b.write(0, &[0x01]);
        pit.write(3, &[0xb0]);
        pit.write(2, &[0xff]);
        pit.write(2, &[0x0f]);
        assert_eq!(get(&*b, 0) & 0x21, 0x01);
        clock.set(nanos(1000, PIT_HZ));
        b.write(0, &[0x00]);
        clock.set(nanos(9000, PIT_HZ));
        assert_eq!(get(&*b, 0) & 0x20, 0, "the gate stops it");
        b.write(0, &[0x01]);
        clock.set(nanos(9000 + 3094, PIT_HZ));
        assert_eq!(get(&*b, 0) & 0x20, 0);
        clock.set(nanos(9000 + 3097, PIT_HZ));
        assert_eq!(get(&*b, 0) & 0x20, 0x20);
        let r = get(&*b, 0) & 0x10;
        clock.set(clock.now() + REFRESH_NS);
        assert_ne!(get(&*b, 0) & 0x10, r);
    }

    #[test]
    fn bcd_and_square_wave() {
        let (clock, pit, _) = rig();
        pit.write(3, &[0x37]);
        pit.write(0, &[0x00]);
        pit.write(0, &[0x10]);
        clock.set(nanos(100, PIT_HZ));
        assert_eq!((get(&*pit, 0), get(&*pit, 0)), (0x00, 0x08), "1000 - 2 * 100");
        let s = pit.state();
        assert!(s.channels[0].out(clock.now()));
        assert!(!s.channels[0].out(nanos(600, PIT_HZ)));
    }

    #[test]
    fn restored_and_given_to_the_hpet() {
        let (clock, pit, _) = rig();
        pit.write(3, &[0x34]);
        pit.write(0, &[0x00]);
        pit.write(0, &[0x10]);
        let (clock2, pit2, irq2) = rig();
        clock2.set(clock.now());
        pit2.restore(&pit.state()).unwrap();
        run_at(&clock2, nanos(0x1000, PIT_HZ));
        assert_eq!(irq2.edges(0), 1);
        pit2.set_irq_enabled(false);
        assert!(!irq2.level(0));
        run_at(&clock2, nanos(0x2000, PIT_HZ));
        assert_eq!(irq2.edges(0), 1);
    }
}
