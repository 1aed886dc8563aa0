//! The local APIC: accepts interrupts, keeps the timer, sends IPIs (SDM vol. 3 ch. 11).
//!
//! Registers live in [`LapicState`]; their decode is in `lapic_regs`. After every change the chip
//! publishes what its processor must know in one atomic ([`Lapic::pending`] reads nothing else when
//! nothing is pending) and kicks the processor when something new is there.

use super::apic_bus::{ApicBus, ApicConfig, Delivery, DeliveryMode};
use super::lapic_regs::{self as regs, Effect, Reg, esr, lvt};
use super::lapic_state::{BASE_BSP, BASE_EN, BASE_EXTD, LapicState, highest, set_bit};
use super::pic::DualPic;
use crate::state::{RestoreError, Stateful};
use crate::timer::{MIN_INTERVAL, TscClock};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use tandem_accel::clock::{Clock, Timer};
use tandem_accel::irq::{CpuEvent, CpuIntc, Kick};

/// A maskable interrupt is deliverable.
const INTR: u8 = 1;
/// NMI, INIT or SIPI waits.
const EVENT: u8 = 2;

const MSR_TSC_DEADLINE: u32 = 0x6e0;
const MSR_X2APIC: u32 = 0x800;
const MSR_X2APIC_LAST: u32 = 0x8ff;

/// A local APIC.
pub struct Lapic {
    id: u32,
    bsp: bool,
    config: ApicConfig,
    clock: Arc<Clock>,
    bus: Weak<ApicBus>,
    pic: Arc<DualPic>,
    state: Mutex<LapicState>,
    /// [`INTR`] and [`EVENT`], stored under the lock.
    published: AtomicU8,
    kick: OnceLock<Arc<dyn Kick>>,
    timer: Timer,
}

impl Lapic {
    pub(super) fn new(
        id: u32,
        bsp: bool,
        config: ApicConfig,
        clock: Arc<Clock>,
        bus: Weak<ApicBus>,
        pic: Arc<DualPic>,
    ) -> Arc<Lapic> {
        Arc::new_cyclic(|me: &Weak<Lapic>| {
            let me = me.clone();
            let timer = clock.timer(move || {
                if let Some(l) = me.upgrade() {
                    l.timer_fired();
                }
            });
            Lapic {
                id,
                bsp,
                config,
                clock,
                bus,
                pic,
                state: Mutex::new(LapicState::new(id, bsp)),
                published: AtomicU8::new(0),
                kick: OnceLock::new(),
                timer,
            }
        })
    }

    /// x2APIC ID.
    pub fn id(&self) -> u32 {
        self.id
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.lock().is_enabled()
    }

    fn lock(&self) -> MutexGuard<'_, LapicState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Changes the state, publishes what follows, and kicks if there is something new.
    fn with<R>(&self, f: impl FnOnce(&mut LapicState) -> R) -> R {
        let (r, new) = {
            let mut s = self.lock();
            let r = f(&mut s);
            (r, self.publish(&s))
        };
        if new && let Some(k) = self.kick.get() {
            k.kick();
        }
        r
    }

    fn publish(&self, s: &LapicState) -> bool {
        let intr = s.deliverable().is_some() || (self.pic.output() && s.accepts_pic());
        let event = s.nmi || s.init || s.sipi.is_some();
        let now = if intr { INTR } else { 0 } | if event { EVENT } else { 0 };
        let before = self.published.swap(now, Ordering::AcqRel);
        now & !before != 0
    }

    fn tsc(&self, s: &LapicState) -> TscClock {
        TscClock::new(self.config.tsc_hz).with_offset(s.tsc_offset)
    }

    /// Whether this is a destination of `d`.
    pub(super) fn matches(&self, d: Delivery) -> bool {
        let s = self.lock();
        if !s.is_enabled() {
            return false;
        }
        let all = if d.wide { u32::MAX } else { 0xff };
        match (d.logical, s.is_x2apic()) {
            (false, _) => d.dest == all || d.dest == s.id,
            (true, true) => {
                let id = s.x2apic_ldr();
                d.dest == all || (id >> 16 == d.dest >> 16 && id & d.dest & 0xffff != 0)
            }
            (true, false) => {
                let (id, dest) = (s.ldr >> 24, d.dest);
                if d.wide && dest == u32::MAX {
                    true
                } else if s.dfr >> 28 == 0xf {
                    id & dest & 0xff != 0
                } else {
                    let cluster = dest >> 4 & 0xf;
                    (cluster == 0xf || cluster == id >> 4) && id & dest & 0xf != 0
                }
            }
        }
    }

    /// Priority in lowest-priority arbitration; `None` if it takes no part.
    pub(super) fn arbitration_priority(&self) -> Option<u32> {
        let s = self.lock();
        s.is_live().then(|| s.ppr())
    }

    /// Takes a delivered interrupt; `false` if it is refused.
    pub(super) fn accept(&self, mode: DeliveryMode, vector: u8, level: bool) -> bool {
        self.with(|s| match mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => request(s, vector, level),
            DeliveryMode::Smi => false,
            DeliveryMode::Nmi => {
                s.nmi = true;
                true
            }
            DeliveryMode::Init => {
                s.init = true;
                s.sipi = None;
                true
            }
            DeliveryMode::StartUp => {
                s.sipi = Some(vector);
                true
            }
            DeliveryMode::ExtInt => {
                s.ext_int = true;
                true
            }
        })
    }

    /// The PIC's output may have changed. It is sampled under our lock, so that whoever comes last
    /// sees its last level.
    pub(super) fn sample_lint0(&self) {
        self.with(|s| {
            let level = self.pic.output();
            let was = std::mem::replace(&mut s.lint0, level);
            let rises = level && !was;
            if rises || (level && s.lvt[lvt::LINT0] & lvt::LEVEL != 0) {
                local_interrupt(s, lvt::LINT0);
            }
        });
    }

    /// An edge on LINT1, where a PC has its NMI button.
    pub fn pulse_lint1(&self) {
        self.with(|s| local_interrupt(s, lvt::LINT1));
    }

    fn rearm(&self, s: &LapicState) {
        match s.timer_next {
            Some(t) => self.timer.arm(t),
            None => self.timer.disarm(),
        }
    }

    fn timer_fired(&self) {
        self.with(|s| {
            let now = self.clock.now();
            // The arming that this call is for may be void by now.
            let Some(due) = s.timer_next.filter(|t| *t <= now) else { return };
            s.timer_next = match s.timer_mode() {
                lvt::TimerMode::Periodic if s.initial_count != 0 => {
                    let period = u64::from(s.initial_count) * s.count_ns();
                    let missed = (now - due) / period;
                    Some((due + (missed + 1) * period).max(now + MIN_INTERVAL))
                }
                _ => None,
            };
            s.tsc_deadline = 0;
            local_interrupt(s, lvt::TIMER);
            self.rearm(s);
        });
    }

    fn write(&self, reg: Reg, v: u64) {
        let now = self.clock.now();
        let (effect, icr, x2) = self.with(|s| {
            let e = regs::write(s, reg, v, now);
            if e == Effect::Timer {
                self.rearm(s);
            }
            (e, s.icr, s.is_x2apic())
        });
        match effect {
            Effect::None | Effect::Timer => {}
            Effect::Eoi(vector) => {
                if let Some(bus) = self.bus.upgrade() {
                    bus.end_of_interrupt(vector);
                }
            }
            Effect::Ipi => self.send_ipi(icr, x2),
            Effect::SelfIpi(vector) => {
                self.send_fixed_checked(vector, |l| {
                    let _ = l.accept(DeliveryMode::Fixed, vector, false);
                });
            }
        }
    }

    /// Fixed interrupts have vectors from 16 (SDM vol. 3 §11.5.3).
    fn send_fixed_checked(&self, vector: u8, send: impl FnOnce(&Lapic)) {
        if vector < 16 {
            self.with(|s| error(s, esr::SEND_ILLEGAL_VECTOR));
        } else {
            send(self);
        }
    }

    fn send_ipi(&self, icr: u64, x2: bool) {
        let low = icr as u32;
        let Some(mode) = DeliveryMode::from_bits(low >> 8) else { return };
        let (assert, level) = (low & 1 << 14 != 0, low & 1 << 15 != 0);
        if mode == DeliveryMode::Init && level && !assert {
            // INIT level de-assert: of no effect since the Pentium 4.
            return;
        }
        let d = Delivery {
            dest: if x2 { (icr >> 32) as u32 } else { (icr >> 56) as u32 },
            logical: low & 1 << 11 != 0,
            wide: x2,
            mode,
            vector: low as u8,
            level: false,
        };
        let send = |me: &Lapic| {
            let Some(bus) = me.bus.upgrade() else { return };
            match low >> 18 & 3 {
                0 => {
                    bus.deliver(d);
                }
                1 => {
                    me.accept(mode, d.vector, false);
                }
                2 => bus.broadcast(d, None),
                _ => bus.broadcast(d, Some(me.id)),
            }
        };
        if matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority) {
            self.send_fixed_checked(d.vector, send);
        } else {
            send(self);
        }
    }

    fn write_tsc_deadline(&self, v: u64) {
        self.with(|s| {
            if s.timer_mode() != lvt::TimerMode::TscDeadline {
                return;
            }
            s.tsc_deadline = v;
            s.timer_next = (v != 0).then(|| self.tsc(s).time_of(v));
            self.rearm(s);
        });
    }

    fn is_valid_base(&self, old: u64, new: u64) -> bool {
        let low = BASE_BSP | BASE_EN | if self.config.x2apic { BASE_EXTD } else { 0 };
        let phys = (1u64 << self.config.phys_bits.clamp(32, 52)) - 1;
        if new & !(phys & !0xfff | low) != 0 {
            return false;
        }
        // Figure 11-9: x2APIC is entered from xAPIC and left to disabled only.
        let mode = |b: u64| (b & BASE_EN != 0, b & BASE_EXTD != 0);
        !matches!(
            (mode(old), mode(new)),
            (_, (false, true)) | ((true, true), (true, false)) | ((false, _), (true, true))
        )
    }
}

/// Sets a fixed interrupt's request bit.
fn request(s: &mut LapicState, vector: u8, level: bool) -> bool {
    if !s.is_live() {
        return false;
    }
    if vector < 16 {
        error(s, esr::RECEIVE_ILLEGAL_VECTOR);
        return true;
    }
    set_bit(&mut s.irr, vector, true);
    set_bit(&mut s.tmr, vector, level);
    true
}

/// Delivers through a local vector table entry.
fn local_interrupt(s: &mut LapicState, n: usize) {
    let l = s.lvt[n];
    if l & lvt::MASKED != 0 || !s.is_enabled() {
        return;
    }
    // Timer and error entries have no mode field and are fixed.
    match if n == lvt::TIMER || n == lvt::ERROR { lvt::FIXED } else { l & lvt::MODE } {
        lvt::FIXED => {
            let level = l & lvt::LEVEL != 0;
            if level && l & lvt::REMOTE_IRR != 0 {
                return;
            }
            let taken = request(s, l as u8, level);
            if level && taken {
                s.lvt[n] |= lvt::REMOTE_IRR;
            }
        }
        lvt::NMI => s.nmi = true,
        // ExtINT is sampled when publishing; SMI and INIT inputs are not wired.
        _ => {}
    }
}

fn error(s: &mut LapicState, bit: u32) {
    s.errors |= bit;
    let l = s.lvt[lvt::ERROR];
    if l & lvt::MASKED == 0 && l as u8 >= 16 && s.is_live() {
        set_bit(&mut s.irr, l as u8, true);
        set_bit(&mut s.tmr, l as u8, false);
    }
}

impl CpuIntc for Lapic {
    fn attach(&self, kick: Arc<dyn Kick>) {
        let _ = self.kick.set(kick);
    }

    fn pending(&self) -> bool {
        self.published.load(Ordering::Acquire) & INTR != 0
    }

    fn acknowledge(&self) -> Option<u8> {
        if !self.pending() {
            return None;
        }
        let from_pic = self.with(|s| {
            let yes = self.pic.output() && s.accepts_pic();
            if yes {
                s.ext_int = false;
            }
            yes
        });
        if from_pic {
            // Without our lock: the PIC tells us of its output.
            let vector = self.pic.acknowledge();
            self.with(|_| ());
            return Some(vector);
        }
        self.with(|s| {
            let v = s.deliverable()?;
            set_bit(&mut s.irr, v, false);
            set_bit(&mut s.isr, v, true);
            Some(v)
        })
    }

    fn take_event(&self) -> Option<CpuEvent> {
        if self.published.load(Ordering::Acquire) & EVENT == 0 {
            return None;
        }
        self.with(|s| {
            if std::mem::take(&mut s.init) {
                s.init();
                self.rearm(s);
                Some(CpuEvent::Init)
            } else if let Some(v) = s.sipi.take() {
                Some(CpuEvent::Sipi(v))
            } else if std::mem::take(&mut s.nmi) {
                Some(CpuEvent::Nmi)
            } else {
                None
            }
        })
    }

    fn cr8(&self) -> u8 {
        (self.lock().tpr >> 4) as u8 & 0xf
    }

    fn set_cr8(&self, v: u8) {
        self.with(|s| s.tpr = u32::from(v & 0xf) << 4);
    }

    fn apic_base(&self) -> u64 {
        self.lock().apic_base
    }

    fn set_apic_base(&self, v: u64) -> bool {
        self.with(|s| {
            if !self.is_valid_base(s.apic_base, v) {
                return false;
            }
            let was = s.is_enabled();
            s.apic_base = v;
            if was && !s.is_enabled() {
                s.init();
                self.rearm(s);
            }
            true
        })
    }

    fn read_msr(&self, msr: u32) -> Option<u64> {
        match msr {
            MSR_TSC_DEADLINE if self.config.tsc_deadline => Some(self.lock().tsc_deadline),
            MSR_X2APIC..=MSR_X2APIC_LAST => {
                let s = self.lock();
                let reg = Reg::decode((msr - MSR_X2APIC) as u16)?;
                if !s.is_x2apic() || !reg.exists(true) {
                    return None;
                }
                if reg == Reg::Icr {
                    return Some(s.icr);
                }
                regs::read(&s, reg, self.clock.now()).map(u64::from)
            }
            _ => None,
        }
    }

    fn write_msr(&self, msr: u32, v: u64) -> bool {
        match msr {
            MSR_TSC_DEADLINE if self.config.tsc_deadline => {
                self.write_tsc_deadline(v);
                true
            }
            MSR_X2APIC..=MSR_X2APIC_LAST => {
                let Some(reg) = Reg::decode((msr - MSR_X2APIC) as u16) else { return false };
                let ok =
                    self.lock().is_x2apic() && reg.exists(true) && regs::is_valid_msr_value(reg, v);
                if ok {
                    self.write(reg, v);
                }
                ok
            }
            _ => false,
        }
    }

    fn set_tsc_offset(&self, offset: u64) {
        self.with(|s| {
            s.tsc_offset = offset;
            if s.tsc_deadline != 0 {
                s.timer_next = Some(self.tsc(s).time_of(s.tsc_deadline));
                self.rearm(s);
            }
        });
    }

    fn read_mmio(&self, offset: u64, data: &mut [u8]) {
        let now = self.clock.now();
        let value = self.with(|s| {
            if !s.is_enabled() || s.is_x2apic() {
                return u32::MAX;
            }
            let reg = Reg::decode((offset >> 4) as u16 & 0xff).filter(|r| r.exists(false));
            let Some(reg) = reg else {
                error(s, esr::ILLEGAL_REGISTER);
                return 0;
            };
            regs::read(s, reg, now).unwrap_or(0)
        });
        // Only the first 4 of each 16 bytes are defined.
        let bytes = value.to_le_bytes();
        for (i, b) in data.iter_mut().enumerate() {
            *b = bytes.get((offset & 0xf) as usize + i).copied().unwrap_or(0);
        }
    }

    fn write_mmio(&self, offset: u64, data: &[u8]) {
        // Registers are written by aligned 32-bit stores; the effect of others is undefined.
        let Some(v) = data.first_chunk::<4>().filter(|_| offset & 0xf == 0) else { return };
        let reg = Reg::decode((offset >> 4) as u16 & 0xff).filter(|r| r.exists(false));
        {
            let s = self.lock();
            if !s.is_enabled() || s.is_x2apic() {
                return;
            }
        }
        match reg {
            Some(reg) => self.write(reg, u32::from_le_bytes(*v).into()),
            None => self.with(|s| error(s, esr::ILLEGAL_REGISTER)),
        }
    }

    fn reset(&self) {
        self.with(|s| {
            let lint0 = s.lint0;
            *s = LapicState { lint0, ..LapicState::new(self.id, self.bsp) };
            self.rearm(s);
        });
    }
}

impl Stateful for Lapic {
    type State = LapicState;
    const KIND: &'static str = "lapic";
    const VERSION: u32 = 1;

    fn state(&self) -> LapicState {
        self.lock().clone()
    }

    fn restore(&self, new: &LapicState) -> Result<(), RestoreError> {
        let fail = |why: String| RestoreError { kind: Self::KIND, why };
        if new.id != self.id {
            return Err(fail(format!("it is of APIC {}, this is APIC {}", new.id, self.id)));
        }
        if highest(&new.isr).is_some_and(|v| v < 16) {
            return Err(fail("a vector below 16 is in service".into()));
        }
        self.with(|s| {
            *s = new.clone();
            s.divide &= regs::DIVIDE_VALID;
            self.rearm(s);
        });
        Ok(())
    }
}

#[cfg(test)]
#[path = "lapic_tests.rs"]
mod tests;
