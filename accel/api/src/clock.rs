//! The virtual clock and its timers.
//!
//! [`Clock`] counts nanoseconds of guest time: it runs while the VM runs and stands still while it
//! is paused. All guest-visible time (PIT, HPET, PM timer, RTC, LAPIC, TSC under translation)
//! derives from it.
//!
//! [`Timer`]s fire on whatever thread calls [`Clock::run_expired`] (the machine's main loop, or the
//! vCPU loop in deterministic mode). Callbacks run without the clock's lock, so they may arm timers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

/// Nanoseconds per second.
pub const NANOS_PER_SEC: u64 = 1_000_000_000;

type Callback = Arc<dyn Fn() + Send + Sync>;
type Waker = Box<dyn Fn() + Send + Sync>;
type Observer = Arc<dyn Fn(bool) + Send + Sync>;

struct Queue {
    /// (deadline, id) → callback.
    armed: BTreeMap<(u64, u64), Callback>,
    next_id: u64,
    waker: Option<Waker>,
}

#[derive(Clone, Copy)]
enum Run {
    /// Running: guest time = elapsed since `origin` + `offset`.
    Running { origin: Instant, offset: u64 },
    /// Standing still at this time.
    Paused(u64),
}

/// The virtual clock.
pub struct Clock {
    run: Mutex<Run>,
    queue: Mutex<Queue>,
    observers: Mutex<Vec<Observer>>,
}

impl Clock {
    /// A clock that stands still at 0.
    pub fn new() -> Arc<Clock> {
        Arc::new(Clock {
            run: Mutex::new(Run::Paused(0)),
            queue: Mutex::new(Queue { armed: BTreeMap::new(), next_id: 0, waker: None }),
            observers: Mutex::default(),
        })
    }

    /// Guest time in nanoseconds.
    pub fn now(&self) -> u64 {
        match *self.run.lock().unwrap() {
            Run::Running { origin, offset } => origin.elapsed().as_nanos() as u64 + offset,
            Run::Paused(t) => t,
        }
    }

    /// Lets time run (no effect if it does).
    pub fn resume(&self) {
        let was_paused = {
            let mut run = self.run.lock().unwrap();
            let paused = *run;
            if let Run::Paused(t) = paused {
                *run = Run::Running { origin: Instant::now(), offset: t };
            }
            matches!(paused, Run::Paused(_))
        };
        if was_paused {
            self.tell(true);
        }
        self.wake();
    }

    /// Stops time (no effect if it stands).
    pub fn pause(&self) {
        {
            let mut run = self.run.lock().unwrap();
            let Run::Running { origin, offset } = *run else { return };
            *run = Run::Paused(origin.elapsed().as_nanos() as u64 + offset);
        }
        self.tell(false);
    }

    /// Calls `f` whenever time starts (`true`) or stops (`false`) running, on the thread that does
    /// it, before [`Clock::resume`] or [`Clock::pause`] returns. For whoever keeps a clock of its
    /// own that must stand still too.
    pub fn observe(&self, f: impl Fn(bool) + Send + Sync + 'static) {
        self.observers.lock().unwrap().push(Arc::new(f));
    }

    fn tell(&self, running: bool) {
        let observers = self.observers.lock().unwrap().clone();
        for f in observers {
            f(running);
        }
    }

    /// Whether time stands still.
    pub fn is_paused(&self) -> bool {
        matches!(*self.run.lock().unwrap(), Run::Paused(_))
    }

    /// Sets guest time; for restoring a snapshot, while paused.
    pub fn set(&self, ns: u64) {
        let mut run = self.run.lock().unwrap();
        *run = match *run {
            Run::Running { .. } => Run::Running { origin: Instant::now(), offset: ns },
            Run::Paused(_) => Run::Paused(ns),
        };
    }

    /// Installs what is called when the earliest deadline may have changed (from any thread, so
    /// that a sleeping main loop recomputes its time-out).
    pub fn set_waker(&self, waker: impl Fn() + Send + Sync + 'static) {
        self.queue.lock().unwrap().waker = Some(Box::new(waker));
    }

    fn wake(&self) {
        if let Some(w) = &self.queue.lock().unwrap().waker {
            w();
        }
    }

    /// The earliest deadline of an armed timer, in guest time.
    pub fn next_deadline(&self) -> Option<u64> {
        self.queue.lock().unwrap().armed.keys().next().map(|k| k.0)
    }

    /// Nanoseconds of host time until the earliest deadline: `None` if no timer is armed or time
    /// stands still, 0 if it has passed.
    pub fn time_to_deadline(&self) -> Option<u64> {
        if self.is_paused() {
            return None;
        }
        Some(self.next_deadline()?.saturating_sub(self.now()))
    }

    /// Calls the callbacks of all timers whose deadline has passed, in deadline order.
    pub fn run_expired(&self) {
        if self.is_paused() {
            return;
        }
        let now = self.now();
        loop {
            let cb = {
                let mut q = self.queue.lock().unwrap();
                match q.armed.first_entry() {
                    Some(e) if e.key().0 <= now => e.remove(),
                    _ => return,
                }
            };
            cb();
        }
    }

    /// A disarmed timer that calls `f` when it fires.
    pub fn timer(self: &Arc<Self>, f: impl Fn() + Send + Sync + 'static) -> Timer {
        let mut q = self.queue.lock().unwrap();
        let id = q.next_id;
        q.next_id += 1;
        Timer { clock: Arc::downgrade(self), id, callback: Arc::new(f), deadline: Mutex::new(None) }
    }
}

/// A one-shot timer on a [`Clock`]; dropping it disarms it.
pub struct Timer {
    clock: Weak<Clock>,
    id: u64,
    callback: Callback,
    deadline: Mutex<Option<u64>>,
}

impl Timer {
    /// Arms the timer for guest time `deadline` (ns), replacing an earlier arming. A deadline in
    /// the past fires at once (from the timer thread, never from inside this call).
    pub fn arm(&self, deadline: u64) {
        let Some(clock) = self.clock.upgrade() else { return };
        let mut mine = self.deadline.lock().unwrap();
        let first = {
            let mut q = clock.queue.lock().unwrap();
            if let Some(old) = mine.replace(deadline) {
                q.armed.remove(&(old, self.id));
            }
            q.armed.insert((deadline, self.id), self.callback.clone());
            q.armed.keys().next() == Some(&(deadline, self.id))
        };
        drop(mine);
        if first {
            clock.wake();
        }
    }
    /// Disarms the timer. A callback that is already being called is not waited for.
    pub fn disarm(&self) {
        let Some(clock) = self.clock.upgrade() else { return };
        let mut mine = self.deadline.lock().unwrap();
        if let Some(old) = mine.take() {
            clock.queue.lock().unwrap().armed.remove(&(old, self.id));
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.disarm();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn paused_clock_fires_nothing_and_resumed_fires_in_order() {
        let c = Clock::new();
        let hits = Arc::new(Mutex::new(vec![]));
        let mk = |n: u32| {
            let h = hits.clone();
            c.timer(move || h.lock().unwrap().push(n))
        };
        let (a, b, d) = (mk(1), mk(2), mk(3));
        b.arm(20);
        a.arm(10);
        d.arm(5);
        d.disarm();
        c.run_expired();
        assert!(hits.lock().unwrap().is_empty());
        c.set(15);
        c.resume();
        std::thread::sleep(std::time::Duration::from_millis(1));
        c.run_expired();
        assert_eq!(*hits.lock().unwrap(), [1, 2]);
    }

    #[test]
    fn observers_hear_of_changes_only() {
        let c = Clock::new();
        let heard = Arc::new(Mutex::new(vec![]));
        let h = heard.clone();
        c.observe(move |on| h.lock().unwrap().push(on));
        c.pause();
        c.resume();
        c.resume();
        c.pause();
        assert_eq!(*heard.lock().unwrap(), [true, false]);
    }

    #[test]
    fn a_callback_may_rearm() {
        let c = Clock::new();
        let n = Arc::new(AtomicU32::new(0));
        let slot: Arc<Mutex<Option<Timer>>> = Arc::default();
        let (n2, s2, c2) = (n.clone(), slot.clone(), Arc::downgrade(&c));
        let t = c.timer(move || {
            n2.fetch_add(1, Ordering::Relaxed);
            let now = c2.upgrade().unwrap().now();
            s2.lock().unwrap().as_ref().unwrap().arm(now + NANOS_PER_SEC);
        });
        t.arm(0);
        *slot.lock().unwrap() = Some(t);
        c.resume();
        c.run_expired();
        assert_eq!(n.load(Ordering::Relaxed), 1);
        assert!(c.next_deadline().is_some());
    }
}
