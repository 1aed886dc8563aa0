//! Counting instructions: whose turn it is on a shared thread, and guest time made from the count.
//!
//! Every block takes its instructions off [`crate::env::Core::insns_left`] when it is entered, and
//! leaves instead when fewer are left than it has. A vCPU is granted as many as there are until its
//! turn ends or the next timer is due, whatever comes first; the last few run one by one, so that
//! both come at an exact instruction. An instruction that faults counts with those of its block that
//! it keeps from running.
//!
//! What always holds: grants depend only on the count, on guest time and on deadlines, never on when
//! another thread looked or called.

use super::shared::Doorbell;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tandem_accel::clock::{Clock, TimeSource};

/// Instructions in a turn.
const TURN: i64 = 100_000;
/// Most that are granted at once.
const MOST: i64 = 1 << 40;
/// Largest shift: a microsecond for an instruction.
const MAX_SHIFT: u8 = 10;
/// How often `auto` looks at host time, in guest time.
const ADJUST_NS: u64 = 100_000_000;

/// Guest time from executed instructions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Icount {
    /// An instruction takes `1 << shift` nanoseconds (0–10); `None`: what brings guest time near
    /// host time, which makes no two runs alike.
    pub shift: Option<u8>,
    /// While all vCPUs are idle, guest time passes as fast as host time; else it jumps to the next
    /// timer at once.
    pub sleep: bool,
}

/// The running vCPU.
struct Running {
    /// Its `Core::insns_left`.
    left: NonNull<AtomicI64>,
    /// What that was at first.
    granted: i64,
    bell: Arc<Doorbell>,
}

// SAFETY: the pointer is followed only under the mutex that holds it, and is taken out before the
// vCPU gives up its `Env`; it points to an atomic.
unsafe impl Send for Running {}

struct Count {
    running: Option<Running>,
    /// Instructions executed before the present grant.
    insns: u64,
    /// Left of the present turn.
    turn: i64,
    /// Guest time of the source is `base_ns` plus what has been executed since `base_insns`.
    base_ns: u64,
    base_insns: u64,
    shift: u8,
}

impl Count {
    fn executed(&self) -> u64 {
        let now = self.running.as_ref().map_or(0, |r| {
            // SAFETY: see `Running`.
            r.granted - unsafe { r.left.as_ref() }.load(Ordering::Relaxed)
        });
        self.insns.wrapping_add(now.max(0) as u64)
    }
    fn ns(&self) -> u64 {
        self.base_ns + ((self.executed() - self.base_insns) << self.shift)
    }
    /// Sets time and scale from here on.
    fn rebase(&mut self, ns: u64, shift: u8) {
        (self.base_insns, self.base_ns, self.shift) = (self.executed(), ns, shift);
    }
}

/// The count of a machine whose vCPUs take turns.
pub struct Pace {
    clock: Arc<Clock>,
    icount: Option<Icount>,
    count: Mutex<Count>,
    /// Host time, and guest time of the source, when `auto` last looked.
    adjusted: Mutex<(Instant, u64)>,
    /// Nothing is executed until vCPUs have been paused.
    held: AtomicBool,
}

impl Pace {
    /// Turns, and guest time from the count if `icount`.
    pub fn new(clock: Arc<Clock>, icount: Option<Icount>) -> Arc<Pace> {
        let shift = icount.and_then(|i| i.shift).unwrap_or(3).min(MAX_SHIFT);
        let count = Count { running: None, insns: 0, turn: TURN, base_ns: 0, base_insns: 0, shift };
        let pace = Arc::new(Pace {
            clock: clock.clone(),
            icount,
            count: Mutex::new(count),
            adjusted: Mutex::new((Instant::now(), 0)),
            held: AtomicBool::new(false),
        });
        if icount.is_some() {
            clock.drive(Arc::new(Source(pace.clone())));
        }
        pace
    }

    /// Whether guest time is made from the count.
    pub fn makes_time(&self) -> bool {
        self.icount.is_some()
    }

    /// Instructions that all vCPUs have executed.
    pub fn executed(&self) -> u64 {
        self.count.lock().unwrap().executed()
    }

    /// Nothing is executed from the next block on, until [`Pace::release`].
    pub fn hold(&self) {
        self.held.store(true, Ordering::Release);
        if let Some(r) = &self.count.lock().unwrap().running {
            r.bell.request_exit();
        }
    }

    /// Whether nothing is to be executed.
    pub fn is_held(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }

    /// Ends [`Pace::hold`].
    pub fn release(&self) {
        self.held.store(false, Ordering::Release);
    }

    /// The vCPU of `bell` runs on, with `left` as its count: grants it what it may execute. `false`:
    /// nothing; its turn is over, or a timer is due.
    pub fn grant(&self, left: &AtomicI64, bell: &Arc<Doorbell>) -> bool {
        self.settle();
        if self.is_held() {
            return false;
        }
        let most = self.until_deadline();
        let mut c = self.count.lock().unwrap();
        let granted = c.turn.min(most);
        left.store(granted, Ordering::Relaxed);
        if granted > 0 {
            c.running = Some(Running { left: NonNull::from(left), granted, bell: bell.clone() });
        }
        granted > 0
    }

    /// Instructions until the next timer.
    fn until_deadline(&self) -> i64 {
        if self.icount.is_none() || self.clock.is_paused() {
            return MOST;
        }
        let Some(deadline) = self.clock.next_deadline() else { return MOST };
        let ns = deadline.saturating_sub(self.clock.now());
        let shift = self.count.lock().unwrap().shift;
        (ns.div_ceil(1 << shift)).min(MOST as u64) as i64
    }

    /// The vCPU does not run: adds up what it has executed.
    pub fn settle(&self) {
        let mut c = self.count.lock().unwrap();
        let executed = c.executed();
        c.turn -= executed.wrapping_sub(c.insns) as i64;
        c.insns = executed;
        c.running = None;
    }

    /// Whether the turn is over; the next one begins then.
    pub fn end_turn(&self, now: bool) -> bool {
        let mut c = self.count.lock().unwrap();
        let over = now || c.turn <= 0;
        if over {
            c.turn = TURN;
        }
        over
    }

    /// Fires the timers that are due, if time is made here.
    pub fn run_timers(&self) {
        if self.icount.is_none() {
            return;
        }
        self.clock.run_expired();
        self.adjust();
    }

    /// All vCPUs are idle, and `idle_since` is when that began: waits on this thread, which may be
    /// unparked, for the next timer, and lets guest time pass until then. Returns whether it has.
    pub fn idle(&self, idle_since: Instant) -> bool {
        let next = self.clock.next_deadline().filter(|_| !self.clock.is_paused());
        let (Some(icount), Some(next)) = (self.icount, next) else {
            std::thread::park();
            return false;
        };
        let wait = next.saturating_sub(self.clock.now());
        let waited = idle_since.elapsed();
        match Duration::from_nanos(wait).checked_sub(waited) {
            Some(rest) if icount.sleep && !rest.is_zero() => {
                std::thread::park_timeout(rest);
                false
            }
            _ => {
                self.pass(wait);
                true
            }
        }
    }

    /// The idle time that began at `idle_since` has ended before a timer was due.
    pub fn wake(&self, idle_since: Instant) {
        let Some(icount) = self.icount else { return };
        let next = self.clock.next_deadline().filter(|_| !self.clock.is_paused());
        let most = next.map_or(u64::MAX, |n| n.saturating_sub(self.clock.now()));
        if icount.sleep && !self.clock.is_paused() {
            self.pass(most.min(idle_since.elapsed().as_nanos() as u64));
        }
    }

    fn pass(&self, ns: u64) {
        let mut c = self.count.lock().unwrap();
        let (then, shift) = (c.ns().saturating_add(ns), c.shift);
        c.rebase(then, shift);
    }

    /// Brings the pace of guest time nearer to that of host time.
    fn adjust(&self) {
        if self.icount.is_none_or(|i| i.shift.is_some()) {
            return;
        }
        let mut adjusted = self.adjusted.lock().unwrap();
        let mut c = self.count.lock().unwrap();
        let guest = c.ns().wrapping_sub(adjusted.1);
        if guest < ADJUST_NS {
            return;
        }
        let host = adjusted.0.elapsed().as_nanos() as u64;
        let shift = match () {
            () if guest > host + host / 2 => c.shift.saturating_sub(1),
            () if host > guest + guest / 2 => (c.shift + 1).min(MAX_SHIFT),
            () => c.shift,
        };
        let ns = c.ns();
        c.rebase(ns, shift);
        *adjusted = (Instant::now(), ns);
    }
}

/// The count as the clock's source.
struct Source(Arc<Pace>);

impl TimeSource for Source {
    fn now(&self) -> u64 {
        self.0.count.lock().unwrap().ns()
    }
    fn deadline_changed(&self) {
        // The running vCPU comes back for a new grant at its next block.
        if let Some(r) = &self.0.count.lock().unwrap().running {
            r.bell.request_exit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tandem_accel::vcpu::VcpuControl;

    fn fixture(icount: Option<Icount>) -> (Arc<Clock>, Arc<Pace>, Arc<Doorbell>, AtomicI64) {
        let clock = Clock::new();
        let pace = Pace::new(clock.clone(), icount);
        clock.resume();
        let bell = Doorbell::new(0, VcpuControl::new(), &clock);
        (clock, pace, bell, AtomicI64::new(0))
    }

    #[test]
    fn time_is_what_has_been_executed() {
        let fixed = Icount { shift: Some(2), sleep: false };
        let (clock, pace, bell, left) = fixture(Some(fixed));
        assert!(pace.grant(&left, &bell));
        assert_eq!(left.load(Ordering::Relaxed), TURN);
        left.fetch_sub(1000, Ordering::Relaxed);
        assert_eq!(clock.now(), 4000);
        pace.settle();
        assert_eq!((clock.now(), pace.executed()), (4000, 1000));
        // A timer cuts the next grant, to the first instruction at or after it.
        let t = clock.timer(|| ());
        t.arm(4401);
        assert!(pace.grant(&left, &bell));
        assert_eq!(left.load(Ordering::Relaxed), 101);
        left.store(0, Ordering::Relaxed);
        assert!(!pace.grant(&left, &bell));
        assert!(!pace.end_turn(false), "the timer comes first");
        pace.run_timers();
        assert!(pace.grant(&left, &bell));
        assert_eq!(left.load(Ordering::Relaxed), TURN - 1101);
        left.store(0, Ordering::Relaxed);
        assert!(!pace.grant(&left, &bell));
        assert!(pace.end_turn(false));
        // Idle time passes at once.
        t.arm(1_000_000_000);
        pace.idle(Instant::now());
        assert_eq!(clock.now(), 1_000_000_000);
    }

    #[test]
    fn turns_do_without_time() {
        let (clock, pace, bell, left) = fixture(None);
        clock.timer(|| ()).arm(0);
        assert!(pace.grant(&left, &bell));
        assert_eq!(left.load(Ordering::Relaxed), TURN);
        assert!(pace.end_turn(true));
    }
}
