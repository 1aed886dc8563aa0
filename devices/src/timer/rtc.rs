//! The CMOS real-time clock MC146818 with its battery-backed memory, ports 70h and 71h (Motorola
//! MC146818A data sheet; ICH9 data sheet §13.6).
//!
//! The time of day is host UTC when the machine starts plus guest time. Update, alarm and periodic
//! flags are worked out when they are looked at; a timer runs only while an interrupt is enabled
//! and none is waiting.

use super::{nanos, ticks};
use crate::state::{RestoreError, Stateful};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use tandem_accel::bus::BusDevice;
use tandem_accel::clock::{Clock, NANOS_PER_SEC, Timer};
use tandem_accel::irq::IrqLine;

/// First of the two ports.
pub const RTC_PORT: u16 = 0x70;
/// CMOS index of the century, for FADT.
pub const CENTURY: u8 = 0x32;

/// Register indices.
mod reg {
    pub const SECONDS: usize = 0;
    pub const SECONDS_ALARM: usize = 1;
    pub const MINUTES: usize = 2;
    pub const MINUTES_ALARM: usize = 3;
    pub const HOURS: usize = 4;
    pub const HOURS_ALARM: usize = 5;
    pub const WEEKDAY: usize = 6;
    pub const DAY: usize = 7;
    pub const MONTH: usize = 8;
    pub const YEAR: usize = 9;
    pub const A: usize = 10;
    pub const B: usize = 11;
    pub const C: usize = 12;
    pub const D: usize = 13;
    pub const CENTURY: usize = super::CENTURY as usize;
}

const A_UIP: u8 = 0x80;
const A_DIVIDER: u8 = 0x70;
/// Divider: 32.768 kHz crystal, running.
const A_DIVIDER_ON: u8 = 0x20;
const B_SET: u8 = 0x80;
const B_PIE: u8 = 0x40;
const B_AIE: u8 = 0x20;
const B_UIE: u8 = 0x10;
const B_BINARY: u8 = 0x04;
const B_24H: u8 = 0x02;
const C_IRQF: u8 = 0x80;
const C_PF: u8 = 0x40;
const C_AF: u8 = 0x20;
const C_UF: u8 = 0x10;
const D_VALID: u8 = 0x80;
/// How long (ns) before an update UIP is seen.
const UIP_NS: u64 = 244_000;
/// Frequency of the crystal.
const CRYSTAL_HZ: u64 = 32_768;
/// Longest stretch of missed seconds that is searched for alarms: an alarm repeats daily.
const DAY: i64 = 86_400;

/// State of the RTC.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RtcState {
    /// Index register (bit 7, the NMI mask, kept apart).
    pub index: u8,
    /// The NMI mask bit.
    pub nmi_masked: bool,
    /// All 128 bytes; those of the time hold it only while SET is on.
    pub cmos: Vec<u8>,
    /// UTC in nanoseconds since 1970 at guest time 0.
    pub epoch: i128,
    /// The second (since 1970) up to which flags are worked out.
    pub seen_second: i64,
    /// The periodic tick up to which flags are worked out.
    pub seen_tick: u64,
    /// Interrupt 8 belongs to the HPET.
    pub irq_disabled: bool,
    /// Periodic interrupts that came while the one before had not been served; kept only where they
    /// are to be made up for.
    pub owed: u64,
    /// Guest time of the next that is made up for.
    pub repay_at: u64,
}

/// What becomes of periodic interrupts that come while the one before has not been served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LostTicks {
    /// They are lost, as in hardware.
    #[default]
    Discard,
    /// They come later, between the others, so that a guest that counts them keeps time.
    Slew,
}

/// The RTC.
pub struct Rtc {
    state: Mutex<RtcState>,
    lost_ticks: LostTicks,
    clock: Arc<Clock>,
    irq: IrqLine,
    timer: Timer,
}

/// A broken-down time.
struct Fields {
    second: u8,
    minute: u8,
    hour: u8,
    weekday: u8,
    day: u8,
    month: u8,
    year: i64,
}

/// Days since 1970 of a civil date (proleptic Gregorian); the year starts in March in between, so
/// that the leap day is its last.
fn days_of(year: i64, month: i64, day: i64) -> i64 {
    let y = if month <= 2 { year - 1 } else { year };
    let era = y.div_euclid(400);
    let yoe = y.rem_euclid(400);
    let doy = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + yoe * 365 + yoe / 4 - yoe / 100 + doy - 719_468
}

impl Fields {
    fn of(seconds: i64) -> Fields {
        let days = seconds.div_euclid(DAY);
        let s = seconds.rem_euclid(DAY);
        let z = days + 719_468;
        let era = z.div_euclid(146_097);
        let doe = z.rem_euclid(146_097);
        let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
        let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
        let mp = (5 * doy + 2) / 153;
        let month = if mp < 10 { mp + 3 } else { mp - 9 };
        Fields {
            second: (s % 60) as u8,
            minute: (s / 60 % 60) as u8,
            hour: (s / 3600) as u8,
            // 1 January 1970 was a Thursday; Sunday is 1.
            weekday: ((days + 4).rem_euclid(7) + 1) as u8,
            day: (doy - (153 * mp + 2) / 5 + 1) as u8,
            month: month as u8,
            year: yoe + era * 400 + i64::from(month <= 2),
        }
    }

    fn seconds(&self) -> i64 {
        let days = days_of(self.year, self.month.clamp(1, 12).into(), self.day.into());
        days * DAY
            + i64::from(self.hour) * 3600
            + i64::from(self.minute) * 60
            + i64::from(self.second)
    }
}

impl RtcState {
    fn new(epoch: i64) -> RtcState {
        let mut cmos = vec![0; 128];
        cmos[reg::A] = A_DIVIDER_ON | 6;
        cmos[reg::B] = B_24H;
        RtcState {
            index: 0,
            nmi_masked: false,
            cmos,
            epoch: epoch.into(),
            seen_second: epoch.div_euclid(NANOS_PER_SEC as i64),
            seen_tick: 0,
            irq_disabled: false,
            owed: 0,
            repay_at: 0,
        }
    }

    fn b(&self) -> u8 {
        self.cmos[reg::B]
    }

    fn is_stopped(&self) -> bool {
        self.b() & B_SET != 0 || self.cmos[reg::A] & A_DIVIDER >= 0x60
    }

    /// The second since 1970, and the nanoseconds of it that have passed.
    fn utc(&self, now: u64) -> (i64, u64) {
        let ns = self.epoch + i128::from(now);
        let per_second = i128::from(NANOS_PER_SEC);
        (ns.div_euclid(per_second) as i64, ns.rem_euclid(per_second) as u64)
    }

    /// Makes it this time at guest time `now`.
    fn set_utc(&mut self, second: i64, fraction: u64, now: u64) {
        let ns = i128::from(second) * i128::from(NANOS_PER_SEC) + i128::from(fraction);
        self.epoch = ns - i128::from(now);
    }

    fn encode(&self, v: u8) -> u8 {
        if self.b() & B_BINARY != 0 { v } else { (v / 10) << 4 | (v % 10) }
    }

    fn decode(&self, v: u8) -> u8 {
        if self.b() & B_BINARY != 0 { v } else { (v >> 4 & 0xf) * 10 + (v & 0xf) }
    }

    fn encode_hour(&self, h: u8) -> u8 {
        if self.b() & B_24H != 0 {
            return self.encode(h);
        }
        let h12 = if h.is_multiple_of(12) { 12 } else { h % 12 };
        self.encode(h12) | if h >= 12 { 0x80 } else { 0 }
    }

    fn decode_hour(&self, v: u8) -> u8 {
        if self.b() & B_24H != 0 {
            return self.decode(v);
        }
        self.decode(v & 0x7f) % 12 + if v & 0x80 != 0 { 12 } else { 0 }
    }

    /// Puts the time into its registers.
    fn show(&mut self, now: u64) {
        let f = Fields::of(self.utc(now).0);
        let century = (f.year.div_euclid(100).rem_euclid(100)) as u8;
        for (r, v) in [
            (reg::SECONDS, self.encode(f.second)),
            (reg::MINUTES, self.encode(f.minute)),
            (reg::HOURS, self.encode_hour(f.hour)),
            (reg::WEEKDAY, self.encode(f.weekday)),
            (reg::DAY, self.encode(f.day)),
            (reg::MONTH, self.encode(f.month)),
            (reg::YEAR, self.encode(f.year.rem_euclid(100) as u8)),
            (reg::CENTURY, self.encode(century)),
        ] {
            self.cmos[r] = v;
        }
    }

    /// Takes the time from its registers.
    fn set_time(&mut self, now: u64) {
        let c = |r: usize| self.decode(self.cmos[r]);
        let f = Fields {
            second: c(reg::SECONDS),
            minute: c(reg::MINUTES),
            hour: self.decode_hour(self.cmos[reg::HOURS]),
            weekday: 0,
            day: c(reg::DAY),
            month: c(reg::MONTH),
            year: i64::from(c(reg::CENTURY)) * 100 + i64::from(c(reg::YEAR)),
        };
        let fraction = self.utc(now).1;
        let seconds = f.seconds();
        self.set_utc(seconds, fraction, now);
        self.seen_second = seconds;
    }

    fn alarm_matches(&self, second: i64) -> bool {
        let s = second.rem_euclid(DAY);
        let any = |r: usize| self.cmos[r] & 0xc0 == 0xc0;
        let eq = |r: usize, v: i64| any(r) || i64::from(self.decode(self.cmos[r])) == v;
        eq(reg::SECONDS_ALARM, s % 60)
            && eq(reg::MINUTES_ALARM, s / 60 % 60)
            && (any(reg::HOURS_ALARM)
                || i64::from(self.decode_hour(self.cmos[reg::HOURS_ALARM])) == s / 3600)
    }

    /// Crystal ticks per period of the periodic interrupt (data sheet table 5).
    fn period(&self) -> Option<u64> {
        match self.cmos[reg::A] & 0xf {
            0 => None,
            r @ 1..=2 => Some(1 << (r + 6)),
            r => Some(1 << (r - 1)),
        }
    }

    /// Works out the flags of register C up to `now`.
    fn catch_up(&mut self, now: u64, lost: LostTicks) {
        if let Some(p) = self.period() {
            let tick = ticks(now, CRYSTAL_HZ) / p;
            let passed = tick.saturating_sub(self.seen_tick);
            if tick != self.seen_tick {
                self.seen_tick = tick;
                let told = u64::from(self.cmos[reg::C] & C_PF == 0);
                self.cmos[reg::C] |= C_PF;
                if lost == LostTicks::Slew && self.b() & B_PIE != 0 {
                    self.owed = self.owed.saturating_add(passed.saturating_sub(told));
                }
            } else if self.owed > 0 && self.cmos[reg::C] & C_PF == 0 && now >= self.repay_at {
                self.owed -= 1;
                self.cmos[reg::C] |= C_PF;
            }
        }
        let second = self.utc(now).0;
        if self.is_stopped() {
            self.seen_second = second;
        }
        if second > self.seen_second {
            self.cmos[reg::C] |= C_UF;
            let first = (self.seen_second + 1).max(second - DAY);
            if self.cmos[reg::C] & C_AF == 0 && (first..=second).any(|s| self.alarm_matches(s)) {
                self.cmos[reg::C] |= C_AF;
            }
        }
        self.seen_second = second;
        if self.wants_irq() {
            self.cmos[reg::C] |= C_IRQF;
        }
    }

    fn wants_irq(&self) -> bool {
        // The enables and flags have the same bit positions.
        self.cmos[reg::C] & self.b() & (C_PF | C_AF | C_UF) != 0
    }

    /// The next guest time at which an enabled interrupt may come.
    fn next_event(&self, now: u64) -> Option<u64> {
        if self.wants_irq() {
            return None;
        }
        let periodic = self.period().filter(|_| self.b() & B_PIE != 0).map(|p| {
            let tick = nanos((self.seen_tick + 1).saturating_mul(p), CRYSTAL_HZ);
            if self.owed > 0 { tick.min(self.repay_at.max(now)) } else { tick }
        });
        let second = (self.b() & (B_AIE | B_UIE) != 0 && !self.is_stopped())
            .then(|| now + (NANOS_PER_SEC - self.utc(now).1));
        [periodic, second].into_iter().flatten().min()
    }

    fn read(&mut self, index: usize, now: u64, lost: LostTicks) -> u8 {
        match index {
            0..=9 | reg::CENTURY => {
                let alarm =
                    matches!(index, reg::SECONDS_ALARM | reg::MINUTES_ALARM | reg::HOURS_ALARM);
                if !alarm && !self.is_stopped() {
                    self.show(now);
                }
                self.cmos[index]
            }
            reg::A => {
                let left = NANOS_PER_SEC - self.utc(now).1;
                let uip = !self.is_stopped() && left <= UIP_NS;
                self.cmos[reg::A] & !A_UIP | if uip { A_UIP } else { 0 }
            }
            reg::C => {
                self.catch_up(now, lost);
                // At twice the rate, until all have come.
                self.repay_at = now + self.period().map_or(0, |p| nanos(p, 2 * CRYSTAL_HZ));
                std::mem::take(&mut self.cmos[reg::C])
            }
            reg::D => D_VALID,
            _ => self.cmos.get(index).copied().unwrap_or(0xff),
        }
    }

    fn write(&mut self, index: usize, v: u8, now: u64, lost: LostTicks) {
        self.catch_up(now, lost);
        match index {
            reg::SECONDS_ALARM | reg::MINUTES_ALARM | reg::HOURS_ALARM => self.cmos[index] = v,
            0..=9 | reg::CENTURY => {
                if self.is_stopped() {
                    self.cmos[index] = v;
                } else {
                    self.show(now);
                    self.cmos[index] = v;
                    self.set_time(now);
                }
            }
            reg::A | reg::B => self.write_control(index, v, now),
            reg::C | reg::D => {}
            _ => {
                if let Some(b) = self.cmos.get_mut(index) {
                    *b = v;
                }
            }
        }
    }

    fn write_control(&mut self, index: usize, v: u8, now: u64) {
        let was = self.is_stopped();
        if !was {
            self.show(now);
        }
        let (divider_was, period_was) = (self.cmos[reg::A] & A_DIVIDER, self.period());
        // SET ends a running update-ended interrupt enable (data sheet, register B).
        let uie_off = if index == reg::B && v & B_SET != 0 { B_UIE } else { 0 };
        let mode_before = self.b() & (B_BINARY | B_24H);
        self.cmos[index] = if index == reg::A { v & !A_UIP } else { v & !uie_off };
        // Leaving a stop takes the registers over in the mode that is now set.
        if was && !self.is_stopped() {
            self.set_time(now);
            if divider_was >= 0x60 {
                // The first update comes half a second after the divider starts.
                let second = self.utc(now).0;
                self.set_utc(second, NANOS_PER_SEC / 2, now);
            }
        } else if !was && mode_before != self.b() & (B_BINARY | B_24H) {
            self.show(now);
        }
        self.seen_tick = self.period().map_or(0, |p| ticks(now, CRYSTAL_HZ) / p);
        // What is owed is time: as many interrupts as that is at the new rate.
        self.owed = match (period_was, self.period()) {
            (Some(old), Some(new)) if self.b() & B_PIE != 0 => self.owed.saturating_mul(old) / new,
            _ => 0,
        };
        if self.wants_irq() {
            self.cmos[reg::C] |= C_IRQF;
        }
    }
}

impl Rtc {
    /// A clock that shows `epoch` (nanoseconds of UTC since 1970) at guest time 0, with interrupt
    /// 8 on `irq`.
    pub fn new(clock: &Arc<Clock>, irq: IrqLine, epoch: i64, lost_ticks: LostTicks) -> Arc<Rtc> {
        Arc::new_cyclic(|me: &Weak<Rtc>| {
            let me = me.clone();
            let timer = clock.timer(move || {
                if let Some(r) = me.upgrade() {
                    let mut s = r.lock();
                    r.update(&mut s);
                }
            });
            let state = Mutex::new(RtcState::new(epoch));
            Rtc { state, lost_ticks, clock: clock.clone(), irq, timer }
        })
    }

    /// Sets a byte of the battery-backed memory (14–127, not the century).
    pub fn set_byte(&self, index: u8, v: u8) {
        let i = usize::from(index);
        if i > reg::D
            && i != reg::CENTURY
            && let Some(b) = self.lock().cmos.get_mut(i)
        {
            *b = v;
        }
    }

    /// Records the sizes of RAM below and above 4 GiB where PC firmware looks for them: base and
    /// extended memory in KiB, memory above 16 MiB and above 4 GiB in units of 64 KiB.
    pub fn set_memory(&self, below_4g: u64, above_4g: u64) {
        let word = |at: u8, v: u64| {
            let v = v.min(0xffff);
            self.set_byte(at, v as u8);
            self.set_byte(at + 1, (v >> 8) as u8);
        };
        word(0x15, (below_4g >> 10).min(640));
        let extended = below_4g.saturating_sub(1 << 20) >> 10;
        word(0x17, extended);
        word(0x30, extended);
        word(0x34, below_4g.saturating_sub(16 << 20) >> 16);
        let high = (above_4g >> 16).min(0xff_ffff);
        for i in 0..3 {
            self.set_byte(0x5b + i, (high >> (8 * i)) as u8);
        }
    }

    /// Gives interrupt 8 away (to the HPET's legacy replacement) or takes it back.
    pub fn set_irq_enabled(&self, on: bool) {
        let mut s = self.lock();
        s.irq_disabled = !on;
        self.update(&mut s);
    }

    /// RESET: the time and the memory stay (data sheet, RESET).
    pub fn reset(&self) {
        let mut s = self.lock();
        s.cmos[reg::B] &= !(B_PIE | B_AIE | B_UIE | 0x08);
        s.cmos[reg::C] = 0;
        s.owed = 0;
        s.irq_disabled = false;
        self.update(&mut s);
    }

    fn lock(&self) -> MutexGuard<'_, RtcState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Brings flags, interrupt and timer up to date.
    fn update(&self, s: &mut RtcState) {
        let now = self.clock.now();
        s.catch_up(now, self.lost_ticks);
        self.irq.set(s.wants_irq() && !s.irq_disabled);
        match s.next_event(now) {
            Some(t) => self.timer.arm(t),
            None => self.timer.disarm(),
        }
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut s = self.lock();
        for (i, b) in data.iter_mut().enumerate() {
            *b = match (offset + i as u64) & 1 {
                // The index is write-only; PCs read all ones.
                0 => 0xff,
                _ => {
                    let index = usize::from(s.index);
                    let v = s.read(index, self.clock.now(), self.lost_ticks);
                    if index == reg::C {
                        self.update(&mut s);
                    }
                    v
                }
            };
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        let mut s = self.lock();
        for (i, &v) in data.iter().enumerate() {
            if (offset + i as u64) & 1 == 0 {
                s.index = v & 0x7f;
                s.nmi_masked = v & 0x80 != 0;
            } else {
                let index = usize::from(s.index);
                s.write(index, v, self.clock.now(), self.lost_ticks);
                self.update(&mut s);
            }
        }
    }
}

impl Stateful for Rtc {
    type State = RtcState;
    const KIND: &'static str = "mc146818";
    const VERSION: u32 = 1;

    fn state(&self) -> RtcState {
        self.lock().clone()
    }

    fn restore(&self, new: &RtcState) -> Result<(), RestoreError> {
        if new.cmos.len() != 128 {
            let why = format!("{} bytes of memory, not 128", new.cmos.len());
            return Err(RestoreError { kind: Self::KIND, why });
        }
        let mut s = self.lock();
        *s = new.clone();
        s.index &= 0x7f;
        // No date that can be set is as far off.
        s.epoch = s.epoch.clamp(-(1 << 80), 1 << 80);
        self.irq.import_level(s.wants_irq() && !s.irq_disabled);
        self.update(&mut s);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Levels, run_at};

    const S: u64 = NANOS_PER_SEC;
    /// Friday, 20 November 2026, 13:45:59 UTC.
    const START: i64 = 1_795_182_359;

    fn rig() -> (Arc<Clock>, Arc<Rtc>, Arc<Levels>) {
        rig_with(LostTicks::Discard)
    }
    fn rig_with(lost: LostTicks) -> (Arc<Clock>, Arc<Rtc>, Arc<Levels>) {
        let clock = Clock::new();
        let irq = Arc::new(Levels::default());
        let rtc = Rtc::new(&clock, IrqLine::new(irq.clone(), 8), START * S as i64, lost);
        (clock, rtc, irq)
    }
    fn rd(r: &Rtc, i: u8) -> u8 {
        r.write(0, &[i]);
        let mut b = [0];
        r.read(1, &mut b);
        b[0]
    }
    fn wr(r: &Rtc, i: u8, v: u8) {
        r.write(0, &[i]);
        r.write(1, &[v]);
    }
    fn time(r: &Rtc) -> [u8; 8] {
        [0x32, 9, 8, 7, 6, 4, 2, 0].map(|i| rd(r, i))
    }

    #[test]
    fn shows_utc_in_bcd_binary_and_12_hours() {
        let (clock, r, _) = rig();
        assert_eq!(time(&r), [0x20, 0x26, 0x11, 0x20, 0x06, 0x13, 0x45, 0x59]);
        clock.set(S);
        assert_eq!(rd(&r, 0), 0);
        assert_eq!(rd(&r, 2), 0x46);
        wr(&r, 11, B_BINARY | B_24H);
        assert_eq!(time(&r), [20, 26, 11, 20, 6, 13, 46, 0]);
        wr(&r, 11, 0);
        assert_eq!(rd(&r, 4), 0x81);
        assert_eq!(rd(&r, 13), 0x80);
        clock.set(2 * S - 100_000);
        assert_eq!(rd(&r, 10) & 0x80, 0x80);
    }

    #[test]
    fn setting_the_time() {
        let (clock, r, _) = rig();
        wr(&r, 11, B_SET | B_24H);
        for (i, v) in [(0x32, 0x20), (9, 0x24), (8, 2), (7, 0x28), (4, 0x23), (2, 0x59), (0, 0x58)]
        {
            wr(&r, i, v);
        }
        clock.set(5 * S);
        assert_eq!(rd(&r, 0), 0x58, "it stands while SET is on");
        wr(&r, 11, B_24H);
        clock.set(7 * S);
        assert_eq!(time(&r), [0x20, 0x24, 0x02, 0x29, 0x05, 0, 0, 0], "a leap day, a Thursday");
        wr(&r, 2, 0x30);
        assert_eq!(rd(&r, 2), 0x30);
        for i in 0..10 {
            wr(&r, i, 0xff);
            time(&r);
        }
    }

    #[test]
    fn interrupts_of_update_alarm_and_period() {
        let (clock, r, irq) = rig();
        run_at(&clock, S / 2);
        wr(&r, 11, B_24H | B_UIE);
        run_at(&clock, S + 1);
        assert!(irq.level(8));
        run_at(&clock, 3 * S);
        assert_eq!(irq.edges(8), 1, "until C is read");
        assert_eq!(rd(&r, 12) & 0xb0, 0x90);
        assert!(!irq.level(8));
        wr(&r, 1, 0x05);
        wr(&r, 3, 0xc0);
        wr(&r, 5, 0x13);
        wr(&r, 11, B_24H | B_AIE);
        rd(&r, 12);
        run_at(&clock, 5 * S);
        assert!(!irq.level(8));
        run_at(&clock, 6 * S);
        assert!(irq.level(8), "13:46:05");
        assert_eq!(rd(&r, 12) & 0xa0, 0xa0);
        wr(&r, 11, B_24H | B_PIE);
        let before = irq.edges(8);
        for k in 1..=10 {
            run_at(&clock, 6 * S + k * S / 1024 + 100_000);
            assert_eq!(rd(&r, 12) & 0xc0, 0xc0);
        }
        assert_eq!(irq.edges(8) - before, 10);
    }

    /// A guest that serves no interrupt for a quarter of a second, and then each at once.
    fn ticks_in_a_second(lost: LostTicks) -> u32 {
        let (clock, r, irq) = rig_with(lost);
        wr(&r, 11, B_24H | B_PIE);
        run_at(&clock, S / 4);
        let mut served = 0;
        for now in (S / 4..S).step_by(10_000) {
            run_at(&clock, now);
            if irq.level(8) {
                assert_eq!(rd(&r, 12) & 0xc0, 0xc0);
                assert!(!irq.level(8), "no storm");
                served += 1;
            }
        }
        served
    }

    #[test]
    fn late_ticks_are_lost_or_made_up_for() {
        let lost = ticks_in_a_second(LostTicks::Discard);
        assert!((766..=770).contains(&lost), "{lost}");
        let slewed = ticks_in_a_second(LostTicks::Slew);
        assert!((1022..=1025).contains(&slewed), "{slewed}");
    }

    #[test]
    fn what_is_owed_is_time() {
        let (clock, r, _) = rig_with(LostTicks::Slew);
        wr(&r, 11, B_24H | B_PIE);
        run_at(&clock, S);
        rd(&r, 12);
        assert!((1022..=1024).contains(&r.state().owed));
        // 64 Hz.
        wr(&r, 10, A_DIVIDER_ON | 10);
        assert!((62..=64).contains(&r.state().owed), "{}", r.state().owed);
        wr(&r, 11, B_24H);
        assert_eq!(r.state().owed, 0);
    }

    #[test]
    fn memory_sizes_and_state() {
        let (_, r, _) = rig();
        r.set_memory(3 << 30, 1 << 30);
        assert_eq!((rd(&r, 0x15), rd(&r, 0x16)), (0x80, 0x02));
        assert_eq!((rd(&r, 0x34), rd(&r, 0x35)), (0x00, 0xbf));
        assert_eq!((rd(&r, 0x5b), rd(&r, 0x5c), rd(&r, 0x5d)), (0, 0x40, 0));
        let s = r.state();
        let (_, other, _) = rig();
        other.restore(&s).unwrap();
        assert_eq!(other.state(), s);
        assert!(other.restore(&RtcState { cmos: vec![], ..s }).is_err());
    }
}
