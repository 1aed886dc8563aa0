//! The watchdog of Intel's 6300ESB (Intel 6300ESB I/O Controller Hub datasheet §16): two stages that
//! software must not let pass; after the first comes an interrupt, after the second the end.

use crate::pci::function::BarKind;
use crate::pci::{Bar, Function, FunctionSpec, Identity, Intx, PciDevice, Pin};
use crate::power::{PowerRequest, PowerSink};
use crate::registry::{BusKind, Device, DeviceType};
use crate::state::{RestoreError, Stateful};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tandem_accel::bus::BusDevice;
use tandem_accel::clock::{Clock, Timer};

/// Configuration space.
mod config {
    /// Interrupt type, clock and output, 16 bits.
    pub const CONTROL: u16 = 0x60;
    /// Lock, enable, function; 8 bits.
    pub const LOCK: u16 = 0x68;
}
/// CONTROL: which interrupt the first stage makes.
const INTERRUPT: u16 = 3;
const INTERRUPT_IRQ: u16 = 0;
/// CONTROL: the clock is 33 MHz divided by 2^5 instead of 2^15; the second stage ends nothing.
const FAST: u16 = 1 << 2;
const NO_REBOOT: u16 = 1 << 5;
/// LOCK: it cannot be written any more; the watchdog runs; it starts again instead of ending things.
const LOCKED: u8 = 1;
const ENABLED: u8 = 1 << 1;
const FREE_RUNNING: u8 = 1 << 2;

/// Memory-mapped registers.
mod reg {
    pub const PRELOAD_1: u64 = 0;
    pub const PRELOAD_2: u64 = 4;
    pub const INTERRUPT_STATUS: u64 = 8;
    pub const RELOAD: u64 = 12;
    /// Length of all.
    pub const LEN: u64 = 16;
}
/// Bits of a preload value.
const PRELOAD: u32 = 0xf_ffff;
/// RELOAD: starts again; has ended things.
const FEED: u16 = 1 << 8;
const TIMED_OUT: u16 = 1 << 9;
/// What is written to RELOAD before each write to another register, in this order.
const UNLOCK: [u16; 2] = [0x80, 0x86];
const CLOCK_HZ: u64 = 33_000_000;

/// Saved state. Deadlines are guest time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    preload: [u32; 2],
    control: u16,
    lock: u8,
    /// How much of [`UNLOCK`] has been written.
    unlocked: u8,
    interrupt: bool,
    timed_out: bool,
    /// 0: the first stage; 1: the second.
    stage: u8,
    /// When the stage ends; absent while it does not run.
    deadline: Option<u64>,
}

impl Default for State {
    fn default() -> State {
        State {
            preload: [PRELOAD; 2],
            control: 0,
            lock: 0,
            unlocked: 0,
            interrupt: false,
            timed_out: false,
            stage: 0,
            deadline: None,
        }
    }
}

/// The watchdog. Lock order: its state → interrupts.
pub struct Watchdog {
    state: Mutex<State>,
    clock: Arc<Clock>,
    timer: Timer,
    intx: Arc<Intx>,
    power: Arc<dyn PowerSink>,
}

impl Watchdog {
    fn new(clock: &Arc<Clock>, intx: Arc<Intx>, power: Arc<dyn PowerSink>) -> Arc<Watchdog> {
        Arc::new_cyclic(|me: &Weak<Watchdog>| {
            let me = me.clone();
            let timer = clock.timer(move || {
                if let Some(w) = me.upgrade() {
                    w.expired();
                }
            });
            Watchdog { state: Mutex::default(), clock: clock.clone(), timer, intx, power }
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts `stage` anew, if the watchdog runs.
    fn start(&self, s: &mut State, stage: u8) {
        s.stage = stage;
        if s.lock & ENABLED == 0 {
            s.deadline = None;
            return self.timer.disarm();
        }
        let shift = if s.control & FAST != 0 { 5 } else { 15 };
        let ticks = u64::from(s.preload[usize::from(stage & 1)]) << shift;
        // At least a tick of the slow clock, so that a guest cannot keep the timer thread busy.
        let ns = (ticks * 1000 / (CLOCK_HZ / 1_000_000)).max(1_000_000);
        let deadline = self.clock.now().saturating_add(ns);
        s.deadline = Some(deadline);
        self.timer.arm(deadline);
    }

    fn expired(&self) {
        let end = {
            let s = &mut *self.lock();
            if s.deadline.is_none_or(|d| d > self.clock.now()) {
                return;
            }
            if s.stage == 0 {
                if s.control & INTERRUPT == INTERRUPT_IRQ {
                    s.interrupt = true;
                    self.intx.set(true);
                }
                self.start(s, 1);
                false
            } else {
                let end = s.control & NO_REBOOT == 0 && s.lock & FREE_RUNNING == 0;
                s.timed_out |= end;
                match s.lock & FREE_RUNNING != 0 {
                    true => self.start(s, 0),
                    false => s.deadline = None,
                }
                end
            }
        };
        if end {
            self.power.request(PowerRequest::Watchdog);
        }
    }

    /// The value of the control or lock register in configuration space has been written.
    fn configured(&self, control: u16, lock: u8) {
        let s = &mut *self.lock();
        s.control = control & (INTERRUPT | FAST | NO_REBOOT);
        if s.lock & LOCKED != 0 {
            return;
        }
        let was = std::mem::replace(&mut s.lock, lock & (LOCKED | ENABLED | FREE_RUNNING));
        if (was ^ lock) & ENABLED != 0 {
            self.start(s, 0);
        }
    }

    fn locks(&self) -> u8 {
        self.lock().lock
    }

    /// Back to nothing. What has ended the machine can be read after its reset.
    fn reset(&self) {
        let s = &mut *self.lock();
        *s = State { timed_out: s.timed_out, ..State::default() };
        self.timer.disarm();
        self.intx.set(false);
    }

    /// A write to RELOAD: the steps of unlocking, or what they have unlocked.
    fn reload(&self, s: &mut State, v: u16) {
        let step = usize::from(s.unlocked);
        if UNLOCK.get(step) == Some(&v) {
            s.unlocked += 1;
            return;
        }
        let open = step == UNLOCK.len();
        s.unlocked = u8::from(v == UNLOCK[0]);
        if open {
            if v & FEED != 0 {
                self.start(s, 0);
            }
            if v & TIMED_OUT != 0 {
                s.timed_out = false;
            }
        }
    }
}

/// A number of an access of up to four bytes, as a register has.
fn number(data: &[u8]) -> u32 {
    data.iter().take(4).rev().fold(0, |n, b| n << 8 | u32::from(*b))
}

impl BusDevice for Watchdog {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let s = self.lock();
        let value = match offset {
            reg::INTERRUPT_STATUS => u32::from(s.interrupt),
            reg::RELOAD if s.timed_out => u32::from(TIMED_OUT),
            _ => 0,
        };
        data.fill(0);
        for (d, v) in data.iter_mut().zip(value.to_le_bytes()) {
            *d = v;
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        let s = &mut *self.lock();
        let value = number(data);
        match offset {
            reg::RELOAD => self.reload(s, value as u16),
            reg::PRELOAD_1 | reg::PRELOAD_2 if usize::from(s.unlocked) == UNLOCK.len() => {
                s.preload[usize::from(offset == reg::PRELOAD_2)] = value & PRELOAD;
                s.unlocked = 0;
            }
            reg::INTERRUPT_STATUS if value & 1 != 0 => {
                s.interrupt = false;
                self.intx.set(false);
            }
            _ => {}
        }
    }
}

impl Stateful for Watchdog {
    type State = State;
    const KIND: &'static str = "i6300esb";
    const VERSION: u32 = 1;

    fn state(&self) -> State {
        self.lock().clone()
    }
    fn restore(&self, state: &State) -> Result<(), RestoreError> {
        if state.stage > 1 || usize::from(state.unlocked) > UNLOCK.len() {
            let why = "it has a stage that there is not".into();
            return Err(RestoreError { kind: Self::KIND, why });
        }
        let s = &mut *self.lock();
        *s = state.clone();
        s.preload = s.preload.map(|p| p & PRELOAD);
        match s.deadline {
            Some(t) => self.timer.arm(t),
            None => self.timer.disarm(),
        }
        Ok(())
    }
}

/// The watchdog on PCI.
struct OnPci {
    function: Function,
    watchdog: Arc<Watchdog>,
}

impl PciDevice for OnPci {
    fn function(&self) -> &Function {
        &self.function
    }
    fn config_write(&self, at: u16, data: &[u8]) {
        self.function.write(at, data);
        let control = self.function.u32(config::CONTROL) as u16;
        self.watchdog.configured(control, self.function.u8(config::LOCK));
        // A lock that is on shows what it has locked.
        self.function.poke(config::LOCK, &[self.watchdog.locks()]);
    }
    fn reset(&self) {
        self.function.reset();
        self.watchdog.reset();
    }
}

impl Device for OnPci {
    fn reset(&self) {
        self.watchdog.reset();
    }
}

inventory::submit! {
    DeviceType {
        name: "i6300esb",
        bus: BusKind::Pci,
        description: "watchdog of Intel's 6300ESB",
        properties: &[],
        create: |ctx, p| {
            let slot = ctx.pci()?.slot(p.pci_address("addr"))?;
            let id = Identity {
                vendor: 0x8086,
                device: 0x25ab,
                revision: 0,
                class: 0x08_8000,
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
            };
            let mut spec = FunctionSpec::new(p.text("id").unwrap_or("i6300esb"), id);
            spec.config().allow(config::CONTROL, &(INTERRUPT | FAST | NO_REBOOT).to_le_bytes());
            spec.config().allow(config::LOCK, &[LOCKED | ENABLED | FREE_RUNNING]);
            let intx = slot.intx(Pin::A);
            spec.intx(intx.clone());
            let watchdog = Watchdog::new(&ctx.clock, intx, ctx.power.clone());
            let bar = Bar { kind: BarKind::Mem32, len: reg::LEN, device: watchdog.clone() };
            spec.bar(0, bar)?;
            let device = Arc::new(OnPci { function: spec.build(slot.decoder()), watchdog });
            slot.attach(device.clone());
            Ok(device)
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::bus::IntxRoute;
    use crate::pci::testing::rig;
    use crate::power::testing::Recorder;
    use crate::testing::{Random, run_at};

    struct Bench {
        dog: Arc<Watchdog>,
        clock: Arc<Clock>,
        power: Arc<Recorder>,
        intx: Arc<Intx>,
    }

    fn bench() -> Bench {
        let (clock, power, r) = (Clock::new(), Arc::new(Recorder::default()), rig());
        let intx = Arc::new(Intx::new(r.router.line(3, Pin::A), Pin::A));
        let dog = Watchdog::new(&clock, intx.clone(), power.clone());
        Bench { dog, clock, power, intx }
    }

    impl Bench {
        fn unlocked(&self, at: u64, v: u32) {
            for step in UNLOCK {
                self.dog.write(reg::RELOAD, &step.to_le_bytes());
            }
            self.dog.write(at, &v.to_le_bytes());
        }
        fn asked(&self) -> usize {
            self.power.0.lock().unwrap().len()
        }
    }

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn hunger_ends_the_machine_after_two_stages() {
        let b = bench();
        // About a second each.
        b.unlocked(reg::PRELOAD_1, 1 << 10);
        b.unlocked(reg::PRELOAD_2, 1 << 10);
        b.dog.configured(0, ENABLED);
        run_at(&b.clock, SECOND / 2);
        b.unlocked(reg::RELOAD, FEED.into());
        run_at(&b.clock, SECOND * 5 / 4);
        assert!(!b.intx.pending());
        run_at(&b.clock, SECOND * 2);
        assert!(b.intx.pending() && b.asked() == 0);
        b.dog.write(reg::INTERRUPT_STATUS, &[1]);
        assert!(!b.intx.pending());
        let saved = b.dog.state();
        b.dog.reset();
        b.dog.restore(&saved).unwrap();
        run_at(&b.clock, SECOND * 4);
        assert_eq!(*b.power.0.lock().unwrap(), [PowerRequest::Watchdog]);
        b.dog.reset();
        let mut d = [0; 2];
        b.dog.read(reg::RELOAD, &mut d);
        assert_eq!(u16::from_le_bytes(d), TIMED_OUT);
        b.unlocked(reg::RELOAD, TIMED_OUT.into());
        b.dog.read(reg::RELOAD, &mut d);
        assert_eq!(d, [0; 2]);
        run_at(&b.clock, SECOND * 100);
        assert_eq!(b.asked(), 1);
    }

    #[test]
    fn locks_hold_and_writes_need_unlocking() {
        let b = bench();
        b.dog.write(reg::PRELOAD_1, &1u32.to_le_bytes());
        b.dog.write(reg::RELOAD, &0x86u16.to_le_bytes());
        assert_eq!(b.dog.state().preload, [PRELOAD; 2]);
        b.dog.configured(NO_REBOOT, ENABLED | LOCKED);
        b.dog.configured(NO_REBOOT, 0);
        assert_eq!(b.dog.locks(), ENABLED | LOCKED);
        run_at(&b.clock, SECOND * 10_000);
        run_at(&b.clock, SECOND * 20_000);
        assert_eq!(b.asked(), 0, "its output is off");
    }

    #[test]
    fn a_hostile_guest_ends_nothing() {
        let (b, mut r, mut now) = (bench(), Random::default(), 0);
        for _ in 0..100_000 {
            let (a, v) = (r.next(), r.word());
            let size = 1usize << (a & 3);
            match a >> 61 {
                0..=3 => b.dog.write(a >> 8 & 0xf, &v.to_le_bytes()[..size]),
                4 => b.dog.read(a >> 8 & 0xf, &mut [0; 8][..size]),
                5 => b.unlocked(a >> 8 & 0xc, v as u32),
                6 => b.dog.configured(v as u16, (v >> 16) as u8 & !LOCKED),
                _ => {
                    now += v >> 30;
                    run_at(&b.clock, now);
                }
            }
        }
        b.dog.restore(&b.dog.state()).unwrap();
    }
}
