//! The high precision event timer: one 64-bit counter at 100 MHz, three comparators, legacy
//! replacement routing (IA-PC HPET specification 1.0a).
//!
//! The counter is computed from guest time when it is read. A comparator interrupts by edge or
//! level on an I/O APIC input of its choice; in legacy replacement, comparators 0 and 1 take over
//! interrupts 0 and 8 from PIT and RTC.

use super::MIN_INTERVAL;
use crate::gsi::{GSI_COUNT, IrqInputs};
use crate::state::{RestoreError, Stateful};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use tandem_accel::bus::BusDevice;
use tandem_accel::clock::{Clock, Timer};
use tandem_accel::irq::IrqLine;

/// Guest physical address.
pub const HPET_BASE: u64 = 0xfed0_0000;
/// Bytes of address space.
pub const HPET_SIZE: u64 = 0x400;
/// Nanoseconds per tick.
const TICK_NS: u64 = 10;
/// Comparators.
const TIMERS: usize = 3;
/// I/O APIC inputs a comparator may use: 2, 8, 16–23.
const ROUTES: u32 = 0x00ff_0104;

/// Revision 1, three comparators, 64-bit counter, legacy replacement, vendor 8086h, period in fs.
const CAPABILITIES: u64 =
    (TICK_NS * 1_000_000) << 32 | 0x8086 << 16 | 1 << 15 | 1 << 13 | (TIMERS as u64 - 1) << 8 | 1;

const CFG_ENABLE: u64 = 1;
const CFG_LEGACY: u64 = 2;

/// Bits of a comparator's configuration.
mod tn {
    pub const LEVEL: u64 = 1 << 1;
    pub const ENABLE: u64 = 1 << 2;
    pub const PERIODIC: u64 = 1 << 3;
    pub const PERIODIC_CAP: u64 = 1 << 4;
    pub const SIZE_64: u64 = 1 << 5;
    pub const SET_VALUE: u64 = 1 << 6;
    pub const FORCE_32: u64 = 1 << 8;
    pub const ROUTE: u64 = 0x1f << 9;
    pub const WRITABLE: u64 = LEVEL | ENABLE | PERIODIC | SET_VALUE | FORCE_32 | ROUTE;
    pub const FIXED: u64 = PERIODIC_CAP | SIZE_64 | (super::ROUTES as u64) << 32;
}

/// A 64-bit register, of which 32-bit halves may be accessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Reg {
    Capabilities,
    Config,
    Status,
    Counter,
    TimerConfig(usize),
    Comparator(usize),
}

impl Reg {
    fn decode(offset: u64) -> Option<Reg> {
        Some(match offset & !7 {
            0x00 => Reg::Capabilities,
            0x10 => Reg::Config,
            0x20 => Reg::Status,
            0xf0 => Reg::Counter,
            o @ 0x100..0x160 => {
                let n = ((o - 0x100) / 0x20) as usize;
                match o & 0x1f {
                    0x00 => Reg::TimerConfig(n),
                    0x08 => Reg::Comparator(n),
                    _ => return None,
                }
            }
            _ => return None,
        })
    }
}

/// State of a comparator.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HpetTimer {
    /// Configuration register.
    pub config: u64,
    /// Comparator register.
    pub comparator: u64,
    /// Period of periodic mode, in ticks.
    pub period: u64,
    /// Guest time (ns) of the next match.
    pub next: Option<u64>,
}

impl Default for HpetTimer {
    fn default() -> HpetTimer {
        HpetTimer { config: tn::FIXED, comparator: u64::MAX, period: 0, next: None }
    }
}

impl HpetTimer {
    fn mask(&self) -> u64 {
        if self.config & tn::FORCE_32 != 0 { u32::MAX.into() } else { u64::MAX }
    }

    fn is_periodic(&self) -> bool {
        self.config & tn::PERIODIC != 0 && self.period & self.mask() != 0
    }
}

/// State of the HPET.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct HpetState {
    /// General configuration.
    pub config: u64,
    /// General interrupt status.
    pub status: u64,
    /// The counter at guest time `since` (or now, while it stands).
    pub counter: u64,
    /// Guest time (ns) since which the counter runs.
    pub since: u64,
    /// The comparators.
    pub timers: [HpetTimer; TIMERS],
}

impl HpetState {
    fn is_enabled(&self) -> bool {
        self.config & CFG_ENABLE != 0
    }

    fn counter(&self, now: u64) -> u64 {
        if !self.is_enabled() {
            return self.counter;
        }
        self.counter.wrapping_add(now.saturating_sub(self.since) / TICK_NS)
    }

    /// The guest time at which the counter will have gone `ticks` on.
    fn time_after(&self, now: u64, ticks: u64) -> u64 {
        let phase = now.saturating_sub(self.since) % TICK_NS;
        now.saturating_add(ticks.saturating_mul(TICK_NS)).saturating_sub(phase)
    }

    /// Works out when comparator `n` matches. A comparator equal to the counter matches now, unless
    /// `fired` says that it just did.
    fn schedule(&mut self, n: usize, now: u64, fired: bool) {
        let t = self.timers[n];
        if !self.is_enabled() {
            self.timers[n].next = None;
            return;
        }
        let mut left = t.comparator.wrapping_sub(self.counter(now)) & t.mask();
        if left == 0 && fired {
            left = t.mask();
        }
        self.timers[n].next = Some(self.time_after(now, left));
    }

    /// The I/O APIC input of comparator `n`.
    fn route(&self, n: usize) -> u32 {
        match (self.config & CFG_LEGACY != 0, n) {
            (true, 0) => 0,
            (true, 1) => 8,
            _ => (self.timers[n].config >> 9) as u32 & 0x1f,
        }
    }

    fn line_level(&self, n: usize) -> bool {
        let c = self.timers[n].config;
        c & tn::ENABLE != 0 && c & tn::LEVEL != 0 && self.status & 1 << n != 0
    }
}

type Callback = Box<dyn Fn(bool) + Send + Sync>;

/// The HPET.
pub struct Hpet {
    state: Mutex<HpetState>,
    clock: Arc<Clock>,
    /// A wire of each comparator to each input.
    lines: Vec<Vec<IrqLine>>,
    timers: Vec<Timer>,
    legacy: OnceLock<Callback>,
}

impl Hpet {
    /// An HPET whose comparators reach `inputs`.
    pub fn new(clock: &Arc<Clock>, inputs: &IrqInputs) -> Arc<Hpet> {
        Arc::new_cyclic(|me: &Weak<Hpet>| Hpet {
            state: Mutex::default(),
            clock: clock.clone(),
            lines: (0..TIMERS).map(|_| (0..GSI_COUNT).map(|g| inputs.line(g)).collect()).collect(),
            timers: (0..TIMERS)
                .map(|n| {
                    let me = me.clone();
                    clock.timer(move || {
                        if let Some(h) = me.upgrade() {
                            h.fired(n);
                        }
                    })
                })
                .collect(),
            legacy: OnceLock::new(),
        })
    }

    /// Installs what is called, without the HPET's lock, when legacy replacement begins (`true`) or
    /// ends: PIT and RTC then lose or regain their interrupts. At most once.
    pub fn on_legacy(&self, f: impl Fn(bool) + Send + Sync + 'static) {
        let _ = self.legacy.set(Box::new(f));
    }

    /// RESET.
    pub fn reset(&self) {
        let was_legacy = {
            let mut s = self.lock();
            let was = s.config & CFG_LEGACY != 0;
            *s = HpetState::default();
            self.apply(&s);
            was
        };
        self.tell_legacy(was_legacy, false);
    }

    fn lock(&self) -> MutexGuard<'_, HpetState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn tell_legacy(&self, was: bool, is: bool) {
        if let Some(f) = self.legacy.get().filter(|_| was != is) {
            f(is);
        }
    }

    /// Sets level lines and timers as the state says.
    fn apply(&self, s: &HpetState) {
        for n in 0..TIMERS {
            for (gsi, line) in self.lines[n].iter().enumerate() {
                line.set(gsi as u32 == s.route(n) && s.line_level(n));
            }
            match s.timers[n].next.filter(|_| s.timers[n].config & tn::ENABLE != 0) {
                Some(t) => self.timers[n].arm(t),
                None => self.timers[n].disarm(),
            }
        }
    }

    fn fired(&self, n: usize) {
        let now = self.clock.now();
        let mut s = self.lock();
        let t = s.timers[n];
        if t.next.is_none_or(|next| next > now) {
            return;
        }
        if t.is_periodic() {
            // The comparator steps on by periods past the counter.
            let behind = s.counter(now).wrapping_sub(t.comparator) & t.mask();
            let period = t.period & t.mask();
            let steps = behind / period + 1;
            let comparator = t.comparator.wrapping_add(steps.wrapping_mul(period)) & t.mask();
            s.timers[n].comparator = comparator;
        }
        s.schedule(n, now, true);
        if let Some(next) = &mut s.timers[n].next {
            *next = (*next).max(now + MIN_INTERVAL);
        }
        if t.config & tn::LEVEL != 0 {
            s.status |= 1 << n;
        } else if t.config & tn::ENABLE != 0
            && let Some(line) = self.lines[n].get(s.route(n) as usize)
        {
            line.pulse();
        }
        self.apply(&s);
    }

    fn read_reg(s: &HpetState, reg: Reg, now: u64) -> u64 {
        match reg {
            Reg::Capabilities => CAPABILITIES,
            Reg::Config => s.config,
            Reg::Status => s.status,
            Reg::Counter => s.counter(now),
            Reg::TimerConfig(n) => s.timers[n].config,
            Reg::Comparator(n) => s.timers[n].comparator,
        }
    }

    /// Writes the bits of `mask`.
    fn write_reg(s: &mut HpetState, reg: Reg, v: u64, mask: u64, now: u64) {
        let merged = |old: u64| old & !mask | v & mask;
        match reg {
            Reg::Capabilities => {}
            Reg::Config => {
                let new = merged(s.config) & (CFG_ENABLE | CFG_LEGACY);
                let starts = new & !s.config & CFG_ENABLE != 0;
                s.counter = s.counter(now);
                s.since = now;
                s.config = new;
                for n in 0..TIMERS {
                    s.schedule(n, now, !starts);
                }
            }
            // Write one to clear.
            Reg::Status => s.status &= !(v & mask),
            Reg::Counter => {
                s.counter = merged(s.counter(now));
                s.since = now;
                for n in 0..TIMERS {
                    s.schedule(n, now, false);
                }
            }
            Reg::TimerConfig(n) => {
                let t = &mut s.timers[n];
                let old = t.config;
                t.config = merged(old) & tn::WRITABLE | tn::FIXED;
                t.comparator &= t.mask();
                // Only an input that exists can be chosen; another reads back as before.
                if ROUTES >> (t.config >> 9 & 0x1f) & 1 == 0 {
                    t.config = t.config & !tn::ROUTE | old & tn::ROUTE;
                }
                s.schedule(n, now, false);
            }
            Reg::Comparator(n) => {
                let t = &mut s.timers[n];
                let new = merged(t.comparator) & t.mask();
                let periodic = t.config & tn::PERIODIC != 0;
                if !periodic || t.config & tn::SET_VALUE != 0 {
                    t.comparator = new;
                }
                if periodic {
                    t.period = merged(t.period) & t.mask();
                    // The flag covers one write; software that writes halves uses 32-bit mode.
                    t.config &= !tn::SET_VALUE;
                }
                s.schedule(n, now, false);
            }
        }
    }
}

impl BusDevice for Hpet {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let now = self.clock.now();
        let v = Reg::decode(offset).map_or(0, |r| Self::read_reg(&self.lock(), r, now));
        let bytes = v.to_le_bytes();
        for (i, b) in data.iter_mut().enumerate() {
            *b = bytes.get((offset & 7) as usize + i).copied().unwrap_or(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(reg) = Reg::decode(offset) else { return };
        let (mut v, mut mask) = ([0; 8], [0; 8]);
        for (i, b) in data.iter().enumerate() {
            let at = (offset & 7) as usize + i;
            if at < 8 {
                v[at] = *b;
                mask[at] = 0xff;
            }
        }
        let now = self.clock.now();
        let (was, is) = {
            let mut s = self.lock();
            let was = s.config & CFG_LEGACY != 0;
            Self::write_reg(&mut s, reg, u64::from_le_bytes(v), u64::from_le_bytes(mask), now);
            self.apply(&s);
            (was, s.config & CFG_LEGACY != 0)
        };
        self.tell_legacy(was, is);
    }
}

impl Stateful for Hpet {
    type State = HpetState;
    const KIND: &'static str = "hpet";
    const VERSION: u32 = 1;

    fn state(&self) -> HpetState {
        *self.lock()
    }

    fn restore(&self, new: &HpetState) -> Result<(), RestoreError> {
        let mut s = self.lock();
        *s = *new;
        for n in 0..TIMERS {
            s.timers[n].config = s.timers[n].config & tn::WRITABLE | tn::FIXED;
            for (gsi, line) in self.lines[n].iter().enumerate() {
                line.import_level(gsi as u32 == s.route(n) && s.line_level(n));
            }
        }
        self.apply(&s);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Levels, run_at};
    use std::sync::atomic::{AtomicU32, Ordering};

    fn rig() -> (Arc<Clock>, Arc<Hpet>, Arc<Levels>) {
        let clock = Clock::new();
        let irq = Arc::new(Levels::default());
        (clock.clone(), Hpet::new(&clock, &IrqInputs::new(irq.clone())), irq)
    }
    fn w(h: &Hpet, r: u64, v: u32) {
        h.write(r, &v.to_le_bytes());
    }
    fn r(h: &Hpet, r: u64) -> u64 {
        let mut b = [0; 8];
        h.read(r, &mut b);
        u64::from_le_bytes(b)
    }

    #[test]
    fn counter_runs_and_stands() {
        let (clock, h, _) = rig();
        assert_eq!(r(&h, 0) >> 32, 10_000_000);
        assert_eq!(r(&h, 0) as u32, 0x8086_a201);
        clock.set(1000);
        assert_eq!(r(&h, 0xf0), 0);
        w(&h, 0x10, 1);
        clock.set(3000);
        assert_eq!(r(&h, 0xf0), 200);
        w(&h, 0x10, 0);
        w(&h, 0xf4, 1);
        assert_eq!(r(&h, 0xf0), 1 << 32 | 200);
    }

    #[test]
    fn one_shot_edge_on_a_chosen_input() {
        let (clock, h, irq) = rig();
        w(&h, 0x10, 1);
        w(&h, 0x140, (17 << 9 | tn::ENABLE) as u32);
        assert_eq!(r(&h, 0x140) as u32 >> 9 & 0x1f, 17);
        w(&h, 0x148, 5000);
        w(&h, 0x14c, 0);
        run_at(&clock, 49_000);
        assert_eq!(irq.edges(17), 0);
        run_at(&clock, 50_000);
        assert_eq!(irq.edges(17), 1);
        run_at(&clock, 5_000_000);
        assert_eq!(irq.edges(17), 1);
        w(&h, 0x140, (5 << 9 | tn::ENABLE) as u32);
        assert_eq!(r(&h, 0x140) as u32 >> 9 & 0x1f, 17, "no such input");
    }

    #[test]
    fn legacy_periodic_as_linux_programs_it() {
        let (clock, h, irq) = rig();
        let told = Arc::new(AtomicU32::new(0));
        let t = told.clone();
        h.on_legacy(move |on| {
            t.fetch_add(if on { 1 } else { 100 }, Ordering::Relaxed);
        });
        w(&h, 0x10, 3);
        let cfg = tn::ENABLE | tn::PERIODIC | tn::SET_VALUE | tn::FORCE_32;
        w(&h, 0x100, cfg as u32);
        w(&h, 0x108, 100_000);
        w(&h, 0x108, 100_000);
        for k in 1..=20 {
            run_at(&clock, k * 1_000_000 + 10);
            assert_eq!(irq.edges(0), k as u32);
        }
        w(&h, 0x10, 1);
        assert_eq!(told.load(Ordering::Relaxed), 101);
    }

    #[test]
    fn level_until_status_is_cleared_and_restored() {
        let (clock, h, irq) = rig();
        w(&h, 0x10, 1);
        w(&h, 0x120, (20 << 9 | tn::ENABLE | tn::LEVEL) as u32);
        h.write(0x128, &100u64.to_le_bytes());
        run_at(&clock, 1000);
        assert!(irq.level(20));
        let (_, other, irq2) = rig();
        other.restore(&h.state()).unwrap();
        assert!(!irq2.level(20), "no edge on restore");
        w(&other, 0x20, 2);
        w(&h, 0x20, 2);
        assert!(!irq.level(20));
        assert_eq!(r(&h, 0x20), 0);
    }
}
